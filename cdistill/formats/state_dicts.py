"""Plain state dicts of others: told apart by their keys; OpenAI's U-Net brought under EDM's names.

That U-Net (openai/guided-diffusion, openai/consistency_models, sony/ctm) is ADM; only names and layouts differ: labels
are an embedding table, queries, keys and values lie as (3, heads, d) instead of (heads, d, 3), and the box filters are
not stored.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from cdistill.errors import CorruptFileError
from cdistill.formats.pickle_values import some

Kind = Literal["ctm-cifar10", "ctm-imagenet64", "openai", "edm"]

# The first whose keys are all there; those of CTM also have the keys of what they were made from.
_SIGNS: list[tuple[Kind, set[str]]] = [
    ("ctm-cifar10", {"model.map_layer0_s.weight"}),
    ("ctm-imagenet64", {"time_embed_s.0.weight"}),
    ("openai", {"time_embed.0.weight", "label_emb.weight"}),
    ("edm", {"model.map_layer0.weight"}),
]

RESOLUTION = 64  # all published class-conditional files are for ImageNet-64
LEVELS = 4
BLOCKS = 3
HEAD = 64
_OUTER = {
    "time_embed.0": "map_layer0",
    "time_embed.2": "map_layer1",
    "time_embed_s.0": "map_layer0_s",
    "time_embed_s.2": "map_layer1_s",
    "label_emb": "map_label",
    "out.0": "out_norm",
    "out.2": "out_conv",
}
_RESIDUAL = {
    "in_layers.0": "norm0",
    "in_layers.2": "conv0",
    "emb_layers.1": "affine",
    "emb_layers_s.1": "affine_s",
    "out_layers.0": "norm1",
    "out_layers.3": "conv1",
    "skip_connection": "skip",
}
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj_out": "proj"}


def state_dict_kind(keys: Collection[object]) -> Kind:
    """Returns whose network a state dict is of.

    ``openai`` is EDM, CD or CT on ImageNet-64 alike: their keys are the same, so the user must say which.

    Raises:
        CorruptFileError: It is a file of an optimiser or a discriminator, or of no known network.
    """
    names = {key for key in keys if isinstance(key, str)}
    for kind, signs in _SIGNS:
        if signs <= names:
            return kind
    if {"state", "param_groups"} <= names:
        raise CorruptFileError("is the state of an optimiser; give the network's file, which lies beside it")
    if any(name.startswith(("discriminators.", "feature_networks.")) for name in names):
        raise CorruptFileError("is a discriminator; give the network's file, which lies beside it")
    raise CorruptFileError(
        f"holds {len(keys)} entries ({some(keys)}), of no known network; "
        "known: networks of EDM, CTM (CIFAR-10, ImageNet-64) and OpenAI (ImageNet-64)"
    )


def guided_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the arguments of :class:`cdistill.networks.adm.ADMUNet`, with "network", read off the shapes.

    CorruptFileError: It is not a class-conditional U-Net for ImageNet-64.
    """
    try:
        width = state["time_embed.0.weight"].shape[1]
        firsts = [state[f"input_blocks.{1 + level * (BLOCKS + 1)}.0.out_layers.3.weight"] for level in range(LEVELS)]
        attends = [f"input_blocks.{1 + level * (BLOCKS + 1)}.1.qkv.weight" in state for level in range(LEVELS)]
        facts = {"channels": state["input_blocks.0.0.weight"].shape[1], "num_classes": len(state["label_emb.weight"])}
    except (KeyError, IndexError) as error:
        raise CorruptFileError(f"no U-Net of {LEVELS} levels with {BLOCKS} blocks each as for ImageNet-64") from error
    return {
        "network": "adm",
        "resolution": RESOLUTION,
        **facts,
        "model_channels": width,
        "channel_mult": [len(first) // width for first in firsts],
        "num_blocks": BLOCKS,
        "attn_resolutions": [RESOLUTION >> level for level in range(LEVELS) if attends[level]],
        "dropout": 0.0,
        "augment_dim": 0,
        "head_channels": HEAD,
        "noise_scale": 1000.0,  # their time input is 250 ln(t)
    }


def guided_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors under the names and in the layouts of an :class:`EDMDenoiser` around an ADM, in float32.

    CorruptFileError: A key that such a U-Net does not have.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem, _, kind = key.rpartition(".")
        name = _OUTER.get(stem) or _inner(stem, state)
        tensors[f"model.{name}.{kind}"] = _laid_out(name, tensor.float())
    box = torch.full((1, 1, 2, 2), 0.25)
    for block in {key.rsplit(".", 2)[0] for key in tensors if re.search(r"_(up|down)\.", key)}:
        tensors |= {f"{block}.conv0.resample_filter": box.clone(), f"{block}.skip.resample_filter": box.clone()}
    return tensors


def _inner(stem: str, state: Mapping[str, Tensor]) -> str:
    """Returns the name of a layer within encoder or decoder."""
    part, _, rest = stem.partition(".")
    if stem == "input_blocks.0.0":
        return f"enc.{RESOLUTION}x{RESOLUTION}_conv"
    first, _, layer = rest.partition(".")
    if part not in ("middle_block", "input_blocks", "output_blocks") or not first.isdecimal():
        raise CorruptFileError(f"an entry {stem!r}, which OpenAI's U-Net does not have")
    if part == "middle_block":
        side = RESOLUTION >> (LEVELS - 1)  # 0 and 1: a residual block and the attention after it; 2: the second one
        sub, block = first, f"dec.{side}x{side}_in{int(first) // 2}"
    else:
        sub, _, layer = layer.partition(".")
        attends = f"{part}.{first}.1.qkv.weight" in state
        block = _encoder(int(first)) if part == "input_blocks" else _decoder(int(first), sub, attends)
    inner = _RESIDUAL.get(layer) or _ATTENTION.get(layer)
    if not inner or not sub.isdecimal():
        raise CorruptFileError(f"an entry {stem!r}, which OpenAI's U-Net does not have")
    return f"{block}.{inner}"


def _encoder(index: int) -> str:
    level, place = divmod(index - 1, BLOCKS + 1)
    if place == BLOCKS:  # the last of a level halves the sides: it belongs to the next one
        return f"enc.{RESOLUTION >> (level + 1)}x{RESOLUTION >> (level + 1)}_down"
    return f"enc.{RESOLUTION >> level}x{RESOLUTION >> level}_block{place}"


def _decoder(index: int, sub: str, attends: bool) -> str:
    level, place = divmod(index, BLOCKS + 1)
    side = RESOLUTION >> (LEVELS - 1 - level)
    if sub == ("2" if attends else "1"):  # the last of a level doubles the sides
        return f"dec.{2 * side}x{2 * side}_up"
    return f"dec.{side}x{side}_block{place}"


def _laid_out(name: str, tensor: Tensor) -> Tensor:
    if name == "map_label":
        return tensor.T.contiguous()
    if name.endswith(".qkv"):
        rows = tensor.reshape(3, -1, HEAD, *tensor.shape[1:2])
        tensor = rows.movedim(0, 2).reshape(tensor.shape)
    if name.endswith((".qkv", ".proj", ".skip")) and tensor.ndim > 1:
        tensor = tensor.reshape(*tensor.shape[:2], 1, 1)
    return tensor
