"""Teachers of EDM's shape, made at test time under the official names and in the official file format."""

from pathlib import Path
from typing import Any

import torch

from cdistill.networks.architecture import build_denoiser
from cdistill.networks.denoiser import EDMDenoiser
from tests.edm_writer import write_edm_pickle

_EDMS_NAMES = {
    "resolution": "img_resolution",
    "channels": "img_channels",
    "num_classes": "label_dim",
    "embedding": "embedding_type",
    "encoder": "encoder_type",
    "taps": "resample_filter",
}
_CLASSES = {"song": "SongUNet", "adm": "DhariwalUNet"}


def random_denoiser(architecture: dict[str, Any]) -> EDMDenoiser:
    """A denoiser with weights at random that has left the tiny initial values of the "zero" layers behind."""
    torch.manual_seed(0)
    denoiser = build_denoiser(architecture, 0.5)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return denoiser.eval()


def write_teacher(path: Path, denoiser: EDMDenoiser, architecture: dict[str, Any], **more: Any) -> None:
    """Pickles a denoiser as EDM's training loop would have."""
    given = dict(architecture)
    name = _CLASSES[given.pop("network")]
    kwargs = {_EDMS_NAMES.get(key, key): value for key, value in given.items()}
    own = type(denoiser.model).__name__
    type(denoiser.model).__name__ = name  # what the writer calls the class in the file
    try:
        write_edm_pickle(path, denoiser, {**kwargs, "model_type": name}, **more)
    finally:
        type(denoiser.model).__name__ = own
