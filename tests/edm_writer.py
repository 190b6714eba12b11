"""Writes pickles in the shape of EDM's, for tests; only the shape, none of that code."""

import pickle  # noqa: TID251
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from torch import nn

SOURCE = "raise RuntimeError('the source within the file was executed')\n"
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential)
DEFAULTS = {
    "label_dim": 0,
    "use_fp16": False,
    "sigma_min": 0,
    "sigma_max": float("inf"),
    "sigma_data": 0.5,
    "model_type": "DhariwalUNet",
}
SIZES = ("img_resolution", "img_channels")


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise RuntimeError("the file was loaded the ordinary way")


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent:
    """What EDM pickles in place of an object of one of its classes."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,), None


def persistent(module: nn.Module, class_name: str | None = None, **more: Any) -> Any:
    """Turns a tree of modules into what EDM would pickle, every class but the containers a persistent one."""
    state = {**module.__dict__, **more}
    state["_modules"] = {name: child and persistent(child) for name, child in module._modules.items()}
    if type(module) in CONTAINERS:
        container = type(module).__new__(type(module))
        vars(container).update(state)
        return container
    simple = {name: value for name, value in state.items() if name.startswith("_") or _is_plain(value)}
    return Persistent(class_name or type(module).__name__, {"_init_args": (), "_init_kwargs": {}, **simple})


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | np.generic)


def snapshot(
    network: nn.Module, init_kwargs: dict[str, Any], class_name: str = "EDMPrecond", dataset_kwargs: Any = None
) -> dict[str, Any]:
    """Returns what EDM's training pickles: the averaged network, its loss, no augmentation, and the data's settings."""
    attributes = {key: value for key, value in {**DEFAULTS, **init_kwargs}.items() if key in (*DEFAULTS, *SIZES)}
    del attributes["model_type"]
    ema = persistent(network, class_name, _init_args=(), _init_kwargs=init_kwargs, **attributes)
    loss = Persistent(
        "EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5, "_init_args": (), "_init_kwargs": {}}
    )
    return {"ema": ema, "loss_fn": loss, "augment_pipe": None, "dataset_kwargs": dataset_kwargs or {}}


@contextmanager
def fake_modules() -> Iterator[None]:
    """Makes ``torch_utils.persistence`` importable, as pickling asks for it; nothing of it runs."""
    package, module = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")
    vars(module)["_reconstruct_persistent_obj"] = _reconstruct_persistent_obj
    vars(package)["persistence"] = module
    with mock.patch.dict(sys.modules, {"torch_utils": package, "torch_utils.persistence": module}):
        yield


def write_edm_pickle(
    path: Path,
    network: nn.Module,
    init_kwargs: dict[str, Any],
    class_name: str = "EDMPrecond",
    protocol: int = 4,
    dataset_kwargs: dict[str, Any] | None = None,
) -> None:
    """Writes a network as EDM's training would.

    Args:
        path: Target.
        network: The preconditioner: a module whose child `model` is a class named SongUNet or DhariwalUNet.
        init_kwargs: What the preconditioner was built with: img_resolution, img_channels, model_type, ...
        class_name: What the file calls the preconditioner's class.
        protocol: Of the pickle.
        dataset_kwargs: Settings of the training data.
    """
    with fake_modules(), path.open("wb") as file:
        pickle.dump(snapshot(network, init_kwargs, class_name, dataset_kwargs), file, protocol=protocol)
