"""CTM (Kim et al. 2024) as Eq. 7 of Zheng et al. (2025) has it."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from cdistill.objectives.base import Batch, Networks, Objective, StepCost
from cdistill.objectives.pairs import check_pairs, draw_times, law_of_times
from cdistill.objectives.settings import Pairs, SolverSection
from cdistill.schedule import rho_grid
from cdistill.settings import Count


class CTMSection(SolverSection):
    """Settings of CTM; the defaults are Table 3's for CIFAR-10 and FFHQ."""

    max_ode_steps: Count = Field(default=17, description="M, the most solver steps from t to u.")
    target: Literal["ema", "live"] = Field(
        default="ema", description="A of Eq. 7: the moving average, or the live student."
    )
    pairs: Pairs = Field(default="ctm", description="Which (t, s): ctm, uniform, mixed, or those of so many calls.")

    @model_validator(mode="after")
    def _consistent(self) -> "CTMSection":
        if self.max_ode_steps > self.points - 1:
            raise ValueError(f"max_ode_steps: got {self.max_ode_steps}; {self.points} points allow {self.points - 1}")
        check_pairs(self.pairs, self.points)
        return self


class CTM(Objective[CTMSection]):
    """d(f_mu(f_theta(x_t; t->s); s->eps), f_mu(f_A(Solver(x_t; t->u); u->s); s->eps)), t > u >= s (Eq. 7).

    A is the moving average mu as in the paper, or the live student as in CTM's code (`target`); w(t) = 1. The distance
    of :meth:`prediction` and :meth:`target` is taken in :meth:`Objective.loss`. With ``targets = "store"`` x_t and
    Solver(x_t; t->u) are two points of a kept trajectory.
    """

    section_type = CTMSection
    takes_gan = True
    jumps = (("u", "s"), ("s", "eps"))

    @override
    def draw(self, size: int, generator: torch.Generator, index: int) -> dict[str, Tensor]:
        grid, section = rho_grid(self.section.points), self.section
        i, k, j = draw_times(section.pairs, section.points, section.max_ode_steps, size, generator)
        steps = torch.arange(int((k - i).max()) + 1)
        return {"t": grid[i], "u": grid[k], "s": grid[j], "path": grid[(i[:, None] + steps).minimum(k[:, None])]}

    @override
    def target(self, batch: Batch, networks: Networks) -> Tensor:
        x_u = networks.solve(batch)
        network = networks.target if self.section.target == "ema" else networks.student
        y = networks.jump(network, x_u, batch, "u", "s")
        return networks.jump(networks.target, y, batch, "s", "eps")

    @override
    def prediction(self, landed: Tensor, batch: Batch, networks: Networks) -> Tensor:
        return networks.jump(networks.target, landed, batch, "s", "eps")

    @property
    @override
    def law(self) -> Tensor:
        return self._law_of_times().sum(1)

    @override
    def cost(self) -> StepCost:
        """Counts over all draws of the times.

        >>> round(CTM(CTMSection(distance="l2"), (1,)).cost().teacher, 2)
        23.33
        """
        law = self._law_of_times()
        steps = torch.arange(self.section.points, dtype=torch.float64)
        solved = float((law.sum(2) * (steps - steps[:, None])).sum())  # E[h]
        to_s = 1 - float(law.sum(0).diagonal().sum())  # u is not s
        to_eps = 1 - float(law[..., -1].sum())  # s is not eps
        return StepCost(teacher=0 if self.stored else 2 * solved, target=to_s + to_eps, frozen=to_eps)

    def _law_of_times(self) -> Tensor:
        return law_of_times(self.section.pairs, self.section.points, self.section.max_ode_steps)
