"""Our own files: atomic writes, checkpoints, checksums, run folders, downloads. README.md says what survives a crash.

Read `files` first, then `checkpoints` (with torch) and `integrity` (the same files without), `run_folder`, and `assets`
with `download`.
"""
