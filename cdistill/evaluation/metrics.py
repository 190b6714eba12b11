"""Metrics, each a class in the registry; lower is better in all of them.

A metric from another package derives from :class:`Metric` and is named in the entry-point group
``cdistill.metrics``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from cdistill import assets
from cdistill.data import Source
from cdistill.data.source import from_uint8, to_uint8
from cdistill.errors import CdistillError
from cdistill.evaluation.frechet import frechet_distance, moments, streamed_moments

_AT_ONCE = 4096  # samples; a multiple of the network batch below


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        source: Real data.
        teacher_samples: The teacher's samples from the same seeds, in the same order (n, ...), float64.
    """

    source: Source
    teacher_samples: Tensor

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Moments of the real data, as `PixelFrechet` sees them."""
        return streamed_moments(from_uint8(part).flatten(1) for part in self.source.chunks(_AT_ONCE))


class Metric(ABC):
    """One number for a set of samples.

    Attributes:
        title: Heading of its column.
    """

    title: ClassVar[str]

    @abstractmethod
    def applies(self, source: Source) -> bool:
        """Whether the metric means something for this kind of data; decides what is measured by default."""

    def check(self, source: Source) -> None:  # noqa: B027 - most metrics need nothing
        """Raises CdistillError if the metric cannot be computed on these data here; asked before anything is drawn."""

    @abstractmethod
    def __call__(self, samples: Tensor, reference: Reference) -> float:
        """Measures `samples` (n, ...), float64, not quantised; the order is that of the reference's seeds."""


class PixelFrechet(Metric):
    """Frechet distance of the pixels of small images, quantised to uint8 as they would be stored."""

    title = "Frechet (pixels)"

    def applies(self, source: Source) -> bool:
        """Images of at most 1,024 elements, fewer than there are of them."""
        return len(source.shape) == 3 and prod(source.shape) <= min(1024, len(source))

    def check(self, source: Source) -> None:
        """See :class:`Metric`."""
        _needs_images("frechet-pixels", source)

    def __call__(self, samples: Tensor, reference: Reference) -> float:
        """See :class:`Metric`."""
        return frechet_distance(moments(from_uint8(to_uint8(samples)).flatten(1)), reference.pixels)


class TeacherError(Metric):
    """Mean square error to the end of the teacher's own trajectory from the same noise (Zheng et al. 2025, 5.3)."""

    title = "MSE to teacher"

    def applies(self, source: Source) -> bool:
        """Always."""
        return True

    def __call__(self, samples: Tensor, reference: Reference) -> float:
        """See :class:`Metric`."""
        return float((samples - reference.teacher_samples).square().mean())


class Wasserstein(Metric):
    """Wasserstein-1 distance between the samples and the data, in one dimension."""

    title = "Wasserstein-1"

    def applies(self, source: Source) -> bool:
        """Scalars."""
        return source.shape == (1,)

    def check(self, source: Source) -> None:
        """See :class:`Metric`."""
        if not self.applies(source):
            raise CdistillError("wasserstein: needs one-dimensional samples; choose another metric")

    def __call__(self, samples: Tensor, reference: Reference) -> float:
        """See :class:`Metric`."""
        return wasserstein_1d(samples, reference.source.samples[:])


class InceptionFrechet(Metric):
    """FID: Frechet distance of TensorFlow's Inception features through clean-fid (`legacy_tensorflow`)."""

    title = "FID"
    _real: tuple[Source, tuple[Tensor, Tensor]] | None = None

    def applies(self, source: Source) -> bool:
        """Images of 32x32 or more."""
        return len(source.shape) == 3 and source.shape[-1] >= 32

    def check(self, source: Source) -> None:
        """See :class:`Metric`."""
        _needs_images("fid", source)
        assets.INCEPTION.find()

    def __call__(self, samples: Tensor, reference: Reference) -> float:
        """See :class:`Metric`."""
        if self._real is None or self._real[0] is not reference.source:
            features = (self._features(part) for part in reference.source.chunks(_AT_ONCE))
            self._real = reference.source, streamed_moments(features)
        return frechet_distance(moments(self._features(to_uint8(samples))), self._real[1])

    @cached_property
    def _network(self) -> torch.nn.Module:
        from cleanfid.inception_torchscript import InceptionV3W

        network: torch.nn.Module = InceptionV3W(str(assets.INCEPTION.find().parent), download=False, resize_inside=True)
        return network

    def _features(self, images: Tensor, batch: int = 64) -> Tensor:
        """Returns the features (n, 2048) of uint8 images (n, C, H, W); grey ones are repeated to three colours."""
        with torch.inference_mode():
            return torch.cat([self._network(part.expand(-1, 3, -1, -1).float()) for part in images.split(batch)])


def _needs_images(name: str, source: Source) -> None:
    if len(source.shape) != 3:
        raise CdistillError(f"{name}: needs images, not {source.name!r}; choose another metric")


def wasserstein_1d(first: Tensor, second: Tensor) -> float:
    """Wasserstein-1 distance between two sets of scalars, (n, 1) and (m, 1)."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(first.flatten().numpy(), second.flatten().numpy()))
