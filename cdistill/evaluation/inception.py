"""Inception-v3 as FID uses it, in clean-fid's three modes, from local files whose digests are checked.

=====================  ==============================================  =================================================
`legacy_tensorflow`    the TensorFlow network as NVIDIA scripted it    resizes inside, as TensorFlow 1 did; EDM's and
                                                                       CTM's numbers
`clean`                the same                                        PIL's bicubic filter, antialiased, before it
                                                                       (Parmar et al. 2022)
`legacy_pytorch`       pytorch-fid's port of the same weights          bilinear interpolation, no antialiasing, before
=====================  ==============================================  =================================================

clean-fid's own loaders are left aside: they download to a folder that every user can write to, and check nothing.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdistill.errors import CorruptFileError
from cdistill.evaluation.features import FeatureNetwork, as_rgb, device, extracting, load_scripts
from cdistill.formats.torch_files import read_torch_file
from cdistill.storage import assets
from cdistill.storage.assets import Asset

SIDE = 299


class Inception(FeatureNetwork):
    """A mode of clean-fid's; features (B, 2048).

    Attributes:
        asset: Where its weights are.
    """

    classifies = True

    @property
    def asset(self) -> Asset:
        """The file of the weights."""
        return assets.INCEPTION

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        return assets.digest(self.asset.find())

    def check(self, shape: tuple[int, ...]) -> None:
        """See :class:`FeatureNetwork`; fetches the weights if they are not there."""
        super().check(shape)
        self.asset.find()


class LegacyTensorFlow(Inception):
    """EDM's and CTM's network: TensorFlow's, which resizes inside."""

    name = "legacy_tensorflow"

    @cached_property
    def _network(self) -> Any:
        return load_script(self.asset.find(), resize=True)

    def __call__(self, images: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        with extracting():
            found: Tensor = self._network(as_rgb(images).to(device()).float())
        return found

    def probabilities(self, images: Tensor) -> Tensor:
        """Returns the 1,008 probabilities, without the last layer's bias, as the first Inception scores had them."""
        with extracting():
            found: Tensor = self._network.base(as_rgb(images).to(device()).float(), no_output_bias=True)
        return found


class Clean(Inception):
    """clean-fid's own mode."""

    name = "clean"
    classifies = False

    @cached_property
    def _network(self) -> Any:
        return load_script(self.asset.find(), resize=False)

    def __call__(self, images: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        with extracting():
            found: Tensor = self._network(resize_clean(as_rgb(images)).to(device()))
        return found


class LegacyPyTorch(Inception):
    """pytorch-fid's network, on images enlarged by bilinear interpolation."""

    name = "legacy_pytorch"

    @property
    def asset(self) -> Asset:
        """The file of the weights."""
        return assets.INCEPTION_PYTORCH

    @cached_property
    def _network(self) -> nn.ModuleDict:
        return load_ported(self.asset.find()).to(device())

    def __call__(self, images: Tensor) -> Tensor:
        """See :class:`FeatureNetwork`."""
        with extracting():
            large = F.interpolate(as_rgb(images).to(device()).float(), (SIDE, SIDE), mode="bilinear")
            return ported_features(self._network, large.clamp(0, 255))

    def probabilities(self, images: Tensor) -> Tensor:
        """Returns the 1,008 probabilities, without the last layer's bias, as the first Inception scores had them."""
        features, last = self(images), self._network["fc"]
        assert isinstance(last, nn.Linear)
        return F.linear(features, last.weight).softmax(1)


def load_script(path: Path, resize: bool) -> Any:
    """Returns clean-fid's wrapper of the scripted network; with `resize`, images of any size may come."""
    from cleanfid.inception_torchscript import InceptionV3W

    with load_scripts():
        return InceptionV3W(str(path.parent), download=False, resize_inside=resize).to(device()).eval()


def resize_clean(images: Tensor) -> Tensor:
    """Returns uint8 RGB images (B, 3, H, W) as float32 (B, 3, 299, 299), by clean-fid's resizer."""
    from cleanfid.resize import build_resizer

    resizer = build_resizer("clean")
    pictures = [torch.from_numpy(resizer(image)) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.stack(pictures).permute(0, 3, 1, 2)


def load_ported(path: Path) -> nn.ModuleDict:
    """Returns the layers of pytorch-fid's Inception with the weights of its file.

    Raises:
        CorruptFileError: The file holds other weights.
    """
    network = ported_layers()
    try:
        network.load_state_dict(read_torch_file(path))
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{path}: not pytorch-fid's Inception; fetch {assets.INCEPTION_PYTORCH.address} again"
        ) from error
    return network.eval().requires_grad_(False)


def ported_layers() -> nn.ModuleDict:
    """Returns the layers in the order in which they are applied, `fc` last: torchvision's, and clean-fid's patches."""
    from cleanfid import inception_pytorch as patches
    from torchvision.models import inception_v3

    plain = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    replaced: dict[str, nn.Module] = {
        "Mixed_5b": patches.FIDInceptionA(192, pool_features=32),
        "Mixed_5c": patches.FIDInceptionA(256, pool_features=64),
        "Mixed_5d": patches.FIDInceptionA(288, pool_features=64),
        "Mixed_6b": patches.FIDInceptionC(768, channels_7x7=128),
        "Mixed_6c": patches.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6d": patches.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6e": patches.FIDInceptionC(768, channels_7x7=192),
        "Mixed_7b": patches.FIDInceptionE_1(1280),
        "Mixed_7c": patches.FIDInceptionE_2(2048),
    }
    return nn.ModuleDict({name: replaced.get(name, layer) for name, layer in plain.named_children()})


def ported_features(network: nn.ModuleDict, images: Tensor) -> Tensor:
    """Returns the features (B, 2048) of images (B, 3, 299, 299) with values from 0 to 255."""
    x = 2 * (images / 255) - 1
    for name, layer in network.items():
        if name != "fc":
            x = layer(x)
    return x.flatten(1)
