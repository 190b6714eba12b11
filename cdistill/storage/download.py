"""Fetching one file with requests: whole or not at all, and quick to report a missing network. Needs no torch."""

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from cdistill import __version__
from cdistill.errors import brief
from cdistill.runtime import signals
from cdistill.runtime.console import progress, say

if TYPE_CHECKING:
    from requests import Response, Session

BUDGET = 1.3  # seconds in which a server or proxy must accept a connection; a whole command then fails within two
HANDSHAKE = 10.0  # seconds for a proxy's answer and for encryption
STALL = 30.0  # seconds without an answer, and then without a byte, after which a download is abandoned
_POLL = 0.1  # seconds between two looks at the signals
_CHUNK, _MIB = 2**16, 2**20
_LOCAL = re.compile(r"http://(?:localhost|127\.0\.0\.1|\[::1\])(?::\d+)?/")
_SWITCHES = ("CDISTILL_OFFLINE", "HF_HUB_OFFLINE")
_PAGE = "the server sent a web page instead; the network may require a login"
Result = TypeVar("Result")


class FetchError(Exception):
    """Why a file was not fetched, as a clause of the caller's message; only printable text is kept."""

    def __init__(self, reason: str) -> None:
        super().__init__("".join(sign if sign.isprintable() else "?" for sign in reason))


def reach(address: str) -> None:
    """Returns once the server of an address, or the proxy in front of it, accepts a connection.

    FetchError: None was accepted in `BUDGET` seconds, or the environment forbids to ask.
    """
    from requests.utils import get_environ_proxies, select_proxy

    for name in _SWITCHES:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise FetchError(f"${name} is set")
    _session(address)
    proxy = select_proxy(address, get_environ_proxies(address))
    parts = urlsplit(proxy or address)
    try:
        place = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    except ValueError as error:
        raise FetchError(f"no connection: {error}") from error
    if not place[0]:
        raise FetchError(f"no connection: {proxy} names no host")
    _in_background(lambda: socket.create_connection(place, BUDGET).close(), BUDGET, place[0])


def download(address: str, target: Path, name: str, size: int | None = None) -> None:
    """Writes the file at an address to `target`; the caller removes it after an error, and checks its content.

    The address is https, or http on this machine; messages call it `name`; `size` is its bytes, if known.

    Raises:
        FetchError: It was refused, broke off, or is something else.
        OSError: It could not be written.
        StoppedError: A signal came.
    """
    with _session(address) as session:
        headers = {"User-Agent": f"cdistill/{__version__}", "Accept-Encoding": "identity"}
        with _in_background(
            lambda: session.get(address, stream=True, timeout=(HANDSHAKE, STALL), headers=headers), STALL, name
        ) as answer:
            total = _total(answer, size)
            say(f"{name}: fetching {_mib(total)} from {address}")
            _store(answer, target, name, total)


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Waits until no other process fetches `target`, and keeps others out; StoppedError if a signal comes."""
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{target.name}: another process is fetching it; waiting")
        while not lock.is_locked:
            signals.check(target.name)
            with suppress(Timeout):
                lock.acquire(timeout=0.5)
    try:
        yield
    finally:
        lock.release()


def _session(address: str) -> "Session":
    """Returns a session that speaks https, and http with this machine if asked so; redirects lead nowhere else."""
    from requests import Session
    from requests.adapters import HTTPAdapter

    local = _LOCAL.match(address)
    if not (local or (address.startswith("https://") and urlsplit(address).hostname)):
        raise FetchError(f"{address} is not https")
    session = Session()
    session.adapters.clear()
    session.mount(local[0] if local else "https://", HTTPAdapter())
    return session


def _in_background(work: Callable[[], Result], seconds: float, name: str) -> Result:
    """Returns what `work` does in a thread, because nothing can interrupt the resolution of a host's name.

    FetchError if it failed or took longer than `seconds`. A thread that hangs does not keep the process alive.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    deadline = time.monotonic() + seconds
    while not wait([future], timeout=_POLL).done:
        signals.check(name)
        if time.monotonic() > deadline:
            raise FetchError(f"no connection: {name} did not answer in {seconds:g} s")
    if error := future.exception():
        raise FetchError(f"no connection: {brief(error)}") from error
    return future.result()


def _total(answer: "Response", size: int | None) -> int:
    """Returns the size of the file; FetchError if it is unknown, or the answer is another file or a page."""
    if answer.status_code != 200:
        raise FetchError(f"the server answered {answer.status_code} {(answer.reason or '')[:100]}")
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise FetchError(_PAGE)
    length = answer.headers.get("Content-Length", "")
    if not re.fullmatch("[0-9]{1,15}", length):
        raise FetchError("the server does not state the file's length")
    if not (total := int(length)):
        raise FetchError("the server sent an empty file")
    if size not in (None, total):
        raise FetchError(f"the server has a file of {total} bytes, not {size}")
    return total


def _store(answer: "Response", target: Path, name: str, total: int) -> None:
    done, whole = 0, -(-total // _MIB)
    with target.open("wb") as file, progress(whole, name, "MiB") as advance:
        for data in _body(answer, total):
            signals.check(name)
            if not done and data.lstrip().startswith(b"<"):
                raise FetchError(_PAGE)
            file.write(data)
            before, done = done, done + len(data)
            if count := (whole if done == total else done // _MIB) - before // _MIB:
                advance(count, "")


def _body(answer: "Response", total: int) -> Iterator[bytes]:
    """Yields the body as it comes; FetchError if it is not as long as announced."""
    done, reason = 0, "the server ended the connection"
    try:
        for data in answer.iter_content(_CHUNK):
            done += len(data)
            yield data
    except OSError as error:  # requests' errors are OSErrors
        if "timed out" in str(error):
            reason = f"no byte came for {STALL:g} s"
        elif "IncompleteRead" not in str(error):
            reason = brief(error)
        done = answer.raw.tell()
    if done != total:
        raise FetchError(f"{reason} after {_mib(done)} of {_mib(total)}")


def _mib(count: int) -> str:
    return f"{count / _MIB:.4g} MiB"
