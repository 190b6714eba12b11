"""Section of a recipe that chooses f and g."""

from typing import Annotated

from pydantic import AfterValidator

from cdistill.registry import PRECONDITIONINGS
from cdistill.settings import Section, known


class PreconditioningSection(Section):
    """f and g; `coefficients` is a file for those that need one, estimated first when it is not given."""

    name: Annotated[str, AfterValidator(known(PRECONDITIONINGS))] = "analytic"
    coefficients: str | None = None
    allow_other_teacher: bool = False
