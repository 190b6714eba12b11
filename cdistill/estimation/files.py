"""Estimates in coefficient files, with the sums behind them; the format: `cdistill.preconditionings.coefficients`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdistill.errors import CorruptFileError, brief
from cdistill.estimation.base import Statistics
from cdistill.estimation.result import Estimate, solve
from cdistill.preconditionings.coefficients import load_coefficients, save_coefficients
from cdistill.registry import ESTIMATORS

_BEHIND = ("sums", "sizes", "stops", "samples")
_FACTS = ("estimator", "dim", "sigma_data")
_FEWEST_GROUPS = 2  # that have an error


@dataclass(frozen=True)
class Found:
    """An estimate and how it was made.

    Attributes:
        estimate: l, s and their errors.
        statistics: The sums behind it.
        header: Provenance.
    """

    estimate: Estimate
    statistics: Statistics
    header: dict[str, Any]


def save_found(out: Path, found: Found) -> None:
    """Writes a coefficient file with everything behind it, atomically."""
    estimate, statistics = found.estimate, found.statistics
    t, s = estimate.pairs()
    f, g = estimate.jump("analytic", t, s)
    f_error, g_error = estimate.jump_errors("analytic", t, s)
    behind = {
        "l_error": estimate.l_error, "s_error": estimate.s_error,
        "pairs": torch.stack([t, s], dim=1), "f": f, "g": g, "f_error": f_error, "g_error": g_error,
        "sums": statistics.sums, "sizes": statistics.sizes, "stops": statistics.stops, "samples": statistics.samples,
    }  # fmt: skip
    save_coefficients(out, estimate.table, behind, found.header)


def read_found(path: Path) -> Found:
    """Reads a coefficient file with everything behind it.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged, or without the statistics of this version.
        UnknownNameError: It was made by an estimator that is not installed here.
    """
    found, tensors, header = load_coefficients(path)
    lacking = [name for name in _BEHIND if name not in tensors] + [name for name in _FACTS if name not in header]
    if lacking:
        raise CorruptFileError(f"{path}: lacks {', '.join(lacking)}; estimate the coefficients again")
    statistics = Statistics(found.t, header["dim"], *(tensors[name] for name in _BEHIND))
    try:
        estimator = ESTIMATORS.get(str(header["estimator"]))()
        _check_statistics(statistics, len(estimator.scalars))
        solved = solve(estimator, statistics, float(header["sigma_data"]))
        if header.get("smoothing", "none") != "none":  # by version 0.1: l and s are not those of the sums
            solved = replace(solved, table=found)
        elif not (_agree(solved.table.l, found.l) and _agree(solved.table.s, found.s)):
            raise ValueError("they do not give its l and s")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptFileError(
            f"{path}: its statistics make no estimate ({brief(error)}); estimate the coefficients again"
        ) from error
    return Found(solved, statistics, header)


def _agree(solved: Tensor, stored: Tensor) -> bool:
    """Whether values are the same but for the rounding of other versions."""
    return torch.allclose(solved, stored, rtol=1e-4, atol=1e-6)


def _check_statistics(statistics: Statistics, scalars: int) -> None:
    """Raises ValueError unless shapes and numbers are such as a collection leaves."""
    levels, (rounds, groups) = len(statistics.t), statistics.sizes.shape
    expected = {
        "sums": (statistics.sums, torch.float64, (rounds, groups, levels, scalars)),
        "sizes": (statistics.sizes, torch.float64, (rounds, groups)),
        "stops": (statistics.stops, torch.int64, (levels,)),
        "samples": (statistics.samples, torch.int64, (levels,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} are not {' x '.join(map(str, shape))} finite numbers of {dtype}")
    counts = statistics.sizes
    if rounds < 1 or groups < _FEWEST_GROUPS or not bool((counts >= 0).all() and (counts[0] > 0).all()):
        raise ValueError("sizes are not those of groups of samples")
    if not bool(((statistics.stops >= 0) & (statistics.stops < rounds)).all()):
        raise ValueError("stops name rounds that are not there")
