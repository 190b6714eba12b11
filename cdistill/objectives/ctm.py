"""CTM (Kim et al. 2024) as Eq. 7 of Zheng et al. (2025) has it."""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from cdistill.objectives.base import Batch, Networks, Objective, StepCost
from cdistill.objectives.settings import ObjectiveSection
from cdistill.schedule import rho_grid
from cdistill.settings import Count, Rate


class CTMSection(ObjectiveSection):
    """Settings of CTM; the defaults are Table 3's for CIFAR-10 and FFHQ."""

    points: Annotated[int, Field(ge=2)] = Field(default=18, description="N, noise levels of the time grid.")
    max_ode_steps: Count = Field(default=17, description="M, the most solver steps from t to u.")
    target: Literal["ema", "live"] = Field(
        default="ema", description="A of Eq. 7: the moving average, or the live student."
    )
    target_rate: Rate = Field(default=0.999, description="Rate of the moving average mu inside the loss.")

    @model_validator(mode="after")
    def _consistent(self) -> "CTMSection":
        if self.max_ode_steps > self.points - 1:
            raise ValueError(f"max_ode_steps: got {self.max_ode_steps}; {self.points} points allow {self.points - 1}")
        return self


class CTM(Objective[CTMSection]):
    """d(f_mu(f_theta(x_t; t->s); s->eps), f_mu(f_A(Solver(x_t; t->u); u->s); s->eps)), t > u >= s (Eq. 7).

    A is the moving average mu as in the paper, or the live student as in CTM's code (`target`); w(t) = 1. The distance
    of :meth:`prediction` and :meth:`target` is taken in :meth:`Objective.loss`.
    """

    section_type = CTMSection
    takes_gan = True
    jumps = (("u", "s"), ("s", "eps"))

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
        i, j, h = draw_ctm_times(self.section.points, self.section.max_ode_steps, size, generator)
        path = grid[i[:, None] + torch.arange(h + 1)]
        return {"t": path[:, 0], "u": path[:, -1], "s": grid[j], "path": path}

    @override
    def target(self, batch: Batch, networks: Networks) -> Tensor:
        x_u = networks.solve(batch)
        network = networks.target if self.section.target == "ema" else networks.student
        y = networks.jump(network, x_u, batch, "u", "s")
        return networks.jump(networks.target, y, batch, "s", "eps")

    @override
    def prediction(self, landed: Tensor, batch: Batch, networks: Networks) -> Tensor:
        return networks.jump(networks.target, landed, batch, "s", "eps")

    @override
    def cost(self) -> StepCost:
        """Counts over all draws of the times.

        >>> round(CTM(CTMSection(distance="l2"), (1,)).cost().teacher, 2)
        23.33
        """
        points, steps = self.section.points, range(1, self.section.max_ode_steps + 1)
        teacher = jumps = 0.0
        for h in steps:
            chance = h / sum(steps)
            starts = range(points - h)
            same = sum(1 / (points - i - h) for i in starts) / len(starts)  # P(s = u | h) = P(s = eps | h)
            teacher += chance * 2 * h
            jumps += chance * (1 - same)
        return StepCost(teacher=teacher, target=2 * jumps, frozen=jumps)


def draw_ctm_times(points: int, max_steps: int, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Draws CTM's times as indices of the grid: h ~ P(h) prop. to h on 1..M, i ~ U{0..N-1-h}, j ~ U{i+h..N-1}.

    Args:
        points: N.
        max_steps: M, at most N - 1.
        size: Samples.
        draw: Generator.

    Returns:
        i (size,), j (size,) and h, one for the whole step; t = tau_i, u = tau_{i+h}, s = tau_j.
    """
    h = 1 + int(torch.multinomial(torch.arange(1, max_steps + 1, dtype=torch.float64), 1, generator=draw))
    start = torch.randint(0, points - h, (size,), generator=draw)
    room = points - (start + h)  # how many places j has
    end = start + h + (torch.rand(size, generator=draw, dtype=torch.float64) * room).long()
    return start, end, h
