"""Writing that survives a crash: atomic, durable, clear about a full disk; and where files belong. Needs no torch."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from cdistill.errors import CdistillError, CorruptFileError, DiskFullError
from cdistill.storage.bounded import open_regular

Result = TypeVar("Result")

FULL = {28, 27, 122}  # ENOSPC, EFBIG, EDQUOT
_CHECKPOINT = re.compile(r"step-(\d{8}|[1-9]\d{8,11})")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically and durably; DiskFullError if it did not fit, and the old file is untouched."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_place(path: Path) -> None:
    """Raises CdistillError unless a file can be written at `path`; asked before the work whose result it is."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CdistillError(f"{path}: cannot be written ({error.strerror}); name another place with --out") from error


def copy_file(source: Path, target: Path) -> None:
    """Copies a file atomically and durably; errors as `write_text`."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


def list_checkpoints(parent: Path) -> list[Path]:
    """Returns the checkpoints in a folder, oldest first."""
    found = [path for path in parent.glob("step-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the number of finished steps that the folder of a checkpoint is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file; errors as `cdistill.storage.bounded.open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def asset_folder() -> Path:
    """Returns ``$CDISTILL_ASSETS``, or ``cdistill`` in the user's cache folder."""
    if chosen := os.environ.get("CDISTILL_ASSETS"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdistill"


def data_folder() -> Path:
    """Returns ``$CDISTILL_DATA``, or ``data`` in the asset folder: where registered data sources look for files."""
    return Path(os.environ.get("CDISTILL_DATA") or asset_folder() / "data")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; on success it is synced and replaces `path`, on failure it is removed."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with disk_full(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def read_steadily(path: Path, read: Callable[[], Result]) -> Result:
    """Returns what `read` makes of a file; again where the file was replaced while it read and so looked damaged.

    A reader that opens a path more than once (safetensors does) may see one file's header and the next one's numbers.
    """
    while True:
        before = _version(path)
        try:
            return read()
        except CorruptFileError:
            if _version(path) == before:
                raise


def _version(path: Path) -> tuple[int, int] | None:
    """Returns what differs between a file and the one that replaces it."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_mtime_ns


@contextmanager
def disk_full(path: Path) -> Iterator[None]:
    """Turns "no space left" of the system, however it is reported, into a DiskFullError.

    Any other error of the system that safetensors reports in words becomes a CdistillError; an OSError stays one.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _full(path) from error
        raise
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        if int(number[1]) in FULL:
            raise _full(path) from error
        raise CdistillError(
            f"{path}: cannot be written ({os.strerror(int(number[1]))}); choose another place"
        ) from error


def _full(path: Path) -> DiskFullError:
    return DiskFullError(f"{path}: not written, the disk (or quota) is full; free some room and resume")


def sync(path: Path) -> None:
    """Makes a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
