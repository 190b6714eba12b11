"""Discriminators of CTM's GAN loss: a small one from scratch, and heads on the features of a frozen network.

Every layer has a spectral norm (Miyato et al. 2018), and the class enters as a projection (Miyato & Koyama 2018). A
discriminator stays in evaluation mode, in which a call changes nothing; its spectral norms follow its weights with
`power_iteration`, once an update, so that the number of micro-batches and of calls does not matter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from typing_extensions import override

_WIDTH = 64  # of a head on features
_NARROW, _WIDE = 32, 128  # of the small discriminator, at its first layer and at most
_SLOPE = 0.2


class Discriminator(nn.Module, ABC):
    """d_k(x, c), high for real images. One from another package derives from this class.

    Built with the shape (C, H, W) of an image, C = 1 or 3, and the number of classes, 0 when unconditional. What it
    needs (weights, say) is loaded then, so that a lack shows before training.
    """

    @abstractmethod
    def forward(self, x: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Computes the logits of every head.

        Args:
            x: Images (B, C, H, W), values about [-1, 1], in the type of the weights.
            labels: Class indices (B,), int64; None when unconditional.

        Returns:
            (B, n_k) for each head k, a logit for each place that it looks at.
        """

    @classmethod
    def meta(cls, shape: tuple[int, ...], num_classes: int) -> "Discriminator":
        """Returns an instance on the meta device that needs no file, for counting what a call costs."""
        with torch.device("meta"):
            return cls(shape, num_classes)

    def frozen(self) -> list[nn.Parameter]:
        """Returns the weights that it holds beside its own."""
        return []


@torch.no_grad()
def power_iteration(module: nn.Module) -> None:
    """Moves every spectral norm's singular vectors by one step of the power iteration."""
    for part in module.modules():
        if parametrize.is_parametrized(part, "weight"):
            part.train()
            _ = part.weight
            part.eval()


class Projection(nn.Module):
    """w.h + b + <e_c, h> at every place of a feature map (Miyato & Koyama 2018, Eq. 3).

    Args:
        width: Channels of the map.
        num_classes: Number of classes, 0 for w.h + b alone.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = _conv(width, 1, 1)
        self.classes = spectral_norm(nn.Embedding(num_classes, width)) if num_classes else None

    def forward(self, h: Tensor, labels: Tensor | None) -> Tensor:
        """Maps (B, width, H, W) to logits (B, H W)."""
        logits: Tensor = self.linear(h)
        if self.classes is not None:
            logits = logits + (self.classes(labels)[:, :, None, None] * h).sum(1, keepdim=True)
        return logits.flatten(1)


class ImageDiscriminator(Discriminator):
    """Convolutions from the pixels down to a side below 8, summed over the places.

    70,000 weights for 8x8 and 12x12 images, 840,000 for 64x64.

    Args:
        shape: (C, H, W) of an image.
        num_classes: Number of classes, 0 when unconditional.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        side, width = shape[-1], _NARROW
        layers: list[nn.Module] = [_conv(shape[0], width, 3), nn.LeakyReLU(_SLOPE)]
        while side >= 8:
            wider = min(2 * width, _WIDE)
            layers += [_conv(width, wider, 4, 2), nn.LeakyReLU(_SLOPE)]
            side, width = side // 2, wider
        self.trunk = nn.Sequential(*layers, _conv(width, width, 3), nn.LeakyReLU(_SLOPE))
        self.head = Projection(width, num_classes)

    @override
    def forward(self, x: Tensor, labels: Tensor | None) -> list[Tensor]:
        """One head, one logit."""
        return [self.head(self.trunk(x).sum((2, 3), keepdim=True), labels)]


class Backbone(nn.Module, ABC):
    """A frozen network whose features tell images apart.

    Attributes:
        channels: Of each feature map.
        sides: Of each feature map, about; heads of larger maps get more layers.
    """

    channels: tuple[int, ...]
    sides: tuple[int, ...]

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps images (B, 1 or 3, H, W), values about [-1, 1], to feature maps, the finest first."""


class FeatureDiscriminator(Discriminator):
    """A small head on each feature map of a frozen backbone (projected GAN, Sauer et al. 2021).

    The heads look at the maps themselves, without the random mixing of channels and scales of that paper. The backbone
    is no submodule: it is moved with the heads, but neither trained, nor saved, nor counted with them.

    Args:
        backbone: The frozen network.
        num_classes: Number of classes, 0 when unconditional.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self._backbone = [backbone.eval().requires_grad_(False)]
        pairs = zip(backbone.channels, backbone.sides, strict=True)
        self.trunks = nn.ModuleList(_trunk(channels, side) for channels, side in pairs)
        self.heads = nn.ModuleList(Projection(_WIDTH, num_classes) for _ in self.trunks)

    @override
    def forward(self, x: Tensor, labels: Tensor | None) -> list[Tensor]:
        """One head for each map, one logit for each place."""
        maps = self._backbone[0](x)
        return [head(trunk(part), labels) for trunk, head, part in zip(self.trunks, self.heads, maps, strict=True)]

    @override
    def frozen(self) -> list[nn.Parameter]:
        return list(self._backbone[0].parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureDiscriminator":
        self._backbone[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _trunk(channels: int, side: int) -> nn.Sequential:
    """Narrows a feature map and halves it until its side is 8 or less."""
    layers: list[nn.Module] = [_conv(channels, _WIDTH, 1), nn.LeakyReLU(_SLOPE)]
    while side > 8:
        layers += [_conv(_WIDTH, _WIDTH, 4, 2), nn.LeakyReLU(_SLOPE)]
        side //= 2
    return nn.Sequential(*layers)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2))
