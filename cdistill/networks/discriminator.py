"""Discriminators of CTM's GAN loss: a small one from scratch, and heads on the features of a frozen VGG-16.

Every layer has a spectral norm (Miyato et al. 2018), and the class enters as a projection (Miyato & Koyama 2018). A
discriminator stays in evaluation mode, in which a call changes nothing; its spectral norms follow its weights with
`power_iteration`, once an update, so that the number of micro-batches and of calls does not matter.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from typing_extensions import override

from cdistill.errors import CorruptFileError
from cdistill.formats.torch_files import read_torch_file
from cdistill.storage import assets

RESOLUTION = 224  # of the images that VGG-16 sees
_LAYERS = (8, 15, 22, 29)  # relu2_2, relu3_3, relu4_3 and relu5_3 of torchvision's VGG-16
_CHANNELS = (128, 256, 512, 512)
_WIDTH = 64  # of a head on features
_NARROW, _WIDE = 32, 128  # of the small discriminator, at its first layer and at most
_SLOPE = 0.2


class Discriminator(nn.Module, ABC):
    """d_k(x, c), high for real images. One from another package derives from this class.

    Built with the shape (C, H, W) of an image, C = 1 or 3, and the number of classes, 0 when unconditional. Weights
    that it needs are loaded then, so that a missing file is reported before training.
    """

    @abstractmethod
    def forward(self, x: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Computes the logits of every head k, (B, n_k), one for each place that it looks at.

        Args:
            x: Images (B, C, H, W), values about [-1, 1], in the type of the weights.
            labels: Class indices (B,), int64; None when unconditional.
        """

    @classmethod
    def meta(cls, shape: tuple[int, ...], num_classes: int) -> "Discriminator":
        """Returns an instance on the meta device that needs no file, for counting what a call costs."""
        with torch.device("meta"):
            return cls(shape, num_classes)

    def frozen(self) -> list[nn.Parameter]:
        """Returns the weights that are frozen inside it, besides its own."""
        return []


@torch.no_grad()
def power_iteration(module: nn.Module) -> None:
    """Moves every spectral norm's singular vectors by one step of the power iteration."""
    for layer in module.modules():
        if parametrize.is_parametrized(layer, "weight"):
            layer.train()
            _ = layer.weight
            layer.eval()


class Projection(nn.Module):
    """w.h + b + <e_c, h> at every place of a feature map (Miyato & Koyama 2018, Eq. 3); no e_c without classes."""

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
    """Convolutions from the pixels down to a side below 8, summed over positions.

    70,000 weights for 8x8 and 12x12 images, 840,000 for 64x64.
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


class VGG16(nn.Module):
    """Four feature maps of a frozen VGG-16 (Simonyan & Zisserman 2015), images enlarged to 224x224 bilinearly.

    `layers` are the beginning of torchvision's `features`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        for name, values in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(values)[:, None, None])  # ImageNet's, of RGB in [0, 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps images (B, 1 or 3, H, W), values about [-1, 1], to feature maps, the finest first."""
        rgb = ((x + 1) / 2).expand(-1, 3, -1, -1)
        h = F.interpolate((rgb - self.mean) / self.std, size=RESOLUTION, mode="bilinear", align_corners=False)
        maps = []
        for place, layer in enumerate(self.layers):
            h = layer(h)
            if place in _LAYERS:
                maps.append(h)
        return maps


class VGG16Discriminator(Discriminator):
    """A small head on each of four feature maps of a frozen VGG-16 (projected GAN, Sauer et al. 2021).

    The heads look at the maps themselves, without the random mixing of channels and scales of that paper; CTM has them
    on DeiT and EfficientNet-lite0. The VGG-16, with the published weights unless `layers` are given, is no submodule:
    it is moved with the heads, but neither trained, nor saved, nor counted with them. Errors as `Asset.find`.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, layers: nn.Sequential | None = None) -> None:
        super().__init__()
        if layers is None:
            load_vgg16(layers := _empty_layers(), assets.VGG16.find())
        self._backbone = [VGG16(layers).eval().requires_grad_(False)]
        sides = [RESOLUTION // 2 ** (k + 1) for k in range(len(_LAYERS))]
        self.trunks = nn.ModuleList(_trunk(channels, side) for channels, side in zip(_CHANNELS, sides, strict=True))
        self.heads = nn.ModuleList(Projection(_WIDTH, num_classes) for _ in self.trunks)

    @override
    def forward(self, x: Tensor, labels: Tensor | None) -> list[Tensor]:
        """One head for each feature map, one logit for each place."""
        maps = self._backbone[0](x)
        return [head(trunk(h), labels) for trunk, head, h in zip(self.trunks, self.heads, maps, strict=True)]

    @override
    @classmethod
    def meta(cls, shape: tuple[int, ...], num_classes: int) -> Discriminator:
        with torch.device("meta"):
            return cls(shape, num_classes, _empty_layers())

    @override
    def frozen(self) -> list[nn.Parameter]:
        return list(self._backbone[0].parameters())

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VGG16Discriminator":
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


def load_vgg16(network: nn.Module, path: Path, name_of: Callable[[str], str] = str) -> None:
    """Gives a network the weights of VGG-16's `features` in torchvision's file; CorruptFileError if they do not fit.

    `name_of` maps the names of the network's weights to those of the file.
    """
    try:
        weights = read_torch_file(path)
        state = {name: weights[f"features.{name_of(name)}"] for name in network.state_dict()}
        network.load_state_dict(state, assign=True)
    except (RuntimeError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path}: not torchvision's VGG-16 ({error}); fetch {assets.VGG16.address} again"
        ) from error


def _empty_layers() -> nn.Sequential:
    """Returns the layers on the meta device."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        layers: nn.Sequential = vgg16(weights=None).features[: _LAYERS[-1] + 1]
    return layers
