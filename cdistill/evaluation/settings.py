"""Section of a recipe about what is measured, and how."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cdistill.registry import METRICS, SAMPLERS, check_features
from cdistill.settings import Count, Section


class EvaluationSection(Section):
    """What is measured, when, and on how many images."""

    nfe: Annotated[
        list[Count],
        Field(min_length=1, description="Numbers of network calls at which a student is measured: 1,2,3,5."),
    ] = [1, 2, 3, 5]
    every: Annotated[
        int, Field(ge=0, description="Iterations between evaluations during training; 0 evaluates at the end only.")
    ] = 0
    samples: Annotated[
        int,
        Field(ge=2, description="Samples of each row, one for each seed; of given images all are measured."),
    ] = 2000
    metrics: Annotated[
        list[Annotated[str, AfterValidator(METRICS.check)]],
        Field(description="Names of metrics (cdistill ls metrics); none named: all that apply to the data."),
    ] = []
    split: Annotated[
        Literal["train", "heldout"],
        Field(description="Which real data to compare with: train, or heldout where the data have such a split."),
    ] = "train"
    first_seed: Annotated[
        int, Field(ge=0, lt=2**32, description="First seed of the samples; the others are the numbers after it.")
    ] = 0
    classes: Annotated[
        Literal["data", "uniform"],
        Field(description="How often each class is drawn: as in the data, or all that occur there alike (uniform)."),
    ] = "data"
    features: Annotated[
        str,
        AfterValidator(check_features),
        Field(
            description="Network of FID, KID, precision and recall: a name (cdistill ls features), a TorchScript file, "
            "or module:callable, uint8 (B,3,H,W) -> (B,d); the last two run code that you name."
        ),
    ] = "legacy_tensorflow"
    reference: Annotated[
        str | None,
        Field(description="Statistics of the real data: 'edm', or a file of EDM's or of cdistill reference-stats."),
    ] = None
    baselines: Annotated[
        list[Annotated[str, AfterValidator(SAMPLERS.check)]],
        Field(description="Solvers by which the teacher is measured too, at the same NFE: euler,heun,dpmpp-2m."),
    ] = []
    grid_images: Annotated[Count, Field(description="Samples that are kept as pictures beside the results.")] = 64
