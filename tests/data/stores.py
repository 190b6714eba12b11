"""The same images and labels, stored in every way."""

import zipfile
from pathlib import Path

import numpy as np

from tests.archives import members, random_images, write_folder, write_zip

COUNT = 24
IMAGES = random_images(COUNT)
CLASSES = [k * 7 % 10 for k in range(COUNT)]
FILES = members(IMAGES, CLASSES)
KINDS = ("zip", "deflated", "folder", "nchw", "nhwc", "compressed")


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def write_store(folder: Path, kind: str) -> Path:
    """Stores IMAGES and CLASSES in one of KINDS, and returns the path."""
    if kind == "folder":
        return write_folder(folder / "folder", FILES)
    if kind in ("zip", "deflated"):
        return write_zip(folder / f"{kind}.zip", FILES, zipfile.ZIP_STORED if kind == "zip" else zipfile.ZIP_DEFLATED)
    path, channels_last = folder / f"{kind}.npz", IMAGES.transpose(0, 2, 3, 1).copy()
    if kind == "nhwc":
        return write_npz(path, arr_0=channels_last, arr_1=np.array(CLASSES, np.uint8))
    if kind == "nchw":
        return write_npz(path, images=IMAGES, labels=np.array(CLASSES))
    np.savez_compressed(path, samples=channels_last, labels=np.array(CLASSES))
    return path
