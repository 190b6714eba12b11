"""Section of a recipe about what is measured, and how."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cdistill.errors import RecipeError
from cdistill.registry import METRICS, SAMPLERS, check_features
from cdistill.settings import Count, Section, known


def _known_features(name: str) -> str:
    """Checks the name of a feature network; a TorchScript file's and ``module:callable`` pass."""
    try:
        return check_features(name)
    except RecipeError as error:
        raise ValueError(str(error)) from error


class EvaluationSection(Section):
    """What is measured, when, and on how many images; `every` = 0 means at the end only.

    `features` is what FID and its kin look at, `reference` a file of its statistics of the real data, `baselines` are
    solvers by which the teacher is measured at the same numbers of calls.
    """

    nfe: Annotated[list[Count], Field(min_length=1)] = [1, 2, 3, 5]
    every: Annotated[int, Field(ge=0)] = 0
    samples: Annotated[int, Field(ge=2)] = 2000
    metrics: list[Annotated[str, AfterValidator(known(METRICS))]] = []
    split: Literal["train", "heldout"] = "train"
    first_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    features: Annotated[str, AfterValidator(_known_features)] = "legacy_tensorflow"
    reference: str | None = None
    baselines: list[Annotated[str, AfterValidator(known(SAMPLERS))]] = []
    grid_images: Count = 64
