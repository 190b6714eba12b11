"""Downloads that survive: resumed where they broke off, never short, and soon plain about a missing network.

The standard library's urllib talks: it knows proxies, redirects and certificates. huggingface_hub resumes too, but has
no public function for any address.
"""

import http.client
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPMessage as Message
from pathlib import Path
from typing import IO, Any
from urllib import request as web
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from cdistill import __version__
from cdistill.runtime import signals as stopping
from cdistill.runtime.console import progress, say
from cdistill.storage.files import disk_full, read_json, sync, write_text

BUDGET = 1.3  # seconds in which a server must show that it is there; a whole command stays below two
STALL = 30.0  # seconds without an answer, and then without a byte, until a download is given up
_POLL = 0.2  # seconds between two looks at the signals while a server is to answer
_CHUNK = _MIB = 2**20
_LOCAL = ("localhost", "127.0.0.1", "::1")
_HERE = tuple(f"http://{host}{end}" for host in ("localhost", "127.0.0.1", "[::1]") for end in ":/")
_ASKING = "cdistill asks"
_SWITCHES = ("CDISTILL_OFFLINE", "HF_HUB_OFFLINE")
_Answer = http.client.HTTPResponse | HTTPError


@dataclass(frozen=True)
class _Note:
    """What stands beside a part.

    Attributes:
        address: Where it comes from.
        size: Bytes of the whole file.
        validator: The ETag or date by which the server tells whether the file is still the one that was begun.
    """

    address: str
    size: int
    validator: str | None


class FetchError(Exception):
    """Why a file was not fetched, as a clause of the message that the caller makes; only printable text is kept."""

    def __init__(self, reason: str) -> None:
        super().__init__("".join(sign if sign.isprintable() else "?" for sign in reason))


def reach(address: str) -> None:
    """Returns when the server has shown that it is there: by an encrypted connection, or by any answer.

    Raises:
        FetchError: Nobody answered in `BUDGET` seconds, or the environment forbids to ask.
    """
    for name in _SWITCHES:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise FetchError(f"${name} is set")
    question = _Question(address, {}, BUDGET, "HEAD")
    if not question.told.wait(BUDGET):
        raise FetchError(f"no connection: {urlsplit(address).hostname} did not answer in {BUDGET:g} s")
    if question.failure:
        raise question.failure


class _Question(threading.Thread):
    """Asks a server aside, because nothing can interrupt the resolving of a name, or a header that comes in drops.

    One that hangs is left behind.

    Attributes:
        told: Set when the answer or a failure has come; after HEAD as soon as an encrypted connection stands.
        left: Whether nobody waits any more.
        answer: The answer to GET.
        failure: Why there is none.
    """

    def __init__(self, address: str, headers: dict[str, str], timeout: float, method: str = "GET") -> None:
        super().__init__(name=_ASKING, daemon=True)
        self.asked = (address, headers, timeout, method)
        self.told = threading.Event()
        self.left = False
        self.answer: _Answer | None = None
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        """Asks."""
        try:
            if self.asked[-1] == "HEAD":
                _open(*self.asked, connected=self.told.set).close()
            else:
                self.answer = _open(*self.asked)
                if self.left:
                    self.answer.close()
        except Exception as error:
            self.failure = error
        finally:
            self.told.set()


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Waits until no other process fetches `target`, and keeps others out.

    Raises:
        StoppedError: A signal came.
    """
    lock = FileLock(beside(target, ".lock"))
    if not _acquired(lock, 0):
        say(f"{target.name}: another process fetches it; waiting")
        while not _acquired(lock, 0.5):
            stopping.check(target.name)
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def download(address: str, target: Path, size: int | None = None) -> Path:
    """Fetches a file to ``TARGET.part``, going on where an earlier attempt broke off.

    ``TARGET.part.json`` says what it is a part of: see `_Note`.

    Args:
        address: https, or http on this machine.
        target: Where the caller will move the file.
        size: How many bytes it must have, where that is known.

    Returns:
        ``TARGET.part``, whole and synced; its content is not checked.

    Raises:
        FetchError: It was refused or broke off; what came is kept.
        DiskFullError: It did not fit; what came is kept.
        StoppedError: A signal came; what came is kept.
    """
    part, note = remains(target)
    known = _read_note(note)
    begun = part.stat().st_size if part.is_file() and known and known.address == address else 0
    if not (known and begun == known.size):
        answer, begun = _ask(address, begun, known, target.name)
        with answer:
            total = _total(answer, begun, size)
            if not begun:
                part.unlink(missing_ok=True)
                facts = _Note(address, total, _validator(answer))
                write_text(note, json.dumps(asdict(facts), indent=1) + "\n")
            onward = f", going on after {_mib(begun)}" if begun else ""
            say(f"{target.name}: fetching {_mib(total)} from {address}{onward}")
            with disk_full(part):
                _store(answer, part, begun, total)
    sync(part)
    return part


def discard(target: Path) -> None:
    """Removes what `download` left beside `target`."""
    for path in remains(target):
        path.unlink(missing_ok=True)


def remains(target: Path) -> tuple[Path, Path]:
    """Returns where `download` keeps a part, and the note about it."""
    return beside(target, ".part"), beside(target, ".part.json")


def beside(path: Path, suffix: str) -> Path:
    """Returns the path with a suffix added to its whole name."""
    return path.with_name(path.name + suffix)


def _read_note(path: Path) -> _Note | None:
    """Returns what a note says; None if there is none, or anything else stands there."""
    found = read_json(path)
    address, size, validator = (found.get(name) for name in ("address", "size", "validator"))
    if not isinstance(address, str) or type(size) is not int or size <= 0:
        return None
    if validator is not None and not (isinstance(validator, str) and validator.isascii() and validator.isprintable()):
        return None
    return _Note(address, size, validator)


def _ask(address: str, begun: int, known: _Note | None, name: str) -> tuple[_Answer, int]:
    """Returns an answer that brings the file, and the byte at which it begins: `begun` or 0."""
    wanted = {}
    if begun and known and known.validator:
        wanted = {"Range": f"bytes={begun}-", "If-Range": known.validator}
    answer = _wait(_Question(address, wanted, STALL), name)
    if wanted and known and _continues(answer, begun, known):
        return answer, begun
    if wanted and answer.status in (206, 416):
        answer.close()
        answer = _wait(_Question(address, {}, STALL), name)
    if answer.status == 200:
        return answer, 0
    answer.close()
    raise FetchError(f"the server answered {answer.status} {answer.reason[:100]}")


def _wait(question: _Question, name: str) -> _Answer:
    """Returns the answer to a question; FetchError if there is none in `STALL` seconds, StoppedError at a signal."""
    try:
        for _ in range(max(1, round(STALL / _POLL))):
            if question.told.wait(_POLL):
                break
            stopping.check(name)
    finally:
        question.left = not question.told.is_set()
    if question.answer is None:
        raise question.failure or FetchError(f"no answer came in {STALL:g} s")
    return question.answer


def _continues(answer: _Answer, begun: int, known: _Note) -> bool:
    """Whether the answer brings the rest of the same file."""
    same = _validator(answer) in (None, known.validator)
    wanted = f"bytes {begun}-{known.size - 1}/{known.size}"
    return same and answer.status == 206 and answer.headers["Content-Range"] == wanted


def _validator(answer: _Answer) -> str | None:
    """Returns the strong ETag or else the date of the file; a weak ETag does not vouch for every byte."""
    tag = answer.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")


def _total(answer: _Answer, begun: int, size: int | None) -> int:
    """Returns the size of the whole file; FetchError if it is unknown, or the answer is another file or a page."""
    length = answer.headers.get("Content-Length", "")
    if answer.headers.get_content_type() == "text/html":
        raise FetchError(_PAGE)
    if not re.fullmatch("[0-9]{1,15}", length):
        raise FetchError("the server does not say how long the file is")
    total = begun + int(length)
    if not total:
        raise FetchError("the server sent an empty file")
    if size not in (None, total):
        raise FetchError(f"the server has a file of {total} bytes, not {size}")
    return total


_PAGE = "the server sent a web page instead; perhaps the network wants a login"


def _store(answer: _Answer, part: Path, begun: int, total: int) -> None:
    """Appends the body to `part`."""
    done = begun
    mib_begun, mib_total = begun // _MIB, -(-total // _MIB)
    with part.open("ab") as file, progress(mib_total, part.stem, "MiB", mib_begun) as advance:
        for data in _chunks(answer, begun, total):
            stopping.check(part.stem)
            if not done and data.lstrip().startswith(b"<"):
                raise FetchError(_PAGE)
            file.write(data)
            before, done = done, done + len(data)
            if count := _shown(done, total) - _shown(before, total):
                advance(count, "")


def _shown(done: int, total: int) -> int:
    """Returns the whole MiB that are done; the last one counts when everything is there."""
    return done // _MIB if done < total else -(-total // _MIB)


def _chunks(answer: _Answer, begun: int, total: int) -> Iterator[bytes]:
    """Yields the body as it comes; FetchError if it ends before `total`."""
    done, reason = begun, "the server ended the connection"
    try:
        while data := answer.read1(_CHUNK):
            done += len(data)
            yield data
    except TimeoutError:
        reason = f"no byte came for {STALL:g} s"
    except (OSError, http.client.HTTPException) as error:
        reason = _reason(error)
    if done != total:
        raise FetchError(
            f"{reason} after {_mib(done)} of {_mib(total)}; what came is kept, and the same command goes on from there"
        )


def _mib(count: int) -> str:
    return f"{count / _MIB:.4g} MiB"


def _open(
    address: str,
    headers: dict[str, str],
    timeout: float,
    method: str = "GET",
    connected: Callable[[], None] = lambda: None,
) -> _Answer:
    """Returns the server's answer, whatever its status.

    Args:
        address: Where to ask.
        headers: What the request says beside the usual.
        timeout: Seconds for each step.
        method: GET or HEAD.
        connected: Called once an encrypted connection stands.

    Raises:
        FetchError: There is no answer.
    """
    director = web.OpenerDirector()
    for handler in (
        web.ProxyHandler(),
        _Talker(connected, address.startswith(_HERE)),
        web.UnknownHandler(),
        _Redirects(),
        web.HTTPErrorProcessor(),
        web.HTTPDefaultErrorHandler(),
    ):
        director.add_handler(handler)
    try:
        asked = web.Request(address, headers={"User-Agent": f"cdistill/{__version__}", **headers}, method=method)
        answer: http.client.HTTPResponse = director.open(asked, timeout=timeout)
        return answer
    except HTTPError as error:
        return error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise FetchError(f"no connection: {_reason(error)}") from error


class _Talker(web.AbstractHTTPHandler):
    """Speaks https; http with this machine only, if it was asked by http; none of urllib's others, such as file://.

    Args:
        connected: Called once an encrypted connection stands.
        plain: Whether http is spoken; a redirect from https must not lead to what this machine serves.
    """

    http_request = https_request = web.AbstractHTTPHandler.do_request_

    def __init__(self, connected: Callable[[], None], plain: bool) -> None:
        super().__init__()
        self.connected, self.plain = connected, plain

    def https_open(self, request: web.Request) -> http.client.HTTPResponse:
        """Called by the director for https."""
        return self.do_open(partial(_Connection, self.connected), request)

    def http_open(self, request: web.Request) -> http.client.HTTPResponse:
        """Called by the director for http."""
        if not self.plain or urlsplit(request.full_url).hostname not in _LOCAL:
            raise URLError(f"{request.full_url} is not https")
        return self.do_open(http.client.HTTPConnection, request)


class _Redirects(web.HTTPRedirectHandler):
    """Follows redirects; one that leads nowhere is closed, which urllib forgets."""

    def http_error_302(self, req: web.Request, fp: IO[bytes], code: int, msg: str, headers: Message) -> Any:
        """Called by the director for every redirect."""
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not isinstance(error, HTTPError):  # that one carries the answer onwards
                fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _Connection(http.client.HTTPSConnection):
    """Tells when it stands."""

    def __init__(self, connected: Callable[[], None], host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self.connected = connected

    def connect(self) -> None:
        """Connects, also through a proxy, and checks the certificate."""
        super().connect()
        self.connected()


def _reason(error: Exception) -> str:
    """Returns an error's text on one line."""
    inner = error.reason if isinstance(error, URLError) else error
    return " ".join(str(inner).split())[:300] or type(inner).__name__
