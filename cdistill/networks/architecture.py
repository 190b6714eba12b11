"""Networks from a description in JSON: what stands in the header of a teacher's file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cdistill.networks.adm import ADMUNet
from cdistill.networks.denoiser import EDMDenoiser
from cdistill.networks.song import SongUNet

NETWORKS: dict[str, type[SongUNet] | type[ADMUNet]] = {"song": SongUNet, "adm": ADMUNet}
_MOST = {"resolution": 4096, "channels": 4096, "num_classes": 10**6, "model_channels": 4096, "num_blocks": 64}


def build_denoiser(architecture: Mapping[str, Any], sigma_data: float) -> EDMDenoiser:
    """Builds an untrained denoiser.

    Args:
        architecture: "network" ("song" or "adm"), the arguments of its class, and "s_branch" for a student's network.
        sigma_data: Standard deviation of the data.

    Raises:
        KeyError, TypeError, ValueError: The description is none, or beyond all reason.
    """
    arguments = dict(architecture)
    takes_s = bool(arguments.pop("s_branch", False))
    network = NETWORKS[arguments.pop("network")]
    for key, most in _MOST.items():
        if not 0 <= arguments.get(key, 0) <= most:
            raise ValueError(f"{key} = {arguments[key]}; at most {most}")
    if len(arguments.get("channel_mult", ())) > 12 or max(arguments.get("channel_mult", [1])) > 64:
        raise ValueError(f"channel_mult = {arguments['channel_mult']}; at most 12 levels of at most 64")
    side, channels = arguments["resolution"], arguments["channels"]
    free = network(**arguments)
    if takes_s:
        free.add_s_branch()
    return EDMDenoiser(free, (channels, side, side), sigma_data, arguments["num_classes"])


def load_denoiser(architecture: Mapping[str, Any], sigma_data: float, tensors: Mapping[str, Tensor]) -> EDMDenoiser:
    """Builds a denoiser around `tensors`, which it takes over without a copy.

    Nothing is allocated for a description that does not fit the tensors.

    Raises:
        KeyError, TypeError, ValueError: The description is none.
        RuntimeError: The tensors do not fit it, are no floats, or a filter is not the one it names.
    """
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise RuntimeError("weights that are no floating-point numbers")
    filters = {key: tensor for key, tensor in tensors.items() if key.endswith("resample_filter")}
    with torch.device("meta"):
        denoiser = build_denoiser(architecture, sigma_data)
    denoiser.load_state_dict(tensors, assign=True)
    taps = torch.tensor(architecture.get("taps", [1, 1]), dtype=torch.float32)
    expected = torch.outer(taps, taps) / taps.sum().square()
    for key, tensor in filters.items():
        if not torch.allclose(tensor.float(), expected.to(tensor.device), atol=1e-6):
            raise RuntimeError(f"{key} is not the filter {taps.tolist()}")
    return denoiser
