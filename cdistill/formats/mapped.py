"""Files of others as read-only memory, and their errors with the path in front."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cdistill.errors import CorruptFileError, MissingAssetError


def map_file(path: Path) -> memoryview:
    """Returns the content of a file without reading it yet; the file must not be cut while it is used.

    Raises:
        MissingAssetError: There is no such file but nothing, a folder or a device; or it cannot be opened.
        CorruptFileError: It is empty.
    """
    if path.exists() and not path.is_file():
        raise MissingAssetError(
            f"{path}: no such file, but a {'folder' if path.is_dir() else 'device'}; give the path of a file"
        )
    if not path.is_file():
        raise MissingAssetError(f"{path}: no such file; put it there or give another path")
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CorruptFileError("the file is empty")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise MissingAssetError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path in front of a CorruptFileError and the advice behind it."""
    try:
        yield
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: {error}; nothing of it was run; fetch it again or use another file") from error
