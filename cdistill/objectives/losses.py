"""Losses as pure functions of tensors: distances of Eqs. 5 and 7, score matching, GAN losses, their balance."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cdistill.errors import RecipeError
from cdistill.networks.denoiser import broadcast
from cdistill.registry import DISTANCES


class Distance(ABC):
    """d(x, y) of each sample. A distance from another package derives from this class.

    Built without arguments; what it needs (weights, say) is loaded then, so that a lack shows before training.

    Attributes:
        images_only: Whether it compares grey or RGB images and nothing else.
    """

    images_only = False

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Maps samples (B, ...) and (B, ...) to distances (B,)."""

    @classmethod
    def hollow(cls) -> "Distance":
        """Returns an instance that works on the meta device and needs no file, for counting what a call costs."""
        return cls()


class L2(Distance):
    """Mean of (x - y)^2 over the elements of each sample."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Distance`."""
        return (x - y).square().flatten(1).mean(1)


class PseudoHuber(Distance):
    """sqrt(|x-y|^2 + c^2) - c with c = 0.00054 sqrt(d) (Song & Dhariwal 2024, Section 3.3)."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Distance`."""
        difference = (x - y).flatten(1)
        c = 0.00054 * difference.shape[1] ** 0.5
        out: Tensor = (difference.square().sum(1) + c**2).sqrt() - c
        return out


def dsm_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's denoising loss, (sigma^2+sd^2)/(sigma sd)^2 |D - x_0|^2 / d (Karras et al. 2022, Table 1).

    Args:
        denoised: D(x_0 + sigma z, sigma), (B, ...).
        clean: x_0, (B, ...).
        sigma: Noise levels (B,), float64.
        sigma_data: Standard deviation of the data.

    Returns:
        One loss a sample, (B,).
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return broadcast(weight, denoised).flatten() * L2()(denoised, clean)


def balance(consistency: Tensor, dsm: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """CTM's adaptive weight of the DSM loss, |grad_W L_cons| / (|grad_W L_dsm| + 1e-4), clamped to [0, 1e4].

    Args:
        consistency: Gradient of the consistency loss with respect to the last layer's weight W.
        dsm: The same of the DSM loss.
        scale: Factor that both gradients carry, that of a gradient scaler for fp16.

    Returns:
        A detached scalar, float32 at least.
    """
    precise = torch.promote_types(dsm.dtype, torch.float32)
    ratio = consistency.to(precise).norm() / (dsm.to(precise).norm() + 1e-4 * scale)
    weight: Tensor = ratio.clamp(0, 1e4).detach()
    return weight


def gan_weight(consistency: Tensor, gan: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """CTM's adaptive weight of the GAN loss: as `balance`, but clamped to [0.01, 10]."""
    return balance(consistency, gan, scale).clamp(0.01, 10)


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """mean_k E[max(0, 1 - d_k(x))] + E[max(0, 1 + d_k(e*))] (Lim & Ye 2017, Eq. 9, averaged over heads k).

    Args:
        real: Logits of real images (B, n_k), of each head.
        fake: Logits of the student's images, likewise.

    Returns:
        A scalar; E is the mean over images and over the places that a head looks at.
    """
    pairs = zip(real, fake, strict=True)
    return torch.stack([(1 - x).relu().mean() + (1 + e).relu().mean() for x, e in pairs]).mean()


def generator_hinge(fake: Sequence[Tensor]) -> Tensor:
    """-mean_k E[d_k(e*)], the student's side of `discriminator_hinge`; a scalar."""
    return -mean_logit(fake)


def mean_logit(logits: Sequence[Tensor]) -> Tensor:
    """mean_k E[d_k], a scalar."""
    return torch.stack([head.mean() for head in logits]).mean()


def check_distance(name: str, shape: tuple[int, ...]) -> type[Distance]:
    """Returns the class of a distance, if it can compare samples of `shape`.

    Raises:
        RecipeError: It compares images, and these are none.
    """
    found: type[Distance] = DISTANCES.get(name)
    if found.images_only and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise RecipeError(f"training.distance: {name!r} compares grey or RGB images; the samples have shape {shape}")
    return found
