"""Networks of EDM (Karras et al. 2022) in their pickles: weights and how the network was built, no code.

Each object of such a file is a call of ``torch_utils.persistence._reconstruct_persistent_obj`` with a record of its
class name, the source of its module and its ``__dict__``. The ordinary loader executes that source; here it is only
hashed.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cdistill.errors import CorruptFileError
from cdistill.formats.pickle_stubs import empty
from cdistill.formats.pickle_values import Budget, Build, Items, LongText, Record, shown, some
from cdistill.formats.safe_pickle import read_pickle
from cdistill.formats.torch_files import is_torch_file, map_file, naming, read_torch, tensor_names

PRECONDITIONER = "EDMPrecond"
MODELS = ("SongUNet", "DhariwalUNet")
ARGUMENTS = (
    "img_resolution",
    "img_channels",
    "label_dim",
    "use_fp16",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "model_type",
)
ATTRIBUTES = ARGUMENTS[:-1]
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_CONTAINERS = tuple(f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential"))
_FORMAT = 6
_DEEPEST = 32
_MOST_VALUES = 20_000
_TABLES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class EDMNetwork:
    """A network of EDM as data.

    Attributes:
        attributes: What the preconditioner states of itself (`ATTRIBUTES`), to be compared with `init_kwargs`.
    """

    model_class: str  # class of the network inside the preconditioner: "SongUNet" or "DhariwalUNet"
    entry: str  # which part of the file it is: "ema", "net" (a training state: not averaged) or "" (the whole file)
    init_kwargs: dict[str, Any]  # arguments of the preconditioner, by name; plain values, but a number may be infinite
    attributes: dict[str, float]
    state: dict[str, Tensor]  # name -> tensor, in the order of ``state_dict``
    source_sha256: str  # SHA-256 of the source code that the file carries for the preconditioner
    dataset_kwargs: dict[str, Any]  # what the file states about the training data; empty if nothing


@dataclass(frozen=True)
class _Persistent:
    """One object: its class name, the source of its module and its ``__dict__``."""

    class_name: str
    source: str | LongText
    state: dict[Any, Any]


def read_network(path: Path) -> EDMNetwork | dict[Any, Any]:
    """Reads a network of EDM (.pkl, or a training state .pt), or else the dict that a torch file holds.

    MissingAssetError: There is no such file. CorruptFileError: It is damaged, unsafe, or neither.
    """
    with naming(path):
        value = _read(map_file(path))
        if isinstance(value, dict) and not any(isinstance(entry, _Persistent) for entry in value.values()):
            return value
        return _network(*_find_network(value))


def read_edm(path: Path) -> EDMNetwork:
    """Reads a network snapshot (.pkl), a pickled network or a training state (.pt) of EDM; errors as `read_network`."""
    with naming(path):
        return _network(*_find_network(_read(map_file(path))))


def _network(entry: str, network: _Persistent, rest: dict[Any, Any]) -> EDMNetwork:
    if network.class_name != PRECONDITIONER:
        raise CorruptFileError(f"is a {network.class_name}; only {PRECONDITIONER} networks are teachers here")
    arguments, source = _arguments(network), network.source
    code = source.view if isinstance(source, LongText) else source.encode("utf-8", "surrogatepass")
    return EDMNetwork(
        model_class=_model_class(network, arguments),
        entry=entry,
        init_kwargs=arguments,
        attributes=_attributes(network),
        state=dict(_tensors(network)),
        source_sha256=hashlib.sha256(code).hexdigest(),
        dataset_kwargs=_plain_dict(rest.get("dataset_kwargs", {}), "dataset_kwargs"),
    )


def _read(data: memoryview) -> Any:
    budget = Budget(len(data))
    names: dict[str, Build | None] = {
        **tensor_names(budget),
        **{name: empty(f"{name} is", partial(Record, name)) for name in _CONTAINERS},
        _PERSISTENT: _persistent,
        "dnnlib.util.EasyDict": empty("a dict that is", Items),
    }
    if is_torch_file(data):
        return read_torch(data, names, budget)
    return read_pickle(data, names, budget=budget)


def _persistent(arguments: tuple[Any, ...]) -> _Persistent:
    meta = arguments[0] if len(arguments) == 1 else None
    if not isinstance(meta, dict):
        raise CorruptFileError("a persistent object without its record")
    name, source, state = meta.get("class_name"), meta.get("module_src"), meta.get("state")
    if type(name) is not str or len(name) > 100 or not name.isidentifier():
        raise CorruptFileError("a persistent object without a class name")
    if type(meta.get("version")) is not int or meta["version"] != _FORMAT:
        raise CorruptFileError(f"a {name} in version {shown(meta.get('version'))} of EDM's format; known: {_FORMAT}")
    if not isinstance(source, str | LongText) or not isinstance(state, dict):
        raise CorruptFileError(f"a {name} without its source or state")
    return _Persistent(name, source, state)


def _find_network(value: Any) -> tuple[str, _Persistent, dict[Any, Any]]:
    """Returns the network, which entry of the file it is, and the file's other entries."""
    if isinstance(value, _Persistent):
        return "", value, {}
    if not isinstance(value, dict):
        raise CorruptFileError(f"{shown(value)} where a network is needed")
    for entry in ("ema", "net"):
        if isinstance(value.get(entry), _Persistent):
            return entry, value[entry], value
    raise CorruptFileError(f"no network 'ema' or 'net' among its entries ({some(value)})")


def _arguments(network: _Persistent) -> dict[str, Any]:
    """Returns the arguments the preconditioner was built with, the positional ones under their names."""
    positional, named = network.state.get("_init_args"), network.state.get("_init_kwargs")
    if type(positional) is not tuple or len(positional) > len(ARGUMENTS) or not isinstance(named, dict):
        raise CorruptFileError(f"the {network.class_name} does not state what it was built with")
    first = dict(zip(ARGUMENTS, positional, strict=False))
    if set(first) & set(named):
        raise CorruptFileError(f"the {network.class_name} was given an argument twice")
    return _plain_dict({**first, **named}, "_init_kwargs")


def _model_class(network: _Persistent, arguments: dict[str, Any]) -> str:
    modules = network.state.get("_modules")
    model = modules.get("model") if isinstance(modules, dict) else None
    if not isinstance(model, _Persistent) or model.class_name not in MODELS:
        raise CorruptFileError(f"its model is {shown(getattr(model, 'class_name', None))}; known: {', '.join(MODELS)}")
    named = arguments.get("model_type", "DhariwalUNet")
    if named != model.class_name:
        raise CorruptFileError(f"its model is a {model.class_name}, but was built as a {shown(named)}")
    return model.class_name


def _attributes(network: _Persistent) -> dict[str, float]:
    attributes = {name: network.state.get(name) for name in ATTRIBUTES}
    missing = [name for name, value in attributes.items() if type(value) not in (int, float, bool)]
    if missing:
        raise CorruptFileError(f"the {network.class_name} has no number {', '.join(missing)}")
    return {name: _plain(value, name) for name, value in attributes.items()}


def _plain_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptFileError(f"{where} is {shown(value)}; a dict is needed")
    plain: dict[str, Any] = _plain(value, where)
    return plain


def _plain(value: Any, where: str) -> Any:
    """Returns a copy of numbers, text, lists and dicts; raises CorruptFileError for anything else or too much of it."""
    left = [_MOST_VALUES]

    def copy(value: Any, depth: int) -> Any:
        left[0] -= 1
        if depth > _DEEPEST or left[0] < 0:
            raise CorruptFileError(f"{where} is nested too deeply or too large")
        if value is None or type(value) in (str, bool, float) or (type(value) is int and abs(value) < 1 << 63):
            return value
        if type(value) in (list, tuple):
            return [copy(item, depth + 1) for item in value]
        if isinstance(value, dict) and len(value) <= left[0] and all(type(key) is str for key in value):
            return {key: copy(item, depth + 1) for key, item in value.items()}
        raise CorruptFileError(f"{where} holds {shown(value)}; only numbers, text, lists and dicts are allowed")

    return copy(value, 0)


def _tensors(network: _Persistent) -> Iterator[tuple[str, Tensor]]:
    """Walks the modules as ``state_dict`` does: parameters, buffers, then the children in their order."""
    waiting: list[tuple[str, int, Any]] = [("", 0, network)]
    left = _MOST_VALUES
    while waiting:
        prefix, depth, module = waiting.pop()
        state = module.state if isinstance(module, _Persistent | Record) else None
        if not isinstance(state, dict):
            raise CorruptFileError(f"{shown(prefix)} is {shown(module)} where a module is needed")
        left -= 1 + sum(len(state[kind]) for kind in _TABLES if isinstance(state.get(kind), dict))
        if depth > _DEEPEST or left < 0:
            raise CorruptFileError("its modules are nested too deeply or too many")
        transient = state.get("_non_persistent_buffers_set", set())
        if not isinstance(transient, set):
            raise CorruptFileError(f"{shown(prefix)} has no set of its non-persistent buffers")
        yield from _own(state, "_parameters", prefix, set())
        yield from _own(state, "_buffers", prefix, transient)
        children = list(_entries(state, "_modules", prefix))
        waiting += [(f"{prefix}{name}.", depth + 1, child) for name, child in reversed(children) if child is not None]


def _own(state: dict[Any, Any], kind: str, prefix: str, transient: set[Any]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _entries(state, kind, prefix):
        if tensor is None or name in transient:
            continue
        if not isinstance(tensor, Tensor):
            raise CorruptFileError(f"{shown(prefix + name)} is {shown(tensor)} where a tensor is needed")
        yield prefix + name, tensor


def _entries(state: dict[Any, Any], kind: str, prefix: str) -> Iterator[tuple[str, Any]]:
    entries = state.get(kind)
    if not isinstance(entries, dict):
        raise CorruptFileError(f"{shown(prefix)} has no {kind}")
    for name, value in entries.items():
        if type(name) is not str or not 0 < len(name) <= 100 or "." in name or not name.isprintable():
            raise CorruptFileError(f"{shown(prefix)} has an entry called {shown(name)}")
        yield name, value
