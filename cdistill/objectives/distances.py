"""Distances d(x, y) of Eqs. 5 and 7."""

from abc import ABC, abstractmethod

from torch import Tensor
from typing_extensions import override

from cdistill.errors import RecipeError
from cdistill.registry import DISTANCES


class Distance(ABC):
    """d(x, y) of each sample. A distance from another package derives from this class.

    Built without arguments; what it needs, such as weights, is loaded then, so that a missing file is reported before
    training.

    Attributes:
        images_only: Whether it compares grey or RGB images and nothing else.
    """

    images_only = False

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Maps samples (B, ...) and (B, ...) to distances (B,)."""

    @classmethod
    def meta(cls) -> "Distance":
        """Returns an instance that works on the meta device and needs no file, for counting what a call costs."""
        return cls()


class L2(Distance):
    """Mean of (x - y)^2 over the elements of each sample."""

    @override
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().flatten(1).mean(1)


class PseudoHuber(Distance):
    """sqrt(|x-y|^2 + c^2) - c with c = 0.00054 sqrt(d) (Song & Dhariwal 2024, Section 3.3)."""

    @override
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        difference = (x - y).flatten(1)
        c = 0.00054 * difference.shape[1] ** 0.5
        out: Tensor = (difference.square().sum(1) + c**2).sqrt() - c
        return out


def make_distance(name: str, sample_shape: tuple[int, ...], meta: bool = False) -> Distance:
    """Builds a registered distance for samples of `sample_shape`; with `meta` one that counts and needs no file.

    Raises:
        RecipeError: It compares images, and these are none.
        MissingAssetError: Its weights are not there.
    """
    kind: type[Distance] = DISTANCES.get(name)
    if kind.images_only and (len(sample_shape) != 3 or sample_shape[0] not in (1, 3)):
        raise RecipeError(
            f"objective.distance: {name!r} compares grey or RGB images; the samples have shape {sample_shape}"
        )
    return kind.meta() if meta else kind()
