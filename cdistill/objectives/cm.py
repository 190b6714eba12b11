"""Consistency distillation (Song et al. 2023) as Eq. 5 of Zheng et al. (2025) has it."""

import torch
from torch import Tensor
from typing_extensions import override

from cdistill.objectives.base import Batch, Networks, Objective, StepCost
from cdistill.objectives.settings import SolverSection
from cdistill.schedule import rho_grid


class CM(Objective[SolverSection]):
    """d(f_theta(x_t; t->eps), f_mu(Solver(x_t; t->u); u->eps)) for neighbours t > u (Eq. 5, whose s is u here).

    w(t) = 1; both networks have the same dropout masks. With ``targets = "store"`` x_t and Solver(x_t; t->u) are
    neighbours of a kept trajectory.
    """

    section_type = SolverSection
    takes_s = False
    sampler = "cm"
    jumps = (("u", "s"),)

    @override
    def draw(self, size: int, generator: torch.Generator, index: int) -> dict[str, Tensor]:
        grid = rho_grid(self.section.points)
        i = torch.randint(0, self.section.points - 1, (size,), generator=generator)
        path = torch.stack([grid[i], grid[i + 1]], dim=1)
        return {"t": grid[i], "u": grid[i + 1], "s": grid[-1].expand(size), "path": path}

    @override
    def target(self, batch: Batch, networks: Networks) -> Tensor:
        return networks.jump_with_dropout(networks.target, networks.solve(batch), batch, "u", "s")

    @property
    @override
    def law(self) -> Tensor:
        return to_eps_law(self.section.points)

    @override
    def cost(self) -> StepCost:
        return StepCost(teacher=0 if self.stored else 2, target=1, frozen=0)


def to_eps_law(points: int) -> Tensor:
    """Returns the law of (t, s) where t is uniform above eps and s is eps, (N, N), float64."""
    law = torch.zeros(points, points, dtype=torch.float64)
    law[:-1, -1] = 1 / (points - 1)
    return law
