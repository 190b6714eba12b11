"""Denoisers D(x, t[, s]) and EDM's way of wrapping a U-Net into one."""

import math
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from cdistill.networks.classes import Classes
from cdistill.networks.unet import UNet

Module = TypeVar("Module", bound=nn.Module)


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Returns per-sample `values` (B,) shaped to multiply `x` (B, ...), in x's dtype and on its device."""
    return values.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def edm_coefficients(t: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in of EDM's denoiser (Karras et al. 2022, Table 1; Zheng et al. 2025, Eq. 3).

    Each is like the noise levels t, float64, of any shape.
    """
    variance = sigma_data**2 + t**2
    return sigma_data**2 / variance, sigma_data * t / variance.sqrt(), 1 / variance.sqrt()


class Denoiser(nn.Module, ABC):
    """D(x, t) of a teacher or D(x, t, s) of a student."""

    sample_shape: tuple[int, ...]  # shape of one sample, (C, H, W) or (d,)
    sigma_data: float  # standard deviation of the data that the network was scaled for
    architecture: dict[str, Any] | None = None  # from which it can be built, see `cdistill.networks.architecture`
    known_classes: Classes = Classes()  # that it takes as labels; none when unconditional

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 when unconditional."""
        return len(self.known_classes)

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Computes D(x, t, s), like x in shape and type.

        Args:
            x: Noisy samples (B, ...), values about +-(1 + t), any floating type.
            t: Their noise levels (B,), float64.
            s: Destinations (B,), float64; None for a teacher.
            labels: Class indices (B,), int64; None when unconditional.
        """

    @abstractmethod
    def student(self, takes_s: bool = True, dropout: float = 0.0) -> "Denoiser":
        """Returns a trainable copy that equals this denoiser bit for bit, for every s.

        Without `takes_s` it has no input for s and is a consistency model's; `dropout` holds while it is trained.
        """

    def balance_weight(self) -> nn.Parameter:
        """Returns the weight of the last layer, at which the losses are balanced (CTM's adaptive weight)."""
        raise NotImplementedError(f"{type(self).__name__} has no weights to train")

    def lowered(self, dtype: torch.dtype) -> "Denoiser":
        """Returns a frozen copy whose network has weights of `dtype`, for samples of any type; itself without one."""
        return self


class EDMDenoiser(Denoiser):
    """D(x, t, s) = c_skip(t) x + c_out(t) F(c_in(t) x; c_noise(t), c_noise(s)) (Zheng et al. 2025, Eq. 3), F a U-Net.

    c_noise = log(t)/4, in float32 for networks of float32 or less, as EDM computes it. The other scalings are computed
    in float64 and cast to the type of `x`; what enters the network is cast to the type of its weights last.
    """

    def __init__(self, model: UNet, sample_shape: tuple[int, ...], sigma_data: float, num_classes: int = 0) -> None:
        super().__init__()
        self.model = model
        self.sample_shape = sample_shape
        self.sigma_data = sigma_data
        self.known_classes = Classes.unknown(num_classes)

    @override
    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        dtype = self.model.last_layer().dtype
        precise = torch.promote_types(dtype, torch.float32)
        c_skip, c_out, c_in = edm_coefficients(t, self.sigma_data)
        noise, noise_s = (None if level is None else level.to(precise).log() / 4 for level in (t, s))
        raw = self.model((broadcast(c_in, x) * x).to(dtype), noise, noise_s, labels)
        out: Tensor = broadcast(c_skip, x) * x + broadcast(c_out, x) * raw.to(x.dtype)
        return out

    @override
    def student(self, takes_s: bool = True, dropout: float = 0.0) -> "EDMDenoiser":
        copy = deepcopy(self)
        copy.model.set_dropout(dropout)
        if takes_s:
            copy.model.add_s_branch()
            copy.architecture = copy.architecture and {**copy.architecture, "s_branch": True}
        copy.train().requires_grad_(True)
        for parameter in copy.model.unused():
            parameter.requires_grad_(False)
        return copy

    @override
    def balance_weight(self) -> nn.Parameter:
        return self.model.last_layer()

    @override
    def lowered(self, dtype: torch.dtype) -> "EDMDenoiser":
        return freeze(deepcopy(self)).to(dtype)


def chunk_size(sample_shape: tuple[int, ...]) -> int:
    """Returns how many samples a network always sees at once: 64 small ones, or 16 of more than 1,024 elements.

    A fixed number, because the number alone changes a network's rounding: samplers and estimators run on chunks
    aligned to the global sample index, whatever the batch size and the number of processes.
    """
    return 64 if torch.Size(sample_shape).numel() <= 1024 else 16


def count_parameters(module: nn.Module) -> int:
    """Returns the number of scalars in the parameters of `module`."""
    return sum(parameter.numel() for parameter in module.parameters())


def freeze(module: Module) -> Module:
    """Returns `module` in evaluation mode with no parameter that asks for a gradient."""
    module.eval().requires_grad_(False)
    return module


def positional_embedding(noise: Tensor, channels: int) -> Tensor:
    """[sin, cos] of noise * 10000^(-i/(h-1)), i = 0..h-1 with h = channels/2 (DDPM++'s, as EDM uses it).

    Maps c_noise (B,), float32 or float64, to (B, channels) of its type; `channels` is even.
    """
    angles = _angles(noise, channels // 2, channels // 2 - 1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def adm_embedding(noise: Tensor, channels: int) -> Tensor:
    """[cos, sin] of noise * 10000^(-i/h), i = 0..h-1 with h = channels/2 (ADM's); see `positional_embedding`."""
    angles = _angles(noise, channels // 2, channels // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def fourier_embedding(noise: Tensor, freqs: Tensor) -> Tensor:
    """[sin, cos] of 2 pi freqs * noise (NCSN++'s, as EDM uses it): c_noise (B,) and freqs (h,) to (B, 2h)."""
    angles = torch.outer(noise, 2 * math.pi * freqs.to(noise.dtype))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _angles(noise: Tensor, count: int, steps: int) -> Tensor:
    exponents = torch.arange(count, dtype=torch.float32, device=noise.device) / steps
    return torch.outer(noise, ((1 / 10000) ** exponents).to(noise.dtype))
