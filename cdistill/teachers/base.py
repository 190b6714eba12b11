"""What a teacher is, and teachers in files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdistill.errors import CorruptFileError
from cdistill.registry import TEACHERS

if TYPE_CHECKING:
    from cdistill.networks.denoiser import Denoiser


@dataclass(frozen=True)
class Teacher:
    """A frozen denoiser D(x, t) and where it comes from.

    Attributes:
        name: Name in the registry, or the path of its file.
        denoiser: D, in evaluation mode, without gradients.
        data: Name of the data source that it was trained on.
    """

    name: str
    denoiser: Denoiser
    data: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.denoiser.sample_shape

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights: what a coefficient file or a student was made for."""
        from cdistill.checkpoint import tensor_digest

        return tensor_digest(self.denoiser.state_dict())


def load_teacher(name: str) -> Teacher:
    """Loads a teacher by its name in the registry or from a teacher file.

    Args:
        name: A registered name, or the path of a ``.safetensors`` file made by `train-teacher`.

    Raises:
        UnknownNameError: Neither.
        CorruptFileError: The file is damaged or no teacher.
    """
    if name.endswith(".safetensors"):
        return read_teacher(Path(name), name)
    found: Teacher = TEACHERS.get(name)()
    return found


def save_teacher(path: Path, teacher: Teacher, architecture: dict[str, Any], header: dict[str, Any]) -> None:
    """Writes a network teacher as safetensors, its `architecture` (see `cdistill.networks`) in the header."""
    from cdistill.checkpoint import save_tensors

    facts = {"architecture": architecture, "data": teacher.data, "sigma_data": teacher.denoiser.sigma_data}
    save_tensors(path, teacher.denoiser.state_dict(), "teacher", {**header, **facts})


def read_teacher(path: Path, name: str) -> Teacher:
    """Reads a file made by `save_teacher`.

    Raises:
        CorruptFileError: Damaged, of another kind, or its tensors do not fit its architecture.
    """
    from cdistill.checkpoint import load_tensors
    from cdistill.networks.architecture import load_denoiser
    from cdistill.networks.denoiser import freeze

    tensors, header = load_tensors(path, "teacher")
    try:
        denoiser = load_denoiser(header["architecture"], header["sigma_data"], tensors)
        data = str(header["data"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: its tensors do not fit its architecture ({error})") from error
    return Teacher(name, freeze(denoiser), data)
