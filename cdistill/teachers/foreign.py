"""Other people's networks under our names: EDM's pickles, and the state dicts of CTM and OpenAI."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdistill.errors import CorruptFileError, RecipeError
from cdistill.formats.checkpoints import describe
from cdistill.formats.edm import EDMNetwork, read_network
from cdistill.formats.guided import guided_architecture, guided_tensors
from cdistill.storage import file_digest
from cdistill.teachers.official import LICENCE, OFFICIAL

_OPENAI_LICENCE = "MIT (OpenAI)"
_SONY_LICENCE = "MIT (Sony), trained from EDM weights"

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
_FIXED = {"channel_mult_emb": 4, "decoder_type": "standard", "label_dropout": 0}  # what ours does not vary
_WRAPPER = {"use_fp16", "sigma_min", "sigma_max", "sigma_data", "model_type"}


@dataclass(frozen=True)
class Foreign:
    """A network out of someone else's file.

    Attributes:
        what: What it is, for people.
        architecture: Description of the network, see `cdistill.networks.architecture`.
        sigma_data: Standard deviation of the data that it was scaled for.
        tensors: Its weights under the names of :class:`EDMDenoiser`, in float32.
        licence: Of the weights.
        preconditioning: Of a student: "ctm" or "cm"; None for a teacher.
        facts: What else is worth keeping: the file's digest, that of the code in it, training data.
    """

    what: str
    architecture: dict[str, Any]
    sigma_data: float
    tensors: dict[str, Tensor]
    licence: str
    preconditioning: str | None
    facts: dict[str, Any]


def read_foreign(path: Path, flavour: str | None = None) -> Foreign:
    """Reads a file of EDM, CTM or OpenAI without executing anything in it.

    Args:
        path: The file; what it is, is told by its content.
        flavour: For OpenAI's ImageNet-64 files, whose keys are all the same: "edm" (a diffusion model), "cd" or "ct"
            (consistency models).

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged, unsafe, or nothing that is known.
        RecipeError: `flavour` is missing where it is needed, or there where it is not.
    """
    found = read_network(path)
    try:
        kind = None if isinstance(found, EDMNetwork) else describe(found)
        if flavour is not None and kind != "openai":
            raise RecipeError("--as: only OpenAI's ImageNet-64 files need it")
        if isinstance(found, EDMNetwork):
            result = _from_edm(found)
        elif kind == "openai":
            result = _from_openai(found, flavour)
        else:
            result = _READERS[kind](_tensors_only(found))
    except CorruptFileError as error:
        raise CorruptFileError(f"{path}: {error}") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    facts = {"file": path.name, "file_sha256": file_digest(path), **result.facts}
    return replace(result, facts=facts)


def official_data(architecture: Mapping[str, Any], file: str) -> str:
    """Returns the data source of the official teacher with that file name and network, or "" for any other."""
    for official in OFFICIAL.values():
        if Path(official.file).stem == Path(file).stem and not disagreements(official.architecture, architecture):
            return official.data
    return ""


def disagreements(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Returns the parts of two network descriptions that differ, dropout aside."""
    keys = sorted({*expected, *found} - {"dropout", "noise_scale", "head_channels"})
    return [f"{key}: {found.get(key)}, not {expected.get(key)}" for key in keys if found.get(key) != expected.get(key)]


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


def _from_openai(state: Mapping[str, Any], flavour: str | None) -> Foreign:
    if flavour is None:
        raise RecipeError(
            "an ImageNet-64 file of OpenAI; EDM, CD and CT look alike in it: say --as edm, --as cd or --as ct"
        )
    tensors = _tensors_only(state)
    return Foreign(
        f"OpenAI, ImageNet-64, {flavour.upper()}",
        guided_architecture(tensors),
        0.5,
        guided_tensors(tensors),
        _OPENAI_LICENCE,
        None if flavour == "edm" else "cm",
        {"flavour": flavour},
    )


def _from_ctm_imagenet(state: Mapping[str, Tensor]) -> Foreign:
    architecture = {**guided_architecture(state), "s_branch": True}
    return Foreign("CTM, ImageNet-64", architecture, 0.5, guided_tensors(state), _SONY_LICENCE, "ctm", {})


def _from_ctm_cifar(state: Mapping[str, Tensor]) -> Foreign:
    architecture = {**song_architecture(state), "s_branch": True}
    return Foreign("CTM, CIFAR-10", architecture, 0.5, _floats(state), _SONY_LICENCE, "ctm", {})


def _from_edm_state(state: Mapping[str, Tensor]) -> Foreign:
    return Foreign("EDM teacher, state dict", song_architecture(state), 0.5, _floats(state), LICENCE, None, {})


_READERS: Mapping[str | None, Callable[[Mapping[str, Tensor]], Foreign]] = {
    "ctm-cifar10": _from_ctm_cifar,
    "ctm-imagenet64": _from_ctm_imagenet,
    "edm": _from_edm_state,
}


def song_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the description of a DDPM++ or NCSN++, read off the names and shapes of its weights.

    Raises:
        CorruptFileError: They are not those of one.
    """
    blocks = [match for key in state if (match := re.fullmatch(r"model\.enc\.(\d+)x\1_block(\d+)\.conv0\.weight", key))]
    sides = sorted({int(match[1]) for match in blocks}, reverse=True)
    try:
        first = state[f"model.enc.{sides[0]}x{sides[0]}_conv.weight"]
        lasts = [state[f"model.enc.{side}x{side}_block0.conv1.weight"] for side in sides]
        labels = state.get("model.map_label.weight", torch.empty(0, 0))
        augments = state.get("model.map_augment.weight", torch.empty(0, 0))
        filters = [tensor for key, tensor in state.items() if key.endswith("resample_filter")]
        line = filters[0][0, 0, 0] / filters[0].min() if filters else torch.ones(2)
        return {
            "network": "song",
            "resolution": sides[0],
            "channels": first.shape[1],
            "num_classes": labels.shape[1],
            "model_channels": len(first),
            "channel_mult": [len(last) // len(first) for last in lasts],
            "num_blocks": max(int(match[2]) for match in blocks) + 1,
            "attn_resolutions": [side for side in sides if f"model.enc.{side}x{side}_block0.qkv.weight" in state],
            "dropout": 0.0,
            "augment_dim": augments.shape[1],
            "channel_mult_noise": state["model.map_layer0.weight"].shape[1] // len(first),
            "embedding": "fourier" if "model.map_noise.freqs" in state else "positional",
            "encoder": "residual" if any("aux_residual" in key for key in state) else "standard",
            "taps": [round(float(tap)) for tap in line],
        }
    except (IndexError, KeyError, ZeroDivisionError) as error:
        raise CorruptFileError(f"not the weights of a DDPM++ or NCSN++ (lacks {error})") from error


def _floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in state.items()}


def _tensors_only(state: Mapping[str, Any]) -> dict[str, Tensor]:
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise CorruptFileError(f"entry {str(other[0])[:60]!r} is no tensor; the state dict alone is needed")
    return dict(state)
