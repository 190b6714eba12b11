"""Discriminators on the features of torchvision's networks, with local, checked weights."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cdistill.errors import CorruptFileError
from cdistill.formats.torch_files import read_torch_file
from cdistill.networks.discriminator import Backbone, FeatureDiscriminator
from cdistill.storage import assets

RESOLUTION = 224
_LAYERS = (8, 15, 22, 29)  # relu2_2, relu3_3, relu4_3 and relu5_3 of torchvision's VGG-16
_CHANNELS = (128, 256, 512, 512)


class VGG16(Backbone):
    """Four feature maps of VGG-16 (Simonyan & Zisserman 2015), images enlarged to 224x224 by bilinear interpolation.

    Args:
        layers: The beginning of torchvision's `features`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.channels = _CHANNELS
        self.sides = tuple(RESOLUTION // 2 ** (k + 1) for k in range(len(_LAYERS)))
        for name, values in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(values)[:, None, None])  # ImageNet's, of RGB in [0, 1]

    @override
    def forward(self, x: Tensor) -> list[Tensor]:
        rgb = ((x + 1) / 2).expand(-1, 3, -1, -1)
        h = F.interpolate((rgb - self.mean) / self.std, size=RESOLUTION, mode="bilinear", align_corners=False)
        maps = []
        for place, layer in enumerate(self.layers):
            h = layer(h)
            if place in _LAYERS:
                maps.append(h)
        return maps


class VGG16Discriminator(FeatureDiscriminator):
    """Heads on four feature maps of a frozen VGG-16.

    CTM has them on DeiT and EfficientNet-lite0, mixed across channels and scales by fixed random layers.

    Args:
        shape: (C, H, W) of an image, C = 1 or 3.
        num_classes: Number of classes, 0 when unconditional.

    Raises:
        MissingAssetError: The weights are not in the asset folder; the message says where to put them.
        CorruptFileError: The file there is not the published one.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__(VGG16(load_layers(assets.VGG16.find())), num_classes)

    @classmethod
    @override
    def meta(cls, shape: tuple[int, ...], num_classes: int) -> FeatureDiscriminator:
        with torch.device("meta"):
            return FeatureDiscriminator(VGG16(_empty_layers()), num_classes)


def load_layers(path: Path) -> nn.Sequential:
    """Returns the layers of VGG-16 that are needed, with the weights of torchvision's file at `path`."""
    layers = _empty_layers()
    try:
        weights = read_torch_file(path)
        layers.load_state_dict({name: weights[f"features.{name}"] for name in layers.state_dict()}, assign=True)
    except (RuntimeError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path}: not torchvision's VGG-16 ({error}); fetch {assets.VGG16.address} again"
        ) from error
    return layers


def _empty_layers() -> nn.Sequential:
    """Returns the layers on the meta device."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        layers: nn.Sequential = vgg16(weights=None).features[: _LAYERS[-1] + 1]
    return layers
