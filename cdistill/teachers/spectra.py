"""Gaussian mixtures in 16 dimensions whose l_t falls over a narrow or a wide range of noise, with exact denoisers.

Both have four equally likely components with means of +-0.5. Every eigenvalue of the narrow one's covariances is the
same; the broad one's spread over five decades. The conditional ones have a class for each component, so that a sample
is a Gaussian's.
"""

from functools import cache, partial

import torch
from torch import Tensor

from cdistill.data.source import Source
from cdistill.networks.denoiser import freeze
from cdistill.runtime.randomness import generator
from cdistill.teachers.base import Teacher
from cdistill.teachers.mixture import DRAWS, LICENCE, MixtureDenoiser

DIM, COMPONENTS = 16, 4


def means() -> Tensor:
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


@cache
def spectral_mixture(name: str) -> MixtureDenoiser:
    """Returns the exact denoiser of "mixture-narrow", "mixture-broad" or, conditional, either with "-cond"."""
    _, width, *conditional = name.split("-")
    classes = torch.arange(COMPONENTS) if conditional else None
    weights = torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=torch.float64)
    return freeze(MixtureDenoiser(weights, means(), _SPECTRA[width]().diag_embed(), classes=classes))


def load(name: str) -> Teacher:
    """Loads one of these mixtures as a teacher; see `spectral_mixture` for the names."""
    return Teacher(name, spectral_mixture(name), name, LICENCE)


def draw(name: str, split: str = "train") -> Source:
    """65,536 draws of one of these mixtures, with their classes if it is conditional; "heldout" are others."""
    denoiser = spectral_mixture(name)
    samples, labels = denoiser.draw(DRAWS, generator(0, f"{name} {split}"))
    return Source(name, samples, labels, denoiser.num_classes)


load_broad, draw_broad = partial(load, "mixture-broad"), partial(draw, "mixture-broad")
load_broad_cond, draw_broad_cond = partial(load, "mixture-broad-cond"), partial(draw, "mixture-broad-cond")
load_narrow, draw_narrow = partial(load, "mixture-narrow"), partial(draw, "mixture-narrow")
load_narrow_cond, draw_narrow_cond = partial(load, "mixture-narrow-cond"), partial(draw, "mixture-narrow-cond")
