"""Whose words a file holds: code, and paths outside of its folder, are believed only where cdistill wrote it here.

Digests of what was written lie in the asset folder, one empty file each, which may be removed: then a person names
again what a file may not. SECURITY.md has the rule.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cdistill.errors import printable
from cdistill.registry import is_code
from cdistill.storage.files import asset_folder, write_text


def write_own(path: Path, text: str) -> None:
    """Writes a text file and remembers it; errors as `write_text`."""
    write_text(path, text)
    with suppress(OSError):  # an asset folder that cannot be written: the person is asked later
        mark = _mark(text.encode())
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def is_own(content: bytes) -> bool:
    """Whether a file of this content was written here, for this person."""
    return _mark(content).is_file()


def objection(path: Path, content: bytes, stated: Mapping[str, str | None]) -> str | None:
    """Returns in one line what a file may not say, and the option that says it in its place; None if there is nothing.

    `stated` is option -> the code or the path that the file states, None where it states a known name, or nothing.
    """
    if is_own(content):
        return None
    for option, value in stated.items():
        if value is not None and is_code(value):
            what = "names code"
        elif value is not None and not is_near(path, value):
            what = "names a file outside of its folder"
        else:
            continue
        return (
            f"{path}: {what}, and was not written here; if you trust it, name it yourself: {option} {printable(value)}"
        )
    return None


def is_near(path: Path, named: str) -> bool:
    """Whether a path that the file `path` names lies in its folder, links followed."""
    return Path(named).expanduser().resolve().is_relative_to(path.parent.resolve())


def _mark(content: bytes) -> Path:
    return asset_folder() / "written" / hashlib.sha256(content).hexdigest()
