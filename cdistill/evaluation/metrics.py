"""Metrics, each a class in the registry; each returns a figure with what every sample contributes to it.

A metric from another package derives from :class:`Metric` and is named in the entry-point group ``cdistill.metrics``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import nan, prod
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from typing_extensions import override

from cdistill.data import Source
from cdistill.errors import CdistillError, MismatchError
from cdistill.evaluation import pairs
from cdistill.evaluation.estimates import Estimate, mean_estimate
from cdistill.evaluation.features import FeatureNetwork, Inception, Pixels, device, extract
from cdistill.evaluation.frechet import frechet_estimate, gaussian, streamed_moments
from cdistill.evaluation.references import Reference

MOST_PIXELS = 4096  # values of an image whose covariance is taken
MOST_VALUES = 1024  # of a vector
_BLOCK = 1024  # vectors that are looked at together
_NEIGHBOURS = 3  # k of precision and recall


@dataclass(frozen=True)
class SampleSet:
    """Samples of a list of seeds, in its order.

    Attributes:
        errors: Mean square distance of each to the end point of the teacher's trajectory from the same noise (n,),
            float64, before quantisation; None without a teacher.
    """

    samples: Tensor  # uint8 images (n, C, H, W), quantised as they would be stored, or float64 vectors (n, d)
    errors: Tensor | None = None
    accelerator: Accelerator | None = None
    _features: dict[str, Tensor] = field(default_factory=dict)

    def features(self, network: FeatureNetwork) -> Tensor:
        """Returns the features (n, d), float32 on the CPU, of all samples; computed once."""
        if network.name not in self._features:
            self._features[network.name] = extract(network, self.samples, self.accelerator)
        return self._features[network.name]


class Metric(ABC):
    """A figure of a set of samples, with the `title` of its column; some need another feature network, or none."""

    title: str
    better: ClassVar[Literal["lower", "higher"]] = "lower"
    needs: ClassVar[str] = ""  # what is said where it does not apply to the data, if it needs some of its own kind

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network

    @abstractmethod
    def applies(self, source: Source) -> bool:
        """Whether it is measured by default for this kind of data."""

    def check(self, reference: Reference) -> None:
        """Raises CdistillError if the metric cannot be computed here; called before anything is drawn."""
        if self.needs and (reference.source is None or not self.applies(reference.source)):
            raise CdistillError(f"{self.needs}; choose another metric")

    @abstractmethod
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """Measures samples, quantised as they would be stored; the reference is taken as it is."""


class FeatureMetric(Metric):
    """A metric of feature vectors, of points of the data or of their moments alone; `heading` lacks the network."""

    heading: ClassVar[str]
    compares_points: ClassVar[bool] = True

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__(network)
        self.title = f"{self.heading} ({network.name})"

    @override
    def applies(self, source: Source) -> bool:
        """Images: of 32x32 or more by Inception, which was made for photographs; all by a network of one's own."""
        if len(source.shape) != 3 or isinstance(self.network, Pixels):
            return False
        return source.shape[-1] >= 32 or not isinstance(self.network, Inception)

    @override
    def check(self, reference: Reference) -> None:
        source = reference.source
        if source is not None and len(source.shape) != 3:
            raise CdistillError(f"{self.title}: needs images, not {source.name!r}; choose another metric")
        reference.check(self.network, self.compares_points)

    def features(self, samples: SampleSet) -> Tensor:
        """Returns the features of the samples (n, d), float32; CdistillError unless two or more, all finite."""
        features = samples.features(self.network)
        if len(features) < 2:
            raise CdistillError(f"samples: got {len(features)}; a figure of features needs at least 2")
        if not all(block.isfinite().all() for block in features.split(_BLOCK)):  # at once, as large as the whole
            raise CdistillError(
                f"features {self.network.name!r}: not finite on the samples; choose another network with --features"
            )
        return features

    def real(self, samples: Tensor, reference: Reference) -> Tensor:
        """Returns the features of the data (m, d), float32; MismatchError if those of the samples have another d."""
        features = reference.features(self.network)
        _check_dimension(samples, features.shape[1], reference)
        return features


class Frechet(FeatureMetric):
    """Frechet distance of the features' Gaussians (Heusel et al. 2017); with Inception it is FID."""

    heading = "Frechet"
    compares_points = False

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__(network)
        if isinstance(network, Inception):
            self.title = "FID"

    @override
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        features, network = self.features(samples), self.network
        real = reference.once(f"gaussian {network.name}", lambda: gaussian(*reference.moments(network)))
        _check_dimension(features, len(real[0]), reference)
        return frechet_estimate(features, real)


class PixelFrechet(Frechet):
    """Frechet distance of the pixels of small images, whatever network is chosen."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__(Pixels())

    @override
    def applies(self, source: Source) -> bool:
        """Images of at most 1,024 values, if the data have more images than that."""
        return len(source.shape) == 3 and prod(source.shape) <= min(1024, len(source))

    @override
    def check(self, reference: Reference) -> None:
        super().check(reference)
        shape = reference.source.shape if reference.source else ()
        if prod(shape) > MOST_PIXELS:
            raise CdistillError(
                f"frechet-pixels: got images of {prod(shape):,} values; at most {MOST_PIXELS:,}; choose another metric"
            )


class KernelDistance(FeatureMetric):
    """KID: the unbiased squared distance of the features' kernel means, over all pairs (Binkowski et al. 2018)."""

    heading = "KID"

    @override
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        features = self.features(samples)
        real = self.real(features, reference)
        within = reference.once(f"mean kernel {self.network.name}", lambda: pairs.mean_kernel(real, device()))
        return pairs.kernel_distance(features, real, within, device())


class Precision(FeatureMetric):
    """Share of the samples among the data (Kynkaanniemi et al. 2019), k = 3."""

    heading, better = "precision", "higher"

    @override
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        features = self.features(samples)
        real = self.real(features, reference)
        balls = reference.once(
            f"balls {self.network.name}", lambda: pairs.find_balls(real, _NEIGHBOURS, device(), self.heading)
        )
        return pairs.precision(features, balls)


class Recall(FeatureMetric):
    """Share of the data among the samples (Kynkaanniemi et al. 2019), k = 3."""

    heading, better = "recall", "higher"

    @override
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        features = self.features(samples)
        balls = pairs.find_balls(features, _NEIGHBOURS, device(), self.heading)
        return pairs.recall(balls, self.real(features, reference))


class TeacherError(Metric):
    """Mean square error to the end point of the teacher's trajectory from the same noise (Zheng et al. 2025, 5.3)."""

    title = "MSE to teacher"

    @override
    def applies(self, source: Source) -> bool:
        """Always."""
        return True

    @override
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """Returns the mean over the samples; CdistillError if they come without a teacher."""
        if samples.errors is None:
            raise CdistillError("teacher-mse: these samples have no teacher; choose other metrics")
        return mean_estimate(samples.errors)


class Wasserstein(Metric):
    """Wasserstein-1 distance between the samples and the data, in one dimension."""

    title = "Wasserstein-1"
    needs = "wasserstein: needs one-dimensional samples"

    @override
    def applies(self, source: Source) -> bool:
        """Scalars."""
        return source.shape == (1,)

    @override
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """Returns the distance; NaN where the student has diverged."""
        assert reference.source is not None
        if not samples.samples.isfinite().all():
            return _not_finite(len(samples.samples))
        return wasserstein_estimate(samples.samples.flatten(), reference.source.samples[:].flatten())


class VectorFrechet(Metric):
    """Frechet distance of the vectors' own values, in float64, unscaled, to all the data's."""

    title = "Frechet (vectors)"
    needs = f"frechet-vectors: needs data that are vectors of 2 to {MOST_VALUES:,} values"

    @override
    def applies(self, source: Source) -> bool:
        """Vectors of 2 to 1,024 values."""
        return len(source.shape) == 1 and 1 < source.shape[0] <= MOST_VALUES

    @override
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """Returns the distance, NaN where the student has diverged; CdistillError of fewer than two samples."""
        source, vectors = reference.source, samples.samples
        assert source is not None
        if len(vectors) < 2:
            raise CdistillError(f"frechet-vectors: got {len(vectors)} samples; needs 2 or more")
        if not vectors.isfinite().all():
            return _not_finite(len(vectors))
        real = reference.once("gaussian", lambda: gaussian(*streamed_moments(source.samples.split(_BLOCK))))
        return frechet_estimate(vectors, real)


def wasserstein_estimate(first: Tensor, second: Tensor) -> Estimate:
    """Wasserstein-1 distance of two sets of scalars (n,) and (m,), the second taken as it is.

    It is the integral of |F - G|; the influence of a sample x is that of sign(F - G) from x on, up to a constant: the
    Kantorovich potential.
    """
    first, second = first.double(), second.double()
    points = torch.cat([first, second]).sort().values
    below = [
        torch.searchsorted(part.sort().values, points[:-1], right=True).double() / len(part) for part in (first, second)
    ]
    gap, width = below[0] - below[1], points.diff()
    beyond = (gap.sign() * width).flip(0).cumsum(0).flip(0)  # from each point to the last
    place = torch.searchsorted(points, first)
    return Estimate(float((gap.abs() * width).sum()), torch.cat([beyond, beyond.new_zeros(1)])[place])


def wasserstein_1d(first: Tensor, second: Tensor) -> float:
    """Wasserstein-1 distance between two sets of scalars, (n, 1) and (m, 1)."""
    return wasserstein_estimate(first.flatten(), second.flatten()).value


def _not_finite(count: int) -> Estimate:
    """Returns the figure of samples that are not finite."""
    return Estimate(nan, torch.full((count,), nan, dtype=torch.float64))


def _check_dimension(features: Tensor, dimension: int, reference: Reference) -> None:
    if features.shape[1] != dimension:
        raise MismatchError(
            f"{reference.stats or 'reference'}: {dimension} dimensions, the samples' features have "
            f"{features.shape[1]}; choose the network that made it with --features"
        )
