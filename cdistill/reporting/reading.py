"""What a page shows of a run, checked: evaluations, coefficients and pictures. Unfinished and old runs lack parts."""

import io
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from cdistill.errors import CorruptFileError, MissingAssetError, brief, printable
from cdistill.evaluation.records import Comparisons, Evaluation, Pair
from cdistill.storage.bounded import LARGEST, explain, load_json, read_bytes
from cdistill.storage.run_folder import RunFolder, RunRecord
from cdistill.storage.run_folder import read_run as read_record

_PIXELS = 1 << 26
_DAMAGE = (
    ValueError, KeyError, EOFError, RecursionError, SyntaxError, NotImplementedError, zlib.error, zipfile.BadZipFile,
    Image.DecompressionBombError,
)  # fmt: skip
Read = TypeVar("Read")


Pictures = tuple[list[int], NDArray[np.uint8] | None, Mapping[int, NDArray[np.uint8]]]
"""The first samples of an evaluation: their seeds; the teacher's (k, C, H, W), uint8, C = 1 or 3, None where there was
none; NFE -> the student's, of the same shape. Every array has the image of seeds[k] at k."""


@dataclass(frozen=True)
class Run:
    """What a page shows of a run."""

    name: str  # unlike those of the other runs of the page
    record: RunRecord  # its small files
    logged: Sequence[Evaluation]  # evaluations in metrics.jsonl, by step
    evaluations: Mapping[str, Evaluation]  # file name -> record; evaluation.json first
    coefficients: Mapping[str, Any] | None  # what `cdistill inspect` says of the coefficient file, if there is one
    pictures: Pictures | None  # samples with their seeds, if they were kept
    grid: bytes | None  # a picture of samples as a PNG, where there are no arrays

    @property
    def path(self) -> Path:
        """The folder, as it was given."""
        return self.record.folder.path

    @property
    def preconditioning(self) -> str:
        """The preconditioning's name, "" for a teacher."""
        return str(self.record.values.get("preconditioning.name", ""))

    @property
    def of_teacher(self) -> bool:
        """Whether the run trains a teacher."""
        return self.record.status.get("kind") == "teacher" or "network.model_channels" in self.record.values


def read_run(folder: RunFolder, name: str, describe: Callable[[Path], dict[str, Any]]) -> Run:
    """Reads a run, finished or not.

    Args:
        folder: The run.
        name: How the page shall call it.
        describe: Verifies and describes a coefficient file.

    Raises:
        MissingAssetError: There is no run in the folder.
        CorruptFileError: One of its files is damaged.
    """
    record = read_record(folder)
    log = folder.path / "metrics.jsonl"
    evaluations = {
        file: _checked(folder.path / file, partial(Evaluation.model_validate, result))
        for file, result in record.results.items()
    }
    pictures, grid = _pictures(folder.path, *next(iter(evaluations.items()))) if evaluations else (None, None)
    return Run(
        name=name,
        record=record,
        logged=[_checked(log, partial(Evaluation.model_validate, logged)) for logged in record.evaluations],
        evaluations=evaluations,
        coefficients=describe(folder.coefficients) if folder.coefficients.is_file() else None,
        pictures=pictures,
        grid=grid,
    )


def read_pairs(path: Path) -> list[Pair]:
    """Reads which runs were compared on the same seeds, and what came out.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is no comparison.
    """
    if not path.is_file():
        raise MissingAssetError(f"{path}: no such file; cdistill evaluate RUN_A RUN_B --out {path} writes it")
    return _checked(path, lambda: Comparisons.model_validate(load_json(path))).comparisons


def _pictures(folder: Path, file: str, evaluation: Evaluation) -> tuple[Pictures | None, bytes | None]:
    """Returns an evaluation's samples as arrays, or else as the picture that older versions drew."""
    stem = f"step-{evaluation.step:08d}" if file == "evaluation.json" and evaluation.step is not None else file[:-5]
    arrays = folder / (evaluation.images or f"samples/{stem}.npz")
    if not arrays.resolve().is_relative_to(folder.resolve()):
        raise CorruptFileError(
            f"{folder / file}: images: {printable(str(evaluation.images))} is outside of the run; restore the record"
        )
    if arrays.is_file():
        return _checked(arrays, partial(_arrays, arrays)), None
    png = folder / "samples" / f"{stem}.png"
    return None, _checked(png, partial(_png, png)) if png.is_file() else None


def _arrays(path: Path) -> Pictures:
    """Reads samples; sizes are checked before anything is unpacked."""
    with zipfile.ZipFile(io.BytesIO(content := read_bytes(path))) as archive:
        if sum(member.file_size for member in archive.infolist()) > LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST:,} bytes")
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        seeds, teacher = stored["seeds"], stored.get("teacher")
        students = {int(name[3:]): stored[name] for name in stored.files if name[:3] == "nfe" and name[3:].isdecimal()}
    images = [*([] if teacher is None else [teacher]), *students.values()]
    if not images or any(one.dtype != np.uint8 or one.shape != images[0].shape for one in images):
        raise ValueError("its images are missing, not of one shape, or no bytes")
    if images[0].ndim != 4 or images[0].shape[1] not in (1, 3) or not images[0].size:
        raise ValueError("its images are neither grey nor RGB")
    if seeds.shape != images[0].shape[:1] or seeds.dtype.kind not in "iu":
        raise ValueError("it has not one seed for each image")
    return seeds.tolist(), teacher, dict(sorted(students.items()))


def _png(path: Path) -> bytes:
    png = read_bytes(path)
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        if picture.width * picture.height > _PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
        picture.load()
    return png


def _checked(path: Path, read: Callable[[], Read]) -> Read:
    """Returns what `read` gives, and turns all that a damaged file may raise into one line."""
    try:
        return read()
    except ValidationError as error:
        reason = explain(error)
    except OSError as error:
        if error.errno is not None:  # of the system, not of what is in the file
            raise
        reason = brief(error)
    except _DAMAGE as error:
        reason = brief(error)
    raise CorruptFileError(f"{path}: damaged ({printable(reason)}); restore it, or make it again")
