"""ADM (Dhariwal & Nichol 2021) as EDM uses it (Karras et al. 2022)."""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cdistill.networks.denoiser import adm_embedding
from cdistill.networks.unet import Block, Style, UNet


def _init(layer: nn.Module, gain: float) -> nn.Module:
    """Torch's own initial values, U(+-1/sqrt(inputs)), times `gain`."""
    for parameter in layer.parameters():
        parameter.data.mul_(gain)
    return layer


class ADMUNet(UNet):
    """ADM's U-Net: the noise scales and shifts, attention has several heads, resampling skips have no weights.

    Arguments as :class:`cdistill.networks.song.SongUNet`, with `head_channels`, those of an attention head, and
    `noise_scale`, the factor on c_noise: 1 in EDM's files, 1000 in OpenAI's.
    """

    def __init__(
        self,
        resolution: int,
        channels: int,
        num_classes: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        augment_dim: int = 0,
        head_channels: int = 64,
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.model_channels, self.noise_scale = num_classes, model_channels, noise_scale
        style = Style(
            init=_init, zero=0.0, attention=1.0, eps=1e-5, skip_scale=1.0, head=head_channels,
            scales=True, projects=False,
        )  # fmt: skip
        width = 4 * model_channels
        self.map_augment = style.linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = style.linear(model_channels, width)
        self.map_layer1 = style.linear(width, width)
        self.map_label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)
        self.map_layer0_s = self.map_layer1_s = None
        widths = [model_channels * factor for factor in channel_mult]
        last = self.build(
            resolution, channels, widths[0], widths, num_blocks,
            lambda side, every: side in attn_resolutions,
            partial(Block, embedding=width, dropout=dropout, style=style), style,
        )  # fmt: skip
        self.out_norm = style.norm(last)
        self.out_conv = style.conv(last, channels, 3, style.zero)

    @override
    def embed(self, noise: Tensor, labels: Tensor | None, first: nn.Module, second: nn.Module) -> Tensor:
        """The labels come in through the t-branch alone, as in CTM's code for ImageNet."""
        features = adm_embedding(self.noise_scale * noise, self.model_channels).to(self.last_layer().dtype)
        emb = second(F.silu(first(features)))
        if self.map_label is not None and first is self.map_layer0:
            emb = emb + self.map_label(self.onehot(labels, emb))
        return F.silu(emb)

    @override
    def output(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out

    @override
    def last_layer(self) -> nn.Parameter:
        return self.out_conv.weight  # type: ignore[return-value]
