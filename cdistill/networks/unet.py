"""What DDPM++, NCSN++ and ADM share: resampling, attention, the residual block and the way through the U.

Written from the papers (Song et al. 2021; Dhariwal & Nichol 2021; Karras et al. 2022). The names of the parameters are
those of EDM's own files, so that a state dict can be exchanged. Everything is a plain operation of torch with forward-
and reverse-mode derivatives.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad


@dataclass(frozen=True)
class Style:
    """The conventions in which the families of U-Nets differ."""

    init: Callable[[nn.Module, float], nn.Module]  # fills the weights of a layer, times a gain, and returns the layer
    zero: float  # gain of the layers that begin at, or next to, zero
    attention: float  # gain of the layer that makes queries, keys and values
    eps: float  # of the group norms
    skip_scale: float  # factor on every residual sum
    head: int | None  # channels of an attention head; None for a single head
    scales: bool  # whether the noise scales the activations too, besides shifting them
    projects: bool  # whether the skip of every resampling block has a convolution
    taps: tuple[int, ...] = (1, 1)  # the resampling filter along one side

    def norm(self, channels: int) -> nn.GroupNorm:
        """Returns a group norm of at most 32 groups with at least 4 channels each."""
        return nn.GroupNorm(min(32, channels // 4), channels, eps=self.eps)

    def conv(self, inputs: int, outputs: int, kernel: int, gain: float = 1.0) -> nn.Module:
        """Returns an initialised convolution that keeps the sides."""
        return self.init(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), gain)

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        """Returns an initialised linear layer."""
        return self.init(nn.Linear(inputs, outputs, bias=bias), 1.0)


def resample(x: Tensor, taps: Tensor, direction: str) -> Tensor:
    """Doubles ("up") or halves ("down") the sides of `x` with the filter `taps` (1, 1, k, k), whose sum is 1."""
    if taps.shape[-1] == 2:  # the box filter: all of these are bit-equal to the convolution, and faster
        if direction == "down":
            return F.avg_pool2d(x, 2)
        return _repeated(x) if x.device.type == "cpu" else F.interpolate(x, scale_factor=2.0, mode="nearest")
    kernel = taps.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    padding = (taps.shape[-1] - 1) // 2
    if direction == "up":
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])


def _repeated(x: Tensor) -> Tensor:
    """Doubles every row and column, in the memory format of `x`; on a CPU 2 to 4 times as fast as `interpolate`."""
    batch, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        inner = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
        return inner.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
    wide = x[:, :, :, None, :, None].expand(batch, channels, height, 2, width, 2)
    return wide.reshape(batch, channels, 2 * height, 2 * width)


class Resampling(nn.Module):
    """Resampling alone, "up" or "down", by the filter `taps` along one side."""

    resample_filter: Tensor

    def __init__(self, direction: str, taps: Sequence[int]) -> None:
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", outer_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C, 2H, 2W) or (B, C, H/2, W/2)."""
        return resample(x, self.resample_filter, self.direction)


class ResamplingConv(nn.Conv2d):
    """Resampling, "up" or "down", followed by a convolution with an odd kernel; `taps` is the filter along one side."""

    resample_filter: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int, direction: str, taps: Sequence[int]) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.direction = direction
        self.register_buffer("resample_filter", outer_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, 2H, 2W) or (B, outputs, H/2, W/2)."""
        return super().forward(resample(x, self.resample_filter, self.direction))


class FusedDownConv(ResamplingConv):
    """The other order: a convolution, then halving; the image is padded once, before both."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H/2, W/2)."""
        taps = self.resample_filter
        padding = self.kernel_size[0] // 2 + (taps.shape[-1] - 1) // 2
        kernel = taps.to(x.dtype).expand(self.out_channels, 1, -1, -1)
        hidden = F.conv2d(x, self.weight, padding=padding)
        return F.conv2d(hidden, kernel, self.bias, stride=2, groups=self.out_channels)


def outer_filter(taps: Sequence[int]) -> Tensor:
    """Returns the two-dimensional filter (1, 1, k, k): the outer product of `taps`, over its sum."""
    line = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(line, line) / line.sum().square())[None, None]


class Attention(nn.Module):
    """Self-attention over the pixels, softmax(q k' / sqrt(d)) v, in heads of d channels, or a single one for None.

    The channels of `qkv` lie as (heads, d, 3), q, k and v innermost. Torch's fused attention has no forward-mode
    derivative, so tensors that carry a tangent go through `plain_attention`; so do half precisions on a CPU, where it
    is twice as fast. For second derivatives, wrap the call in
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
    """

    def __init__(self, head: int | None = None) -> None:
        super().__init__()
        self.head = head

    def forward(self, qkv: Tensor) -> Tensor:
        """Maps (B, 3C, H, W) to (B, C, H, W)."""
        q, k, v = split_heads(qkv, self.head or qkv.shape[1] // 3)
        carries_tangent = not torch.compiler.is_compiling() and forward_ad.unpack_dual(qkv).tangent is not None
        plain = carries_tangent or (qkv.device.type == "cpu" and qkv.itemsize == 2)
        out = plain_attention(q, k, v) if plain else F.scaled_dot_product_attention(q, k, v)
        return out.transpose(-1, -2).reshape(len(qkv), -1, *qkv.shape[2:])


def split_heads(qkv: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v, each (B, heads, pixels, head) and contiguous, out of (B, 3C, H, W)."""
    rows = qkv.reshape(len(qkv), -1, head, 3, qkv.shape[2] * qkv.shape[3]).permute(3, 0, 1, 4, 2).contiguous()
    return rows[0], rows[1], rows[2]


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, heads, pixels, d) by single operations; the softmax runs in float32 at least."""
    logits = q @ (k / math.sqrt(k.shape[-1])).transpose(-1, -2)
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype) @ v


class Block(nn.Module):
    """Residual block: norm, SiLU, (resample,) conv, noise, norm, SiLU, dropout, conv; then attention.

    The noise embedding has `embedding` channels; `resample` is "up", "down" or "" for none.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float,
        style: Style,
        resample: str = "",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.dropout = dropout
        self.style = style
        self.norm0 = style.norm(inputs)
        self.conv0 = self._layer(inputs, outputs, 3, resample)
        self.affine = style.linear(embedding, outputs * (2 if style.scales else 1))
        self.affine_s: nn.Linear | None = None
        self.norm1 = style.norm(outputs)
        self.conv1 = style.conv(outputs, outputs, 3, style.zero)
        kernel = int(style.projects or inputs != outputs)
        self.skip = self._layer(inputs, outputs, kernel, resample) if resample or inputs != outputs else None
        self.attention = Attention(style.head) if attention else None
        if attention:
            self.norm2 = style.norm(outputs)
            self.qkv = style.conv(outputs, 3 * outputs, 1, style.attention)
            self.proj = style.conv(outputs, outputs, 1, style.zero)

    def forward(self, x: Tensor, emb: Tensor, emb_s: Tensor | None) -> Tensor:
        """Maps (B, inputs, H, W) to (B, outputs, H', W'); `emb` and `emb_s` are (B, embedding)."""
        hidden = self.conv0(F.silu(self.norm0(x)))
        noise = self.affine(emb)
        if self.affine_s is not None and emb_s is not None:
            noise = noise + self.affine_s(emb_s)
        noise = noise[:, :, None, None]
        if self.style.scales:
            scale, shift = noise.chunk(2, dim=1)
            hidden = torch.addcmul(shift, self.norm1(hidden), scale + 1)
        else:
            hidden = self.norm1(hidden + noise)
        hidden = self.conv1(F.dropout(F.silu(hidden), self.dropout, self.training))
        out: Tensor = (hidden + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        if self.attention is not None:
            out = (out + self.proj(self.attention(self.qkv(self.norm2(out))))) * self.style.skip_scale
        return out

    def add_s_branch(self) -> None:
        """Adds the projection of s, weight and bias exactly zero."""
        self.affine_s = deepcopy(self.affine)  # type: ignore[assignment]
        nn.init.zeros_(self.affine_s.weight)  # type: ignore[union-attr]
        nn.init.zeros_(self.affine_s.bias)  # type: ignore[union-attr]

    def _layer(self, inputs: int, outputs: int, kernel: int, direction: str) -> nn.Module:
        if not direction:
            return self.style.conv(inputs, outputs, kernel)
        if not kernel:
            return Resampling(direction, self.style.taps)
        return self.style.init(ResamplingConv(inputs, outputs, kernel, direction, self.style.taps), 1.0)


class UNet(nn.Module, ABC):
    """The way through the U; a family adds its embeddings, its encoder and decoder, and its last layers.

    Attributes:
        map_augment: Layer of EDM's augmentation labels, kept for the files' sake: distillation never has such labels.
        map_layer0_s: First layer of the s-branch, None before `add_s_branch`; `map_layer1_s` is the second.
    """

    num_classes: int
    enc: nn.ModuleDict
    dec: nn.ModuleDict
    map_augment: nn.Module | None
    map_layer0: nn.Module
    map_layer1: nn.Module
    map_layer0_s: nn.Module | None
    map_layer1_s: nn.Module | None

    @abstractmethod
    def embed(self, noise: Tensor, labels: Tensor | None, first: nn.Module, second: nn.Module) -> Tensor:
        """Maps c_noise (B,) and the labels to the embedding (B, E) of the branch with these mapping layers."""

    @abstractmethod
    def output(self, x: Tensor) -> Tensor:
        """Maps the decoder's activations to F."""

    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """Returns the weight of the output layer."""

    def forward(self, x: Tensor, noise: Tensor, noise_s: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Computes F(x, c_noise(t)[, c_noise(s)], labels), like x.

        x (B, C, H, W) is of unit variance, in the type of the weights; c_noise (B,) are float32 at least; labels (B,)
        are int64, None for no class.
        """
        return self.output(self.body(x, noise, noise_s, labels))

    def body(self, x: Tensor, noise: Tensor, noise_s: Tensor | None, labels: Tensor | None) -> Tensor:
        """Computes what `output` maps to F; arguments as `forward`."""
        emb, emb_s = self.embed(noise, labels, self.map_layer0, self.map_layer1), None
        if noise_s is not None and self.map_layer0_s is not None and self.map_layer1_s is not None:
            emb_s = self.embed(noise_s, labels, self.map_layer0_s, self.map_layer1_s)
        skips: list[Tensor] = []
        aux = x
        for layer in self.enc.values():
            if isinstance(layer, FusedDownConv):  # the residual encoder: the image itself joins in at every level
                x = aux = (x + layer(aux)) / math.sqrt(2)
                skips[-1] = x
            else:
                x = layer(x, emb, emb_s) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        for layer in self.dec.values():
            if isinstance(layer, Block):
                x = layer(torch.cat([x, skips.pop()], dim=1) if x.shape[1] != layer.inputs else x, emb, emb_s)
        return x

    def add_s_branch(self) -> None:
        """Adds an input for s: mapping layers copied from those of t, and in every block a projection.

        The projections are zero, so that the output stays the same until they are trained.
        """
        self.map_layer0_s, self.map_layer1_s = deepcopy(self.map_layer0), deepcopy(self.map_layer1)
        for block in self.blocks():
            block.add_s_branch()

    def set_dropout(self, probability: float) -> None:
        """Sets the dropout probability of every block."""
        for block in self.blocks():
            block.dropout = probability

    def unused(self) -> list[nn.Parameter]:
        """Returns parameters that no output depends on; they stay frozen in a student."""
        return [] if self.map_augment is None else list(self.map_augment.parameters())

    def blocks(self) -> list[Block]:
        """Returns every residual block."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def onehot(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """Returns the labels (B, num_classes) one-hot, or zeros for no class, in the type of `like` (B, ...)."""
        if labels is None:
            return like.new_zeros(len(like), self.num_classes)
        return F.one_hot(labels, self.num_classes).to(like.dtype)

    def build(
        self,
        resolution: int,
        channels: int,
        first: int,
        widths: Sequence[int],
        num_blocks: int,
        attention: Callable[[int, bool], bool],
        block: Callable[..., Block],
        style: Style,
        residual: bool = False,
    ) -> int:
        """Builds encoder and decoder under EDM's names, and returns the width that leaves the decoder.

        `first` is the width after the first convolution, `widths` those of each level, from the highest resolution; the
        decoder has one block a level more than `num_blocks`. ``attention(side, every)`` says whether a block has
        attention; `every` holds for all blocks of the encoder and for the last of each level in the decoder. With
        `residual` the image joins in at every level of the encoder.
        """
        sides = [resolution >> level for level in range(len(widths))]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f"{resolution}x{resolution}_conv"] = style.conv(channels, first, 3)
        width, aux, skips = first, channels, [first]
        for level, (side, target) in enumerate(zip(sides, widths, strict=True)):
            if level:
                self.enc[f"{side}x{side}_down"] = block(width, width, resample="down")
                skips.append(width)
            if level and residual:
                joined = style.init(FusedDownConv(aux, width, 3, "down", style.taps), 1.0)
                self.enc[f"{side}x{side}_aux_residual"] = joined
                aux = width
            for index in range(num_blocks):
                self.enc[f"{side}x{side}_block{index}"] = block(width, target, attention=attention(side, True))
                width = target
                skips.append(width)
        for side, target in reversed(list(zip(sides, widths, strict=True))):
            if side == sides[-1]:
                self.dec[f"{side}x{side}_in0"] = block(width, width, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(width, width)
            else:
                self.dec[f"{side}x{side}_up"] = block(width, width, resample="up")
            for index in range(num_blocks + 1):
                attends = attention(side, index == num_blocks)
                self.dec[f"{side}x{side}_block{index}"] = block(width + skips.pop(), target, attention=attends)
                width = target
        return width
