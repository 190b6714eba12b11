"""Sections of a recipe that the training reads."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from cdistill.registry import DISCRIMINATORS, METRICS
from cdistill.settings import Count, Positive, Precision, Rate, Section


def _known_goal(goal: str) -> str:
    """Checks METRIC@NFE, "fid@2" say."""
    metric, _, calls = goal.rpartition("@")
    if not (metric and re.fullmatch(r"[1-9][0-9]{0,9}", calls)):
        raise ValueError(f"got {goal!r}; needs METRIC@NFE, as in frechet-pixels@2")
    return f"{METRICS.check(metric)}@{calls}"


class CheckpointSection(Section):
    """When the state is saved."""

    every: Count = 200
    keep: Count = 2


class LoggingSection(Section):
    """Training steps between lines of metrics.jsonl, and accelerate's trackers that get the same numbers."""

    every: Count = 10
    trackers: Annotated[list[Literal["tensorboard", "wandb"]], Field(max_length=2)] = []

    @model_validator(mode="after")
    def _consistent(self) -> "LoggingSection":
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: got {self.trackers}; name each once")
        return self


class StudentCheckpointSection(CheckpointSection):
    """`best`, METRIC@NFE, says by which measurement of the run one checkpoint more is kept, the best.

    By default it is the first metric of the evaluation at the first number of its network calls.
    """

    best: Annotated[str, AfterValidator(_known_goal)] | None = None


class DenoisingSection(Section):
    """EDM's training of a teacher (Karras et al. 2022, Table 1)."""

    iterations: Count
    batch_size: Annotated[int, Field(ge=1, le=10**6)]
    learning_rate: Positive
    ema_rate: Rate
    p_mean: Annotated[float, Field(ge=-20, le=20)] = -1.2
    p_std: Annotated[float, Field(gt=0, le=10)] = 1.2
    sigma_data: Positive = 0.5
    flips: bool = True
    precision: Precision = Field(
        default="fp32",
        description="fp32, tf32 (on a GPU, convolutions and products of matrices with 10 bits), fp16 or bf16.",
    )
    patience: Count = 20


# What version 0.1 had in [training] and now belongs to the objective.
MOVED = {
    "method": "objective.name",
    **{key: f"objective.{key}" for key in ("points", "max_ode_steps", "distance", "dsm", "target", "target_rate")},
}


class TrainingSection(Section):
    """How a student is trained, whatever the objective; the defaults are Table 3's."""

    moved: ClassVar[Mapping[str, str]] = MOVED

    iterations: Count
    batch_size: Annotated[int, Field(ge=1, le=10**6)]
    learning_rate: Positive = 4e-4
    decay: Literal["none", "cosine"] = Field(
        default="none", description="Of the learning rate: none, or half a cosine, from its full value to 0 at the end."
    )
    ema_rate: Rate = Field(default=0.999, description="Rate of the moving average that is sampled from.")
    dropout: Rate = 0.0
    flips: bool = True
    precision: Precision = Field(
        default="fp32",
        description="fp32, tf32 (on a GPU, convolutions and products of matrices with 10 bits), fp16 or bf16.",
    )
    teacher_precision: Literal["same", "fp32", "fp16", "bf16"] = "same"
    compile: bool | Literal["auto"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    accumulation: Count = Field(default=1, description="Micro-batches whose gradients are added up.")
    patience: Count = Field(
        default=20, description="Skipped steps in a row before the run returns to its last checkpoint."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingSection":
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation: {self.accumulation} does not divide batch_size {self.batch_size}")
        return self


def cosine_rate(section: TrainingSection | DenoisingSection, index: int) -> float:
    """Returns the learning rate of step `index`, half a cosine from its full value to 0 at the end."""
    return section.learning_rate * (1 + math.cos(math.pi * index / section.iterations)) / 2


def precision_of_teacher(section: TrainingSection) -> Precision:
    """Returns the precision that a recipe asks for its teacher."""
    return section.precision if section.teacher_precision == "same" else section.teacher_precision


class GanSection(Section):
    """CTM's GAN loss, on from step `start`: then every other step trains the discriminator instead of the student."""

    discriminator: Annotated[str, AfterValidator(DISCRIMINATORS.check)] = "small"
    start: Annotated[int, Field(ge=0, le=10**9)] = 0
    learning_rate: Positive = 2e-3
    augment: list[Literal["color", "translation", "cutout"]] = ["color", "translation", "cutout"]
