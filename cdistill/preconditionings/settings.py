"""Section of a recipe that chooses f and g."""

from typing import Annotated

from pydantic import AfterValidator, Field

from cdistill.registry import PRECONDITIONINGS
from cdistill.settings import FilePath, Section


class PreconditioningSection(Section):
    """f and g of the consistency function."""

    name: Annotated[str, AfterValidator(PRECONDITIONINGS.check)] = Field(
        default="analytic", description="A preconditioning (cdistill ls preconditionings)."
    )
    coefficients: FilePath | None = Field(
        default=None, description="File of the teacher's l and s, for those that need them; estimated first by default."
    )
    allow_other_teacher: bool = Field(
        default=False, description="Accept coefficients that were estimated for another teacher."
    )
