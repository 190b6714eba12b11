"""stub"""
from abc import ABC, abstractmethod
from math import prod
from typing import ClassVar
import torch
from torch import Tensor
from cdistill.data import Source
from cdistill.errors import CdistillError
from cdistill.evaluation.estimates import Estimate, mean_estimate
from cdistill.evaluation.features import FeatureNetwork, Pixels
from cdistill.evaluation.frechet import frechet_distance, moments, _root
from cdistill.evaluation.references import Reference
from cdistill.evaluation.samples import SampleSet


class Metric(ABC):
    """stub."""
    title: str
    better: ClassVar[str] = "lower"

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network

    @abstractmethod
    def applies(self, source: Source) -> bool: ...
    def check(self, reference: Reference) -> None: ...
    @abstractmethod
    def __call__(self, samples: SampleSet, reference: Reference) -> Estimate: ...


class PixelFrechet(Metric):
    title = "Frechet (pixels)"

    def applies(self, source):
        return len(source.shape) == 3 and prod(source.shape) <= min(1024, len(source))

    def __call__(self, samples, reference):
        x = samples.features(Pixels()).double()
        ref = reference.moments(Pixels())
        m2, c2 = ref
        m1, c1 = moments(x)
        v, U = torch.linalg.eigh(c1)
        s = v.clamp(min=0).sqrt()
        inv = torch.where(v > v.max() * 1e-10, 1 / s.clamp(min=1e-300), torch.zeros(()).double())
        R = (U * s) @ U.T
        Ri = (U * inv) @ U.T
        T = Ri @ _root(R @ c2 @ R) @ Ri
        A = torch.eye(len(m1)).double() - T
        y = x - m1
        psi = 2 * (y @ (m1 - m2)) + ((y @ A) * y).sum(1)
        return Estimate(frechet_distance((m1, c1), ref), psi - psi.mean())


class TeacherError(Metric):
    title = "MSE to teacher"

    def applies(self, source):
        return True

    def __call__(self, samples, reference):
        return mean_estimate(samples.errors)


class Wasserstein(Metric):
    title = "Wasserstein-1"

    def applies(self, source):
        return source.shape == (1,)

    def check(self, reference):
        if not self.applies(reference.source):
            raise CdistillError("wasserstein: needs one-dimensional samples; choose another metric")

    def __call__(self, samples, reference):
        v = wasserstein_1d(samples.samples, reference.source.samples[:])
        return Estimate(v, samples.samples[:, 0])


class InceptionFrechet(Metric):
    title = "FID"

    def applies(self, source):
        return len(source.shape) == 3 and source.shape[-1] >= 32

    def check(self, reference):
        from cdistill import assets
        assets.INCEPTION.find()

    def __call__(self, samples, reference): raise NotImplementedError


def wasserstein_1d(first: Tensor, second: Tensor) -> float:
    """Wasserstein-1 distance between two sets of scalars, (n, 1) and (m, 1)."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(first.flatten().numpy(), second.flatten().numpy()))
