"""The members of a zip archive that stores them uncompressed: the container of torch's files.

Not zipfile: that builds an object for every entry of the directory before one can count them, and copies members,
while a tensor here is copied straight from the file.
"""

import re
import struct
import zlib

from cdistill.errors import CorruptFileError
from cdistill.formats.pickle_values import Budget, shown

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_MOST_MEMBERS = 100_000
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


Entry = tuple[int, int, int, int, int, int]
"""(flags, method, CRC-32, packed size, size, place of the local header) of a member."""


class StoredZip:
    """A zip archive in memory; members are found by name, verified at their first use, and never written anywhere.

    `budget` pays for the checksums. Raises CorruptFileError if `data` is damaged or no such archive.
    """

    def __init__(self, data: memoryview, budget: Budget) -> None:
        self.data = data
        self.budget = budget
        self._entries = _directory(data)
        self.names = list(self._entries)
        self._opened: dict[str, memoryview] = {}

    def open(self, name: str) -> memoryview:
        """Returns the content of a member; raises CorruptFileError if it is missing, compressed or altered."""
        if name not in self._opened:
            if name not in self._entries:
                raise CorruptFileError(f"the archive has no member {shown(name)}")
            self._opened[name] = self._verified(name)
        return self._opened[name]

    def _verified(self, name: str) -> memoryview:
        flags, method, checksum, packed, size, place = self._entries[name]
        if method != 0 or packed != size or flags & 1:
            raise CorruptFileError(f"the member {shown(name)} is compressed or encrypted, not stored")
        start = place + _LOCAL.size + sum(_unpack(_LOCAL, self.data, place, b"PK\3\4")[-2:])
        if start + size > len(self.data):
            raise CorruptFileError(f"the member {shown(name)} reaches beyond the end: truncated")
        content = self.data[start : start + size]
        self.budget.spend(work=size)
        if zlib.crc32(content) != checksum:
            raise CorruptFileError(f"the checksum of {shown(name)} does not match: altered")
        return content


def _unpack(layout: struct.Struct, data: memoryview, place: int, magic: bytes) -> tuple[int, ...]:
    if place < 0 or place + layout.size > len(data) or bytes(data[place : place + 4]) != magic:
        raise CorruptFileError("the archive has no valid directory: damaged or truncated")
    return layout.unpack_from(data, place)


def _directory(data: memoryview) -> dict[str, Entry]:
    count, place = _find_directory(data)
    if count > _MOST_MEMBERS or count * _ENTRY.size > len(data):
        raise CorruptFileError(f"an archive of {count} members")
    entries: dict[str, Entry] = {}
    for _ in range(count):
        name, entry, place = _read_entry(data, place)
        if name in entries:
            raise CorruptFileError(f"the archive has two members {shown(name)}")
        entries[name] = entry
    return entries


def _find_directory(data: memoryview) -> tuple[int, int]:
    """Returns the number of members and where their directory begins."""
    tail = max(0, len(data) - _FULL16 - _END.size)
    end = tail + bytes(data[tail:]).rfind(b"PK\5\6")
    if end < tail:
        raise CorruptFileError("the archive has no directory: truncated")
    _, _, _, _, count, _, place, _ = _unpack(_END, data, end, b"PK\5\6")
    if count == _FULL16 or place == _FULL32:
        _, _, far, _ = _unpack(_LOCATOR, data, end - _LOCATOR.size, b"PK\6\7")
        _, _, _, _, _, _, _, count, _, place = _unpack(_END64, data, far, b"PK\6\6")
    return count, place


def _read_entry(data: memoryview, place: int) -> tuple[str, Entry, int]:
    """Returns a member's name, what the directory says about it, and where the next entry begins."""
    fields = _unpack(_ENTRY, data, place, b"PK\1\2")
    flags, method, _, _, checksum, packed, size, name_length, extra_length, comment_length = fields[3:13]
    start = place + _ENTRY.size
    extra = bytes(data[start + name_length : start + name_length + extra_length])
    size, packed, local = _wide(extra, [size, packed, fields[-1]])
    name = re.sub(r"[^ -~]", "?", bytes(data[start : start + name_length]).decode("latin-1"))
    return name, (flags, method, checksum, packed, size, local), start + name_length + extra_length + comment_length


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Replaces full 32-bit values by the 64-bit ones of the extra field."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind == 1:
            field = extra[place + 4 : place + 4 + length]
            wide = (int.from_bytes(field[at : at + 8], "little") for at in range(0, len(field) - 7, 8))
            return [next(wide, value) if value == _FULL32 else value for value in values]
        place += 4 + length
    return values
