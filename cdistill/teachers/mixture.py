"""Exact denoisers of Gaussian mixtures in any dimension, by Bayes' rule, as teachers.

``mixture-1d`` is the paper's (Section 5.3). The others are in 16 dimensions, and their l_t falls over a narrow or a
wide range of noise: four equally likely components with means of +-0.5, every eigenvalue of the narrow one's
covariances the same, the broad one's spread over five decades. The conditional ones (``-cond``) have a class for each
component, so that the samples of a class are a Gaussian's.
"""

from copy import deepcopy
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cdistill.data.source import Source
from cdistill.networks.classes import Classes
from cdistill.networks.denoiser import Denoiser, broadcast, edm_coefficients, freeze, positional_embedding
from cdistill.runtime.randomness import generator
from cdistill.schedule import SIGMA_DATA
from cdistill.teachers.base import Teacher

DRAWS = 65536
DIM, COMPONENTS = 16, 4  # of the mixtures with a spectrum
LICENCE = "none needed: an exact formula, without trained weights or data"


class MixtureDenoiser(Denoiser):
    """D(x, t) = E[x_0 | x] for x_0 ~ sum_k w_k N(m_k, C_k), x = x_0 + t z.

    With C_k = U_k diag(e_k) U_k' and y_k = U_k'(x - m_k), component k denoises to m_k + U_k (e_k/(e_k+t^2) y_k) and
    has the posterior weight w_k N(x; m_k, C_k + t^2). Given a class, only its components count: D(x, t | c) =
    E[x_0 | x, c]; without one, all do.

    w (K,) are positive, normalised here; m is (K, d), C (K, d, d), symmetric, positive semi-definite; the class of each
    component (K,) is int64, from 0 without gaps, None for an unconditional mixture.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    classes: Tensor | None

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        sigma_data: float = SIGMA_DATA,
        classes: Tensor | None = None,
    ) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(covariances.double())
        self.register_buffer("weights", weights.double() / weights.double().sum())
        self.register_buffer("means", means.double())
        self.register_buffer("covariances", covariances.double())
        self.register_buffer("eigenvalues", values.clamp(min=0), persistent=False)
        self.register_buffer("eigenvectors", vectors, persistent=False)
        self.register_buffer("classes", classes)
        self.sample_shape = (means.shape[1],)
        self.sigma_data = sigma_data
        if classes is not None:
            shares = torch.zeros(int(classes.max()) + 1, dtype=torch.float64).index_add(0, classes, self.weights)
            self.known_classes = Classes(tuple((shares * DRAWS).round().long().tolist()))

    @override
    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Computed in float64."""
        noise = t.double().square()[:, None, None]
        rotated = torch.einsum("bki,kij->bkj", x.double()[:, None] - self.means, self.eigenvectors)
        variance = self.eigenvalues + noise
        log_density = -(rotated.square() / variance + variance.log()).sum(-1) / 2
        logits = self.weights.log() + log_density
        if self.classes is not None and labels is not None:
            logits = logits.masked_fill(self.classes != labels[:, None], -torch.inf)
        posterior = logits.softmax(-1)
        shrunk = torch.einsum("bkj,kij->bki", self.eigenvalues / variance * rotated, self.eigenvectors)
        return torch.einsum("bk,bki->bi", posterior, self.means + shrunk).to(x.dtype)

    @override
    def student(self, takes_s: bool = True, dropout: float = 0.0) -> "MixtureStudent":
        """The student always has an input for s, and no dropout."""
        return MixtureStudent(deepcopy(self))

    def draw(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draws x_0 (count, d), float64, and the classes (count,), int64, None of an unconditional mixture."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=draw)
        x = torch.randn(count, self.means.shape[1], generator=draw, dtype=torch.float64)
        for k, mean in enumerate(self.means):
            rows = component == k
            x[rows] = mean + (self.eigenvalues[k].sqrt() * x[rows]) @ self.eigenvectors[k].T
        return x, None if self.classes is None else self.classes[component]


class MixtureStudent(Denoiser):
    """D(x, t, s) = D_phi(x, t) + c_out(t) MLP(c_in x, c_noise(t), c_noise(s)), the last layer exactly zero at first.

    A conditional one's MLP also sees the class: one-hot times sqrt(num_classes), as EDM's networks, or zeros for none.
    D_phi, the exact denoiser, stays frozen inside; each noise embedding has `frequencies` channels.
    """

    def __init__(self, teacher: MixtureDenoiser, width: int = 128, frequencies: int = 32) -> None:
        super().__init__()
        self.teacher = freeze(teacher)
        self.sample_shape = teacher.sample_shape
        self.sigma_data = teacher.sigma_data
        self.known_classes = teacher.known_classes
        self.frequencies = frequencies
        dim = self.sample_shape[0]
        self.hidden = nn.Sequential(
            nn.Linear(dim + 2 * frequencies + self.num_classes, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @override
    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        s = t if s is None else s
        dtype = self.last.weight.dtype
        _, c_out, c_in = edm_coefficients(t, self.sigma_data)
        levels = [positional_embedding((level.log() / 4).to(dtype), self.frequencies) for level in (t, s)]
        features = torch.cat([(broadcast(c_in, x) * x).to(dtype), *levels, self._onehot(x, labels).to(dtype)], dim=1)
        change = self.last(self.hidden(features))
        out: Tensor = self.teacher(x, t, None, labels) + broadcast(c_out, x) * change.to(x.dtype)
        return out

    def student(self, takes_s: bool = True, dropout: float = 0.0) -> "MixtureStudent":
        """Returns a copy of this student."""
        return deepcopy(self)

    @override
    def balance_weight(self) -> nn.Parameter:
        return self.last.weight  # type: ignore[return-value]

    def _onehot(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Returns sqrt(num_classes) for each label's class and zeros beside it (B, num_classes), in the type of `x`."""
        if labels is None or not self.num_classes:
            return x.new_zeros(len(x), self.num_classes)
        return F.one_hot(labels, self.num_classes).to(x.dtype) * sqrt(self.num_classes)


def mixture_1d() -> MixtureDenoiser:
    """Returns the exact denoiser of 1/3 N(-2, 1) + 2/3 N(1, 0.25) (Zheng et al. 2025, Section 5.3).

    0.25 is the variance: the paper's own l_t and s_t come out only so.
    """
    weights = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    means = torch.tensor([[-2.0], [1.0]], dtype=torch.float64)
    covariances = torch.tensor([[[1.0]], [[0.25]]], dtype=torch.float64)
    return freeze(MixtureDenoiser(weights, means, covariances))


def load_mixture_1d() -> Teacher:
    """The paper's 1-D mixture with its exact denoiser."""
    return Teacher("mixture-1d", mixture_1d(), "mixture-1d", LICENCE, "forward")


def draw_mixture_1d(split: str = "train") -> Source:
    """65,536 draws of the paper's 1-D mixture; "heldout" are others."""
    draw = generator(0, f"mixture-1d {split}")
    return Source("mixture-1d", mixture_1d().draw(DRAWS, draw)[0])


def spectral_means() -> Tensor:
    """Returns m_k = 0.5 h_k (4, 16), where h_kj = (-1)^(bit k of j): rows 1, 2, 4 and 8 of the Hadamard matrix."""
    bits = torch.arange(DIM) >> torch.arange(COMPONENTS)[:, None] & 1
    return 0.5 - bits.double()


def narrow_spectrum() -> Tensor:
    """Returns the eigenvalues (4, 16) of the narrow mixture's covariances, all 0.04."""
    return torch.full((COMPONENTS, DIM), 0.04, dtype=torch.float64)


def broad_spectrum() -> Tensor:
    """Returns those of the broad mixture's: log-uniform from 4e-6 to 0.4, rolled by 4k for component k."""
    values = 4e-6 * 10 ** torch.linspace(0, 5, DIM, dtype=torch.float64)
    return torch.stack([values.roll(4 * k) for k in range(COMPONENTS)])


_SPECTRA = {"narrow": narrow_spectrum, "broad": broad_spectrum}


def spectral_mixture(name: str) -> MixtureDenoiser:
    """Returns the exact denoiser of "mixture-narrow", "mixture-broad" or, conditional, either with "-cond"."""
    _, width, *conditional = name.split("-")
    classes = torch.arange(COMPONENTS) if conditional else None
    weights = torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=torch.float64)
    return freeze(MixtureDenoiser(weights, spectral_means(), _SPECTRA[width]().diag_embed(), classes=classes))


def load_spectral(name: str) -> Teacher:
    """Loads one of these mixtures as a teacher; see `spectral_mixture` for the names."""
    return Teacher(name, spectral_mixture(name), name, LICENCE)


def draw_spectral(name: str, split: str = "train") -> Source:
    """65,536 draws of one of these mixtures, with their classes if it is conditional; "heldout" are others."""
    denoiser = spectral_mixture(name)
    samples, labels = denoiser.draw(DRAWS, generator(0, f"{name} {split}"))
    return Source(name, samples, labels, denoiser.num_classes)
