"""Metrics, each a class in the registry; each returns a figure and what every sample adds to it.

A metric from another package derives from :class:`Metric` and is named in the entry-point group
``cdistill.metrics``.
"""

from abc import ABC, abstractmethod
from math import nan, prod
from typing import ClassVar

import torch
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import CdistillError, MismatchError
from cdistill.evaluation import prdc as neighbours
from cdistill.evaluation.blocks import AT_ONCE
from cdistill.evaluation.estimates import Estimate, mean_estimate
from cdistill.evaluation.features import FeatureNetwork, Pixels, device
from cdistill.evaluation.frechet import Gaussian, frechet_estimate, gaussian, streamed_moments
from cdistill.evaluation.inception import Inception
from cdistill.evaluation.kid import kernel_estimate, mean_within
from cdistill.evaluation.prdc import Balls, find_balls
from cdistill.evaluation.references import Reference
from cdistill.evaluation.samples import SampleSet

MOST_PIXELS = 4096  # values of an image whose covariance is taken
MOST_VALUES = 1024  # of a vector


class Metric(ABC):
    """A figure of a set of samples.

    Args:
        network: The feature network that is chosen; some need none, or another.

    Attributes:
        title: Heading of its column.
        better: Whether "lower" or "higher" figures are better.
    """

    title: str
    better: ClassVar[str] = "lower"

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network

    @abstractmethod
    def applies(self, source: Source) -> bool:
        """Whether it is measured by default for this kind of data."""

    def check(self, reference: Reference) -> None:  # noqa: B027 - a few metrics need nothing
        """Raises CdistillError if the metric cannot be computed here; asked before anything is drawn."""

    @abstractmethod
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """Measures samples, quantised as they would be stored; the reference is taken as it is."""


class FeatureMetric(Metric):
    """A metric of feature vectors.

    Attributes:
        heading: Title without the network.
        compares_points: It needs features of the data, not their moments alone.
    """

    heading: ClassVar[str]
    compares_points: ClassVar[bool] = True

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__(network)
        self.title = f"{self.heading} ({network.name})"

    def applies(self, source: Source) -> bool:
        """Images: of 32x32 or more by Inception, which was made for photographs; all by a network of one's own."""
        if len(source.shape) != 3 or isinstance(self.network, Pixels):
            return False
        return source.shape[-1] >= 32 or not isinstance(self.network, Inception)

    def check(self, reference: Reference) -> None:
        """See :class:`Metric`."""
        _needs_images(self, reference)
        reference.check(self.network, self.compares_points)

    def features(self, samples: SampleSet) -> Tensor:
        """Returns the features of the samples (n, d), float32.

        Raises:
            CdistillError: They are not finite, or fewer than two.
        """
        return _sound(samples.features(self.network), self.network)

    def real(self, samples: Tensor, reference: Reference) -> Tensor:
        """Returns the features of the data (m, d), float32.

        Raises:
            MismatchError: They have another dimension than the samples' features (n, d).
        """
        found = reference.features(self.network)
        _check_dimension(samples, found.shape[1], reference)
        return found


class Frechet(FeatureMetric):
    """Frechet distance of the features' Gaussians (Heusel et al. 2017); FID as EDM and CTM have it by their network."""

    heading = "Frechet"
    compares_points = False
    _real: tuple[Reference, Gaussian] | None = None

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__(network)
        if isinstance(network, Inception):
            self.title = "FID" if network.name == "legacy_tensorflow" else f"FID ({network.name})"

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`."""
        features = self.features(samples)
        if self._real is None or self._real[0] is not reference:
            self._real = reference, gaussian(*reference.moments(self.network))
        _check_dimension(features, len(self._real[1].mean), reference)
        return frechet_estimate(features, self._real[1])


class PixelFrechet(Frechet):
    """Frechet distance of the pixels of small images, whatever network is chosen."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__(Pixels())

    def applies(self, source: Source) -> bool:
        """Images of at most 1,024 elements, fewer than there are of them."""
        return len(source.shape) == 3 and prod(source.shape) <= min(1024, len(source))

    def check(self, reference: Reference) -> None:
        """See :class:`Metric`."""
        super().check(reference)
        shape = reference.source.shape if reference.source else ()
        if prod(shape) > MOST_PIXELS:
            raise CdistillError(
                f"frechet-pixels: got images of {prod(shape):,} values; at most {MOST_PIXELS:,}; choose another metric"
            )


class KernelDistance(FeatureMetric):
    """KID: the unbiased squared distance of the features' kernel means, over all pairs (Binkowski et al. 2018)."""

    heading = "KID"
    _real: tuple[Reference, float] | None = None

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`."""
        features = self.features(samples)
        real = self.real(features, reference)
        if self._real is None or self._real[0] is not reference:
            self._real = reference, mean_within(real, device())
        return kernel_estimate(features, real, self._real[1], device())


class NeighbourMetric(FeatureMetric):
    """A metric of balls around points, see `cdistill.evaluation.prdc`.

    Attributes:
        k: A ball reaches to the k-th nearest of its own kind.
    """

    better = "higher"
    k: ClassVar[int]
    _real: tuple[Reference, Balls] | None = None

    def real_balls(self, samples: Tensor, reference: Reference) -> Balls:
        """Returns the balls of the data; computed once."""
        if self._real is None or self._real[0] is not reference:
            self._real = reference, find_balls(self.real(samples, reference), self.k, device(), self.heading)
        return self._real[1]


class Precision(NeighbourMetric):
    """Share of the samples among the data (Kynkaanniemi et al. 2019)."""

    heading, k = "precision", 3

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`."""
        features = self.features(samples)
        return neighbours.precision(features, self.real_balls(features, reference))


class Recall(NeighbourMetric):
    """Share of the data among the samples (Kynkaanniemi et al. 2019)."""

    heading, k = "recall", 3

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`."""
        features = self.features(samples)
        balls = find_balls(features, self.k, device(), self.heading)
        return neighbours.recall(balls, self.real(features, reference))


class Density(NeighbourMetric):
    """How densely the data stand around the samples (Naeem et al. 2020)."""

    heading, k = "density", 5

    def applies(self, source: Source) -> bool:
        """Never; by its name only."""
        return False

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`."""
        features = self.features(samples)
        return neighbours.density(features, self.real_balls(features, reference))


class Coverage(Density):
    """Share of the data that have a sample near (Naeem et al. 2020)."""

    heading = "coverage"

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`."""
        features = self.features(samples)
        return neighbours.coverage(features, self.real_balls(features, reference))


class InceptionScore(FeatureMetric):
    """exp of the mean divergence of a sample's class probabilities from all samples' (Salimans et al. 2016).

    Of all samples together; the mean over ten parts, which is often reported, is a little lower. A sample adds the
    score times its own divergence, up to a constant.
    """

    heading = "Inception score"
    better = "higher"

    def applies(self, source: Source) -> bool:
        """Never; by its name only."""
        return False

    def check(self, reference: Reference) -> None:
        """See :class:`Metric`."""
        _needs_images(self, reference)
        if not self.network.classifies:
            raise CdistillError(
                f"inception-score: features {self.network.name!r} have no class probabilities; choose another network"
            )
        if reference.source is not None:
            self.network.check(reference.source.shape)

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`."""
        return inception_score(_sound(samples.features(_Probabilities(self.network)), self.network))


class TeacherError(Metric):
    """Mean square error to the end of the teacher's own trajectory from the same noise (Zheng et al. 2025, 5.3)."""

    title = "MSE to teacher"

    def applies(self, source: Source) -> bool:
        """Always."""
        return True

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`.

        Raises:
            CdistillError: The samples come without a teacher.
        """
        if samples.errors is None:
            raise CdistillError("teacher-mse: these samples have no teacher; choose other metrics")
        return mean_estimate(samples.errors)


class Wasserstein(Metric):
    """Wasserstein-1 distance between the samples and the data, in one dimension."""

    title = "Wasserstein-1"

    def applies(self, source: Source) -> bool:
        """Scalars."""
        return source.shape == (1,)

    def check(self, reference: Reference) -> None:
        """See :class:`Metric`."""
        if reference.source is None or not self.applies(reference.source):
            raise CdistillError("wasserstein: needs one-dimensional samples; choose another metric")

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`; NaN where the student has diverged."""
        assert reference.source is not None
        if not samples.samples.isfinite().all():
            return _unknown(len(samples.samples))
        return wasserstein_estimate(samples.samples.flatten(), reference.source.samples[:].flatten())


class VectorFrechet(Metric):
    """Frechet distance of the vectors' own values, in float64, unscaled, to all the data's."""

    title = "Frechet (vectors)"
    _real: tuple[Reference, Gaussian] | None = None

    def applies(self, source: Source) -> bool:
        """Vectors of 2 to 1,024 values."""
        return len(source.shape) == 1 and 1 < source.shape[0] <= MOST_VALUES

    def check(self, reference: Reference) -> None:
        """See :class:`Metric`."""
        if reference.source is None or not self.applies(reference.source):
            raise CdistillError(
                f"frechet-vectors: needs data that are vectors of 2 to {MOST_VALUES:,} values; choose another metric"
            )

    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate:
        """See :class:`Metric`; NaN where the student has diverged.

        Raises:
            CdistillError: Fewer than two samples.
        """
        assert reference.source is not None
        vectors = samples.samples
        if len(vectors) < 2:
            raise CdistillError(f"frechet-vectors: got {len(vectors)} samples; needs 2 or more")
        if not vectors.isfinite().all():
            return _unknown(len(vectors))
        if self._real is None or self._real[0] is not reference:
            self._real = reference, gaussian(*streamed_moments(reference.source.chunks(AT_ONCE)))
        return frechet_estimate(vectors, self._real[1])


class _Probabilities(FeatureNetwork):
    """The class probabilities of a network in place of its features."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network, self.name = network, f"{network.name}, probabilities"

    def __call__(self, images: Tensor) -> Tensor:
        return self.network.probabilities(images)


def inception_score(probabilities: Tensor) -> Estimate:
    """Returns the Inception score of class probabilities (n, K)."""
    p = probabilities.double()
    divergence = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1)
    score = float(divergence.mean().exp())
    return Estimate(score, score * divergence)


def wasserstein_estimate(first: Tensor, second: Tensor) -> Estimate:
    """Wasserstein-1 distance of two sets of scalars (n,) and (m,), the second taken as it is.

    It is the integral of |F - G|; a sample x adds that of sign(F - G) from x on, up to a constant: the Kantorovich
    potential.
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


def _unknown(count: int) -> Estimate:
    """Returns the figure of samples that are not finite."""
    return Estimate(nan, torch.full((count,), nan, dtype=torch.float64))


def _needs_images(metric: FeatureMetric, reference: Reference) -> None:
    source = reference.source
    if source is not None and len(source.shape) != 3:
        raise CdistillError(f"{metric.title}: needs images, not {source.name!r}; choose another metric")


def _sound(features: Tensor, network: FeatureNetwork) -> Tensor:
    if len(features) < 2:
        raise CdistillError(f"samples: {len(features)} of them; a figure of features needs at least 2")
    if not all(part.isfinite().all() for part in features.split(AT_ONCE)):  # at once it takes the room of the whole
        raise CdistillError(f"features {network.name!r}: not finite on the samples; choose another network")
    return features


def _check_dimension(features: Tensor, dimension: int, reference: Reference) -> None:
    if features.shape[1] != dimension:
        raise MismatchError(
            f"{reference.stats or 'reference'}: {dimension} dimensions, the samples' features have "
            f"{features.shape[1]}; choose the network that made it with --features"
        )
