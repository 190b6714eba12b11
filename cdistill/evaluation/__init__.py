"""Evaluation: what samples are measured by, what they are compared with, and how sure a figure is.

To read in this order: `settings`, `estimates` (a figure with its interval), `features`, `references`, `metrics` with
`frechet` and `pairs`, `evaluator`, `pipeline`, `records`, `comparison`. Nothing is imported here, so that sections and
records need no torch.
"""
