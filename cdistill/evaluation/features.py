"""Feature networks: what turns images into the vectors that FID, KID, precision and recall compare.

A network from another package derives from :class:`FeatureNetwork`, takes no argument and is named in the entry-point
group ``cdistill.features``. Without a package, a TorchScript file or ``module:callable`` will do: both are the user's
own code, which runs because the user names it.
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from typing_extensions import override

from cdistill.data.memory import check_memory
from cdistill.data.source import from_uint8
from cdistill.errors import CdistillError, MissingAssetError, brief
from cdistill.registry import FEATURES, check_features, is_script
from cdistill.runtime import signals
from cdistill.runtime.console import progress
from cdistill.storage import assets

MOST_DIMENSIONS = 2**14  # of features, whose covariance is taken
BATCH = 64  # images that a feature network sees; fixed, because the number alone changes the last bits


class FeatureNetwork(ABC):
    """Maps images to feature vectors; results call it by its `name`: registered, a path, or ``module:callable``."""

    name: str

    @property
    def digest(self) -> str:
        """SHA-256 of its weights, "" where it has none."""
        return ""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises CdistillError if it cannot take samples of `shape`, or its weights are missing; loads nothing."""
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise CdistillError(f"features {self.name!r}: needs grey or RGB images; the samples have shape {shape}")

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Returns the features (B, d) of uint8 images (B, C, H, W)."""


class Pixels(FeatureNetwork):
    """The values themselves, scaled to [-1, 1]; of images with any number of channels."""

    name = "pixels"

    @override
    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3:
            raise CdistillError(f"features {self.name!r}: needs images; the samples have shape {shape}")
        check_dimensions(prod(shape), self.name)

    @override
    def __call__(self, images: Tensor) -> Tensor:
        return from_uint8(images).flatten(1)


class Script(FeatureNetwork):
    """A TorchScript file: uint8 RGB images (B, 3, H, W) -> (B, d). Loading it runs what is in it."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path

    @property
    @override
    def digest(self) -> str:
        self._check_file()
        return assets.digest(self.path)

    @override
    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        self._check_file()

    @override
    def __call__(self, images: Tensor) -> Tensor:
        with extracting():
            return check_vectors(self._network(as_rgb(images).to(device())), len(images), self.name)

    @cached_property
    def _network(self) -> Any:
        with loading_script(self.path):
            return torch.jit.load(self.path, map_location=device()).eval()

    def _check_file(self) -> None:
        if not self.path.is_file():
            raise MissingAssetError(f"{self.path}: no such file; give the path of a TorchScript file")


class Inception(FeatureNetwork):
    """Inception-v3 as EDM and CTM use it for FID; features (B, 2048).

    TensorFlow's network as NVIDIA scripted it, by clean-fid, whose mode `legacy_tensorflow` it is; it resizes images
    itself, as TensorFlow 1 did. Its file is looked for in the asset folder, fetched, and its SHA-256 checked.
    """

    name = "legacy_tensorflow"

    @property
    @override
    def digest(self) -> str:
        return assets.digest(assets.INCEPTION.find())

    @override
    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        assets.INCEPTION.find()

    @override
    def __call__(self, images: Tensor) -> Tensor:
        with extracting():
            features: Tensor = self._network(as_rgb(images).to(device()).float())
        return features

    @cached_property
    def _network(self) -> Any:
        from cleanfid.inception_torchscript import InceptionV3W

        # Not its loader, which downloads to a folder that every user can write to, and checks nothing.
        with loading_script(path := assets.INCEPTION.find()):
            return InceptionV3W(str(path.parent), download=False, resize_inside=True).to(device()).eval()


class Imported(FeatureNetwork):
    """``module:callable``: uint8 RGB images (B, 3, H, W) on the CPU -> (B, d). It is imported, which runs it.

    A module in the current folder needs PYTHONPATH=. ; CdistillError if it cannot be imported or called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        module, _, attribute = name.partition(":")
        try:
            self._function = getattr(import_module(module), attribute)
        except Exception as error:  # whatever the user's module raises while it is imported
            raise CdistillError(f"features {name!r}: does not import ({type(error).__name__}: {error})") from error
        if not callable(self._function):
            raise CdistillError(f"features {name!r}: not a function; needs one from images (B, 3, H, W) to (B, d)")

    @cached_property
    @override
    def digest(self) -> str:
        """SHA-256 of the module's file and, of a torch module, of its weights."""
        path = import_module(self.name.partition(":")[0]).__file__
        sha256 = hashlib.sha256(Path(path).read_bytes() if path else b"")
        if isinstance(self._function, torch.nn.Module):
            for key, value in sorted(self._function.state_dict().items()):
                sha256.update(key.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha256.hexdigest()

    @override
    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return check_vectors(self._function(as_rgb(images)), len(images), self.name)


def load_features(name: str) -> FeatureNetwork:
    """Returns a feature network by its registered name, a TorchScript file or ``module:callable``, or CdistillError."""
    check_features(name)
    if name in FEATURES.names():
        network: FeatureNetwork = FEATURES.get(name)()
        return network
    return Script(Path(name)) if is_script(name) else Imported(name)


def extract(network: FeatureNetwork, samples: Tensor, accelerator: Accelerator | None = None) -> Tensor:
    """Returns the features (n, d) of all samples, float32 on the CPU; StoppedError if a signal came.

    Every process takes its turn at batches of a fixed size, and returns everything.
    """
    if not len(samples):
        raise ValueError("no samples")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    first = network(samples[:BATCH]).float().cpu()  # by every process: it gives the dimension
    check_dimensions(first.shape[1], network.name)
    check_memory(4 * len(samples) * first.shape[1], f"features {network.name!r} of {len(samples):,} samples")
    features = torch.zeros(len(samples), first.shape[1])
    bar = progress(len(samples), f"features ({network.name})", "img")
    with nullcontext(None) if isinstance(network, Pixels) else bar as advance:  # pixels take no time
        for number, start in enumerate(range(0, len(samples), BATCH)):
            signals.check("evaluation")
            batch = samples[start : start + BATCH]
            if number % world == rank:
                features[start : start + BATCH] = network(batch).float().cpu() if number else first
            if advance is not None:
                advance(len(batch), "")
    if accelerator is not None and world > 1:
        features = accelerator.reduce(features.to(accelerator.device), "sum").cpu()
    return features


def as_rgb(images: Tensor) -> Tensor:
    """Returns images (B, 3, H, W), grey ones repeated to three colours."""
    return images.expand(-1, 3, -1, -1)


def check_vectors(features: Any, count: int, name: str) -> Tensor:
    """Returns what a user's network made of `count` images, or raises CdistillError if it is no vector for each."""
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != count:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise CdistillError(f"features {name!r}: got {got} for {count} images; needs a tensor ({count}, d)")
    return features


def check_dimensions(count: int, name: str) -> None:
    """Raises CdistillError if features have too many dimensions for a covariance, 2 GiB."""
    if count > MOST_DIMENSIONS:
        raise CdistillError(
            f"features {name!r}: {count:,} dimensions; at most {MOST_DIMENSIONS:,}; choose other features, or smaller "
            "images"
        )


def device() -> torch.device:
    """Returns where networks run: this process's GPU, if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def extracting() -> Iterator[None]:
    """No gradients; convolutions that give the same numbers every time, in full float32 (by default GPUs use TF32)."""
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.no_grad(), exact:
        yield


@contextmanager
def loading_script(path: Path) -> Iterator[None]:
    """Without torch's advice to authors of TorchScript files, which users cannot follow; CdistillError if it fails."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit", category=Warning)
            yield
    except (RuntimeError, ValueError) as error:
        raise CdistillError(f"{path}: does not load as TorchScript ({brief(error)}); save it by script.save") from error
