"""NumPy's archives (.npz) of plain numbers and text; only the header of an array is left to NumPy's reader."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cdistill.errors import CdistillError, CorruptFileError, MissingAssetError, brief

_AT_ONCE = 2**24  # bytes
_MOST_HEADER = 10_000  # bytes; NumPy's own bound, which it looks at after reading


def read_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Reads the shape and type of an array; CorruptFileError if it holds Python objects or is in Fortran's order."""
    magic = file.read(8)
    if magic not in (npy.magic(1, 0), npy.magic(2, 0)):
        raise CorruptFileError(f"{where}: not version 1 or 2 of NumPy's format; save it again")
    wide = magic == npy.magic(2, 0)
    length = file.read(4 if wide else 2)
    if (size := int.from_bytes(length, "little")) > _MOST_HEADER:
        raise CorruptFileError(f"{where}: a header of {size:,} bytes; at most {_MOST_HEADER:,} are read; save it again")
    header = io.BytesIO(length + file.read(size))
    try:
        shape, fortran, dtype = npy.read_array_header_2_0(header) if wide else npy.read_array_header_1_0(header)
    except Exception as error:  # NumPy evaluates it as Python's syntax
        raise CorruptFileError(f"{where}: a header that cannot be understood; save it again") from error
    if dtype.hasobject:
        raise CorruptFileError(f"{where}: an array of Python objects, which is never read; save plain numbers")
    if fortran and len(shape) > 1:
        raise CorruptFileError(f"{where}: in Fortran's order; save numpy.ascontiguousarray of it")
    return shape, dtype


def read_array(archive: zipfile.ZipFile, name: str, where: str, most: int) -> NDArray[Any]:
    """Reads an array of at most `most` bytes from an open .npz, the file `where`; CorruptFileError if damaged."""
    where = f"{where}: {name}"
    with archive.open(f"{name}.npy") as file:
        shape, dtype = read_header(file, where)
        size = prod(shape) * dtype.itemsize
        if size > most:
            raise CorruptFileError(f"{where}: {size:,} bytes; at most {most:,} are read")
        if archive.getinfo(f"{name}.npy").file_size - file.tell() != size:
            raise CorruptFileError(f"{where}: shape {shape} of {dtype} needs {size:,} bytes; save it again")
        content = bytearray(size)
        with memoryview(content) as target:
            place = 0
            while place < size and (block := file.read(min(size - place, _AT_ONCE))):
                target[place : place + len(block)] = block
                place += len(block)
        if place < size or file.read(1):  # the end is where zipfile compares the CRC-32
            raise CorruptFileError(f"{where}: ends too early; save it again")
    return np.frombuffer(content, dtype).reshape(shape)


@contextmanager
def npz_errors(path: Path) -> Iterator[None]:
    """Turns whatever zipfile and NumPy raise on damaged files into an error that names the file."""
    try:
        yield
    except CdistillError:
        raise
    except FileNotFoundError as error:
        raise MissingAssetError(f"{path}: no such file; check the path") from error
    except Exception as error:
        raise CorruptFileError(f"{path}: not a valid .npz ({brief(error)}); save it again") from error
