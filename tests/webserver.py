"""A web server on this machine that serves one file as badly as it is told to."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Site:
    """What is served and how; and what was asked.

    Attributes:
        content: The file.
        status: What it answers instead of 200.
        kind: The content type.
        extra: How many bytes more than it has it says it has; None says nothing.
        length: What it says about the length in place of the truth.
        cut: After how many bytes of the body it falls silent or hangs up.
        hang: For how many seconds it falls silent before it hangs up.
        pause: Seconds between pieces of 64 KiB.
        delay: Seconds before it answers.
        drip: Whether its answer to GET is a header that never ends, in drops.
        reason: What it says beside the status.
        location: Where it sends on those who ask for /moved.
        asked: Headers of the GET requests so far.
        sent: How many bytes of the body each of them got.
    """

    content: bytes
    status: int = 200
    kind: str = "application/octet-stream"
    extra: int | None = 0
    length: str = ""
    cut: int | None = None
    hang: float = 0
    pause: float = 0
    delay: float = 0
    drip: bool = False
    reason: str | None = None
    location: str = "/file.bin"
    asked: list[Message] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    address: str = ""


def _answer(handler: BaseHTTPRequestHandler, site: Site) -> None:
    time.sleep(site.delay)
    if handler.path == "/moved":
        _redirect(handler, site.location)
        return
    if site.drip and handler.command == "GET":
        _drip(handler, site)
        return
    if handler.command == "GET":
        site.asked.append(handler.headers)
        site.sent.append(0)
    handler.send_response(site.status, site.reason)
    length = site.length or ("" if site.extra is None else str(len(site.content) + site.extra))
    headers = {"Content-Type": site.kind, "Content-Length": length}
    for name in filter(headers.get, headers):
        handler.send_header(name, headers[name])
    handler.end_headers()
    if handler.command == "GET":
        _send(handler, site)


def _drip(handler: BaseHTTPRequestHandler, site: Site) -> None:
    """Sends until the site closes, or the other side has gone."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while site.drip:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def _redirect(handler: BaseHTTPRequestHandler, location: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", location)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def _send(handler: BaseHTTPRequestHandler, site: Site) -> None:
    number = len(site.sent) - 1
    body = site.content[: site.cut]
    for start in range(0, len(body), 65536):
        piece = body[start : start + 65536]
        handler.wfile.write(piece)
        site.sent[number] += len(piece)
        time.sleep(site.pause)
    time.sleep(site.hang)


@contextmanager
def serving(content: bytes, context: Any = None, **how: Any) -> Iterator[Site]:
    """Serves `content` under `address` until the block ends; with an SSL context, by https."""
    site = Site(content, **how)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                _answer(self, site)
            except OSError:
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass

        def finish_request(self, request: Any, client_address: Any) -> None:
            if context is None:
                super().finish_request(request, client_address)
            else:
                with context.wrap_socket(request, server_side=True) as wrapped:
                    super().finish_request(wrapped, client_address)

    server = Server(("127.0.0.1", 0), Handler)
    site.address = f"http{'s' if context else ''}://127.0.0.1:{server.server_port}/file.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.drip = False
        server.shutdown()
        server.server_close()
        thread.join()
