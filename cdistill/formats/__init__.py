"""Readers of other people's files; nothing in them is executed. README.md says what is read and what is refused.

Read `safe_pickle` first (with `pickle_values` and `pickle_stubs`, what it may build), then `torch_files` and
`edm_pickles`, which stand on it, `stored_zip` and `state_dicts`. `archives`, `images` and `npz` read data sets.
"""
