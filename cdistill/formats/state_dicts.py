"""Telling plain state dicts apart by their keys, so that each goes to the reader that knows its names."""

from collections.abc import Collection
from typing import Literal

from cdistill.errors import CorruptFileError
from cdistill.formats.pickle_values import shown

Kind = Literal["ctm-cifar10", "ctm-imagenet64", "openai", "edm"]

# The first whose keys are all there; those of CTM also have the keys of what they were made from.
_SIGNS: list[tuple[Kind, set[str]]] = [
    ("ctm-cifar10", {"model.map_layer0_s.weight"}),
    ("ctm-imagenet64", {"time_embed_s.0.weight"}),
    ("openai", {"time_embed.0.weight", "label_emb.weight"}),
    ("edm", {"model.map_layer0.weight"}),
]


def describe(keys: Collection[object]) -> Kind:
    """Returns what a state dict is.

    ``openai`` is EDM, CD or CT on ImageNet-64 alike: their keys are the same, so the user must say which.

    Args:
        keys: The keys of the dict that the file holds.

    Raises:
        CorruptFileError: It is a file of an optimiser or a discriminator, or of no known network.
    """
    names = {key for key in keys if isinstance(key, str)}
    for kind, signs in _SIGNS:
        if signs <= names:
            return kind
    if {"state", "param_groups"} <= names:
        raise CorruptFileError("is the state of an optimiser; give the file of the network beside it")
    if any(name.startswith(("discriminators.", "feature_networks.")) for name in names):
        raise CorruptFileError("is a discriminator; give the file of the network beside it")
    some = ", ".join(shown(key) for key in list(keys)[:4]) or "none"
    raise CorruptFileError(
        f"holds {len(keys)} entries ({some}{', ...' if len(keys) > 4 else ''}), of no known network; "
        "known: networks of EDM, CTM (CIFAR-10, ImageNet-64) and OpenAI (ImageNet-64)"
    )
