"""Files that the package does not bring: the weights of feature networks. Each is known by its SHA-256."""

from dataclasses import dataclass
from pathlib import Path

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.storage import asset_folder, file_digest


@dataclass(frozen=True)
class Asset:
    """A file that has to be fetched once.

    Attributes:
        name: Its name in the asset folder.
        address: Where it is published.
        sha256: Its digest, in hexadecimal.
    """

    name: str
    address: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where it belongs."""
        return asset_folder() / self.name

    def find(self) -> Path:
        """Returns the path of the file after checking its digest.

        Raises:
            MissingAssetError: It is not there; the message says what to fetch and where to put it.
            CorruptFileError: Its digest is another: a broken download, or another file of that name.
        """
        if not self.path.is_file():
            raise MissingAssetError(
                f"{self.name}: not found; fetch {self.address} (sha256 {self.sha256[:12]}...) and put it at {self.path}"
            )
        found = file_digest(self.path)
        if found != self.sha256:
            raise CorruptFileError(
                f"{self.path}: sha256 is {found[:12]}..., not {self.sha256[:12]}...; fetch {self.address} again"
            )
        return self.path


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
