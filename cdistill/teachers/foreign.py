"""Other people's networks under our names: EDM's pickles, and the state dicts of CTM and OpenAI."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdistill.errors import CorruptFileError, RecipeError, brief
from cdistill.formats.edm_pickles import EDMNetwork, read_network
from cdistill.formats.pickle_values import shown
from cdistill.formats.state_dicts import guided_architecture, guided_tensors, state_dict_kind
from cdistill.networks.architecture import describe as describe_network
from cdistill.teachers.official import LICENCE, OFFICIAL

_OPENAI_LICENCE = "MIT (OpenAI)"
_SONY_LICENCE = "MIT (Sony); made from diffusion models with licences of their own (EDM's: CC BY-NC-SA 4.0)"
_UNKNOWN_LICENCE = f"unknown; NVIDIA's own files of this kind: {LICENCE}"

# EDM's argument -> ours, with EDM's own default where the file does not say.
_SHARED = {
    "img_resolution": ("resolution", None),
    "img_channels": ("channels", None),
    "label_dim": ("num_classes", 0),
    "augment_dim": ("augment_dim", 0),
}
_SONG: Mapping[str, tuple[str, Any]] = {
    **_SHARED,
    "model_channels": ("model_channels", 128),
    "channel_mult": ("channel_mult", [1, 2, 2, 2]),
    "num_blocks": ("num_blocks", 4),
    "attn_resolutions": ("attn_resolutions", [16]),
    "dropout": ("dropout", 0.10),
    "channel_mult_noise": ("channel_mult_noise", 1),
    "embedding_type": ("embedding", "positional"),
    "encoder_type": ("encoder", "standard"),
    "resample_filter": ("taps", [1, 1]),
}
_DHARIWAL: Mapping[str, tuple[str, Any]] = {
    **_SHARED,
    "model_channels": ("model_channels", 192),
    "channel_mult": ("channel_mult", [1, 2, 3, 4]),
    "num_blocks": ("num_blocks", 3),
    "attn_resolutions": ("attn_resolutions", [32, 16, 8]),
    "dropout": ("dropout", 0.10),
}
_ARGUMENTS = {"SongUNet": ("song", _SONG), "DhariwalUNet": ("adm", _DHARIWAL)}
_FIXED = {"channel_mult_emb": 4, "decoder_type": "standard"}  # what ours does not vary
# What does not describe the network, or matters while it is trained only.
_WRAPPER = {"use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type", "label_dropout"}


@dataclass(frozen=True)
class Foreign:
    """A network out of someone else's file."""

    what: str  # what it is, for messages
    architecture: dict[str, Any]  # description of the network, see `cdistill.networks.architecture`
    sigma_data: float
    tensors: dict[str, Tensor]  # its weights under the names of :class:`EDMDenoiser`, in float32
    licence: str
    preconditioning: str | None  # of a student: "ctm" or "cm"; None for a teacher
    facts: dict[str, Any]  # what else is worth keeping: the file's digest, that of the code in it, training data


def read_foreign(path: Path, flavour: str | None = None) -> Foreign:
    """Reads a file of EDM, CTM or OpenAI, recognised by its content, without executing anything in it.

    `flavour` is for OpenAI's ImageNet-64 files, whose keys are all the same: "edm" (a diffusion model), "cd" or "ct"
    (consistency models).

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged, unsafe, or nothing that is known.
        RecipeError: `flavour` is missing where it is needed, or given where it is not.
    """
    if path.suffix == ".safetensors":
        raise CorruptFileError(f"{path}: safetensors; only .pkl, .pt and .pth are converted, from EDM, CTM or OpenAI")
    network = read_network(path)
    try:
        result = _from_edm(network) if isinstance(network, EDMNetwork) else _from_state(_tensors_only(network), flavour)
        if flavour is not None and "flavour" not in result.facts:
            raise RecipeError("--as: only OpenAI's ImageNet-64 files need it")
        describe_network(result.architecture)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptFileError(f"{path}: not the network that its names promise ({brief(error)})") from error
    return replace(result, facts={"file": path.name, **result.facts})


def official_data(architecture: Mapping[str, Any], file: str) -> str:
    """Returns the data source of the official teacher with that file name and network, or "" for any other."""
    for official in OFFICIAL.values():
        if Path(official.file).stem == Path(file).stem and not disagreements(official.architecture, architecture):
            return official.data
    return ""


def disagreements(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Returns the parts of two descriptions that differ, except dropout and OpenAI's scale of the noise input."""
    expected, actual = describe_network(expected), describe_network(actual)
    keys = sorted({*expected, *actual} - {"dropout", "noise_scale"})
    return [
        f"{key}: {actual.get(key)}, not {expected.get(key)}" for key in keys if actual.get(key) != expected.get(key)
    ]


def _from_edm(network: EDMNetwork) -> Foreign:
    given = network.init_kwargs
    name, names = _ARGUMENTS[network.model_class]
    unknown = sorted(set(given) - set(names) - set(_FIXED) - _WRAPPER)
    other = [f"{key} = {given[key]!r}" for key, value in _FIXED.items() if given.get(key, value) != value]
    if unknown or other:
        raise CorruptFileError(f"a {network.model_class} of another kind ({', '.join([*unknown, *other])})")
    missing = [key for key, (_, default) in names.items() if default is None and key not in given]
    wrong = [key for key, value in network.attributes.items() if given.get(key, value) != value]
    if missing or wrong:
        raise CorruptFileError(f"its arguments do not fit its attributes ({', '.join([*missing, *wrong])})")
    architecture = {"network": name, **{ours: given.get(theirs, default) for theirs, (ours, default) in names.items()}}
    facts = {
        "entry": network.entry,
        "half": bool(network.attributes["use_fp16"]),
        "code_sha256": network.source_sha256,
        "dataset_kwargs": network.dataset_kwargs,
    }
    tensors = {key: tensor.float() for key, tensor in network.state.items()}
    kind = "ADM" if name == "adm" else "NCSN++" if architecture["encoder"] == "residual" else "DDPM++"
    sigma_data = float(network.attributes["sigma_data"])
    return Foreign(f"EDM teacher, {kind}", architecture, sigma_data, tensors, LICENCE, None, facts)


def _from_state(state: dict[str, Tensor], flavour: str | None) -> Foreign:
    """Sorts a plain state dict to its reader, by its keys."""
    kind = state_dict_kind(state)
    if kind == "openai":
        if flavour is None:
            raise RecipeError(
                "an ImageNet-64 file of OpenAI; EDM, CD and CT look alike in it: add --as edm, --as cd or --as ct"
            )
        what, trained_with = f"OpenAI, ImageNet-64, {flavour.upper()}", None if flavour == "edm" else "cm"
        architecture, tensors, facts = guided_architecture(state), guided_tensors(state), {"flavour": flavour}
        return Foreign(what, architecture, 0.5, tensors, _OPENAI_LICENCE, trained_with, facts)
    if kind == "ctm-imagenet64":
        architecture = {**guided_architecture(state), "s_branch": True}
        return Foreign("CTM, ImageNet-64", architecture, 0.5, guided_tensors(state), _SONY_LICENCE, "ctm", {})
    architecture = unet_architecture(state)
    floats = {key: tensor.float() for key, tensor in state.items()}
    if kind == "ctm-cifar10":
        return Foreign("CTM, CIFAR-10", {**architecture, "s_branch": True}, 0.5, floats, _SONY_LICENCE, "ctm", {})
    return Foreign("EDM teacher, state dict", architecture, 0.5, floats, _UNKNOWN_LICENCE, None, {})


def unet_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the description of a DDPM++, NCSN++ or ADM, read off the names and shapes of its weights in EDM's naming.

    LookupError, ArithmeticError, TypeError, ValueError, RuntimeError: They are not those of one.
    """
    pattern = re.compile(r"model\.enc\.(\d{1,4})x\1_block(\d{1,3})\.conv0\.weight")
    blocks = [match for key in state if (match := pattern.fullmatch(key))]
    sides = sorted({int(match[1]) for match in blocks}, reverse=True)
    if not sides:
        raise ValueError("no blocks of an encoder")
    adm = "model.out_conv.weight" in state
    noise = state["model.map_layer0.weight"].shape[1]
    first = len(state[f"model.enc.{sides[0]}x{sides[0]}_conv.weight"])
    unit = noise if adm else first
    lasts = [len(state[f"model.enc.{side}x{side}_block0.conv1.weight"]) for side in sides]
    none = torch.empty(0, 0)
    architecture = {
        "network": "adm" if adm else "song",
        "resolution": sides[0],
        "channels": state[f"model.enc.{sides[0]}x{sides[0]}_conv.weight"].shape[1],
        "num_classes": state.get("model.map_label.weight", none).shape[1],
        "model_channels": unit,
        "channel_mult": [last // unit for last in lasts],
        "num_blocks": max(int(match[2]) for match in blocks) + 1,
        "attn_resolutions": [side for side in sides if f"model.enc.{side}x{side}_block0.qkv.weight" in state],
        "dropout": 0.0,
        "augment_dim": state.get("model.map_augment.weight", none).shape[1],
    }
    return architecture if adm else {**architecture, **_song_only(state, noise // unit)}


def _song_only(state: Mapping[str, Tensor], channel_mult_noise: int) -> dict[str, Any]:
    filters = [tensor for key, tensor in state.items() if key.endswith("resample_filter")]
    line = filters[0][0, 0, 0] / filters[0].min() if filters else torch.ones(2)
    return {
        "channel_mult_noise": channel_mult_noise,
        "embedding": "fourier" if "model.map_noise.freqs" in state else "positional",
        "encoder": "residual" if any("aux_residual" in key for key in state) else "standard",
        "taps": [round(float(tap)) for tap in line],
    }


def _tensors_only(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Returns the state dict if it is one; a file of another known kind is recognised by its keys first."""
    state_dict_kind(state)
    other = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise CorruptFileError(f"entry {shown(other[0])} is no tensor with a name; the state dict alone is needed")
    return dict(state)
