"""What every section of a recipe is made of: strict types, checked names, one line for each error. Needs no torch.

A section lives in the room that reads it; `cdistill.recipe` composes them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cdistill.errors import RecipeError, printable, suggest

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]  # what is counted, and takes no memory
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MOST_CALLS = 10_000
Calls = Annotated[int, Field(ge=1, le=MOST_CALLS)]  # of a network, for one sample
Rate = Annotated[float, Field(ge=0, lt=1)]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]
"""The path of a file; a relative one counts from the folder where a command runs."""
Precision = Literal["fp32", "tf32", "fp16", "bf16"]
_MOST_ERRORS = 20  # that a message lists


class Section(BaseModel):
    """A part of a recipe: strict types, no unknown keys, no change afterwards."""

    moved: ClassVar[Mapping[str, str]] = {}  # keys that an earlier version had here -> where they are now
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


AnySection = TypeVar("AnySection", bound=Section)


def check_section(
    values: dict[str, Any], model: type[AnySection], where: str, spell: Callable[[str], str] = str
) -> AnySection:
    """Turns parsed TOML into a recipe or a section of one.

    `where` begins every message; `spell` gives how a key is written where the values come from.

    Raises:
        RecipeError: It is wrong; all errors are listed, a line each.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        front = f"{where}: " if where else ""
        lines = [f"{front}{_explain(item, model, spell)}" for item in error.errors()[:_MOST_ERRORS]]
        more = error.error_count() - len(lines)
        raise RecipeError("\n".join(lines + [f"{front}{more:,} more errors"] * (more > 0))) from error


def _explain(item: Any, model: type[BaseModel], spell: Callable[[str], str]) -> str:
    """Makes one line of one of pydantic's errors."""
    key = printable(spell(".".join(map(str, item["loc"])))) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        *path, last = map(str, item["loc"])
        section = _section_at(model, path)
        if section is not None and last in section.moved:
            return f"{key}: unknown key; it is {section.moved[last]} now"
        return f"{key}: unknown key; {suggest(last, [] if section is None else section.model_fields)}"
    if item["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: got {printable(repr(item['input']))}; {message[0].lower()}{message[1:]}"


def _section_at(model: type[BaseModel], path: Sequence[str]) -> type[Section] | None:
    """Returns the section of a recipe at `path`."""
    for key in path:
        annotation = model.model_fields[key].annotation
        choices = [annotation, *get_args(annotation)]  # a section, or one that may be left out
        sections = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, Section)]
        if not sections:
            return None
        model = sections[0]
    return model if issubclass(model, Section) else None
