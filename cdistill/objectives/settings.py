"""What the section [objective] of every objective has. Needs no torch."""

from typing import Annotated

from pydantic import AfterValidator, Field

from cdistill.registry import DISTANCES, OBJECTIVES
from cdistill.settings import Section, known


class ObjectiveSection(Section):
    """Settings that all objectives share; each adds its own in a subclass, which may change the defaults."""

    name: Annotated[str, AfterValidator(known(OBJECTIVES))] = Field(
        default="ctm", description="What the student satisfies."
    )
    distance: Annotated[str, AfterValidator(known(DISTANCES))] = Field(
        default="lpips", description="d(x, y) of the loss."
    )
    dsm: bool = Field(default=True, description="Keep D(x, t, t) a denoiser by denoising score matching.")
