"""Regression on kept trajectories of the teacher: exact targets, no moving average, no solver in the step."""

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import override

from cdistill.errors import RecipeError
from cdistill.objectives.base import Batch, Networks, Objective, StepCost
from cdistill.objectives.cm import to_eps_law
from cdistill.objectives.pairs import check_pairs, draw_times, law_of_times
from cdistill.objectives.settings import DistanceName, GridSection, Pairs
from cdistill.schedule import rho_grid


class RegressionSection(GridSection):
    """Settings of the regression from any t to any s."""

    distance: DistanceName = Field(
        default="l2", description="d(x, y) of the loss; of noisy points, so none that needs images."
    )
    pairs: Pairs = Field(default="mixed", description="Which (t, s): ctm, uniform, mixed, or those of so many calls.")

    @model_validator(mode="after")
    def _consistent(self) -> "RegressionSection":
        check_pairs(self.pairs, self.points)
        return self


class Regression(Objective[RegressionSection]):
    """d(f_theta(x_t; t->s), x_s), x_t and x_s points of one trajectory of the teacher.

    Raises:
        RecipeError: The distance compares images, which noisy points are not.
    """

    section_type: ClassVar[type[GridSection]] = RegressionSection
    takes_gan = True

    def __init__(self, section: RegressionSection, sample_shape: tuple[int, ...], meta: bool = False) -> None:
        super().__init__(section, sample_shape, meta)
        if self.takes_s and self.distance.images_only:
            raise RecipeError(
                f"objective.distance: {section.distance!r} compares images; the points of 'regression' are noisy: take "
                "l2 or pseudo-huber, or objective.name 'regression-to-eps'"
            )

    @property
    @override
    def stored(self) -> tuple[str, ...]:
        return ("s",)

    @override
    def draw(self, size: int, generator: torch.Generator, index: int) -> dict[str, Tensor]:
        grid, points = rho_grid(self.section.points), self.section.points
        i, _, j = draw_times(self.section.pairs, points, points - 1, size, generator)
        return {"t": grid[i], "s": grid[j]}

    @override
    def target(self, batch: Batch, networks: Networks) -> Tensor:
        return batch.points["s"]

    @property
    @override
    def law(self) -> Tensor:
        points = self.section.points
        return law_of_times(self.section.pairs, points, points - 1).sum(1)

    @override
    def cost(self) -> StepCost:
        return StepCost(teacher=0, target=0, frozen=0)


class RegressionToEps(Regression):
    """d(f_theta(x_t; t->eps), x_eps), t uniform over the grid: the targets are images, so that d may be perceptual."""

    section_type = GridSection
    takes_s = False
    sampler = "cm"

    @override
    def draw(self, size: int, generator: torch.Generator, index: int) -> dict[str, Tensor]:
        grid = rho_grid(self.section.points)
        i = torch.randint(0, self.section.points - 1, (size,), generator=generator)
        return {"t": grid[i], "s": grid[-1].expand(size)}

    @property
    @override
    def law(self) -> Tensor:
        return to_eps_law(self.section.points)
