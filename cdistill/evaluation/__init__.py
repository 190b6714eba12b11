"""Evaluation: metrics of samples against a reference and against the teacher, and the table of results."""
