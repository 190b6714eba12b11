"""How far two estimators are from each other, on the same samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cdistill.estimation.jackknife import standard_error
from cdistill.estimation.result import Estimate


@dataclass(frozen=True)
class Deviation:
    """The difference of two estimators in one quantity, over all noise levels or jumps.

    Attributes:
        quantity: "l", "s", "f" or "g".
        largest: Largest absolute difference.
        bars: Root mean square of the difference in units of the error bars of both together.
        paired: The same in units of the standard error of the difference, which is smaller: the samples are common.
        beyond: Part of the differences beyond two of those standard errors; 0.05 is chance.
    """

    quantity: str
    largest: float
    bars: float
    paired: float
    beyond: float


def measure_deviations(first: Estimate, second: Estimate) -> list[Deviation]:
    """Compares two estimates from the same samples and groups: l, s, and f, g of the analytic preconditioning."""
    mine, other = _quantities(first), _quantities(second)
    return [_deviation(name, mine[name], other[name]) for name in mine]


def _deviation(name: str, first: Tensor, second: Tensor) -> Deviation:
    """Compares values (1+G, ...), the whole in front of its replicates."""
    difference = first - second
    own = (standard_error(first[1:]).square() + standard_error(second[1:]).square()).sqrt()
    paired = standard_error(difference[1:])
    known = (own > 0) & (paired > 0)
    largest = float(difference[0].abs().max())
    if not bool(known.any()):
        return Deviation(name, largest, 0.0, 0.0, 0.0)
    bars, units = (difference[0] / own)[known], (difference[0] / paired)[known]
    beyond = float((units.abs() > 2).double().mean())
    return Deviation(name, largest, _rms(bars), _rms(units), beyond)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _quantities(one: Estimate) -> dict[str, Tensor]:
    tables = (one.table, *one.parts)
    t, s = one.pairs()
    whole, parts = one.jump("analytic", t, s), one.jumps("analytic", t, s)
    f, g = (torch.cat([value[None], part]) for value, part in zip(whole, parts, strict=True))
    return {
        "l": torch.stack([part.l for part in tables]),
        "s": torch.stack([part.s for part in tables]),
        "f": f,
        "g": g,
    }
