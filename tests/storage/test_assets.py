"""Files that are fetched once: found, downloaded, recorded, checked, or named with what to do."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.evaluation.evaluator import choose_metrics
from cdistill.storage import assets
from cdistill.storage.assets import ASSETS, Asset, digest
from tests.storage.test_download import CONTENT, CUT, _network  # noqa: F401 - the fixture that lets tests ask
from tests.webserver import serving

ROOT = Path(__file__).resolve().parents[2]
DIGEST = sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The asset folder, which does not exist yet."""
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "cache"))
    return tmp_path / "cache"


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def start(code, *arguments):
    """Starts a process that finds an asset."""
    head = "import sys, time\nfrom cdistill.storage.assets import Asset\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_missing_file_is_downloaded_and_recorded(folder):
    with serving(CONTENT) as site:
        asset = Asset("file.bin", site.address)
        assert asset.find() == folder / "file.bin"
        assert asset.find().read_bytes() == CONTENT
        assert len(site.asked) == 1
    assert names(folder) == ["file.bin", "file.bin.json"]
    record = json.loads(asset.record.read_text())
    assert (record["address"], record["size"], record["sha256"]) == (site.address, len(CONTENT), DIGEST)


def test_a_published_digest_needs_no_record(folder):
    with serving(CONTENT) as site:
        assert Asset("file.bin", site.address, DIGEST, len(CONTENT)).find().read_bytes() == CONTENT
    assert names(folder) == ["file.bin"]


def test_a_file_put_there_by_hand_is_recorded_at_first_use_and_checked_afterwards(folder):
    folder.mkdir()
    asset = Asset("file.bin", "https://example.com/file.bin")
    asset.path.write_bytes(b"right")
    assert asset.find() == asset.path
    asset.path.write_bytes(b"altered")
    with pytest.raises(CorruptFileError) as caught:
        asset.find()
    for part in (sha256(b"right").hexdigest()[:12], sha256(b"altered").hexdigest()[:12], str(asset.record)):
        assert part in str(caught.value)
    asset.record.unlink()
    assert asset.find() == asset.path
    assert json.loads(asset.record.read_text())["sha256"] == sha256(b"altered").hexdigest()


def test_a_recorded_digest_holds_for_a_later_download(folder):
    with serving(CONTENT) as site:
        asset = Asset("file.bin", site.address)
        asset.find().unlink()
        site.content = CONTENT[::-1]
        with pytest.raises(CorruptFileError, match=r"discarded.*remove it if the change is wanted"):
            asset.find()
        assert names(folder) == ["file.bin.json"]
        asset.record.unlink()
        assert asset.find().read_bytes() == CONTENT[::-1]


def test_a_download_with_a_wrong_digest_is_discarded(folder):
    with serving(CONTENT) as site:
        with pytest.raises(CorruptFileError, match=f"sha256 is {DIGEST[:12]}.*, not 000000000000"):
            Asset("file.bin", site.address, "0" * 64).find()
        assert names(folder) == []
        assert Asset("file.bin", site.address, DIGEST).find().is_file()


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"sha256": 1}', '{"sha256": "abc"}', "[" * 200_000])
def test_a_damaged_record_is_said_before_anything_is_fetched(folder, text, present):
    folder.mkdir()
    with serving(CONTENT) as site:
        asset = Asset("file.bin", site.address)
        if present:
            asset.path.write_bytes(b"x")
        asset.record.write_text(text)
        with pytest.raises(CorruptFileError, match=r"file\.bin\.json: not the record of a digest; remove it"):
            asset.find()
        assert site.asked == []


@pytest.mark.parametrize(
    ("suffix", "error", "message"),
    [
        ("", MissingAssetError, r"file\.bin is a folder, move it away\)"),
        (".json", CorruptFileError, r"file\.bin\.json: not the record of a digest; remove it"),
    ],
)
def test_a_folder_in_the_way_is_said_before_anything_is_fetched(folder, suffix, error, message):
    (folder / f"file.bin{suffix}").mkdir(parents=True)
    with serving(CONTENT) as site:
        with pytest.raises(error, match=message):
            Asset("file.bin", site.address).find()
        assert site.asked == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the server sent an empty file"), (b"no\x1b[31m", r"only 7 bytes came, which begin with 'no\\x1b\[31m'")],
)
def test_a_stub_is_neither_taken_nor_recorded_where_no_digest_is_known(folder, content, message):
    with serving(content) as site, pytest.raises(MissingAssetError, match=message):
        Asset("file.bin", site.address).find()
    assert names(folder) == []
    with serving(b"x" * 100) as site:
        assert Asset("file.bin", site.address, sha256(b"x" * 100).hexdigest()).find().is_file()


def test_a_wrong_size_needs_no_digest(folder, monkeypatch):
    folder.mkdir()
    asset = Asset("file.bin", "https://example.com/file.bin", DIGEST, size=len(CONTENT))
    asset.path.write_bytes(CONTENT[:-1])
    monkeypatch.setattr(assets, "digest", lambda path: pytest.fail("hashed"))
    with pytest.raises(CorruptFileError, match="2999999 bytes, not 3000000"):
        asset.find()


def test_a_file_is_hashed_once_in_a_process(folder, monkeypatch):
    hashed = []
    monkeypatch.setattr(assets, "file_digest", lambda path: hashed.append(path) or sha256(CONTENT).hexdigest())
    with serving(CONTENT) as site:
        for _ in range(3):
            Asset("file.bin", site.address).find()
    assert [path.name for path in hashed] == [f".tmp-{os.getpid()}-file.bin"]
    os.utime(folder / "file.bin", (1, 1))
    digest(folder / "file.bin")
    assert len(hashed) == 2


@pytest.mark.parametrize("how", [{"cut": CUT}, {"extra": 1}, {"status": 503}], ids=str)
def test_a_broken_download_is_a_missing_file_and_leaves_nothing(folder, how):
    with serving(CONTENT, **how) as site:
        asset = Asset("file.bin", site.address)
        with pytest.raises(MissingAssetError, match=r"MiB of|answered 503") as caught:
            asset.find("or give its path with --weights FILE")
        assert str(caught.value).endswith(
            f"fetch {site.address} and put it at {asset.path}, or give its path with --weights FILE"
        )
        assert names(folder) == []
        site.cut, site.extra, site.status = None, 0, 200
        assert asset.find().read_bytes() == CONTENT


def test_a_folder_that_is_none_is_said_without_asking(monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", os.devnull)
    with serving(CONTENT) as site:
        with pytest.raises(MissingAssetError, match=f"{os.devnull} is no folder"):
            Asset("file.bin", site.address).find()
        assert site.asked == []


def test_a_folder_that_cannot_be_made_is_said(monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", "/proc/cache")
    with serving(CONTENT) as site, pytest.raises(MissingAssetError, match=r"\(/proc/cache: "):
        Asset("file.bin", site.address).find()


READ_ONLY = """
import os
import cdistill.runtime.console, cdistill.storage.download
os.chdir(sys.argv[1])
os.environ["CDISTILL_ASSETS"] = "."
import requests, requests.utils, requests.adapters, encodings.idna  # another user may not read these files
if os.getuid() == 0:
    os.setuid(65534)
for name in ("there", "there", "elsewhere"):
    try:
        print(Asset(name, sys.argv[2]).find().read_text())
    except Exception as error:
        print(error)
"""


def test_a_folder_that_cannot_be_written_is_said_once_and_serves(folder):
    folder.mkdir()
    (folder / "there").write_text("content")
    folder.chmod(0o555)
    with serving(CONTENT) as site:
        out, err = start(READ_ONLY, str(folder), site.address).communicate(timeout=60)
    folder.chmod(0o755)
    assert out.splitlines()[:2] == ["content", "content"]
    assert re.search(r"elsewhere: not found, not downloaded \(\.: Permission denied\)", out)
    assert err.count("the digest of there is not recorded") == 1
    assert names(folder) == ["there"]


FIND = "print(Asset('file.bin', sys.argv[1]).find().stat().st_size, flush=True)"


def part(folder, process):
    """What a process has written of a file, once it has begun to write."""
    temporary, deadline = folder / f".tmp-{process.pid}-file.bin", time.monotonic() + 30
    while not (temporary.is_file() and temporary.stat().st_size > 500_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    return temporary


def test_what_a_killed_download_left_is_removed_by_the_next(folder):
    with serving(CONTENT, pause=0.02) as site:
        process = start(FIND, site.address)
        left = part(folder, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert 500_000 < left.stat().st_size < len(CONTENT)
        assert not (folder / "file.bin").exists()
        site.pause = 0
        assert Asset("file.bin", site.address).find().read_bytes() == CONTENT
        assert names(folder) == ["file.bin", "file.bin.json"]


def test_two_processes_download_once(folder):
    with serving(CONTENT, pause=0.02) as site:
        both = [start(FIND, site.address) for _ in range(2)]
        told = [process.communicate(timeout=60) for process in both]
        assert [out for out, _ in told] == [f"{len(CONTENT)}\n"] * 2
        assert sum("another process is fetching it; waiting" in err for _, err in told) == 1
        assert site.sent == [len(CONTENT)]


FULL_DISK = """
import resource
from cdistill.cli.app import guard
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.exit(guard(lambda: print(Asset("file.bin", sys.argv[1]).find())))
"""


def test_a_full_disk_leaves_nothing(folder):
    with serving(CONTENT) as site:
        process = start(FULL_DISK, site.address)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 7, err
        assert "file.bin: not written, the disk (or quota) is full" in err
        assert names(folder) == []


SIGNALLED = """
from cdistill.runtime import signals
from cdistill.cli.app import guard
signals.install_handlers()
sys.exit(guard(lambda: print(Asset("file.bin", sys.argv[1]).find())))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_a_download_and_leaves_nothing(folder, number, code):
    with serving(CONTENT, pause=0.02) as site:
        process = start(SIGNALLED, site.address)
        assert part(folder, process).is_file()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "run the same command" in err
        assert names(folder) == []


OFFLINE = """
import socket
from cdistill.cli.app import guard
from cdistill.storage import download
download.HANDSHAKE = download.STALL = 1
if sys.argv[1] == "hanging":
    socket.getaddrinfo = lambda *arguments, **options: time.sleep(100)
print(guard(lambda: print(Asset("file.bin", sys.argv[2]).find("or give its path with --weights FILE"))))
"""


@pytest.fixture
def silent():
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def refused():
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("resolver", "address", "proxy"),
    [
        ("plain", "https://nowhere.invalid/file.bin", ""),
        ("hanging", "https://example.com/file.bin", ""),
        ("plain", "https://127.0.0.1:{refused}/file.bin", ""),
        ("plain", "https://127.0.0.1:{silent}/file.bin", ""),
        ("plain", "http://127.0.0.1:{silent}/file.bin", ""),
        ("plain", "https://10.255.255.1/file.bin", ""),
        ("plain", "https://example.com/file.bin", "http://127.0.0.1:{refused}"),
        ("plain", "https://example.com/file.bin", "http://127.0.0.1:{silent}"),
        ("plain", "https://example.com/file.bin", "nonsense://"),
    ],
    ids=[
        "unknown host", "hanging name service", "refused", "silent to https", "silent to http", "black hole",
        "refusing proxy", "silent proxy", "nonsensical proxy",
    ],
)  # fmt: skip
def test_without_a_network_one_message_comes(folder, silent, refused, resolver, address, proxy, monkeypatch):
    address = address.format(silent=silent, refused=refused)
    monkeypatch.setenv("https_proxy", proxy.format(silent=silent, refused=refused))
    out, err = start(OFFLINE, resolver, address).communicate(timeout=60)  # a thread that hangs does not keep it
    assert out == "3\n"
    assert len(err.splitlines()) == 1
    assert err.startswith("error: file.bin: not found, not downloaded (no connection: ")
    assert f"fetch {address} and put it at {folder / 'file.bin'}, or give its path with --weights FILE" in err


def test_processes_do_not_wait_for_each_other_to_find_no_network():
    """The lock is taken once the server accepts connections: the ranks of a training fail together, rank 0 reports."""
    ranks = [start(OFFLINE, "hanging", "https://example.com/file.bin") for _ in range(3)]
    told = [process.communicate(timeout=60) for process in ranks]
    assert [out for out, _ in told] == ["3\n"] * 3
    assert not any("waiting" in err for _, err in told)


@pytest.mark.parametrize("how", ["hanging name service", "black hole"])
def test_the_promise_of_two_seconds_is_kept_by_the_budget(how, monkeypatch):
    from cdistill.storage import download as fetching

    answers = threading.Event()
    given = []

    def connect(place, timeout):
        given.append(timeout)
        if how == "black hole":
            raise TimeoutError("timed out")
        answers.wait(60)

    monkeypatch.setattr("socket.create_connection", connect)
    begun = time.monotonic()
    with pytest.raises(MissingAssetError, match=r"did not answer in 1\.3 s|timed out"):
        Asset("file.bin", "https://example.com/file.bin").find()
    answers.set()
    assert given == [fetching.BUDGET]
    assert fetching.BUDGET + 0.5 < 2  # a command starts in less than the half
    assert time.monotonic() - begun < 10


def test_a_stopped_download_of_a_metrics_weights_is_no_metric_left_out(monkeypatch):
    import torch

    from cdistill.data.source import Source
    from cdistill.errors import StoppedError
    from cdistill.evaluation.features import load_features
    from cdistill.evaluation.references import Reference

    def find(self, hint=""):
        raise StoppedError("stopped", 75)

    monkeypatch.setattr(Asset, "find", find)
    with pytest.raises(StoppedError):
        choose_metrics(
            ["fid", "teacher-mse"],
            Reference(Source("large", torch.zeros(4, 3, 32, 32, dtype=torch.uint8))),
            load_features("legacy_tensorflow"),
        )


def test_every_asset_that_is_named_has_a_digest():
    for asset in ASSETS:
        assert re.fullmatch("[0-9a-f]{64}", asset.sha256)
        assert asset.address == f"https://{asset.address.removeprefix('https://')}"
        assert asset.address.endswith(asset.name)
