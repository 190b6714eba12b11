"""Readers of other people's files: pickles of EDM, files of torch, plain state dicts. Nothing of theirs is executed."""
