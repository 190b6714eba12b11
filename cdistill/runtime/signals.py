"""Stopping on a signal: handlers only set a flag, which the loops poll where they can save."""

import ctypes
import os
import signal
import sys
from types import FrameType

from cdistill.errors import StoppedError

EXIT_CODES: dict[int, int] = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGINT: 130}
PARENT = "CDISTILL_PARENT"  # set for processes that must not outlive the one that started them
_received: list[int] = []


def install_handlers() -> None:
    """Makes SIGTERM, SIGUSR1 and Ctrl-C set the flag; a second Ctrl-C stops at once.

    On Linux the death of a launcher counts as SIGTERM, so that no training continues unseen; a run that a shell has
    started outlives the shell.
    """
    _received.clear()
    for number in EXIT_CODES:
        signal.signal(number, _handle)
    launched = any(name in ("RANK", "LOCAL_RANK", PARENT) or name.startswith("ACCELERATE_") for name in os.environ)
    if sys.platform == "linux" and launched:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def requested() -> int:
    """Returns the number of the first signal that asked to stop, or 0."""
    return _received[0] if _received else 0


def check(where: str) -> None:
    """Raises StoppedError if a signal came; for loops that have nothing to save."""
    if requested():
        name = signal.Signals(requested()).name
        raise StoppedError(f"{where}: stopped by {name}; run the same command to resume", EXIT_CODES[requested()])


def _handle(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if _received.count(signal.SIGINT) > 1:
        raise KeyboardInterrupt
