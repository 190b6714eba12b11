"""Files of reference statistics: EDM's .npz, `mu` (d,) and `sigma` (d, d), with what else we write beside them."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdistill.errors import CorruptFileError, MismatchError, MissingAssetError, RecipeError
from cdistill.formats.npz import npz_errors, read_array
from cdistill.runtime.console import say_once
from cdistill.storage.assets import EDM_STATISTICS, digest
from cdistill.storage.files import replacing

_MOST = 2**31  # bytes of the covariance: 16,384 dimensions
_MOST_FEATURES = 2**34
_MOST_TEXT = 2**22
_TOLERANCE = 1e-6  # relative, of symmetry: other people's covariances are the sums of float32 products


@dataclass(frozen=True)
class Statistics:
    """What samples are compared with, as a feature network sees it.

    Attributes:
        facts: Where the numbers come from, as JSON; empty for other people's files.
    """

    mean: Tensor  # (d,), float64
    covariance: Tensor  # (d, d), float64, unbiased
    features: Tensor | None = None  # features of some of the data (m, d), float32, if they are kept
    facts: Mapping[str, Any] = field(default_factory=dict)


def find_statistics(name: str, data: str) -> Path:
    """Returns the file of statistics that `name` stands for: a path, or "edm" for what EDM published for the data.

    Raises:
        RecipeError: EDM published none for these data.
        MissingAssetError: It is not there and cannot be downloaded; the message says what to put where.
        CorruptFileError: It is not what it was at first use.
    """
    if name != "edm":
        if not Path(name).is_file():
            raise MissingAssetError(f"--reference: {name}: no such file; cdistill reference-stats makes one")
        return Path(name)
    if data not in EDM_STATISTICS:
        raise RecipeError(
            f"--reference: EDM has no statistics of {data!r}; known: {', '.join(sorted(EDM_STATISTICS))}; give a file, "
            "cdistill reference-stats makes one"
        )
    return EDM_STATISTICS[data].find("or give another file with --reference FILE")


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an .npz that EDM's fid.py reads too, atomically; DiskFullError if it did not fit."""
    arrays: dict[str, NDArray[Any]] = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays, provenance=np.array(json.dumps(statistics.facts)))


def read_statistics(path: Path) -> Statistics:
    """Reads an .npz of EDM's or ours; nothing in it is executed.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged, its numbers cannot be moments, or it is a pickle.
    """
    if path.suffix == ".pkl":
        raise CorruptFileError(
            f"{path}: a pickle (EDM2's format), which is never opened; take the .npz of EDM, or make one by "
            "cdistill reference-stats"
        )
    with npz_errors(path), zipfile.ZipFile(path) as archive:
        held = {name.removesuffix(".npy") for name in archive.namelist()}
        if not {"mu", "sigma"} <= held:
            raise CorruptFileError(f"{path}: holds {sorted(held)[:5]}; reference statistics are arrays mu and sigma")
        mean, covariance = (_numbers(archive, name, path, _MOST) for name in ("mu", "sigma"))
        features = _numbers(archive, "features", path, _MOST_FEATURES).float() if "features" in held else None
        facts = _facts(archive, path) if "provenance" in held else {}
    _check_moments(path, mean, covariance)
    if features is not None and (features.dim() != 2 or features.shape[1] != len(mean)):
        raise CorruptFileError(f"{path}: features of shape {tuple(features.shape)} beside a mean of {len(mean)}")
    return Statistics(mean, covariance, features, facts)


def check_made_for(path: Path, statistics: Statistics, name: str, sha256: str) -> None:
    """Raises MismatchError if the file was made by another feature network than `name` with these weights."""
    made_by = statistics.facts.get("features", {})
    if path in [asset.path for asset in EDM_STATISTICS.values()]:
        made_by = {"name": "legacy_tensorflow", "sha256": sha256}
    if not made_by:
        return say_once(f"{path}: does not say which features it is made of; taken for those of {name!r}")
    if (made_by.get("name"), made_by.get("sha256")) == (name, sha256):
        return None
    raise MismatchError(
        f"{path}: made by features {made_by.get('name')!r} (sha256 {str(made_by.get('sha256'))[:12]}...), not {name!r} "
        f"({sha256[:12]}...); choose its --features, or make another by cdistill reference-stats"
    )


def file_facts(path: Path) -> dict[str, str]:
    """Returns which file it is, for a record."""
    return {"file": str(path), "sha256": digest(path)}


def _numbers(archive: zipfile.ZipFile, name: str, path: Path, most: int) -> Tensor:
    array = read_array(archive, name, str(path), most)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8) or not np.isfinite(array).all():
        raise CorruptFileError(f"{path}: {name}: {array.dtype}; needs finite numbers in float32 or float64")
    kind = np.float32 if name == "features" else np.float64
    return torch.from_numpy(array.astype(kind, copy=False))


def _facts(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    array = read_array(archive, "provenance", str(path), _MOST_TEXT)
    facts = json.loads(str(array)) if array.dtype.kind == "U" and array.shape == () else None
    if not isinstance(facts, dict) or not isinstance(facts.get("features", {}), dict):
        raise CorruptFileError(f"{path}: provenance is no JSON object; make the file again")
    return facts


def _check_moments(path: Path, mean: Tensor, covariance: Tensor) -> None:
    size = len(mean) if mean.dim() == 1 else 0
    if not size or covariance.shape != (size, size):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise CorruptFileError(f"{path}: mu and sigma of shapes {shapes}; needs (d,) and (d, d)")
    scale = covariance.abs().max()
    skew, least = (covariance - covariance.T).abs().max(), covariance.diagonal().min()
    if skew > _TOLERANCE * scale or least < -_TOLERANCE * scale:
        raise CorruptFileError(f"{path}: sigma is no covariance (not symmetric, or a negative variance)")
