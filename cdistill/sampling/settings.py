"""Section of a recipe about kept trajectories of the teacher. Needs no torch."""

from typing import Annotated, Literal

from pydantic import Field

from cdistill.settings import Section


class TrajectoriesSection(Section):
    """The teacher's trajectories that an objective reads, kept in the asset folder and shared between runs."""

    count: Annotated[int, Field(ge=1, le=10**7)] = Field(default=8192, description="M, trajectories.")
    substeps: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=1, description="Heun's steps of the solver from one noise level to the next."
    )
    precision: Literal["fp16", "fp32"] = Field(
        default="fp16", description="Of the numbers on disk; fp16 ones are scaled to unit variance."
    )
    levels: list[Annotated[int, Field(ge=0, lt=4096)]] = Field(
        default=[],
        max_length=4096,
        description="Indices of the noise levels that are kept, of the objective's grid; all by default.",
    )
    flips: bool = Field(default=False, description="Mirror half of the trajectories that a step reads.")
