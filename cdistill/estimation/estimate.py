"""l and s of a teacher with the standard errors of everything that follows from them, and their file.

The format of the file: `cdistill.preconditionings.coefficients`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdistill.errors import CorruptFileError, brief
from cdistill.estimation.base import Estimator, GroupSums, replicates, standard_error
from cdistill.preconditionings.coefficients import Coefficients, Fit, load_coefficients, save_coefficients
from cdistill.preconditionings.loading import make_preconditioning
from cdistill.registry import ESTIMATORS
from cdistill.runtime.console import Table, compact
from cdistill.schedule import EPS, SIGMA_DATA

_PAIRED_LEVELS = 16
_SUMS = ("sums", "sizes", "stops", "samples")
_FACTS = ("estimator", "dim", "sigma_data")
_FEWEST_GROUPS = 2  # that have an error


@dataclass(frozen=True)
class CoefficientEstimate:
    """l and s of a teacher, with what their errors follow from."""

    l_replicates: Tensor  # l_t (1+G, n): of all samples, then without each group of samples in turn
    s_replicates: Tensor  # s_t (1+G, n)
    sums: GroupSums  # what both were computed from
    sigma_data: float = SIGMA_DATA  # standard deviation of the data
    header: Mapping[str, Any] = field(default_factory=dict)  # how they were made, {} if they are not those of a file
    fit: Fit | None = None  # f and g by least squares along trajectories, where they were asked for

    @property
    def coefficients(self) -> Coefficients:
        """l_t and s_t, and the fit of f and g."""
        return Coefficients(self.sums.t, self.l_replicates[0], self.s_replicates[0], self.fit)

    @property
    def l_error(self) -> Tensor:
        """Standard errors of l (n,)."""
        return standard_error(self.l_replicates[1:])

    @property
    def s_error(self) -> Tensor:
        """Standard errors of s (n,)."""
        return standard_error(self.s_replicates[1:])

    def f_and_g(self, name: str, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Returns replicates of f(t,s) and g(t,s) of the preconditioning `name`, each (1+G, ...)."""
        pairs = zip(self.l_replicates, self.s_replicates, strict=True)
        tables = [Coefficients(self.sums.t, *pair, self.fit) for pair in pairs]
        values = [make_preconditioning(name, self.sigma_data, EPS, table)(t, s) for table in tables]
        f, g = zip(*values, strict=True)
        return torch.stack(f), torch.stack(g)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Returns all t and s < t, each (P,), among 16 of the noise levels, both ends included."""
        levels = _spread(self.coefficients.t, _PAIRED_LEVELS)
        first, second = torch.triu_indices(len(levels), len(levels), 1)
        return levels[first], levels[second]

    def table(self, rows: int = 16) -> Table:
        """Returns l and s, and f and g of halving the noise (0.5 in CTM), at `rows` of the noise levels."""
        t = _spread(self.coefficients.t, rows)
        chosen = torch.isin(self.coefficients.t, t)
        s = (t / 2).clamp(min=float(self.coefficients.t[-1]))
        f, g = self.f_and_g("analytic", t, s)
        columns = {
            "l": _with_errors(self.l_replicates[:, chosen]),
            "s_coef": _with_errors(self.s_replicates[:, chosen]),
            "f(t,t/2)": _with_errors(f),
            "g(t,t/2)": _with_errors(g),
        }
        for name in ("f(t,t/2)", "g(t,t/2)"):
            columns[name] = [text if level > end else "-" for text, level, end in zip(columns[name], t, s, strict=True)]
        if len(self.sums.samples.unique()) > 1:
            columns["samples"] = [str(count) for count in self.sums.samples[chosen].tolist()]
        title = (
            f"{len(t)} of {len(self.coefficients.t)} noise levels, {self.header.get('estimator', 'l and s')}; CTM's f "
            "and g: 0.5; in brackets: standard error"
        )
        lines = [[f"{level:.4g}", *line] for level, *line in zip(t.tolist(), *columns.values(), strict=True)]
        return Table(title, ["t", *columns], lines)

    def samples_note(self) -> str:
        """Returns how many samples a target error took, and where it was missed; "" without one."""
        target, samples = self.header.get("target_error"), self.sums.samples
        if target is None:
            return ""
        missed = int((torch.maximum(self.l_error, self.s_error) > target).sum())
        return (
            f"target error {target:g}: {int(samples.min())} to {int(samples.max())} samples a noise level, "
            f"{int(samples.sum()):,} pairs in place of {self.header['samples'] * len(samples):,}"
            + (f"; {missed} of {len(samples)} levels are above it" if missed else "")
        )

    def fit_note(self) -> str:
        """Returns what the fit of f and g came to; "" without one."""
        if self.fit is None:
            return ""
        place = int(self.fit.g.nan_to_num(0).argmax())
        row, column = divmod(place, len(self.fit.t))
        largest = compact(float(self.fit.g.flatten()[place]), float(self.fit.g_error.flatten()[place]))
        return (
            f"f and g by least squares at {len(self.fit.t)} levels, {self.header['fit_trajectories']} trajectories; "
            f"largest g: {largest}, from {float(self.fit.t[row]):.4g} to {float(self.fit.t[column]):.4g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns l, s, their errors and the samples of each noise level as JSON."""
        values = {"t": self.coefficients.t, "l": self.coefficients.l, "s": self.coefficients.s}
        errors = {"l_error": self.l_error, "s_error": self.s_error, "samples": self.sums.samples}
        facts = {key: self.header[key] for key in ("teacher", "estimator") if key in self.header}
        record = {**facts, **{key: tensor.tolist() for key, tensor in {**values, **errors}.items()}}
        if self.fit is not None:
            rows = {name: values.nan_to_num(0).tolist() for name, values in self.fit._asdict().items()}
            record["fit"] = rows
        return record

    def save(self, path: Path) -> None:
        """Writes a coefficient file with everything that it follows from, atomically."""
        t, s = self.pairs()
        f, g = self.f_and_g("analytic", t, s)
        tensors = {
            "l_error": self.l_error, "s_error": self.s_error, "pairs": torch.stack([t, s], dim=1),
            "f": f[0], "g": g[0], "f_error": standard_error(f[1:]), "g_error": standard_error(g[1:]),
            **{name: getattr(self.sums, name) for name in _SUMS},
        }  # fmt: skip
        save_coefficients(path, self.coefficients, tensors, dict(self.header))


def _spread(t: Tensor, count: int) -> Tensor:
    """Returns about `count` of the noise levels, both ends included."""
    return t[torch.linspace(0, len(t) - 1, count).round().long().unique()]


def _with_errors(replicates: Tensor) -> list[str]:
    """Writes values (n,) with their standard errors, from replicates (1+G, n)."""
    values, errors = replicates[0].tolist(), standard_error(replicates[1:]).tolist()
    return [compact(value, error) for value, error in zip(values, errors, strict=True)]


def solve(
    estimator: Estimator, sums: GroupSums, sigma_data: float, header: Mapping[str, Any] | None = None
) -> CoefficientEstimate:
    """Computes l and s of all samples and without each group in turn; `header` says how the sums were made."""
    whole, without = estimator.solve(sums.t, sums.means(), sums.stops, sums.dim), replicates(estimator, sums)
    l, s = (torch.cat([value[None], rest]) for value, rest in zip(whole, without, strict=True))  # noqa: E741
    return CoefficientEstimate(l, s, sums, sigma_data, header or {})


def load_estimate(path: Path) -> CoefficientEstimate:
    """Reads a coefficient file with everything that it follows from.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged, or without the sums that versions before 0.1 did not write.
        UnknownNameError: It was made by an estimator that is not installed here.
    """
    stored, tensors, header = load_coefficients(path)
    lacking = [name for name in _SUMS if name not in tensors] + [name for name in _FACTS if name not in header]
    if lacking:
        raise CorruptFileError(f"{path}: lacks {', '.join(lacking)}; estimate the coefficients again")
    sums = GroupSums(stored.t, header["dim"], *(tensors[name] for name in _SUMS))
    estimator = ESTIMATORS.get(str(header["estimator"]))()
    try:
        _check_sums(sums, len(estimator.scalars))
        solved = solve(estimator, sums, float(header["sigma_data"]), header)
        if header.get("smoothing", "none") != "none":  # by version 0.1: l and s are not those of the sums
            l = torch.cat([stored.l[None], solved.l_replicates[1:]])  # noqa: E741
            s = torch.cat([stored.s[None], solved.s_replicates[1:]])
            solved = replace(solved, l_replicates=l, s_replicates=s)
        elif not (_agree(solved.coefficients.l, stored.l) and _agree(solved.coefficients.s, stored.s)):
            raise ValueError("they do not give its l and s")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptFileError(
            f"{path}: its sums make no estimate ({brief(error)}); estimate the coefficients again"
        ) from error
    return replace(solved, fit=stored.fit)


def _agree(solved: Tensor, stored: Tensor) -> bool:
    """Whether values are the same but for the rounding of other versions."""
    return torch.allclose(solved, stored, rtol=1e-4, atol=1e-6)


def _check_sums(sums: GroupSums, scalars: int) -> None:
    """Raises ValueError unless shapes and numbers are such as a collection leaves."""
    levels, (rounds, groups) = len(sums.t), sums.sizes.shape
    expected = {
        "sums": (sums.sums, torch.float64, (rounds, groups, levels, scalars)),
        "sizes": (sums.sizes, torch.float64, (rounds, groups)),
        "stops": (sums.stops, torch.int64, (levels,)),
        "samples": (sums.samples, torch.int64, (levels,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} are not {' x '.join(map(str, shape))} finite numbers of {dtype}")
    sizes, stops = sums.sizes, sums.stops
    if rounds < 1 or groups < _FEWEST_GROUPS or not bool((sizes >= 0).all() and (sizes[0] > 0).all()):
        raise ValueError("sizes are not those of groups of samples")
    if not bool(((stops >= 0) & (stops < rounds)).all()):
        raise ValueError("stops name rounds that are not there")


@dataclass(frozen=True)
class EstimatorComparison:
    """Estimates of one teacher by estimator, from the same samples and groups: the others against the first."""

    teacher: str
    estimates: Mapping[str, CoefficientEstimate]

    @cached_property
    def deviations(self) -> dict[str, list[dict[str, Any]]]:
        """How far each other estimator is from the first, see `deviations`."""
        (_, first), *others = self.estimates.items()
        return {name: deviations(first, other) for name, other in others}

    def table(self) -> Table:
        """Returns a line for each other estimator and quantity."""
        columns = [
            "minus", "of", "largest difference", "in error bars, rms", "in errors of the difference, rms",
            "beyond 2 of them",
        ]  # fmt: skip
        rows = [
            [name, row["quantity"], f"{row['largest']:.2e}", f"{row['bars']:.2f}", f"{row['paired']:.2f}",
             f"{row['beyond']:.0%}"]
            for name, rows in self.deviations.items()
            for row in rows
        ]  # fmt: skip
        first = next(iter(self.estimates))
        return Table(f"{self.teacher}: {first} minus others on the same samples; 1.0 and 5% are chance", columns, rows)

    def to_dict(self) -> dict[str, Any]:
        """Returns the estimates and their deviations as JSON."""
        estimates = {name: estimate.to_dict() for name, estimate in self.estimates.items()}
        against = next(iter(estimates))
        return {"teacher": self.teacher, "against": against, "deviations": self.deviations, "estimates": estimates}


def deviations(first: CoefficientEstimate, second: CoefficientEstimate) -> list[dict[str, Any]]:
    """Compares two estimates from the same samples and groups.

    Returns:
        For each "quantity" (l, s, and f and g of the analytic preconditioning), over all noise levels or jumps: the
        "largest" absolute difference; the root mean square of the difference in units of the error "bars" of both
        together, and in units of the standard error of the difference ("paired"), which is smaller, as the samples are
        common; the fraction of the differences "beyond" two of the latter, 0.05 by chance.
    """
    t, s = first.pairs()
    mine, other = (
        (estimate.l_replicates, estimate.s_replicates, *estimate.f_and_g("analytic", t, s))
        for estimate in (first, second)
    )
    return [{"quantity": name, **_deviation(*pair)} for name, *pair in zip("lsfg", mine, other, strict=True)]


def _deviation(first: Tensor, second: Tensor) -> dict[str, float]:
    """Compares replicates (1+G, ...)."""
    difference = first - second
    own = (standard_error(first[1:]).square() + standard_error(second[1:]).square()).sqrt()
    paired = standard_error(difference[1:])
    known = (own > 0) & (paired > 0)
    largest = float(difference[0].abs().max())
    if not bool(known.any()):
        return {"largest": largest, "bars": 0.0, "paired": 0.0, "beyond": 0.0}
    bars, units = (difference[0] / own)[known], (difference[0] / paired)[known]
    beyond = float((units.abs() > 2).double().mean())
    return {"largest": largest, "bars": _rms(bars), "paired": _rms(units), "beyond": beyond}


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
