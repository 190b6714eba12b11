"""Feature networks: what turns images into the vectors that Frechet distances and their kin compare."""

from abc import ABC, abstractmethod

from torch import Tensor

from cdistill.data.source import from_uint8


class FeatureNetwork(ABC):
    """Maps images to feature vectors.

    Attributes:
        name: What it is called in results: a name in the registry, a path, or ``module:callable``.
    """

    name: str

    @property
    def digest(self) -> str:
        """SHA-256 of its weights, "" where it has none."""
        return ""

    def check(self, shape: tuple[int, ...]) -> None:  # noqa: B027 - most have nothing to object
        """Raises CdistillError if samples of `shape` cannot be given to it, or its weights are missing; loads nothing."""

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Returns the features (B, d) of uint8 images (B, C, H, W)."""


class Pixels(FeatureNetwork):
    """The values themselves, scaled to [-1, 1]."""

    name = "pixels"

    def __call__(self, images: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        return from_uint8(images).flatten(1)


def load_features(name: str) -> FeatureNetwork:
    """stub."""
    return Pixels()
