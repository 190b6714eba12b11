"""Zip archives and folders of images: what is in them, and bounded reading of one member. Nothing is extracted."""

import hashlib
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.formats.images import SUFFIXES, Pixels, decode

MOST_BYTES = 64 * 2**20  # of one image
_LABELS = "dataset.json"
_UNREAD = (".gif", ".tif", ".tiff", ".npy")  # pictures that are not read: better refused than left out unseen
_ENCRYPTED = 1
_METHODS = {zipfile.ZIP_STORED: False, zipfile.ZIP_DEFLATED: True}

Job = list[Any]
"""How to read one image, as JSON: its name, then what `read_jobs` needs; a decoding process knows nothing else."""


class Images(ABC):
    """Images in one file or folder, sorted by name.

    Hidden files, and files that are no pictures, are left out.

    Attributes:
        path: The archive or folder.
        names: Names of the images inside it, with "/" between folders.
    """

    path: Path
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def jobs(self, indices: Sequence[int]) -> list[Job]:
        """Returns how to read the images at `indices`."""

    def most_label_bytes(self) -> int:
        """Returns how large ``dataset.json`` may be: a name, a class and some air for every image.

        JSON may write what is not ASCII as twelve bytes.
        """
        return 4096 + sum((1 if name.isascii() else 12) * len(name) + 64 for name in self.names)

    @abstractmethod
    def label_file(self) -> bytes | None:
        """Returns the content of ``dataset.json``, or None."""

    @abstractmethod
    def digest(self, tell: Callable[[], None]) -> str:
        """Returns a SHA-256 that changes with every image, name and label.

        Args:
            tell: Called after every file that had to be read.
        """


class ZipImages(Images):
    """Images in a zip archive, stored or deflated.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: No zip archive, without images, or with members that cannot be read safely.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.filename)
        except OSError as error:
            raise _missing(path, error) from error
        except Exception as error:  # zipfile raises several kinds on damaged directories
            raise CorruptFileError(f"{path}: not a sound zip archive ({error}); make or fetch it again") from error
        self._labels = next((_zip_job(path, member) for member in members if member.filename == _LABELS), None)
        pictures = [member for member in members if not member.is_dir() and is_picture(path, member.filename)]
        self.names = [member.filename for member in pictures]
        _check_names(path, self.names)
        # Numbers in an array: ImageNet has a million members.
        self._table = np.array([_zip_job(path, member)[1:] for member in pictures], dtype=np.int64)

    def jobs(self, indices: Sequence[int]) -> list[Job]:
        """See :class:`Images`."""
        return [[self.names[k], *self._table[k].tolist()] for k in indices]

    def label_file(self) -> bytes | None:
        """See :class:`Images`."""
        if self._labels is None:
            return None
        return next(_read_zip(self.path, [self._labels], self.most_label_bytes()))

    def digest(self, tell: Callable[[], None]) -> str:
        """SHA-256 of names, sizes and CRC-32s, and of the labels."""
        found = hashlib.sha256(b"zip")
        for name, (_, _, size, crc, _) in zip(self.names, self._table.tolist(), strict=True):
            found.update(f"{name}\0{size}\0{crc}\0".encode())
        found.update(self.label_file() or b"")
        return found.hexdigest()


class FolderImages(Images):
    """Images in a folder and its sub-folders; errors as `ZipImages`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise MissingAssetError(f"{path}: no such folder; check the path")
        self.names = sorted(name for name in _walk(path) if is_picture(path, name))
        _check_names(path, self.names)

    def jobs(self, indices: Sequence[int]) -> list[Job]:
        """See :class:`Images`."""
        return [[self.names[k]] for k in indices]

    def label_file(self) -> bytes | None:
        """See :class:`Images`."""
        file = self.path / _LABELS
        return _read_file(file, self.most_label_bytes()) if file.is_file() else None

    def digest(self, tell: Callable[[], None]) -> str:
        """SHA-256 of names and contents, and of the labels."""
        found = hashlib.sha256(b"folder")
        for name in self.names:
            content = _read_file(self.path / name, MOST_BYTES)
            found.update(f"{name}\0{len(content)}\0".encode() + content)
            tell()
        found.update(self.label_file() or b"")
        return found.hexdigest()


def decode_jobs(path: Path, jobs: Sequence[Job], shape: tuple[int, ...] | None) -> list[Pixels]:
    """Reads and decodes images of an archive or folder.

    Args:
        path: The archive or folder.
        jobs: See :meth:`Images.jobs`.
        shape: (C, H, W) that all must have, see `decode`.

    Raises:
        CorruptFileError: An image is damaged or changed; the message names it.
    """
    contents = _read_folder(path, jobs) if path.is_dir() else _read_zip(path, jobs, MOST_BYTES)
    return [decode(content, f"{path}: {job[0]}", shape) for job, content in zip(jobs, contents, strict=True)]


def is_picture(path: Path, name: str) -> bool:
    """Whether a member is an image to read, judging by its name.

    Raises:
        CorruptFileError: It is one that cannot be read, or labels where nobody looks for them.
    """
    folder, _, last = name.rpartition("/")
    if any(part == "__MACOSX" or (part[:1] == "." and part not in (".", "..")) for part in name.split("/")):
        return False
    if last == _LABELS and folder:
        raise CorruptFileError(f"{path}: {name!r}: labels must lie beside the folders, at the top; move everything up")
    suffix = os.path.splitext(last)[1].lower()
    if suffix in _UNREAD:
        raise CorruptFileError(f"{path}: {name}: {suffix} is not read; allowed: {', '.join(SUFFIXES)}; convert it")
    if suffix in SUFFIXES and not name.isprintable():
        raise CorruptFileError(f"{path}: {name!a}: characters that cannot be printed; rename it")
    return suffix in SUFFIXES


def _zip_job(path: Path, member: zipfile.ZipInfo) -> Job:
    """Returns name, offset, stored size, size, CRC-32 and whether it is deflated."""
    if member.flag_bits & _ENCRYPTED:
        raise CorruptFileError(f"{path}: {member.filename}: encrypted; make the archive without a password")
    if member.compress_type not in _METHODS:
        raise CorruptFileError(f"{path}: {member.filename}: compressed in a way that is not read; store or deflate it")
    if member.header_offset < 0 or max(member.header_offset, member.compress_size, member.file_size) >= 2**62:
        raise CorruptFileError(f"{path}: {member.filename}: an impossible size or place; make or fetch the file again")
    deflated = _METHODS[member.compress_type]
    return [member.filename, member.header_offset, member.compress_size, member.file_size, member.CRC, int(deflated)]


def _read_zip(path: Path, jobs: Sequence[Job], most: int) -> Iterator[bytes]:
    """Reads members; what the directory says about a member is a bound that its content must meet exactly."""
    try:
        with path.open("rb") as file:
            for name, offset, stored, size, crc, deflated in jobs:
                if max(stored, size) > most:
                    raise CorruptFileError(f"{path}: {name}: {size:,} bytes; at most {most:,} are read; remove it")
                file.seek(offset)
                header = file.read(30)
                if len(header) == 30 and header[:4] == b"PK\3\4":
                    file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
                data = file.read(stored)
                content = _inflate(data, size) if deflated else data
                if len(content) != size or zlib.crc32(content) != crc:
                    raise CorruptFileError(f"{path}: {name}: its content is not what was packed; fetch the file again")
                yield content
    except OSError as error:
        raise _missing(path, error) from error


def _inflate(data: bytes, size: int) -> bytes:
    """Inflates to at most `size` bytes, and one more if there are more; nothing if the stream is damaged."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error:
        return b""


def _walk(path: Path) -> Iterator[str]:
    """Yields the names of all files below a folder, with "/" between folders."""

    def refuse(error: OSError) -> None:
        raise _missing(Path(error.filename), error)

    for folder, below, files in os.walk(path, onerror=refuse):
        inside = Path(folder).relative_to(path).as_posix()
        for name in below:
            if (Path(folder) / name).is_symlink():
                raise CorruptFileError(
                    f"{Path(folder) / name}: a link to a folder is not followed; move the folder here"
                )
        yield from (name if inside == "." else f"{inside}/{name}" for name in files)


def _read_folder(path: Path, jobs: Sequence[Job]) -> Iterator[bytes]:
    for (name,) in jobs:
        yield _read_file(path / name, MOST_BYTES)


def _read_file(path: Path, most: int) -> bytes:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("no such file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise _missing(path, error) from error
    if len(content) > most:
        raise CorruptFileError(f"{path}: more than {most:,} bytes, too large; remove it")
    return content


def _missing(path: Path, error: OSError) -> MissingAssetError:
    return MissingAssetError(f"{path}: cannot be read ({error.strerror or error}); check the path")


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raises CorruptFileError unless there are names, each once."""
    if not names:
        raise CorruptFileError(f"{path}: no images in it; allowed: {', '.join(SUFFIXES)}")
    for first, second in pairwise(names):
        if first == second:
            raise CorruptFileError(f"{path}: {first}: stored twice; pack the images again")
