"""Zip archives and folders of images: what is in them, and bounded reading of one member. Nothing is extracted."""

import hashlib
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
from typing_extensions import override

from cdistill.errors import CorruptFileError, MismatchError, MissingAssetError
from cdistill.formats.images import LOSSY, SUFFIXES, Pixels, decode
from cdistill.runtime.console import say

MOST_BYTES = 64 * 2**20  # of one image
_LABELS = "dataset.json"
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "heldout", "eval"}
_ENCRYPTED = 1
_METHODS = {zipfile.ZIP_STORED: False, zipfile.ZIP_DEFLATED: True}


class Images(ABC):
    """Images in one file or folder `path`, by their sorted `names`, with "/" between folders.

    Hidden files are left out, and so are files that are no pictures or of a kind that is not read, which a line counts.
    """

    path: Path
    names: list[str]

    @property
    def lossy(self) -> bool:
        """Whether some images are of a kind that is as a rule compressed with losses."""
        return any(SUFFIXES[suffix_of(name)] in LOSSY for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Generator[bytes]:
        """Yields the files of the images at `indices`."""

    def decode(self, indices: Sequence[int], shape: tuple[int, ...] | None = None) -> list[Pixels]:
        """Decodes images, of the `shape` (C, H, W) if it is given; errors as `cdistill.formats.images.decode`."""
        with closing(self.read(indices)) as files:  # at once, also after an error: it may hold an open file
            where = [f"{self.path}: {self.names[k]}" for k in indices]
            return [decode(content, name, shape) for content, name in zip(files, where, strict=True)]

    def most_label_bytes(self) -> int:
        """How large ``dataset.json`` may be: for every image its name, at most 12 bytes a sign, a class and spaces."""
        return 4096 + sum((1 if name.isascii() else 12) * len(name) + 64 for name in self.names)

    @abstractmethod
    def label_file(self) -> bytes | None:
        """Returns the content of ``dataset.json``, or None."""

    @abstractmethod
    def digest(self, advance: Callable[[], None]) -> str:
        """Returns a SHA-256 that changes with every image, name and label; `advance` is called after each file read."""


class ZipImages(Images):
    """Images in a zip archive, stored or deflated.

    MissingAssetError: There is no such file; CorruptFileError: no images, or members that cannot be read safely.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.filename)
        except OSError as error:
            raise _missing(path, error) from error
        except Exception as error:  # zipfile raises several kinds on damaged directories
            raise CorruptFileError(f"{path}: not a valid zip archive ({error}); make or fetch it again") from error
        self._labels = next((_locate(path, member) for member in members if member.filename == _LABELS), None)
        files = [member for member in members if not member.filename.endswith("/")]
        pictures = [member for member in files if is_picture(path, member.filename)]
        self.names = [member.filename for member in pictures]
        _check_names(path, self.names, [member.filename for member in files])
        # Numbers in an array: ImageNet has a million members.
        self._places = np.array([_locate(path, member) for member in pictures], dtype=np.int64)

    @override
    def read(self, indices: Sequence[int]) -> Generator[bytes]:
        places = zip([self.names[k] for k in indices], self._places[list(indices)].tolist(), strict=True)
        return _read_members(self.path, places, MOST_BYTES)

    @override
    def label_file(self) -> bytes | None:
        if self._labels is None:
            return None
        with closing(_read_members(self.path, [(_LABELS, self._labels)], self.most_label_bytes())) as files:
            return next(files)

    @override
    def digest(self, advance: Callable[[], None]) -> str:
        """SHA-256 of names, sizes and CRC-32s, and of the labels."""
        digest = hashlib.sha256(b"zip")
        for name, (_, _, size, crc, _) in zip(self.names, self._places.tolist(), strict=True):
            digest.update(f"{name}\0{size}\0{crc}\0".encode())
        digest.update(self.label_file() or b"")
        return digest.hexdigest()


class FolderImages(Images):
    """Images in a folder and its sub-folders; errors as `ZipImages`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise MissingAssetError(f"{path}: no such folder; check the path")
        files = list(_walk(path))
        self.names = sorted(name for name in files if is_picture(path, name))
        _check_names(path, self.names, files)

    @override
    def read(self, indices: Sequence[int]) -> Generator[bytes]:
        return (_read_file(self.path / self.names[k], MOST_BYTES) for k in indices)

    @override
    def label_file(self) -> bytes | None:
        file = self.path / _LABELS
        return _read_file(file, self.most_label_bytes()) if file.is_file() else None

    @override
    def digest(self, advance: Callable[[], None]) -> str:
        """SHA-256 of names and contents, and of the labels."""
        digest = hashlib.sha256(b"folder")
        for name in self.names:
            content = _read_file(self.path / name, MOST_BYTES)
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            advance()
        digest.update(self.label_file() or b"")
        return digest.hexdigest()


def is_picture(path: Path, name: str) -> bool:
    """Whether a member is an image to read, by its name; CorruptFileError for labels that would not be read."""
    folder, _, last = name.rpartition("/")
    if _is_hidden(name):
        return False
    if last == _LABELS and folder:
        raise CorruptFileError(f"{path}: {name!r}: labels must lie beside the folders, at the top; move everything up")
    suffix = suffix_of(name)
    if suffix in SUFFIXES and not name.isprintable():
        raise CorruptFileError(f"{path}: {name!a}: characters that cannot be printed; rename it")
    return suffix in SUFFIXES


def suffix_of(name: str) -> str:
    """Returns the end of a file's name from its last dot on, in small letters."""
    return os.path.splitext(name)[1].lower()


def _is_hidden(name: str) -> bool:
    return any(step == "__MACOSX" or (step[:1] == "." and step not in (".", "..")) for step in name.split("/"))


def _locate(path: Path, member: zipfile.ZipInfo) -> list[int]:
    """Returns offset, stored size, size, CRC-32 and whether it is deflated."""
    if member.flag_bits & _ENCRYPTED:
        raise CorruptFileError(f"{path}: {member.filename}: encrypted; make the archive without a password")
    if member.compress_type not in _METHODS:
        raise CorruptFileError(f"{path}: {member.filename}: compressed in a way that is not read; store or deflate it")
    if member.header_offset < 0 or max(member.header_offset, member.compress_size, member.file_size) >= 2**62:
        raise CorruptFileError(f"{path}: {member.filename}: an impossible size or place; make or fetch the file again")
    deflated = _METHODS[member.compress_type]
    return [member.header_offset, member.compress_size, member.file_size, member.CRC, int(deflated)]


def _read_members(path: Path, places: Iterable[tuple[str, list[int]]], most: int) -> Generator[bytes]:
    """Reads members; what the directory says about a member is a bound that its content must meet exactly."""
    try:
        with path.open("rb") as file:
            for name, (offset, stored, size, crc, deflated) in places:
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


def _check_names(path: Path, names: Sequence[str], files: Iterable[str]) -> None:
    """Checks the names of the images, and counts the other `files` in a line.

    Raises:
        CorruptFileError: There are none, or one is stored twice.
        MismatchError: Folders called train, test or the like divide them: which one is wanted must be said.
    """
    wanted = set(names)
    left_out = Counter(suffix_of(name) or "no suffix" for name in files if _is_left_out(name, wanted))
    unread = ", ".join(f"{count:,} {suffix if suffix.isprintable() else 'other'}" for suffix, count in left_out.items())
    if not names:
        found = f" (holds {unread})" if unread else ""
        raise CorruptFileError(f"{path}: no images in it{found}; allowed: {', '.join(SUFFIXES)}")
    if unread:
        say(f"{path}: {len(names):,} images; not read: {unread}")
    tops = {name.removeprefix("./").partition("/")[0] for name in names}
    if len(tops) > 1 and all(top.lower() in _SPLITS for top in tops):
        folders = " and ".join(sorted(tops))
        raise MismatchError(f"{path}: holds the folders {folders}: data and held-out data; give one of them, not both")
    for first, second in pairwise(names):
        if first == second:
            raise CorruptFileError(f"{path}: {first}: stored twice; pack the images again")


def _is_left_out(name: str, wanted: Collection[str]) -> bool:
    """Whether a file is neither an image to read, nor hidden, nor the labels."""
    return not (name in wanted or name == _LABELS or _is_hidden(name))
