"""Tar archives as plain as CIFAR-10's own: ustar headers of files and folders, walked by ourselves.

Python's reader follows long names, sparse maps and pax headers of any length and in any depth; none is needed here.
"""

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from cdistill.errors import CorruptFileError, MissingAssetError

_BLOCK = 512
_MOST_BYTES = 64 * 2**20  # of one member; CIFAR-10's have 30 MB
_MOST_TOTAL = 2**29  # of everything that comes out of the file; CIFAR-10's has 180 MB
_MOST_MEMBERS = 1000
_MOST_PAX = 2**16
_FILES, _FOLDERS, _PAX = (b"0", b"\0"), (b"5",), (b"x", b"g")


class _Bounded:
    """Reads from a stream, and counts what came out of it."""

    def __init__(self, stream: gzip.GzipFile | BufferedReader) -> None:
        self._stream, self._left = stream, _MOST_TOTAL

    def read(self, size: int) -> bytes:
        """Returns `size` bytes, or what is left; raises CorruptFileError beyond the bound."""
        content = self._stream.read(min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise CorruptFileError(f"more than {_MOST_TOTAL:,} bytes, no CIFAR-10")
        return content

    def exactly(self, size: int) -> bytes:
        """Returns `size` bytes; raises EOFError if there are fewer."""
        content = self.read(size)
        if len(content) != size:
            raise EOFError("it ends too early")
        return content

    def skip(self, size: int) -> None:
        """Passes over `size` bytes."""
        for start in range(0, size, _MOST_PAX):
            self.exactly(min(_MOST_PAX, size - start))


def read_tar(path: Path, wanted: set[str]) -> dict[str, bytes]:
    """Reads the members called as in `wanted`, in whatever folder, from a .tar or .tar.gz; nothing is extracted.

    Pax headers are passed over: what they could say of such members is what we do not need.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: Damaged, larger than CIFAR-10, with entries of another kind, or with two of one name.
    """
    found: dict[str, bytes] = {}
    try:
        with _opened(path) as stream:
            for name, content in _members(_Bounded(stream), wanted):
                if any(name.removesuffix(".bin") == other.removesuffix(".bin") for other in found):
                    raise CorruptFileError(f"{name} is in it twice")
                found[name] = content
    except FileNotFoundError as error:
        raise MissingAssetError(f"{path}: no such file; check the path") from error
    except (CorruptFileError, EOFError, zlib.error, OSError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a sound tar archive ({error}); fetch it again") from error
    return found


def _members(stream: _Bounded, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yields names and contents of the wanted members, and reads to the end, where gzip compares the CRC-32."""
    for _ in range(_MOST_MEMBERS):
        header = stream.exactly(_BLOCK)
        if not any(header):
            while stream.read(_MOST_PAX):
                pass
            return
        name, size, kind = _read_header(header)
        if kind in _FILES and name in wanted:
            if size > _MOST_BYTES:
                raise CorruptFileError(f"{name} has {size:,} bytes; at most {_MOST_BYTES:,} are read")
            yield name, stream.exactly(size)
            stream.skip(-size % _BLOCK)
        else:
            stream.skip(size + -size % _BLOCK)
    raise CorruptFileError(f"more than {_MOST_MEMBERS:,} entries, no CIFAR-10")


def _read_header(header: bytes) -> tuple[str, int, bytes]:
    """Returns a member's name without its folders, its size and its kind."""
    if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise CorruptFileError("a header with a wrong checksum")
    name, size, kind = header[:100].split(b"\0")[0].split(b"/")[-1], _octal(header[124:136]), header[156:157]
    if kind not in (*_FILES, *_FOLDERS, *_PAX) or (kind in _PAX and size > _MOST_PAX):
        raise CorruptFileError(f"an entry of kind {kind.decode('latin-1')!a}, {size:,} bytes; only files, folders")
    return name.decode("latin-1"), size, kind


def _octal(field: bytes) -> int:
    text = field.strip(b" \0")
    if not text.isdigit():
        raise CorruptFileError("a header with a number that is none")
    return int(text, 8)


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    """Opens a file that may be compressed."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")
