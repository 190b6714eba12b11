"""What a teacher is, teachers in files, and `load_teacher` for a name or a file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdistill.errors import CorruptFileError, MismatchError, RecipeError, brief
from cdistill.registry import TEACHERS
from cdistill.teachers.official import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from torch import Tensor

    from cdistill.networks.denoiser import Denoiser

    # Architecture, sigma_data, weights, name of the data ("" if unknown), licence and classes, as a file states them.
    _Contents = tuple[Mapping[str, Any], float, dict[str, Tensor], str, str, Any]

UNKNOWN = "unknown"  # a licence that nothing states


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser D(x, t) and where it comes from.

    Attributes:
        licence: Of the weights, and of the data they come from where that is known; `UNKNOWN` if nothing says.
        estimator: Name of the estimator that suits it: "forward" only where it was shown to agree with "autodiff".
    """

    name: str  # name in the registry, or the path of its file
    denoiser: Denoiser
    data: str  # name of the data source that it was trained on, "" if unknown
    licence: str = UNKNOWN
    estimator: str = "autodiff"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.denoiser.sample_shape

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights: what a coefficient file or a student was made for."""
        from cdistill.storage.checkpoints import tensor_digest

        return tensor_digest(self.denoiser.state_dict())


def load_teacher(name: str, weights: Path | None = None) -> Teacher:
    """Loads a teacher by its name in the registry or from a file.

    Args:
        name: A registered name, or the path of a file: ``.safetensors`` made by `train-teacher` or `convert`, ``.pkl``
            or ``.pt`` of EDM.
        weights: File of the weights, for names whose weights do not ship with the package.

    Raises:
        UnknownNameError: Neither.
        MissingAssetError: Its weights are not there; the message says what to put where.
        CorruptFileError: The file is damaged, unsafe or no teacher.
        RecipeError: `weights` for a teacher that has its own.

    >>> load_teacher("digits").shape
    (1, 8, 8)
    """
    name = os.path.expanduser(name)
    if Path(name).suffix in WEIGHT_SUFFIXES:
        if weights is not None:
            raise RecipeError(f"weights: goes with the name of a teacher; {name} is a file already")
        return read_teacher(Path(name), name)[0]
    loader = TEACHERS.get(name)
    if weights is not None and "weights" not in inspect.signature(loader).parameters:
        raise RecipeError(f"weights: got {weights}; teacher {name!r} brings its own; leave them out")
    teacher: Teacher = loader() if weights is None else loader(weights=weights)
    return teacher


def save_teacher(path: Path, teacher: Teacher, architecture: dict[str, Any], header: dict[str, Any]) -> None:
    """Writes a network teacher as safetensors, its `architecture` (see `cdistill.networks`) in the header.

    Its licence is written where it is known; otherwise a licence in `header` stays.
    """
    from cdistill.storage.checkpoints import save_tensors

    facts = {"architecture": architecture, "data": teacher.data, "sigma_data": teacher.denoiser.sigma_data}
    if teacher.denoiser.num_classes:
        facts["classes"] = teacher.denoiser.known_classes.to_dict()
    if teacher.licence != UNKNOWN:
        facts["licence"] = teacher.licence
    save_tensors(path, teacher.denoiser.state_dict(), "teacher", {**header, **facts})


def read_teacher(path: Path, name: str) -> tuple[Teacher, Mapping[str, Any]]:
    """Reads a file of weights by its suffix, ours or someone else's, as the teacher called `name`.

    Returns it, with the data and the licence that the file states, and its `cdistill.networks.architecture`; errors as
    `load_teacher`, and MismatchError: It holds a student.
    """
    from cdistill.networks.architecture import load_denoiser
    from cdistill.networks.classes import Classes
    from cdistill.networks.denoiser import freeze

    read = _read_ours if path.suffix == ".safetensors" else _read_foreign
    architecture, sigma_data, tensors, data, licence, classes = read(path)
    try:
        denoiser = load_denoiser(architecture, sigma_data, tensors)
        denoiser.known_classes = Classes.parse(classes, denoiser.num_classes)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise CorruptFileError(f"{path}: its tensors do not fit its architecture ({brief(error)})") from error
    return Teacher(name, freeze(denoiser), data, licence), architecture


def _read_ours(path: Path) -> _Contents:
    from cdistill.storage.checkpoints import load_tensors

    tensors, header = load_tensors(path, "teacher")
    try:
        if "network" not in header["architecture"]:
            raise CorruptFileError(f"{path}: made by an older cdistill; train it again, or convert it again")
        licence = header.get("licence")
        stated = licence if isinstance(licence, str) and licence else UNKNOWN
        facts = header["architecture"], header["sigma_data"]
        return *facts, tensors, str(header["data"]), stated, header.get("classes")
    except (KeyError, TypeError) as error:
        raise CorruptFileError(f"{path}: its header is not that of a teacher ({error}); make it again") from error


def _read_foreign(path: Path) -> _Contents:
    from cdistill.teachers.foreign import official_data, read_foreign

    foreign = read_foreign(path)
    if foreign.preconditioning is not None:
        raise MismatchError(f"{path}: a student ({foreign.what}); a teacher is needed")
    data = official_data(foreign.architecture, path.name)
    return foreign.architecture, foreign.sigma_data, foreign.tensors, data, foreign.licence, None
