"""DDPM++ as EDM uses it (Song et al. 2021; Karras et al. 2022), written from the papers.

The names of the parameters are those of EDM's own files, so that a state dict can be exchanged.
"""

import math
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.networks.denoiser import FreeNetwork, positional_embedding

_SKIP_SCALE = math.sqrt(0.5)


def _init(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Xavier-uniform weights times `gain`, zero bias."""
    nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.weight.mul_(gain)  # type: ignore[operator]
        if layer.bias is not None:
            layer.bias.zero_()  # type: ignore[operator]
    return layer


def _conv(inputs: int, outputs: int, kernel: int, gain: float = 1.0) -> nn.Module:
    return _init(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), gain)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Attention(nn.Module):
    """Single-head self-attention over the pixels, with plain operations so that every kind of derivative exists.

    The channels of `qkv` lie as (C, 3), q, k and v innermost.
    """

    def forward(self, qkv: Tensor) -> Tensor:
        """Maps (B, 3C, H, W) to (B, C, H, W); the softmax runs in float32 at least."""
        batch, triple, height, width = qkv.shape
        q, k, v = qkv.reshape(batch, triple // 3, 3, height * width).unbind(2)
        logits = torch.einsum("bci,bcj->bij", q, k / math.sqrt(k.shape[1]))
        weights = logits.softmax(dim=2, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)
        return torch.einsum("bij,bcj->bci", weights, v).reshape(batch, -1, height, width)


class Block(nn.Module):
    """Residual block: norm, SiLU, (resample,) conv, noise shift, norm, SiLU, dropout, conv; attention behind it.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        embedding: Channels of the noise embedding.
        dropout: Probability of dropping an activation in front of the second convolution.
        resample: "up", "down" or "" for none.
        attention: Whether self-attention follows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float,
        resample: str = "",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.resample = resample
        self.dropout = dropout
        self.norm0 = _norm(inputs)
        self.conv0 = _conv(inputs, outputs, 3)
        self.affine = _init(nn.Linear(embedding, outputs))
        self.affine_s: nn.Linear | None = None
        self.norm1 = _norm(outputs)
        self.conv1 = _conv(outputs, outputs, 3, gain=1e-5)
        self.skip = _conv(inputs, outputs, 1) if resample or inputs != outputs else None
        self.attention = Attention() if attention else None
        if attention:
            self.norm2 = _norm(outputs)
            self.qkv = _conv(outputs, 3 * outputs, 1, gain=math.sqrt(0.2))
            self.proj = _conv(outputs, outputs, 1, gain=1e-5)

    def forward(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H', W'); `emb` and `emb_s` are (B, embedding)."""
        hidden = self.conv0(_resample(F.silu(self.norm0(x)), self.resample))
        shift = self.affine(emb)
        if self.affine_s is not None and emb_s is not None:
            shift = shift + self.affine_s(emb_s)
        hidden = F.silu(self.norm1(hidden + shift[:, :, None, None]))
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        skip = x if self.skip is None else self.skip(_resample(x, self.resample))
        out: Tensor = (hidden + skip) * _SKIP_SCALE
        if self.attention is not None:
            out = (out + self.proj(self.attention(self.qkv(self.norm2(out))))) * _SKIP_SCALE
        return out

    def add_s_branch(self) -> None:
        """Adds the projection of s, weight and bias exactly zero."""
        self.affine_s = deepcopy(self.affine)  # type: ignore[assignment]
        nn.init.zeros_(self.affine_s.weight)  # type: ignore[union-attr]
        nn.init.zeros_(self.affine_s.bias)  # type: ignore[union-attr]


def _resample(x: Tensor, direction: str) -> Tensor:
    """Doubles ("up") or halves ("down") the sides with the box filter [1, 1]."""
    if direction == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.avg_pool2d(x, 2) if direction == "down" else x


class SongUNet(FreeNetwork):
    """DDPM++ U-Net F(x; c_noise(t), c_noise(s), label).

    Args:
        resolution: Side of the images.
        channels: Colours, in and out.
        num_classes: Classes, 0 when unconditional.
        model_channels: Width at the highest resolution.
        channel_mult: Width multiplier of each resolution, from the highest.
        num_blocks: Residual blocks a resolution.
        attn_resolutions: Resolutions with self-attention.
        dropout: Dropout probability while training.
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
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        self.num_classes = num_classes
        emb = 4 * model_channels
        self.map_label = _init(nn.Linear(num_classes, model_channels)) if num_classes else None
        self.map_layer0 = _init(nn.Linear(model_channels, emb))
        self.map_layer1 = _init(nn.Linear(emb, emb))
        self.map_layer0_s: nn.Linear | None = None
        self.map_layer1_s: nn.Linear | None = None

        widths = [model_channels * m for m in channel_mult]
        sides = [resolution >> level for level in range(len(widths))]
        self.enc = nn.ModuleDict()
        width, skips = model_channels, []
        for level, (side, target) in enumerate(zip(sides, widths, strict=True)):
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = _conv(channels, width, 3)
            else:
                self.enc[f"{side}x{side}_down"] = Block(width, width, emb, dropout, "down")
            skips.append(width)
            for index in range(num_blocks):
                block = Block(width, target, emb, dropout, attention=side in attn_resolutions)
                self.enc[f"{side}x{side}_block{index}"] = block
                width = target
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, (side, target) in reversed(list(enumerate(zip(sides, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{side}x{side}_in0"] = Block(width, width, emb, dropout, attention=True)
                self.dec[f"{side}x{side}_in1"] = Block(width, width, emb, dropout)
            else:
                self.dec[f"{side}x{side}_up"] = Block(width, width, emb, dropout, "up")
            for index in range(num_blocks + 1):
                attention = index == num_blocks and side in attn_resolutions
                block = Block(width + skips.pop(), target, emb, dropout, attention=attention)
                self.dec[f"{side}x{side}_block{index}"] = block
                width = target
        self.dec[f"{resolution}x{resolution}_aux_norm"] = _norm(width)
        self.dec[f"{resolution}x{resolution}_aux_conv"] = _conv(width, channels, 3, gain=1e-5)
        self._out = f"{resolution}x{resolution}_aux"

    def forward(self, x: Tensor, noise: Tensor, noise_s: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Computes F; `x` (B, C, H, W), `noise` and `noise_s` (B,), `labels` (B,) int64 or None."""
        emb = self._embed(noise, labels, self.map_layer0, self.map_layer1)
        emb_s = None
        if noise_s is not None and self.map_layer0_s is not None and self.map_layer1_s is not None:
            emb_s = self._embed(noise_s, labels, self.map_layer0_s, self.map_layer1_s)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb, emb_s) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                x = torch.cat([x, skips.pop()], dim=1) if x.shape[1] != layer.inputs else x
                x = layer(x, emb, emb_s)
        out: Tensor = self.dec[f"{self._out}_conv"](F.silu(self.dec[f"{self._out}_norm"](x)))
        return out

    def add_s_branch(self) -> None:
        """Adds mapping layers for s, copied from those of t, and a zero projection in every block."""
        self.map_layer0_s, self.map_layer1_s = deepcopy(self.map_layer0), deepcopy(self.map_layer1)  # type: ignore[assignment]
        for module in self.modules():
            if isinstance(module, Block):
                module.add_s_branch()

    def set_dropout(self, probability: float) -> None:
        """See :class:`FreeNetwork`."""
        for module in self.modules():
            if isinstance(module, Block):
                module.dropout = probability

    def last_layer(self) -> nn.Parameter:
        """Returns the weight of the output convolution."""
        return self.dec[f"{self._out}_conv"].weight  # type: ignore[return-value]

    def _embed(self, noise: Tensor, labels: Tensor | None, layer0: nn.Module, layer1: nn.Module) -> Tensor:
        emb = positional_embedding(noise, self.model_channels)
        if self.map_label is not None and labels is not None:
            onehot = F.one_hot(labels, self.num_classes).to(emb.dtype)
            emb = emb + self.map_label(onehot * math.sqrt(self.num_classes))
        out: Tensor = F.silu(layer1(F.silu(layer0(emb))))
        return out
