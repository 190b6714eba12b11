"""Easy Consistency Tuning (Geng et al. 2024): consistency training from a teacher's weights, without its solver."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import override

from cdistill.networks.denoiser import broadcast
from cdistill.objectives.base import Batch, Networks, Objective, StepCost
from cdistill.objectives.settings import DSM, DistanceName, ObjectiveSection
from cdistill.schedule import EPS, T
from cdistill.settings import Count, Positive

_LEAST = 2 * EPS  # t, so that r = eps lies below it
_LEAST_GAP = 1e-6  # (t - r) / t: with less float32 tells the two points no longer apart


class ECTSection(ObjectiveSection):
    """Settings of ECT; the defaults are the public code's for CIFAR-10, whose d is 25,000."""

    distance: DistanceName = Field(default="pseudo-huber", description="d(x, y) of the loss.")
    dsm: bool = Field(default=False, description=DSM)
    level_mean: float = Field(default=-1.1, ge=-20, le=20, description="Mean of log t.")
    level_std: Positive = Field(default=2.0, description="Standard deviation of log t.")
    q: Annotated[float, Field(gt=1, le=1024)] = Field(default=4.0, description="By which t - r shrinks at a time.")
    every: Count = Field(default=1000, description="d, steps after each of which t - r shrinks by q.")
    k: Annotated[float, Field(ge=0, le=1024)] = Field(default=8.0, description="k of n(t) = 1 + k sigmoid(-b t).")
    b: Annotated[float, Field(ge=0, le=1024)] = Field(default=1.0, description="b of n(t).")


class ECT(Objective[ECTSection]):
    """d(f_theta(x_t; t->eps), sg f_theta(x_r; r->eps)) / (t - r), x_t = x_0 + t z and x_r = x_0 + r z.

    log t is normal, t within [2 eps, T]; r = max(eps, t (1 - n(t) / q^a)) with n(t) = 1 + k sigmoid(-b t) and a = 1, 2,
    ..., one more after every d steps. Both jumps are the student's, with the same dropout masks. Nothing but the start
    comes from the teacher.
    """

    section_type = ECTSection
    takes_s = False
    sampler = "cm"
    jumps = (("r", "s"),)

    @override
    def draw(self, size: int, generator: torch.Generator, index: int) -> dict[str, Tensor]:
        section = self.section
        normal = torch.randn(size, dtype=torch.float64, generator=generator)
        t = (section.level_mean + section.level_std * normal).exp().clamp(_LEAST, T)
        n = 1 + section.k * torch.sigmoid(-section.b * t)
        shrunk = torch.tensor(section.q, dtype=torch.float64).pow(-(index // section.every + 1))
        gap = (n * shrunk).clamp(min=_LEAST_GAP)
        return {"t": t, "r": (t * (1 - gap)).clamp(min=EPS), "s": torch.full_like(t, EPS)}

    @override
    def target(self, batch: Batch, networks: Networks) -> Tensor:
        t, r = batch.levels["t"], batch.levels["r"]
        x_r = batch.x0 + broadcast(r / t, batch.x0) * (batch.x_t - batch.x0)
        return networks.jump_with_dropout(networks.student, x_r, batch, "r", "s")

    @override
    def loss(self, prediction: Tensor, target: Tensor, batch: Batch) -> Tensor:
        gap = batch.levels["t"] - batch.levels["r"]
        return self.distance(prediction, target) / gap.to(prediction.dtype)

    @override
    def cost(self) -> StepCost:
        return StepCost(teacher=0, target=1, frozen=0)
