"""EDM's published teachers (Karras et al. 2022): file names, networks and data. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdistill.errors import MissingAssetError, RecipeError
from cdistill.registry import TEACHERS
from cdistill.storage.assets import Asset

WEIGHT_SUFFIXES = (".pkl", ".pt", ".pth", ".safetensors")  # of a teacher's name that is a path
ADDRESS = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
LICENCE = "CC BY-NC-SA 4.0 (NVIDIA, EDM weights): no commercial use"

_DDPMPP: Mapping[str, Any] = {
    "network": "song",
    "channels": 3,
    "model_channels": 128,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "augment_dim": 9,
    "channel_mult_noise": 1,
    "embedding": "positional",
    "encoder": "standard",
    "taps": [1, 1],
}
_NCSNPP: Mapping[str, Any] = {
    **_DDPMPP,
    "channel_mult_noise": 2,
    "embedding": "fourier",
    "encoder": "residual",
    "taps": [1, 3, 3, 1],
}
_CIFAR: Mapping[str, Any] = {"resolution": 32, "num_classes": 0, "channel_mult": [2, 2, 2], "dropout": 0.13}
_FFHQ: Mapping[str, Any] = {"resolution": 64, "num_classes": 0, "channel_mult": [1, 2, 2, 2], "dropout": 0.05}
_ADM: Mapping[str, Any] = {
    "network": "adm",
    "resolution": 64,
    "channels": 3,
    "num_classes": 1000,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.10,
    "augment_dim": 0,
}


@dataclass(frozen=True)
class Official:
    """A published teacher: its file at `ADDRESS`, the data source that it was trained on, and its network."""

    file: str
    data: str
    architecture: Mapping[str, Any]

    @property
    def asset(self) -> Asset:
        """The file as it is published."""
        return Asset(self.file, ADDRESS + self.file)

    def present(self) -> Path | None:
        """Returns the path of the weights, converted or as published, if they are in the asset folder."""
        places = (self.asset.path.with_suffix(".safetensors"), self.asset.path)
        return next((path for path in places if path.is_file()), None)

    def find(self, name: str) -> Path:
        """Returns the path of the weights: converted, or as published, fetched if need be; errors as `Asset.find`."""
        present = self.present()
        if present is not None and present.suffix == ".safetensors":
            return present
        return self.asset.find(f"or name another place with --weights FILE (teacher {name})")


OFFICIAL: Mapping[str, Official] = {
    "edm-cifar10": Official("edm-cifar10-32x32-uncond-vp.pkl", "cifar10", {**_DDPMPP, **_CIFAR}),
    "edm-cifar10-ve": Official("edm-cifar10-32x32-uncond-ve.pkl", "cifar10", {**_NCSNPP, **_CIFAR}),
    "edm-cifar10-cond": Official("edm-cifar10-32x32-cond-vp.pkl", "cifar10", {**_DDPMPP, **_CIFAR, "num_classes": 10}),
    "edm-cifar10-cond-ve": Official(
        "edm-cifar10-32x32-cond-ve.pkl", "cifar10", {**_NCSNPP, **_CIFAR, "num_classes": 10}
    ),
    "edm-ffhq64": Official("edm-ffhq-64x64-uncond-vp.pkl", "ffhq64", {**_DDPMPP, **_FFHQ}),
    "edm-ffhq64-ve": Official("edm-ffhq-64x64-uncond-ve.pkl", "ffhq64", {**_NCSNPP, **_FFHQ}),
    "edm-afhqv2-64": Official(
        "edm-afhqv2-64x64-uncond-vp.pkl", "afhqv2-64", {**_DDPMPP, **_FFHQ, "dropout": 0.25}
    ),
    "edm-afhqv2-64-ve": Official(
        "edm-afhqv2-64x64-uncond-ve.pkl", "afhqv2-64", {**_NCSNPP, **_FFHQ, "dropout": 0.25}
    ),
    "edm-imagenet64": Official("edm-imagenet-64x64-cond-adm.pkl", "imagenet64", _ADM),
}  # fmt: skip


def find_weights(teacher: str, weights: Path | None = None) -> Path | None:
    """Returns the file of a teacher's weights before anything heavy is imported; None if it needs no such file.

    MissingAssetError: It is not there; RecipeError: no such teacher, or weights for one that is a file.
    """
    is_path = Path(teacher).suffix in WEIGHT_SUFFIXES
    if not is_path:
        TEACHERS.check(teacher)
    elif weights is not None:
        raise RecipeError(f"weights: goes with the name of a teacher; {teacher} is a file already")
    if weights is not None or is_path:
        path = weights or Path(teacher)
        if not path.is_file():
            raise MissingAssetError(f"{path}: no such file; give the path of a teacher's weights")
        return path
    return OFFICIAL[teacher].find(teacher) if teacher in OFFICIAL else None
