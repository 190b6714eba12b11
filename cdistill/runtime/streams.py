"""Standard streams that no command depends on: what cannot be written is dropped, and the first error is kept."""

import codecs
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from typing_extensions import override

_PLAIN = {"±": "+-"}  # what is written where a terminal has no such sign
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # nobody reads, or nobody can


class SteadyStream(io.TextIOBase):
    """Passes on what is written to `stream` until that fails, because its reader has gone or its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def _try(self, work: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            work()
        except (OSError, ValueError) as error:  # a ValueError from a stream that is closed
            self.error = error if isinstance(error, OSError) else OSError(errno.EBADF, os.strerror(errno.EBADF))
            self._forget()

    def _forget(self) -> None:
        """Turns the place of the stream into one that takes everything: the interpreter flushes it once more."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            pass

    @override
    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    @override
    def flush(self) -> None:
        self._try(self.stream.flush)

    @override
    def isatty(self) -> bool:
        return self.error is None and self.stream.isatty()

    @override
    def fileno(self) -> int:
        return self.stream.fileno()

    @override
    def writable(self) -> bool:
        return True

    @property
    @override
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    @property
    def buffer(self) -> Any:
        """The stream of bytes below."""
        return self.stream.buffer


def install() -> None:
    """Puts such streams in the place of standard output and error; must run before anything is printed."""
    codecs.register_error("cdistill", _replace)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python began
            stream = open(os.devnull, "w")  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="cdistill")
        setattr(sys, name, SteadyStream(stream))


def output_error() -> OSError | None:
    """Returns why standard output could not be written, if it could not and somebody may have waited for it."""
    if not isinstance(sys.stdout, SteadyStream):
        return None
    sys.stdout.flush()
    error = sys.stdout.error
    return None if error is None or error.errno in _GONE else error


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Writes characters that a terminal lacks in others."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(sign, "?") for sign in error.object[error.start : error.end]), error.end
