"""Class labels of images in archives and folders."""

import json
import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdistill.errors import CorruptFileError, MismatchError
from cdistill.formats.archives import Images
from cdistill.runtime.console import say

MOST_CLASSES = 1_000_000
_SHARD = re.compile(r"\d{5}")


def read_labels(images: Images) -> tuple[Tensor | None, tuple[str, ...]]:
    """Returns the class of every image, int64 (N,), or None if there are none; and what the classes are called.

    ``dataset.json`` decides if it is there: ``{"labels": [[name, class], ...]}``, or null for no labels. Without it,
    images that all lie one level deep in two or more sub-folders have their sub-folder as class, in sorted order;
    sub-folders called by five digits (00000, 00001, ...) are EDM's and FFHQ's way to divide a large set, no classes.
    Where other folders are not taken for classes, a line says so.

    Raises:
        CorruptFileError: ``dataset.json`` is damaged.
        MismatchError: Not one label for every image.
    """
    content = images.label_file()
    if content is None:
        return _folder_classes(images)
    where = f"{images.path}: dataset.json"
    try:
        pairs = json.loads(content)["labels"]
        given = None if pairs is None else _as_dictionary(pairs)
    except (ValueError, TypeError, KeyError, RecursionError, MemoryError) as error:
        text = 'needs {"labels": [[name, class], ...]} or {"labels": null}'
        raise CorruptFileError(f"{where}: cannot be understood ({type(error).__name__}: {error}); {text}") from error
    return None if given is None else _match(images.names, given, where), ()


def check_classes(labels: NDArray[Any], where: str, count: int = MOST_CLASSES) -> NDArray[np.int64]:
    """Returns whole numbers as int64 if all lie in [0, count), or raises CorruptFileError."""
    least, most = int(labels.min()), int(labels.max())
    if not 0 <= least <= most < count:
        wrong = least if least < 0 else most
        raise CorruptFileError(f"{where}: label {wrong}; classes are whole numbers from 0 to {count - 1:,}")
    return labels.astype(np.int64)


def count_classes(labels: Tensor | None) -> int:
    """Returns the largest label plus 1; 0 without labels."""
    return 0 if labels is None else int(labels.max()) + 1


def _as_dictionary(pairs: Any) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, label in pairs:
        if not isinstance(name, str):
            raise TypeError(f"got the name {_shown(name)}")
        if name in given:
            raise ValueError(f"{_shown(name)} is named twice")
        given[name] = label
    return given


def _match(names: list[str], given: dict[str, Any], where: str) -> Tensor:
    """Returns the labels in the order of the images."""
    if missing := [name for name in names if name not in given]:
        raise MismatchError(f"{where}: no label for {missing[0]} ({len(missing)} of {len(names)} images); add them")
    if extra := sorted(set(given) - set(names)):
        raise MismatchError(
            f"{where}: a label for {_shown(extra[0])}, which is missing ({len(extra)} such); remove them"
        )
    for name, label in given.items():
        if type(label) is not int or not 0 <= label < MOST_CLASSES:  # a bool is an int, 1.0 equals one
            raise CorruptFileError(
                f"{where}: label {_shown(label)} of {name}; classes are whole numbers from 0 to {MOST_CLASSES - 1:,}"
            )
    return torch.tensor([given[name] for name in names])


def _shown(value: Any) -> str:
    """Returns a short text on one line for a value that came from a file."""
    return repr(value)[:80]


def _folder_classes(images: Images) -> tuple[Tensor | None, tuple[str, ...]]:
    folders = [name.removeprefix("./").rpartition("/")[0] for name in images.names]
    distinct = sorted(set(folders))
    if len(distinct) < 2 or all(_SHARD.fullmatch(folder.rpartition("/")[2]) for folder in distinct):
        return None, ()
    if not all(distinct) or any("/" in folder for folder in distinct):
        say(
            f"{images.path}: no classes: {len(distinct)} folders ({_shown(distinct[-1])}, ...) are ignored; "
            "classes are folders at the top, with all the images right in them"
        )
        return None, ()
    number = {folder: k for k, folder in enumerate(distinct)}
    return torch.tensor([number[folder] for folder in folders]), tuple(distinct)
