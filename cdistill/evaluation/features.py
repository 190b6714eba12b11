"""Feature networks: what turns images into the vectors that Frechet distances and their kin compare.

One from another package derives from :class:`FeatureNetwork`, takes no argument and is named in the entry-point group
``cdistill.features``. Without a package, a TorchScript file or ``module:callable`` will do: both are the user's own
code, which runs because the user names it.
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cdistill.data.source import from_uint8
from cdistill.errors import CdistillError, MissingAssetError
from cdistill.registry import FEATURES, check_features, is_script
from cdistill.storage import assets


class FeatureNetwork(ABC):
    """Maps images to feature vectors.

    Attributes:
        name: What it is called in results: a name in the registry, a path, or ``module:callable``.
        classifies: Whether it has class probabilities too.
    """

    name: str
    classifies: ClassVar[bool] = False

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

    def probabilities(self, images: Tensor) -> Tensor:
        """Returns the class probabilities (B, K) of uint8 images (B, C, H, W).

        Raises:
            CdistillError: The network has none.
        """
        raise CdistillError(f"features {self.name!r}: no class probabilities; choose a network that classifies")


class Pixels(FeatureNetwork):
    """The values themselves, scaled to [-1, 1]."""

    name = "pixels"

    def check(self, shape: tuple[int, ...]) -> None:
        """See :class:`FeatureNetwork`; images with any number of channels."""
        if len(shape) != 3:
            raise CdistillError(f"features {self.name!r}: needs images; the samples have shape {shape}")

    def __call__(self, images: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        return from_uint8(images).flatten(1)


class Script(FeatureNetwork):
    """A TorchScript file: uint8 RGB images (B, 3, H, W) -> (B, d). Loading it runs what is in it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        self._present()
        return assets.digest(self.path)

    def check(self, shape: tuple[int, ...]) -> None:
        """See :class:`FeatureNetwork`."""
        super().check(shape)
        self._present()

    def __call__(self, images: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        with extracting():
            return as_features(self._network(as_rgb(images).to(device())), len(images), self.name)

    @cached_property
    def _network(self) -> Any:
        try:
            with load_scripts():
                return torch.jit.load(self.path, map_location=device()).eval()
        except (RuntimeError, ValueError) as error:
            said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise CdistillError(
                f"{self.path}: does not load as TorchScript ({said}); save it by script.save"
            ) from error

    def _present(self) -> None:
        if not self.path.is_file():
            raise MissingAssetError(f"{self.path}: no such file; give the path of a TorchScript file")


class Imported(FeatureNetwork):
    """``module:callable``: uint8 RGB images (B, 3, H, W) on the CPU -> (B, d). It is imported, which runs it.

    Args:
        name: Where it is, as in ``my_package.networks:embed``; a module in the current folder needs PYTHONPATH=. .

    Raises:
        CdistillError: It cannot be imported or called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        module, _, attribute = name.partition(":")
        try:
            self._function = getattr(import_module(module), attribute)
        except Exception as error:  # whatever the user's module raises while it is imported
            raise CdistillError(f"features {name!r}: does not import ({type(error).__name__}: {error})") from error
        if not callable(self._function):
            raise CdistillError(f"features {name!r}: is no function; it takes images (B, 3, H, W), returns (B, d)")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the module's file and, of a torch module, of its weights."""
        path = import_module(self.name.partition(":")[0]).__file__
        found = hashlib.sha256(Path(path).read_bytes() if path else b"")
        if isinstance(self._function, torch.nn.Module):
            for key, value in sorted(self._function.state_dict().items()):
                found.update(key.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def __call__(self, images: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        with torch.no_grad():
            return as_features(self._function(as_rgb(images)), len(images), self.name)


def load_features(name: str) -> FeatureNetwork:
    """Returns a feature network: a name in the registry, the path of a TorchScript file, or ``module:callable``.

    Raises:
        UnknownNameError: It is none of them.
        CdistillError: What is named cannot be imported.
    """
    check_features(name)
    if name in FEATURES.names():
        found: FeatureNetwork = FEATURES.get(name)()
        return found
    return Script(Path(name)) if is_script(name) else Imported(name)


def as_rgb(images: Tensor) -> Tensor:
    """Returns images (B, 3, H, W), grey ones repeated to three colours."""
    return images.expand(-1, 3, -1, -1)


def as_features(found: Any, count: int, name: str) -> Tensor:
    """Returns what a user's network made of `count` images, if it is a vector for each.

    Raises:
        CdistillError: It is something else.
    """
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != count:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise CdistillError(f"features {name!r}: got {got} for {count} images; needs a tensor ({count}, d)")
    return found


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
def load_scripts() -> Iterator[None]:
    """Silences torch's advice to the authors of TorchScript files, which those who use one cannot follow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit", category=Warning)
        yield
