"""Images in NumPy archives: what is read, and that damaged or hostile ones are refused."""

import struct

import numpy as np
import pytest

from cdistill.data import load_source
from cdistill.errors import CorruptFileError
from tests.archives import write_zip
from tests.data.stores import IMAGES, write_npz

ONE = np.zeros((4, 8, 8, 3), np.uint8)
BAD_ARRAYS = {
    "float32; images must be uint8": {"images": ONE.astype(np.float32)},
    "Python objects": {"images": np.array([{}, []], dtype=object)},
    "shape (4, 8, 8);": {"images": ONE[..., 0]},
    "shape (4, 8, 8, 4)": {"images": np.zeros((4, 8, 8, 4), np.uint8)},
    "shape (4, 3, 8, 3)": {"images": np.zeros((4, 3, 8, 3), np.uint8)},
    "shape (0, 8, 8, 3)": {"images": ONE[:0]},
    "needs an array 'images'": {"pictures": ONE},
    "shape (3,); 4 images": {"images": ONE, "labels": np.arange(3)},
    "float64; classes": {"images": ONE, "labels": np.zeros(4)},
    "bool; classes": {"images": ONE, "labels": np.zeros(4, bool)},
    "label -1;": {"images": ONE, "labels": np.array([0, -1, 1, 2])},
    "label 18446744073709551615;": {"images": ONE, "labels": np.array([0, 2**64 - 1, 1, 2], np.uint64)},
    "objects, which is never": {"images": ONE, "labels": np.array([1, 2, 3, None])},
    "Fortran": {"images": np.asfortranarray(ONE)},
}


@pytest.mark.parametrize("words", list(BAD_ARRAYS))
def test_arrays_that_are_no_images_or_labels_are_refused(tmp_path, words):
    with pytest.raises(CorruptFileError) as caught:
        load_source(str(write_npz(tmp_path / "x.npz", **BAD_ARRAYS[words])))
    assert words in str(caught.value)
    assert str(tmp_path / "x.npz") in str(caught.value)


def array_file(text: str, version: int = 1) -> bytes:
    """A header of NumPy's format."""
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode()


HEADER = '{"descr": "|u1", "fortran_order": False, "shape": (1, 3, 32, 32)}'
BAD_HEADERS = {
    "a header of 20,065 bytes; at most 10,000": array_file(HEADER + " " * 20_000),
    "a header of 1,000,065 bytes; at most 10,000": array_file(HEADER + " " * 1_000_000, 2),
    "a header that cannot be understood": array_file("(" * 3000 + ")" * 3000),
    "a header that cannot be understood;": array_file("{}"),
    "a header that cannot be understood; ": array_file(HEADER)[:-3],
    "not version 1 or 2": b"\x93NUMPY\3\0",
    "not version 1 or 2 ": b"",
    "shape (-1, 3, -32, 32)": array_file(HEADER.replace("1,", "-1,").replace(", 32,", ", -32,")) + bytes(3072),
}


@pytest.mark.parametrize("words", list(BAD_HEADERS))
def test_headers_of_arrays_are_read_with_care(tmp_path, words):
    for version in (1, 2):
        path = write_zip(tmp_path / "good.npz", {"images.npy": array_file(HEADER, version) + bytes(3072)})
        assert load_source(str(path)).shape == (3, 32, 32)
    path = write_zip(tmp_path / "x.npz", {"images.npy": BAD_HEADERS[words]})
    with pytest.raises(CorruptFileError) as caught:
        load_source(str(path))
    assert str(caught.value).startswith(f"{path}: images: {words.strip()}")
    assert "\n" not in str(caught.value)
    assert "pickle" not in str(caught.value)


def test_damaged_npz_files_are_refused(tmp_path):
    path = write_npz(tmp_path / "x.npz", images=IMAGES)
    data = path.read_bytes()
    for damaged in (data[:500], b"hello", data[:900] + bytes([data[900] ^ 1]) + data[901:]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"x\.npz: not a valid"):
            load_source(str(path))
