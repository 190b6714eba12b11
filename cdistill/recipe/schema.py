"""What a recipe consists of: sections, each defined in the room that reads it, and what must hold between them."""

import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, SerializeAsAny, create_model, model_validator

from cdistill.errors import RecipeError, UnknownNameError
from cdistill.estimation.settings import EstimationSection
from cdistill.evaluation.settings import EvaluationSection
from cdistill.networks.settings import NetworkSection
from cdistill.objectives.settings import ObjectiveSection
from cdistill.preconditionings.settings import PreconditioningSection
from cdistill.registry import (
    OBJECTIVES,
    PRECONDITIONINGS,
    SOURCES,
    TEACHERS,
    is_data_path,
    is_teacher_data,
    teacher_data_count,
)
from cdistill.sampling.settings import TrajectoriesSection
from cdistill.settings import Count, FilePath, Section, Seed
from cdistill.teachers.official import WEIGHT_SUFFIXES
from cdistill.training.settings import (
    CheckpointSection,
    DenoisingSection,
    GanSection,
    LoggingSection,
    StudentCheckpointSection,
    TrainingSection,
)


def _known_teacher(name: str) -> str:
    """Checks the name of a teacher; the path of a file of weights passes."""
    name = os.path.expanduser(name)
    return name if name.endswith(WEIGHT_SUFFIXES) else TEACHERS.check(name)


def _known_data(name: str) -> str:
    """Checks the name of a data source; a path passes."""
    name = os.path.expanduser(name)
    try:
        return name if is_data_path(name) else SOURCES.check(name)
    except UnknownNameError as error:
        raise ValueError(f"{error}; or the path of a file or folder, from {Path.cwd()} if it is relative") from error


def _known_data_or_teacher(name: str) -> str:
    """Checks the name of a data source; a path passes, and so do samples of the teacher."""
    try:
        return f"teacher:{teacher_data_count(name)}" if is_teacher_data(name) else _known_data(name)
    except RecipeError as error:
        raise ValueError(str(error).removeprefix("data: ")) from error


class WarmupSection(ObjectiveSection):
    """An objective by which the student is trained first, with that objective's own settings beside these."""

    iterations: Count = Field(description="Steps, of those of [training].")


class TeacherRecipe(Section):
    """Everything that `cdistill train-teacher` needs.

    Attributes:
        may_change: What may differ when a run resumes; the learning rate depends on the length of the training.
    """

    may_change: ClassVar[tuple[str, ...]] = ("checkpoint", "logging")

    data: Annotated[str, AfterValidator(_known_data)]
    seed: Seed = 0
    network: NetworkSection
    training: DenoisingSection
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    def architecture(self, shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
        """Returns the description of the network for images of `shape`, see `cdistill.networks.architecture`."""
        fitted = {"resolution": shape[-1], "channels": shape[0], "num_classes": num_classes}
        return {"network": "song", **fitted, **self.network.model_dump()}


class DistillRecipe(Section):
    """Everything that `cdistill distill` needs; `weights` is the teacher's file where it is in no usual place."""

    teacher: Annotated[str, AfterValidator(_known_teacher)]
    weights: FilePath | None = None
    data: Annotated[str, AfterValidator(_known_data_or_teacher)] | None = None
    seed: Seed = 0
    preconditioning: PreconditioningSection = PreconditioningSection()
    estimation: EstimationSection = EstimationSection()
    trajectories: TrajectoriesSection = TrajectoriesSection()
    objective: SerializeAsAny[ObjectiveSection] = ObjectiveSection()
    warmup: SerializeAsAny[WarmupSection] | None = None
    training: TrainingSection
    gan: GanSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: StudentCheckpointSection = StudentCheckpointSection()
    logging: LoggingSection = LoggingSection()

    @property
    def weights_path(self) -> Path | None:
        """`weights` as a path."""
        return None if self.weights is None else Path(self.weights)

    @property
    def may_change(self) -> tuple[str, ...]:
        """What may differ when a run resumes; a learning rate that decays depends on the length of the training."""
        always = ("training.accumulation", "evaluation", "checkpoint", "logging", "weights")
        return always if self.training.decay == "cosine" else (*always, "training.iterations")

    @model_validator(mode="after")
    def _consistent(self) -> "DistillRecipe":
        objective = OBJECTIVES.get(self.objective.name)
        if objective.takes_s and PRECONDITIONINGS.get(self.preconditioning.name).to_eps_only:
            fitting = [name for name in OBJECTIVES.names() if not OBJECTIVES.get(name).takes_s]
            raise ValueError(
                f"preconditioning.name: {self.preconditioning.name!r} jumps to eps only; objective.name "
                f"{self.objective.name!r} needs jumps to any s; choose from objectives to eps: {', '.join(fitting)}"
            )
        if self.warmup is not None:
            self._check_warmup(self.warmup)
        if self.gan is not None and not objective.takes_gan:
            fitting = [name for name in OBJECTIVES.names() if OBJECTIVES.get(name).takes_gan]
            raise ValueError(
                f"gan: objective.name {self.objective.name!r} takes no GAN loss; these do: {', '.join(fitting)}"
            )
        if self.gan is not None and self.gan.start >= self.training.iterations:
            raise ValueError(f"gan.start: got {self.gan.start}; training.iterations is {self.training.iterations}")
        return self

    def _check_warmup(self, warmup: WarmupSection) -> None:
        """Raises ValueError unless a student of this objective can be trained by another one first."""
        if warmup.iterations >= self.training.iterations:
            raise ValueError(f"warmup.iterations: got {warmup.iterations}; of {self.training.iterations} in training")
        if OBJECTIVES.get(warmup.name).takes_s != OBJECTIVES.get(self.objective.name).takes_s:
            raise ValueError(
                f"warmup.name: {warmup.name!r} trains another kind of student than {self.objective.name!r}: one that "
                "jumps to eps only"
            )

    @model_validator(mode="after")
    def _best_is_measured(self) -> "DistillRecipe":
        metric, _, calls = (self.checkpoint.best or "").rpartition("@")
        measured = self.evaluation
        if metric and (int(calls) not in measured.nfe or metric not in (measured.metrics or [metric])):
            raise ValueError(
                f"checkpoint.best: got {self.checkpoint.best!r}; evaluation measures "
                f"{', '.join(measured.metrics) or 'every metric that applies'} at NFE {measured.nfe}"
            )
        return self


@cache
def recipe_of_objectives(name: str, warmup: str | None = None) -> type[DistillRecipe]:
    """Returns the recipe whose sections [objective] and [warmup] are those of registered objectives."""
    section: Any = OBJECTIVES.get(name).section_type
    fields: dict[str, Any] = {"objective": (section, section.model_construct(name=name))}
    if warmup is not None:
        own: Any = create_model("Warmup", __base__=(OBJECTIVES.get(warmup).section_type, WarmupSection))
        fields["warmup"] = (own, ...)
    return create_model("DistillRecipe", __base__=DistillRecipe, **fields)
