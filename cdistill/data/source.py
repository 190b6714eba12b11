"""What a data source is, and the map between uint8 and [-1, 1]."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cdistill.errors import CdistillError
from cdistill.networks.classes import Classes

QUANTISATION = "uint8 = clamp(127.5 x + 128)"  # what `to_uint8` does, as records of samples state it


def from_uint8(images: Tensor) -> Tensor:
    """Returns x / 127.5 - 1 in float32 (EDM's scaling)."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Returns clamp(127.5 x + 128, 0, 255) cut to an integer, as EDM writes its images; inverse of `from_uint8`."""
    return (x.double() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Source:
    """Samples with their labels; what a loader returns, see `cdistill/data/README.md`.

    Attributes:
        content: Computes a SHA-256 that stands for the samples, where reading them all would take long.
    """

    name: str  # name in the registry, or the absolute path of a file or folder
    samples: Tensor  # uint8 images (N, C, H, W), or float64 vectors (N, d); read only, they may be mapped from a file
    labels: Tensor | None = None  # class indices (N,), int64, or None, with 0 classes
    num_classes: int = 0
    class_names: tuple[str, ...] = ()  # of all classes, or () where nothing says
    flips: bool = False  # whether a horizontally flipped sample is as good as the sample
    content: Callable[[], str] | None = None
    lossy: bool = False  # whether images were stored with losses, as JPEG files are

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.samples.shape[1:])

    @cached_property
    def classes(self) -> Classes:
        """The classes with their counts and names; none without labels."""
        if self.labels is None:
            return Classes()
        return Classes(tuple(self.labels.cpu().bincount(minlength=self.num_classes).tolist()), self.class_names)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the samples and labels."""
        content = self.content().encode() if self.content else self.samples.contiguous().numpy().tobytes()
        digest = hashlib.sha256(content)
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def resident(self, device: torch.device) -> Source:
        """Returns the source with its samples on a GPU, if they take at most a tenth of what is free there.

        Itself otherwise. Eight bits a value: CIFAR-10 takes 150 MB.
        """
        if device.type != "cuda" or self.samples.nbytes > torch.cuda.mem_get_info(device)[0] / 10:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, samples=self.samples.to(device), labels=labels)

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns the samples at `indices` (B,), int64, on the CPU, and their labels (B,), int64, or None.

        x (B, ...) is float32 in [-1, 1] for images, float64 for vectors. `flip` (B,), bool, says which images to
        mirror, where `flips` holds.
        """
        place = self.samples.device
        indices = indices.to(place, non_blocking=True)  # the copy of a few bytes is never waited for
        chosen = self.samples[indices]
        x = from_uint8(chosen) if chosen.dtype == torch.uint8 else chosen
        if flip is not None and self.flips:
            x = torch.where(flip.to(place, non_blocking=True)[:, None, None, None], x.flip(-1), x)
        return x, None if self.labels is None else self.labels[indices]


def check_split(name: str, split: str, allowed: Collection[str] = ("train",)) -> None:
    """Raises CdistillError unless the source called `name` has the split; it lists the `allowed` ones."""
    if split not in allowed:
        raise CdistillError(f"data {name!r}: has no split {split!r}; only {' and '.join(map(repr, allowed))}")
