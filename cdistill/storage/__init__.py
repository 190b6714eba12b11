"""Files of our own: atomic writes, checkpoints, checksums, run folders, downloads."""
