"""DDPM++ and NCSN++ (Song et al. 2021) as EDM uses them (Karras et al. 2022)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cdistill.networks.denoiser import fourier_embedding, positional_embedding
from cdistill.networks.unet import Block, Style, UNet


def _init(layer: nn.Module, gain: float) -> nn.Module:
    """Xavier-uniform weights times `gain`, zero bias."""
    nn.init.xavier_uniform_(layer.weight, gain)  # type: ignore[arg-type]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class FourierNoise(nn.Module):
    """Random Fourier features of c_noise; the frequencies are drawn once and belong to the weights.

    They stay in float32 when the network becomes half: rounded, they would turn the angles by several degrees.
    """

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FourierNoise":
        precise = self.freqs
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.freqs.itemsize < precise.itemsize == 4:
            self.freqs = precise.to(self.freqs.device)
        return self

    def forward(self, noise: Tensor) -> Tensor:
        """Maps (B,) to (B, channels)."""
        return fourier_embedding(noise, self.freqs)


class SongUNet(UNet):
    """DDPM++ (the defaults) or NCSN++ (embedding "fourier", encoder "residual", taps [1,3,3,1], channel_mult_noise 2).

    The arguments are EDM's: images of side `resolution`; width `model_channels` at the highest resolution, times
    `channel_mult` at each from there on; residual blocks a resolution; resolutions with self-attention; channels of
    the augmentation labels, 0 for none; width of the noise features over `model_channels`; resampling filter `taps`
    along one side.
    """

    def __init__(
        self,
        resolution: int,
        channels: int,
        num_classes: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.13,
        augment_dim: int = 0,
        channel_mult_noise: int = 1,
        embedding: Literal["positional", "fourier"] = "positional",
        encoder: Literal["standard", "residual"] = "standard",
        taps: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        style = Style(
            init=_init, zero=1e-5, attention=math.sqrt(0.2), eps=1e-6, skip_scale=math.sqrt(0.5), head=None,
            scales=False, projects=True, taps=tuple(taps),
        )  # fmt: skip
        features, width = channel_mult_noise * model_channels, 4 * model_channels
        self.map_noise = (
            FourierNoise(features) if embedding == "fourier" else partial(positional_embedding, channels=features)
        )
        self.map_label = style.linear(num_classes, features) if num_classes else None
        self.map_augment = style.linear(augment_dim, features, bias=False) if augment_dim else None
        self.map_layer0 = style.linear(features, width)
        self.map_layer1 = style.linear(width, width)
        self.map_layer0_s = self.map_layer1_s = None
        last = self.build(
            resolution, channels, model_channels, [model_channels * factor for factor in channel_mult], num_blocks,
            lambda side, every: side in attn_resolutions and every,
            partial(Block, embedding=width, dropout=dropout, style=style), style, encoder == "residual",
        )  # fmt: skip
        self.last = f"{resolution}x{resolution}_aux"
        self.dec[f"{self.last}_norm"] = style.norm(last)
        self.dec[f"{self.last}_conv"] = style.conv(last, channels, 3, style.zero)

    @override
    def embed(self, noise: Tensor, labels: Tensor | None, first: nn.Module, second: nn.Module) -> Tensor:
        """The s-branch sees the labels as the t-branch does, as in CTM's code for CIFAR-10."""
        return F.silu(second(F.silu(first(self._features(noise, labels)))))

    @override
    def output(self, x: Tensor) -> Tensor:
        out: Tensor = self.dec[f"{self.last}_conv"](F.silu(self.dec[f"{self.last}_norm"](x)))
        return out

    @override
    def last_layer(self) -> nn.Parameter:
        return self.dec[f"{self.last}_conv"].weight  # type: ignore[return-value]

    def _features(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Noise features plus the label, (B, features), in the type of the weights."""
        features: Tensor = self.map_noise(noise).to(self.last_layer().dtype)
        if self.map_label is not None:
            features = features + self.map_label(self.onehot(labels, features) * math.sqrt(self.num_classes))
        return features
