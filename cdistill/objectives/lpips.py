"""LPIPS as a training distance, through the `lpips` package with a local, checked backbone."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from cdistill.networks.discriminator import load_vgg16
from cdistill.objectives.distances import Distance
from cdistill.storage import assets

RESOLUTION = 224
_TINY = 1e-20


class LPIPS(Distance):
    """LPIPS (Zhang et al. 2018) of VGG-16, images enlarged to 224x224 by bilinear interpolation, not clamped.

    CTM and CM average-pool in VGG; the `lpips` package used here max-pools, as in LPIPS' own paper. The root of
    each feature's norm has its epsilon inside, because the gradient of the plain root at zero is NaN. Under autocast
    VGG runs in half precision, and what becomes of its features in float32: small squares would vanish.

    Raises:
        MissingAssetError: The backbone is not in the asset folder; the message says where to put it.
        CorruptFileError: The file there is not the published one.
    """

    images_only = True

    def __init__(self) -> None:
        self.model = load_network(assets.VGG16.find())

    @override
    @classmethod
    def meta(cls) -> "LPIPS":
        distance = cls.__new__(cls)
        with torch.device("meta"):
            distance.model = _build(pretrained=False)
        return distance

    @override
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.model.to(x.device)
        total = torch.zeros(len(x), device=x.device)
        for layer, first, second in zip(self.model.lins, self._features(x), self._features(y), strict=True):
            weight = layer.model[-1].weight  # a 1x1 convolution to one channel, which autocast would make half
            difference = _unit(first.float()) - _unit(second.float())
            total = total + (weight * difference.square()).sum(1).mean((1, 2))
        return total

    def _features(self, x: Tensor) -> list[Tensor]:
        large = F.interpolate(x.float().expand(-1, 3, -1, -1), size=RESOLUTION, mode="bilinear", align_corners=False)
        return list(self.model.net(self.model.scaling_layer(large)))


@cache
def load_network(path: Path) -> Any:
    """Builds lpips' network with the backbone of a torchvision file and the linear weights of the package."""
    model = _build(pretrained=True)
    load_vgg16(model.net, path, lambda name: name.split(".", 1)[1])  # without the name of lpips' slice
    return model


def _build(pretrained: bool) -> Any:
    """Builds lpips' network, frozen, without torchvision's download of the backbone (`pnet_rand`)."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips names torchvision's arguments as they were in 2022
        model = lpips.LPIPS(net="vgg", pretrained=pretrained, pnet_rand=True, verbose=False)
    return model.eval().requires_grad_(False)


def _unit(features: Tensor) -> Tensor:
    """Scales the feature vector of each pixel to unit length."""
    return features / (features.square().sum(1, keepdim=True) + _TINY).sqrt()
