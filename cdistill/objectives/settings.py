"""What the section [objective] of every objective has. Needs no torch."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cdistill.registry import DISTANCES, OBJECTIVES
from cdistill.settings import Calls, Section

DistanceName = Annotated[str, AfterValidator(DISTANCES.check)]
DSM = "Keep D(x, t, t) a denoiser by denoising score matching."
Pairs = Literal["ctm", "uniform", "mixed"] | Annotated[list[Calls], Field(min_length=1, max_length=100)]
"""Which (t, s) a student is trained on, see `cdistill.objectives.pairs`."""


class ObjectiveSection(Section):
    """Settings that all objectives share; each adds its own in a subclass, which may change the defaults."""

    name: Annotated[str, AfterValidator(OBJECTIVES.check)] = Field(
        default="ctm", description="What the student satisfies."
    )
    distance: DistanceName = Field(default="lpips", description="d(x, y) of the loss.")
    dsm: bool = Field(default=True, description=DSM)


class GridSection(ObjectiveSection):
    """Settings of an objective on a grid of noise levels; without DSM, which exact targets do not need."""

    dsm: bool = Field(default=False, description=DSM)
    points: Annotated[int, Field(ge=2, le=4096)] = Field(default=18, description="N, noise levels of the time grid.")


class SolverSection(GridSection):
    """Settings of an objective that compares with the teacher's solver."""

    dsm: bool = Field(default=True, description=DSM)
    targets: Literal["rollout", "store"] = Field(
        default="rollout", description="Solve the teacher's ODE in every step, or read kept trajectories."
    )
    target_rate: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="Rate of the moving average mu inside the loss."
    )
