"""What `evaluate` measures: a run's student, a converted student, a teacher, or images that another program drew."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cdistill.data import Source, load_source
from cdistill.errors import MismatchError, MissingAssetError, RecipeError
from cdistill.evaluation.settings import EvaluationSection
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.recipe.schema import DistillRecipe
from cdistill.sampling.samplers import SamplerChoice
from cdistill.sampling.teacher_data import open_data
from cdistill.settings import check_section
from cdistill.storage.checkpoints import tensor_digest
from cdistill.storage.files import file_digest
from cdistill.storage.run_folder import RunFolder
from cdistill.teachers import Teacher, load_teacher
from cdistill.workflows.students import load_converted, load_student, untrained_student


@dataclass(frozen=True)
class Target:
    """What a person asks to have measured; as JSON in the record, so that it can be asked again.

    Attributes:
        path: A run folder, the file of a converted student, or images: any file or folder of data.
        teacher: Name or file of the teacher, for other paths than runs, which know it; alone, it is what is measured.
        data: What to compare with, for other paths than runs.
        weights: File of the teacher's weights, where it is in no usual place.
        step: Which student of a run, see `load_student`.
        changes: Values that replace those of the recipe's evaluation section.
    """

    path: str | None = None
    teacher: str | None = None
    data: str | None = None
    weights: str | None = None
    step: str = "last"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def weights_path(self) -> Path | None:
        """`weights` as a path."""
        return None if self.weights is None else Path(self.weights)


@dataclass(frozen=True)
class LoadedTarget:
    """What is measured, loaded.

    Attributes:
        request: What was asked for.
        title: What messages call it.
        folder: Where its results go.
        section: How it is measured.
        source: Opens the data to compare with; returns None where there are statistics of them and no data are named.
        teacher: Whose end points `teacher-mse` compares with; None without one.
        student: D(x, t, s) and its f and g; None for a teacher alone, or for images.
        untrained: The student before training; None where it is not known.
        images: Samples that were drawn elsewhere; None for networks.
        facts: Where it comes from: step, digests.
    """

    request: Target
    title: str
    folder: Path
    section: EvaluationSection
    source: Callable[[Accelerator], Source | None]
    teacher: Teacher | None = None
    student: tuple[Denoiser, Preconditioning] | None = None
    untrained: Denoiser | None = None
    images: Source | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether it is a run, which knows its teacher and its data."""
        return "run" in self.facts

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        if self.images is not None:
            return self.images.shape
        return () if self.network is None else self.network.sample_shape

    @property
    def network(self) -> Denoiser | None:
        """What is drawn from."""
        if self.student is not None:
            return self.student[0]
        return None if self.teacher is None or self.images is not None else self.teacher.denoiser

    def to(self, device: torch.device) -> None:
        """Moves the networks to a device."""
        for network in (self.network, self.untrained, None if self.teacher is None else self.teacher.denoiser):
            if network is not None:
                network.to(device)

    def unread(self, choice: SamplerChoice) -> Iterator[tuple[list[str], str]]:
        """Yields options that were given and that nothing reads, and what they go with."""
        request, changes = self.request, self.request.changes
        given = {"--sampler": choice.name, "--times": choice.times, "--gamma": choice.gamma}
        options = [option for option, value in given.items() if value is not None]
        if options and self.student is None:
            yield options, "goes with a student; --baselines measures solvers"
        if "nfe" in changes and self.student is None and not self.section.baselines:
            yield ["--nfe"], "goes with a student, or with --baselines"
        if self.images is not None and (options := [o for o in ("first_seed", "baselines") if o in changes]):
            yield [f"--{option.replace('_', '-')}" for option in options], "goes with networks, not with images"
        if "baselines" in changes and self.teacher is None:
            yield ["--baselines"], "are a teacher's solvers, and there is no teacher; name one with --teacher"
        if request.step != "last" and not self.is_run:
            yield ["--step"], "goes with a run; this is of one step alone"
        if request.weights is not None and self.teacher is None:
            yield ["--weights"], "are a teacher's, and there is no teacher; name one with --teacher"
        if "split" in changes and not self.is_run and request.data is None and self.section.reference is not None:
            yield ["--split"], "goes with data, not with --reference alone; name --data"


def load_target(target: Target) -> LoadedTarget:
    """Loads what is to be measured.

    Raises:
        RecipeError: It does not say what to compare with, or options contradict each other.
        MissingAssetError, CorruptFileError, MismatchError: As the loaders of its files say.
    """
    if target.path is None:
        return _load_teacher(target)
    path = Path(target.path)
    if not path.exists():
        raise MissingAssetError(f"{path}: no such run, file or folder")
    if path.suffix == ".safetensors":
        return _load_converted(path, target)
    run = RunFolder(path)
    foreign = path.is_dir() and not run.recipe.is_file() and not run.checkpoints.is_dir()
    if path.is_file() or foreign:
        return _load_images(path, target)
    return _load_run(run, target)


def _load_run(run: RunFolder, target: Target) -> LoadedTarget:
    student = load_student(run, target.weights_path, target.step)
    section = _section({**student.recipe.evaluation.model_dump(), **target.changes})
    return LoadedTarget(
        request=target,
        title=f"{run.path}, step {student.step}",
        folder=run.path,
        section=section,
        source=lambda accelerator: open_data(student.recipe.data, section.split, student.teacher, accelerator),
        teacher=student.teacher,
        student=(student.denoiser, student.preconditioning),
        untrained=untrained_student(student.teacher, student.recipe),
        facts=run_facts(run, student.recipe, student.step, student.denoiser),
    )


def run_facts(run: RunFolder, recipe: DistillRecipe, step: int, denoiser: Denoiser) -> dict[str, Any]:
    """Returns what the record says of a run's student, as JSON."""
    return {
        "run": str(run.path),
        "step": step,
        "weights_sha256": tensor_digest(denoiser.state_dict()),
        "preconditioning": recipe.preconditioning.name,
        "coefficients_sha256": file_digest(run.coefficients) if run.coefficients.is_file() else None,
    }


def _load_converted(path: Path, target: Target) -> LoadedTarget:
    denoiser, preconditioning = load_converted(path)
    teacher = None if target.teacher is None else load_teacher(target.teacher, target.weights_path)
    section = _section(target.changes)
    return LoadedTarget(
        request=target,
        title=str(path),
        folder=path.parent,
        section=section,
        source=_data(target, section, denoiser.sample_shape, teacher),
        teacher=teacher,
        student=(denoiser, preconditioning),
        facts={"file": str(path), "weights_sha256": tensor_digest(denoiser.state_dict())},
    )


def _load_teacher(target: Target) -> LoadedTarget:
    if target.teacher is None:
        raise RecipeError("evaluate: got nothing to measure; name a run, a file, or --teacher")
    teacher = load_teacher(target.teacher, target.weights_path)
    section = _section(target.changes)
    return LoadedTarget(
        request=target,
        title=f"teacher {teacher.name}",
        folder=Path(),
        section=section,
        source=_data(target, section, teacher.shape, teacher),
        teacher=teacher,
    )


def _load_images(path: Path, target: Target) -> LoadedTarget:
    images = load_source(str(path))
    teacher = None if target.teacher is None else load_teacher(target.teacher, target.weights_path)
    count = len(images)
    section = _section({**target.changes, "samples": count})
    if target.changes.get("samples", count) != count:
        raise RecipeError(f"{path}: holds {count:,} images, all of which are measured; leave out --samples")
    return LoadedTarget(
        request=target,
        title=str(path),
        folder=path.parent,
        section=section,
        source=_data(target, section, images.shape, teacher),
        images=images,
        facts={"file": str(path), "images_sha256": images.digest},
    )


def _section(values: dict[str, Any]) -> EvaluationSection:
    return check_section(values, EvaluationSection, "evaluate")


def _data(
    target: Target, section: EvaluationSection, shape: tuple[int, ...], teacher: Teacher | None
) -> Callable[[Accelerator], Source | None]:
    """Returns what opens the data that the target names, or its teacher's own."""

    def opened(accelerator: Accelerator) -> Source | None:
        if target.data is None and section.reference is not None:
            return None
        if teacher is not None:
            source = open_data(target.data, section.split, teacher, accelerator)
        elif target.data is None:
            raise RecipeError(f"{target.path}: does not say what to compare with; name --data, or --teacher")
        else:
            source = load_source(target.data, section.split)
        if source.shape != shape:
            raise MismatchError(f"data {source.name!r}: shape {source.shape}; {target.path} has shape {shape}")
        return source

    return opened
