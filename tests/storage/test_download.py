"""Downloads from a server on this machine: whole, broken off, refused."""

import random
import shutil
import socket
import ssl
import subprocess

import pytest

from cdistill.errors import StoppedError
from cdistill.runtime import signals
from cdistill.storage import download as fetching
from cdistill.storage.download import FetchError, alone, reach
from tests.webserver import serving

CONTENT = random.Random(0).randbytes(3_000_000)
CUT = 1_300_000


@pytest.fixture(autouse=True)
def _network(monkeypatch):
    for name in ("CDISTILL_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "file.bin"


def download(address, target, size=None):
    fetching.download(address, target, target.name, size)
    return target


def test_a_file_comes_whole(target):
    with serving(CONTENT) as site:
        assert download(site.address, target).read_bytes() == CONTENT
        assert site.sent == [len(CONTENT)]
        assert site.asked[0]["User-Agent"].startswith("cdistill/")


def test_tiny_files_come_whole(target):
    with serving(b"x") as site:
        assert download(site.address, target, 1).read_bytes() == b"x"


def test_a_file_comes_after_a_redirect(target):
    with serving(CONTENT) as site:
        assert download(site.address.replace("/file.bin", "/moved"), target).read_bytes() == CONTENT


def test_a_connection_that_ends_too_soon_is_an_error(target):
    with (
        serving(CONTENT, cut=CUT) as site,
        pytest.raises(FetchError, match=r"ended .* after 1\.24 MiB of 2\.861 MiB$"),
    ):
        download(site.address, target)


@pytest.mark.parametrize("extra", [1, 10_000_000])
def test_a_file_shorter_than_announced_is_never_taken(target, extra):
    message = r"^the server ended the connection after 2\.861 MiB of"
    with serving(CONTENT, extra=extra) as site, pytest.raises(FetchError, match=message):
        download(site.address, target)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"status": 404}, "the server answered 404 Not Found"),
        ({"status": 403}, "the server answered 403 Forbidden"),
        ({"status": 503}, "the server answered 503 Service Unavailable"),
        ({"kind": "text/html; charset=utf-8"}, "a web page instead"),
        ({"content": b"\r\n <!DOCTYPE html>"}, "a web page instead"),
        ({"extra": None}, "does not state the file's length"),
        ({"length": "9" * 5000}, "does not state the file's length"),
        ({"length": "-5"}, "does not state the file's length"),
        ({"length": "\u00b2"}, "does not state the file's length"),
        ({"content": b""}, "an empty file"),
        ({"extra": 1}, "has a file of 3000001 bytes, not 3000000"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_the_file_is_refused(target, how, message):
    with serving(**{"content": CONTENT, **how}) as site, pytest.raises(FetchError, match=message):
        download(site.address, target, 3_000_000 if "extra" in how else None)
    assert not target.is_file() or not target.stat().st_size


def test_silence_ends_a_download(target, monkeypatch):
    monkeypatch.setattr(fetching, "STALL", 0.3)
    with (
        serving(CONTENT, cut=CUT, hang=2) as site,
        pytest.raises(FetchError, match=r"no byte came for 0\.3 s after 1\.[12]\d* MiB of"),
    ):
        download(site.address, target)


def test_a_signal_ends_a_download(target, monkeypatch):
    with serving(CONTENT, pause=0.01) as site:
        checks = []

        def check(where):
            checks.append(where)
            if len(checks) > 5:
                raise StoppedError(where, 75)

        monkeypatch.setattr(signals, "check", check)
        with pytest.raises(StoppedError, match=r"file\.bin"):
            download(site.address, target)
        assert site.sent[0] < len(CONTENT)


def test_progress_counts_mebibytes(target, capsys):
    with serving(CONTENT) as site:
        download(site.address, target)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("file.bin: fetching 2.861 MiB from http://127.0.0.1")
    assert second.startswith("file.bin 3/3 ")
    assert "MiB/s" in second


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "http://example.com/x", "ftp://127.0.0.1/x", "data:,x", "no address"]
)
def test_only_https_is_spoken(target, address):
    with pytest.raises(FetchError):
        download(address, target)


@pytest.mark.parametrize("location", ["file:///etc/passwd", "http://example.com/x", "ftp://127.0.0.1/x"])
def test_redirects_lead_to_https_only(target, location):
    with (
        serving(CONTENT, location=location) as site,
        pytest.raises(FetchError, match=r"No connection adapters were found"),
    ):
        download(site.address.replace("/file.bin", "/moved"), target)


def test_a_redirect_from_https_never_leads_to_what_this_machine_serves(target, https, certificate, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    with serving(CONTENT) as inner, serving(CONTENT, https, location=inner.address) as outer:
        with pytest.raises(
            FetchError, match=r"No connection adapters were found for 'http://127\.0\.0\.1:\d+/file\.bin'"
        ):
            download(outer.address.replace("/file.bin", "/moved"), target)
        assert inner.asked == []
        outer.location = "/file.bin"
        assert download(outer.address.replace("/file.bin", "/moved"), target).read_bytes() == CONTENT


def test_only_printable_text_of_a_server_is_shown(target):
    with serving(CONTENT, status=500, reason="a\x1b[31mb\u009b" + "x" * 9999) as site:
        with pytest.raises(FetchError, match=r"^the server answered 500 a\?\[31mb\?x{90,}$") as caught:
            download(site.address, target)
        assert len(str(caught.value)) < 200
    with serving(CONTENT, location="http://a\x1b]0;b\x07.example/") as site, pytest.raises(FetchError) as caught:
        download(site.address.replace("/file.bin", "/moved"), target)
    assert str(caught.value).isprintable()


def test_a_header_that_comes_in_drops_is_given_up(target, monkeypatch):
    monkeypatch.setattr(fetching, "STALL", 0.4)
    with serving(CONTENT, drip=True) as site, pytest.raises(FetchError, match=r"file\.bin did not answer in 0\.4 s"):
        download(site.address, target)


def test_a_signal_ends_the_wait_for_an_answer(target, monkeypatch):
    monkeypatch.setattr(signals, "_received", [15])
    with serving(CONTENT, drip=True) as site, pytest.raises(StoppedError, match=r"file\.bin"):
        download(site.address, target)


def test_a_server_that_answers_is_reached_whatever_it_says():
    for status in (200, 404, 405, 503):
        with serving(CONTENT, status=status) as site:
            reach(site.address)


def test_a_dead_proxy_is_no_network(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(CONTENT) as site, pytest.raises(FetchError, match="no connection"):
        reach(site.address)


@pytest.mark.parametrize("name", ["CDISTILL_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_environment_can_forbid_to_ask(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: pytest.fail("asked"))
    with pytest.raises(FetchError, match=name):
        reach("https://example.com/x")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for this machine, signed by itself, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("certificate")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key", "-out", "cert"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder / "cert", folder / "key"


@pytest.fixture
def https(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def test_a_slow_server_is_there_once_it_accepts_a_connection(target, https, certificate, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
    monkeypatch.setattr(fetching, "BUDGET", 0.5)
    with serving(CONTENT, https, delay=0.7) as site:
        reach(site.address)
        assert download(site.address, target).read_bytes() == CONTENT


def test_an_unknown_certificate_is_refused(target, https):
    with serving(CONTENT, https) as site, pytest.raises(FetchError, match=r"(?i)certificate"):
        download(site.address, target)


def test_a_second_process_waits_until_the_lock_is_free(target, capsys, monkeypatch):
    held = fetching.FileLock(target.with_name("file.bin.lock"))
    held.acquire()

    def check(where):
        held.release()

    monkeypatch.setattr(signals, "check", check)
    with alone(target):
        assert "another process is fetching it; waiting" in capsys.readouterr().err
    held.acquire()
    monkeypatch.undo()
    monkeypatch.setattr(signals, "_received", [15])
    with pytest.raises(StoppedError), alone(target):
        pass
    held.release()
