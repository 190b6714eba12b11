"""Downloads from a server on this machine: whole, broken off, resumed, refused."""

import json
import random
import shutil
import socket
import ssl
import subprocess
import threading

import pytest

from cdistill.errors import StoppedError
from cdistill.runtime import signals as stopping
from cdistill.storage import download as fetching
from cdistill.storage.download import FetchError, alone, beside, discard, download, reach
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


def begin(site, target):
    """Breaks a download off after CUT bytes, and mends the server."""
    site.cut = CUT
    with pytest.raises(FetchError, match=r"after 1\.24 MiB of 2\.861 MiB; what came is kept"):
        download(site.address, target)
    site.cut = None
    assert beside(target, ".part").read_bytes() == CONTENT[:CUT]


def test_a_file_comes_whole(target):
    with serving(CONTENT) as site:
        assert download(site.address, target) == beside(target, ".part")
        assert beside(target, ".part").read_bytes() == CONTENT
        assert site.sent == [len(CONTENT)]
        assert site.asked[0]["User-Agent"].startswith("cdistill/")
    discard(target)
    assert not list(target.parent.iterdir())


def test_tiny_files_come_whole(target):
    with serving(b"x") as site:
        assert download(site.address, target, 1).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("how", "validator"),
    [
        ({}, '"one"'),
        ({"tag": "", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, "Wed, 21 Oct 2015 07:28:00 GMT"),
        ({"tag": 'W/"weak"', "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, "Wed, 21 Oct 2015 07:28:00 GMT"),
    ],
    ids=["strong tag", "date", "weak tag"],
)
def test_a_broken_download_goes_on_where_it_ended(target, how, validator):
    with serving(CONTENT, **how) as site:
        begin(site, target)
        assert download(site.address, target).read_bytes() == CONTENT
        assert (site.asked[1]["Range"], site.asked[1]["If-Range"]) == (f"bytes={CUT}-", validator)
        assert site.sent == [CUT, len(CONTENT) - CUT]


@pytest.mark.parametrize(
    "changed",
    [
        {"size": None}, {"size": "3000000"}, {"size": True}, {"size": -1}, {"size": 1e400},
        {"validator": [1]}, {"validator": "a\r\nb: c"}, {"validator": "\u20ac"}, {"address": ["x"]}, {"address": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_note_of_another_shape_means_that_nothing_was_begun(target, changed):
    with serving(CONTENT) as site:
        begin(site, target)
        note = beside(target, ".part.json")
        facts = {**json.loads(note.read_text()), **changed}
        note.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))
        assert download(site.address, target).read_bytes() == CONTENT
        assert site.sent == [CUT, len(CONTENT)]


def test_a_part_that_is_longer_than_the_file_is_dropped(target):
    with serving(CONTENT) as site:
        begin(site, target)
        beside(target, ".part").write_bytes(bytes(len(CONTENT) + 1))
        assert download(site.address, target).read_bytes() == CONTENT


def test_a_broken_download_goes_on_after_a_redirect(target):
    with serving(CONTENT) as site:
        site.address = site.address.replace("/file.bin", "/moved")
        begin(site, target)
        assert download(site.address, target).read_bytes() == CONTENT
        assert site.sent == [CUT, len(CONTENT) - CUT]


@pytest.mark.parametrize(
    "how",
    [{"ranges": False}, {"tag": ""}],
    ids=["no ranges", "nothing that identifies the file"],
)
def test_without_ranges_it_starts_again(target, how):
    with serving(CONTENT, **how) as site:
        begin(site, target)
        assert download(site.address, target).read_bytes() == CONTENT
        assert site.sent == [CUT, len(CONTENT)]


@pytest.mark.parametrize("conditions", [True, False], ids=["If-Range is heeded", "If-Range is ignored"])
def test_a_file_that_changed_is_fetched_from_its_beginning(target, conditions):
    with serving(CONTENT, conditions=conditions) as site:
        begin(site, target)
        site.content, site.tag = CONTENT[::-1], '"two"'
        assert download(site.address, target).read_bytes() == CONTENT[::-1]


def test_a_shorter_file_is_fetched_from_its_beginning(target):
    with serving(CONTENT, conditions=False) as site:
        begin(site, target)
        site.content = CONTENT[:1000]
        assert download(site.address, target).read_bytes() == CONTENT[:1000]


def test_a_part_of_another_address_is_not_gone_on_with(target):
    with serving(CONTENT) as site, serving(CONTENT[::-1]) as other:
        begin(site, target)
        assert download(other.address, target).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("note", ["", "{}", "[1]", '{"address": "x"}'])
def test_a_part_with_a_damaged_note_is_fetched_again(target, note):
    with serving(CONTENT) as site:
        begin(site, target)
        beside(target, ".part.json").write_text(note)
        assert download(site.address, target).read_bytes() == CONTENT
        assert "Range" not in site.asked[1]


def test_a_whole_part_needs_no_second_request(target):
    with serving(CONTENT) as site:
        download(site.address, target)
        assert download(site.address, target).read_bytes() == CONTENT
        assert len(site.asked) == 1


@pytest.mark.parametrize("extra", [1, 10_000_000])
def test_a_file_shorter_than_announced_is_never_taken(target, extra):
    with serving(CONTENT, extra=extra) as site:
        for _ in range(2):
            with pytest.raises(FetchError, match="what came is kept"):
                download(site.address, target)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"status": 404}, "the server answered 404 Not Found"),
        ({"status": 403}, "the server answered 403 Forbidden"),
        ({"status": 503}, "the server answered 503 Service Unavailable"),
        ({"kind": "text/html; charset=utf-8"}, "a web page instead"),
        ({"content": b"\r\n <!DOCTYPE html>"}, "a web page instead"),
        ({"extra": None}, "does not say how long"),
        ({"length": "9" * 5000}, "does not say how long"),
        ({"length": "-5"}, "does not say how long"),
        ({"length": "\u00b2"}, "does not say how long"),
        ({"content": b""}, "an empty file"),
        ({"extra": 1}, "has a file of 3000001 bytes, not 3000000"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_not_the_file_is_refused(target, how, message):
    with serving(**{"content": CONTENT, **how}) as site, pytest.raises(FetchError, match=message):
        download(site.address, target, 3_000_000 if "extra" in how else None)
    assert not beside(target, ".part").is_file() or not beside(target, ".part").stat().st_size


def test_an_error_of_the_server_keeps_what_came(target):
    with serving(CONTENT) as site:
        begin(site, target)
        site.status = 503
        with pytest.raises(FetchError, match="503"):
            download(site.address, target)
        site.status = 200
        assert download(site.address, target).read_bytes() == CONTENT
        assert site.sent[-1] == len(CONTENT) - CUT


def test_silence_ends_a_download_and_keeps_what_came(target, monkeypatch):
    monkeypatch.setattr(fetching, "STALL", 0.3)
    with serving(CONTENT, cut=CUT, hang=2) as site:
        with pytest.raises(FetchError, match=r"no byte came for 0\.3 s after 1\.24 MiB"):
            download(site.address, target)
        site.cut, site.hang = None, 0
        assert download(site.address, target).read_bytes() == CONTENT


def test_a_signal_keeps_what_came(target, monkeypatch):
    with serving(CONTENT, pause=0.01) as site:
        checks = []

        def check(where):
            checks.append(where)
            if len(checks) > 5:
                raise StoppedError(where, 75)

        monkeypatch.setattr(stopping, "check", check)
        with pytest.raises(StoppedError, match=r"file\.bin"):
            download(site.address, target)
        kept = beside(target, ".part").stat().st_size
        assert 0 < kept < len(CONTENT)
        monkeypatch.undo()
        assert download(site.address, target).read_bytes() == CONTENT
        assert site.asked[1]["Range"] == f"bytes={kept}-"


def test_progress_counts_mebibytes(target, capsys):
    with serving(CONTENT) as site:
        begin(site, target)
        download(site.address, target)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("file.bin: fetching 2.861 MiB from http://127.0.0.1")
    assert lines[1].endswith("going on after 1.24 MiB")
    assert lines[2].startswith("file.bin 3/3 ")
    assert "MiB/s" in lines[2]


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
        pytest.raises(FetchError, match=r"not https|unknown url|answered"),
    ):
        download(site.address.replace("/file.bin", "/moved"), target)


def test_a_redirect_from_https_never_leads_to_what_this_machine_serves(target, https, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with serving(CONTENT) as inner, serving(CONTENT, https, location=inner.address) as outer:
        with pytest.raises(FetchError, match=r"127\.0\.0\.1:\d+/file\.bin is not https"):
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
    with serving(CONTENT, drip=True) as site, pytest.raises(FetchError, match=r"no answer came in 0\.4 s"):
        download(site.address, target)


def test_a_signal_ends_the_wait_for_an_answer(target, monkeypatch):
    monkeypatch.setattr(stopping, "_received", [15])
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


def test_a_slow_server_is_there_once_the_encryption_stands(target, https, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setattr(fetching, "BUDGET", 0.5)
    with serving(CONTENT, https, delay=0.7) as site:
        reach(site.address)
        assert download(site.address, target).read_bytes() == CONTENT
    with serving(CONTENT, delay=0.7) as site, pytest.raises(FetchError, match=r"did not answer in 0\.5 s"):
        reach(site.address)
    for thread in threading.enumerate():
        if thread.name == fetching._ASKING:
            thread.join(5)


def test_an_unknown_certificate_is_refused(target, https):
    with serving(CONTENT, https) as site:
        for ask in (reach, lambda address: download(address, target)):
            with pytest.raises(FetchError, match=r"(?i)certificate"):
                ask(site.address)


def test_a_second_process_waits_until_the_lock_is_free(target, capsys, monkeypatch):
    held = fetching.FileLock(beside(target, ".lock"))
    held.acquire()

    def check(where):
        held.release()

    monkeypatch.setattr(stopping, "check", check)
    with alone(target):
        assert "another process fetches it; waiting" in capsys.readouterr().err
    held.acquire()
    monkeypatch.undo()
    monkeypatch.setattr(stopping, "_received", [15])
    with pytest.raises(StoppedError), alone(target):
        pass
    held.release()


def test_the_note_says_what_was_begun(target):
    with serving(CONTENT) as site:
        begin(site, target)
    assert json.loads(beside(target, ".part.json").read_text()) == {
        "address": site.address,
        "size": len(CONTENT),
        "validator": '"one"',
    }
