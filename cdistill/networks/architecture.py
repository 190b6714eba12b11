"""Networks from a description in JSON: what stands in the header of a teacher's file."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from cdistill.networks.adm import ADMUNet
from cdistill.networks.denoiser import EDMDenoiser
from cdistill.networks.song import SongUNet

Size = Annotated[int, Field(ge=1, le=4096)]
_LARGEST_SIGMA = 1e3
Factor = Annotated[int, Field(ge=1, le=64)]


class _Description(BaseModel):
    """What every network is described by; bounded, so that a file cannot ask for too much memory."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    resolution: Size
    channels: Annotated[int, Field(ge=1, le=64)]
    num_classes: Annotated[int, Field(ge=0, le=10**6)] = 0
    model_channels: Annotated[int, Field(ge=4, le=4096)]
    channel_mult: Annotated[list[Factor], Field(min_length=1, max_length=12)]
    num_blocks: Factor
    attn_resolutions: Annotated[list[Size], Field(max_length=12)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment_dim: Annotated[int, Field(ge=0, le=64)] = 0
    s_branch: bool = False

    @model_validator(mode="after")
    def _can_be_halved(self) -> "_Description":
        if self.resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(f"resolution: {self.resolution} cannot be halved {len(self.channel_mult) - 1} times")
        return self


class SongDescription(_Description):
    """A DDPM++ or NCSN++: the arguments of :class:`SongUNet`."""

    network: Literal["song"]
    channel_mult_noise: Annotated[int, Field(ge=1, le=16)] = 1
    embedding: Literal["positional", "fourier"] = "positional"
    encoder: Literal["standard", "residual"] = "standard"
    taps: Annotated[list[int], Field(max_length=4)] = [1, 1]

    @model_validator(mode="after")
    def _known_filter(self) -> "SongDescription":
        if self.taps not in ([1, 1], [1, 3, 3, 1]):
            raise ValueError("taps: known are [1, 1] and [1, 3, 3, 1]")
        return self


class ADMDescription(_Description):
    """An ADM: the arguments of :class:`ADMUNet`."""

    network: Literal["adm"]
    head_channels: Annotated[int, Field(ge=1, le=4096)] = 64
    noise_scale: Annotated[float, Field(gt=0, le=10**6, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _whole_heads(self) -> "ADMDescription":
        sides = [self.resolution >> level for level in range(len(self.channel_mult))]
        attended = [k for k, side in enumerate(sides) if side in self.attn_resolutions or side == sides[-1]]
        if any(self.model_channels * self.channel_mult[k] % self.head_channels for k in attended):
            raise ValueError(f"head_channels: {self.head_channels} does not divide every width with attention")
        return self


_ANY: TypeAdapter[SongDescription | ADMDescription] = TypeAdapter(
    Annotated[SongDescription | ADMDescription, Field(discriminator="network")]
)


def describe(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a network's description with every default filled in; ValueError, which names what is wrong, if none."""
    try:
        return _ANY.validate_python(dict(architecture)).model_dump()
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc'])) or 'network'}: {item['msg']}" for item in error.errors()]
        raise ValueError("; ".join(problems)) from error


def build_denoiser(architecture: Mapping[str, Any], sigma_data: float) -> EDMDenoiser:
    """Builds an untrained denoiser for data of standard deviation `sigma_data`; ValueError if that is no network.

    `architecture` has "network" ("song" or "adm"), the arguments of its class, and "s_branch" for a student's network.
    """
    arguments = describe(architecture)
    if isinstance(sigma_data, bool) or not isinstance(sigma_data, int | float) or not 0 < sigma_data <= _LARGEST_SIGMA:
        raise ValueError(f"sigma_data: needs a number above 0 and up to {_LARGEST_SIGMA:g}")
    kind, takes_s = arguments.pop("network"), arguments.pop("s_branch")
    unet = SongUNet(**arguments) if kind == "song" else ADMUNet(**arguments)
    if takes_s:
        unet.add_s_branch()
    side, channels = arguments["resolution"], arguments["channels"]
    denoiser = EDMDenoiser(unet, (channels, side, side), float(sigma_data), arguments["num_classes"])
    denoiser.architecture = {"network": kind, **arguments, "s_branch": takes_s}
    return denoiser


def load_denoiser(architecture: Mapping[str, Any], sigma_data: float, tensors: Mapping[str, Tensor]) -> EDMDenoiser:
    """Builds a denoiser around `tensors`, float32, which it takes over without a copy.

    Nothing is allocated for a description that does not fit the tensors, which is a RuntimeError, as other types and
    filters than the named ones are; ValueError if it describes no network.
    """
    if other := {str(tensor.dtype) for tensor in tensors.values()} - {"torch.float32"}:
        raise RuntimeError(f"weights in {', '.join(sorted(other))}; float32 is needed")
    if broken := next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None):
        raise RuntimeError(f"{broken} holds NaN or infinity: this network has diverged")
    with torch.device("meta"):
        denoiser = build_denoiser(architecture, sigma_data)
    denoiser.load_state_dict(tensors, assign=True)
    taps = torch.tensor(architecture.get("taps", [1, 1]), dtype=torch.float32)
    expected = torch.outer(taps, taps) / taps.sum().square()
    for key, tensor in tensors.items():
        if key.endswith("resample_filter") and not torch.allclose(tensor, expected.to(tensor.device), atol=1e-6):
            raise RuntimeError(f"{key} is not the filter {taps.tolist()}")
    return denoiser
