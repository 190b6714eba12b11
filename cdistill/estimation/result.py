"""What an estimation ends in: l and s, and the standard errors of everything that follows from them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cdistill.estimation.base import Estimator, Statistics
from cdistill.estimation.jackknife import replicates, standard_error
from cdistill.preconditionings import make_preconditioning
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.schedule import EPS, SIGMA_DATA

_PAIRED_LEVELS = 16


@dataclass(frozen=True)
class Estimate:
    """l and s of a teacher with their replicates.

    Attributes:
        table: l_t and s_t.
        parts: The same without each group of samples in turn.
        sigma_data: Standard deviation of the data.
    """

    table: Coefficients
    parts: tuple[Coefficients, ...]
    sigma_data: float = SIGMA_DATA

    @cached_property
    def l_error(self) -> Tensor:
        """Standard errors of l (n,)."""
        return standard_error(torch.stack([part.l for part in self.parts]))

    @cached_property
    def s_error(self) -> Tensor:
        """Standard errors of s (n,)."""
        return standard_error(torch.stack([part.s for part in self.parts]))

    def jump(self, name: str, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f(t,s) and g(t,s) of the preconditioning `name`, like `t`."""
        return make_preconditioning(name, self.sigma_data, EPS, self.table)(t, s)

    def jumps(self, name: str, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f and g of the preconditioning `name` without each group in turn, each (G, ...)."""
        forms = [make_preconditioning(name, self.sigma_data, EPS, part) for part in self.parts]
        f, g = zip(*[form(t, s) for form in forms], strict=True)
        return torch.stack(f), torch.stack(g)

    def jump_errors(self, name: str, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the standard errors of f(t,s) and g(t,s) of the preconditioning `name`, like `t`."""
        f, g = self.jumps(name, t, s)
        return standard_error(f), standard_error(g)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Returns all t and s < t, each (P,), among 16 of the noise levels, both ends included."""
        chosen = torch.linspace(0, len(self.table.t) - 1, _PAIRED_LEVELS).round().long().unique()
        levels = self.table.t[chosen]
        first, second = torch.triu_indices(len(levels), len(levels), 1)
        return levels[first], levels[second]


def solve(estimator: Estimator, statistics: Statistics, sigma_data: float) -> Estimate:
    """Computes l and s of all samples and without each group in turn.

    Args:
        estimator: Which collected the statistics.
        statistics: Its sums.
        sigma_data: Standard deviation of the data.
    """
    t = statistics.t
    l, s = estimator.solve(t, statistics.means(), statistics.stops, statistics.dim)  # noqa: E741
    l_parts, s_parts = replicates(estimator, statistics)
    tables = [Coefficients(t, *pair) for pair in [(l, s), *zip(l_parts, s_parts, strict=True)]]
    return Estimate(tables[0], tuple(tables[1:]), sigma_data)
