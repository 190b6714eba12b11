"""Consistency distillation (Song et al. 2023) as Eq. 5 of Zheng et al. (2025) has it."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from cdistill.objectives.base import Batch, Networks, Objective, StepCost
from cdistill.objectives.settings import ObjectiveSection
from cdistill.schedule import rho_grid
from cdistill.settings import Rate


class CMSection(ObjectiveSection):
    """Settings of consistency distillation."""

    points: Annotated[int, Field(ge=2)] = Field(default=18, description="N, noise levels of the time grid.")
    target_rate: Rate = Field(default=0.999, description="Rate of the moving average mu inside the loss.")


class CM(Objective[CMSection]):
    """d(f_theta(x_t; t->eps), f_mu(Solver(x_t; t->u); u->eps)) for neighbours t > u (Eq. 5, whose s is u here).

    w(t) = 1; both networks have the same dropout masks.
    """

    section_type = CMSection
    takes_s = False
    sampler = "cm"
    jumps = (("u", "s"),)

    @property
    @override
    def grid(self) -> Tensor:
        return rho_grid(self.section.points)

    @property
    @override
    def target_rate(self) -> float:
        return self.section.target_rate

    @override
    def draw(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        grid = self.grid
        i = torch.randint(0, self.section.points - 1, (size,), generator=generator)
        path = torch.stack([grid[i], grid[i + 1]], dim=1)
        return {"t": grid[i], "u": grid[i + 1], "s": grid[-1].expand(size), "path": path}

    @override
    def target(self, batch: Batch, networks: Networks) -> Tensor:
        return networks.jump_with_dropout(networks.target, networks.solve(batch), batch, "u", "s")

    @override
    def cost(self) -> StepCost:
        return StepCost(teacher=2, target=1, frozen=0)
