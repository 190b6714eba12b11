"""What a data source is, and the map between uint8 and [-1, 1]."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cdistill.errors import CdistillError
from cdistill.registry import SOURCES

if TYPE_CHECKING:
    from torch import Tensor


def from_uint8(images: Tensor) -> Tensor:
    """Returns x / 127.5 - 1 in float32 (EDM's scaling)."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Returns clamp(127.5 x + 128, 0, 255) cut to an integer, as EDM writes its images; inverse of `from_uint8`."""
    return (x.double() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Source:
    """Samples in memory.

    Attributes:
        name: Name in the registry.
        samples: uint8 images (N, C, H, W), or float64 vectors (N, d).
        labels: Class indices (N,), int64, or None.
        num_classes: Number of classes, 0 without labels.
        flips: Whether a horizontally flipped sample is as good as the sample.
    """

    name: str
    samples: Tensor
    labels: Tensor | None = None
    num_classes: int = 0
    flips: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.samples.shape[1:])

    @property
    def digest(self) -> str:
        """SHA-256 of the samples and labels."""
        found = hashlib.sha256(self.samples.contiguous().numpy().tobytes())
        if self.labels is not None:
            found.update(self.labels.numpy().tobytes())
        return found.hexdigest()

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the samples at `indices` and their labels.

        Args:
            indices: (B,) int64.
            flip: (B,) bool, which images to mirror; used only where `flips` holds.

        Returns:
            x (B, ...), float32 in [-1, 1] for images, float64 for vectors; labels (B,) int64 or None.
        """
        chosen = self.samples[indices]
        x = from_uint8(chosen) if chosen.dtype == torch.uint8 else chosen
        if flip is not None and self.flips:
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        return x, None if self.labels is None else self.labels[indices]


def load_source(name: str, split: str = "train") -> Source:
    """Loads a data source.

    Args:
        name: A name in the registry.
        split: "train", or "heldout" where the source has such a part.

    Raises:
        UnknownNameError: No such source.
        CdistillError: The source has no such part.
    """
    found: Source = SOURCES.get(name)(split)
    return found


def only_train(name: str, split: str) -> None:
    """Raises CdistillError if `split` is not "train", for sources too small to be divided."""
    if split != "train":
        raise CdistillError(f"data {name!r}: has no part {split!r}; only 'train'")
