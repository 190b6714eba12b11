"""Stopping on a signal: handlers only set a flag, which the loops poll where they can save."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cdistill.errors import StoppedError

_CODES = {"SIGTERM": 75, "SIGUSR1": 75, "SIGHUP": 75, "SIGINT": 130}
EXIT_CODES: dict[int, int] = {getattr(signal, name): code for name, code in _CODES.items() if hasattr(signal, name)}
PARENT = "CDISTILL_PARENT"  # number of the process that this one must not outlive, if any
_PR_SET_PDEATHSIG = 1
_received: list[int] = []


def install_handlers() -> None:
    """Makes SIGTERM, SIGUSR1, SIGHUP and Ctrl-C set the flag; a second Ctrl-C stops at once.

    SIGHUP, which a terminal sends as it closes, stays ignored where it is, as under nohup.
    """
    _received.clear()
    for number in EXIT_CODES:
        if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
            continue
        signal.signal(number, _handle)
    if launcher_gone():
        _received.append(signal.SIGTERM)


def follow_launcher() -> None:
    """Makes the death of a launcher count as SIGTERM, on Linux, so that no training continues unseen.

    To be called as early as can be; a launcher that died before is found by `install_handlers`. A run that a shell has
    started outlives the shell.
    """
    if sys.platform == "linux" and _launched():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def launcher_gone() -> bool:
    """Whether the process that launched this one has died before `follow_launcher` could ask to be told."""
    if sys.platform != "linux":
        return False
    if stated := os.environ.get(PARENT, ""):
        return os.getppid() != int(stated) if stated.isdecimal() else False
    # A child of torchrun, as accelerate's several are, has a Python program as its parent; an orphan has process 1.
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == 1 and b"python" not in _command_of(1)


def _command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b"python"  # not known


def _launched() -> bool:
    return any(name in ("RANK", "LOCAL_RANK", PARENT) or name.startswith("ACCELERATE_") for name in os.environ)


def requested() -> int:
    """Returns the number of the first signal that asked to stop, or 0."""
    return _received[0] if _received else 0


def check(where: str) -> None:
    """Raises StoppedError if a signal came; for loops that have nothing to save."""
    if requested():
        name = signal.Signals(requested()).name
        raise StoppedError(f"{where}: stopped by {name}; run the same command to resume", EXIT_CODES[requested()])


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Lets a signal end the process inside, where handlers do not run: while processes wait for each other to start.

    One that waits for a process that is gone would not hear of it for half an hour.

    Raises:
        StoppedError: A signal came before.
    """
    check("launch")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        while number := os.read(reading, 1):
            if number[0] in EXIT_CODES:
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, b"error: launch: stopped by a signal; run the same command again\n")
                os._exit(EXIT_CODES[number[0]])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _handle(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    if _received.count(signal.SIGINT) > 1:
        raise KeyboardInterrupt
