"""Files that the package does not ship: weights that others publish. Each is fetched once and checked at every use."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.runtime.console import say_once
from cdistill.storage.bounded import read_json
from cdistill.storage.download import FetchError, alone, download, reach
from cdistill.storage.files import asset_folder, file_digest, replacing, write_text

LEAST = 2**20  # bytes that a download must have if neither its size nor its digest is known
_digests: dict[tuple[int, ...], str] = {}


@dataclass(frozen=True)
class Asset:
    """A file that has to be fetched once: its name in the asset folder, where it is published, its digest and bytes.

    Where its publisher gives no digest, size and SHA-256 are recorded beside it, in ``NAME.json``, at first use.
    """

    name: str
    address: str
    sha256: str | None = None
    size: int | None = None

    @property
    def path(self) -> Path:
        """Where it belongs."""
        return asset_folder() / self.name

    @property
    def record(self) -> Path:
        """Where its digest is recorded, if none is published."""
        return self.path.with_name(f"{self.path.name}.json")

    def find(self, hint: str = "") -> Path:
        """Returns the path of the file, downloaded if need be, after checking its digest, once in a process.

        `hint` is another remedy for a missing file, such as "or give its path with --weights FILE".

        Raises:
            MissingAssetError: It is missing and cannot be downloaded; the message says what to put where. Without a
                network it comes within two seconds.
            CorruptFileError: Its digest differs: a broken download, or another file of that name; or the record of its
                digest cannot be read, which is reported before anything is fetched.
            DiskFullError: The download did not fit.
            StoppedError: A signal came during the download.
        """
        expected = self._expected()
        if not self.path.is_file():
            self._fetch(expected, hint)
        self._check(self.path, expected)
        if self.sha256 is None and not self.record.exists():
            self._remember()
        return self.path

    def _fetch(self, expected: str | None, hint: str) -> None:
        folder = self.path.parent
        try:
            if folder.exists() and not folder.is_dir():
                raise FetchError(f"{folder} is no folder")
            if self.path.is_dir():
                raise FetchError(f"{self.path} is a folder, move it away")
            reach(self.address)
            folder.mkdir(parents=True, exist_ok=True)
            with alone(self.path):
                for left in folder.glob(f".tmp-*-{self.path.name}"):  # by a process that was killed
                    left.unlink()
                if not self.path.is_file():
                    with replacing(self.path) as temporary:
                        download(self.address, temporary, self.path.name, self.size)
                        self._accept(temporary, expected)
        except FetchError as error:
            raise self._missing(str(error), hint) from error
        except OSError as error:
            raise self._missing(f"{folder}: {error.strerror or error}", hint) from error

    def _accept(self, path: Path, expected: str | None) -> None:
        """Refuses a download with a wrong digest, or one far too small to be true."""
        size = path.stat().st_size
        if expected is None and self.size is None and size < LEAST:
            with path.open("rb") as file:
                begin = file.read(40)
            raise FetchError(f"only {size} bytes came, which begin with {ascii(begin)[1:]}")
        try:
            self._check(path, expected)
        except CorruptFileError as error:
            raise CorruptFileError(f"{self.name}: the download is discarded: {error}") from error

    def _check(self, path: Path, expected: str | None) -> None:
        """Raises CorruptFileError if `path` has another size or digest than it should."""
        size = path.stat().st_size
        if self.size not in (None, size):
            raise CorruptFileError(f"{path}: {size} bytes, not {self.size}; fetch {self.address} again")
        actual = digest(path)
        if expected not in (None, actual):
            remedy = f"fetch {self.address} again"
            if self.sha256 is None:
                remedy = (
                    f"{self.record} recorded that at first use: remove it if the change is wanted, or both and {remedy}"
                )
            raise CorruptFileError(f"{path}: sha256 is {actual[:12]}..., not {str(expected)[:12]}...; {remedy}")

    def _expected(self) -> str | None:
        """Returns the digest that was published, or else recorded at first use, if any."""
        try:
            if self.sha256 is not None or not self.record.exists():
                return self.sha256
            recorded = read_json(self.record).get("sha256")
        except OSError as error:
            raise CorruptFileError(f"{self.record}: cannot be read ({error.strerror}); fix or remove it") from error
        if not isinstance(recorded, str) or not re.fullmatch("[0-9a-f]{64}", recorded):
            raise CorruptFileError(f"{self.record}: not the record of a digest; remove it")
        return recorded

    def _remember(self) -> None:
        facts = {
            "address": self.address,
            "size": self.path.stat().st_size,
            "sha256": digest(self.path),
            "recorded": time.strftime("%Y-%m-%d"),
        }
        try:
            write_text(self.record, json.dumps(facts, indent=1) + "\n")
        except OSError as error:
            say_once(f"{self.record}: {error.strerror}; the digest of {self.name} is not recorded, nor checked later")

    def _missing(self, reason: str, hint: str) -> MissingAssetError:
        known = f" (sha256 {self.sha256[:12]}...)" if self.sha256 else ""
        other = f", {hint}" if hint else ""
        return MissingAssetError(
            f"{self.name}: not found, not downloaded ({reason}); fetch {self.address}{known} and put it at "
            f"{self.path}{other}"
        )


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file; computed once in a process for each state of it, whatever it is called."""
    facts = path.stat()
    state = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    if state not in _digests:
        _digests[state] = file_digest(path)
    return _digests[state]


VGG16 = Asset(
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
INCEPTION = Asset(
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
ASSETS = (VGG16, INCEPTION)

_STATISTICS = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/"
EDM_STATISTICS = {  # by the name of the data source; NVIDIA publishes no digests
    data: Asset(f"fid-refs/{file}", _STATISTICS + file)
    for data, file in {
        "afhqv2-64": "afhqv2-64x64.npz",
        "cifar10": "cifar10-32x32.npz",
        "ffhq64": "ffhq-64x64.npz",
        "imagenet64": "imagenet-64x64.npz",
    }.items()
}
