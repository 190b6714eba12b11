"""Section of a recipe about what is measured, and how."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cdistill.registry import METRICS, SAMPLERS, check_features
from cdistill.settings import Calls, FilePath, Section


class EvaluationSection(Section):
    """What is measured, when, and on how many images."""

    nfe: list[Calls] = Field(
        default=[1, 2, 3, 5],
        min_length=1,
        max_length=100,
        description="Numbers of network calls at which a student is measured: 1,2,3,5.",
    )
    every: int = Field(
        default=0,
        ge=0,
        le=10**9,
        description="Iterations between evaluations during training; 0 evaluates at the end only.",
    )
    samples: int = Field(
        default=2000,
        ge=2,
        le=10**7,
        description="Samples of each row, one for each seed; of given images all are measured.",
    )
    metrics: list[Annotated[str, AfterValidator(METRICS.check)]] = Field(
        default=[], description="Names of metrics (cdistill ls metrics); none named: all that apply to the data."
    )
    split: Literal["train", "heldout"] = Field(
        default="train",
        description="Which real data to compare with: train, or heldout where the data have such a split.",
    )
    first_seed: int = Field(
        default=0, ge=0, lt=2**32, description="First seed of the samples; the others are the numbers after it."
    )
    classes: Literal["data", "uniform"] = Field(
        default="data",
        description="How often each class is drawn: as in the data, or all that occur there alike (uniform).",
    )
    features: Annotated[FilePath, AfterValidator(check_features)] = Field(
        default="legacy_tensorflow",
        description="Network of FID, KID, precision and recall: a name (cdistill ls features), a TorchScript file, "
        "or module:callable, uint8 (B,3,H,W) -> (B,d); the last two run code that you name.",
    )
    reference: FilePath | None = Field(
        default=None,
        description="Statistics of the real data: 'edm', or a file of EDM's or of cdistill reference-stats.",
    )
    baselines: list[Annotated[str, AfterValidator(SAMPLERS.check)]] = Field(
        default=[], description="Solvers by which the teacher is measured too, at the same NFE: euler,heun,dpmpp-2m."
    )
    grid_images: int = Field(
        default=64, ge=1, le=10_000, description="Samples that are kept as pictures beside the results."
    )
