"""What `evaluate` measures: a run's student, a converted student, a teacher, or images that another program drew."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cdistill.data import Source, load_source
from cdistill.errors import MismatchError, MissingAssetError, RecipeError, printable
from cdistill.evaluation.settings import EvaluationSection
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.recipe.schema import DistillRecipe
from cdistill.registry import FEATURES, is_data_path
from cdistill.sampling.samplers import SamplerChoice
from cdistill.sampling.teacher_data import open_data
from cdistill.settings import check_section
from cdistill.storage.bounded import read_bytes
from cdistill.storage.checkpoints import tensor_digest
from cdistill.storage.files import file_digest
from cdistill.storage.own_words import is_near, is_own, objection
from cdistill.storage.run_folder import RunFolder
from cdistill.teachers import Teacher, load_teacher
from cdistill.teachers.official import WEIGHT_SUFFIXES
from cdistill.workflows.students import load_converted, load_student, untrained_student


@dataclass(frozen=True)
class Target:
    """What a person asks to have measured; as JSON in the record, so that it can be asked again."""

    path: str | None = None  # a run folder, the file of a converted student, or images: any file or folder of data
    teacher: str | None = None
    """Name or file of the teacher, for other paths than runs, which know it; alone, it is what is measured."""
    data: str | None = None  # what to compare with, for other paths than runs
    weights: str | None = None  # file of the teacher's weights, where it is in no usual place
    step: str = "last"  # which student of a run, see `load_student`
    changes: dict[str, Any] = field(default_factory=dict)
    """Values that replace those of the recipe's evaluation section."""

    @property
    def weights_path(self) -> Path | None:
        """`weights` as a path."""
        return None if self.weights is None else Path(self.weights)


@dataclass(frozen=True)
class LoadedTarget:
    """What is measured, loaded."""

    request: Target  # what was asked for
    title: str  # what messages call it
    folder: Path  # where its results go
    section: EvaluationSection  # how it is measured
    source: Callable[[Accelerator], Source | None]
    """Opens the data to compare with; returns None where there are statistics of them and no data are named."""
    teacher: Teacher | None = None  # whose end points `teacher-mse` compares with; None without one
    student: tuple[Denoiser, Preconditioning] | None = None
    """D(x, t, s) and its f and g; None for a teacher alone, or for images."""
    untrained: Denoiser | None = None  # the student before training; None where it is not known
    images: Source | None = None  # samples that were drawn elsewhere; None for networks
    facts: dict[str, Any] = field(default_factory=dict)  # where it comes from: step, digests

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
        sampler = [option for option, value in given.items() if value is not None]
        chosen = {name: [f"--{name.replace('_', '-')}"] for name in changes}
        of_networks = [word for name in ("first_seed", "classes", "baselines") for word in chosen.get(name, [])]
        step = ["--step"] if request.step != "last" else []
        weights = ["--weights"] if request.weights is not None else []
        student, teacher, unlabelled = self.student, self.teacher, self.network and not self.network.num_classes
        no_data = not self.is_run and request.data is None and self.section.reference is not None
        rules = [
            (sampler, student is None, "goes with a student; --baselines measures solvers"),
            (
                chosen.get("nfe"),
                student is None and not self.section.baselines,
                "goes with a student, or with --baselines",
            ),
            (of_networks, self.images is not None, "goes with networks, not with images"),
            (chosen.get("classes"), unlabelled, "goes with a network that has classes; this one is unconditional"),
            (
                chosen.get("baselines"),
                teacher is None,
                "are a teacher's solvers, and there is none; name one: --teacher",
            ),
            (step, not self.is_run, "goes with a run; this is of one step alone"),
            (weights, teacher is None, "are a teacher's, and there is none; name one: --teacher"),
            (chosen.get("split"), no_data, "goes with data, not with --reference alone; name --data"),
        ]
        return ((options, reason) for options, unread, reason in rules if options and unread)


def load_target(target: Target) -> LoadedTarget:
    """Loads what is to be measured.

    Raises:
        RecipeError: It does not say what to compare with, or options contradict each other.
        MissingAssetError, CorruptFileError, MismatchError: As the loaders of its files say.
    """
    path = Path(target.path or "")
    if not path.exists():
        raise MissingAssetError(f"{path}: no such run, file or folder")
    run = RunFolder(path)
    if target.path is not None and path.is_dir() and (run.recipe.is_file() or run.checkpoints.is_dir()):
        return _load_run(run, target)
    return _load_other(path, target)


def _load_run(run: RunFolder, target: Target) -> LoadedTarget:
    student = load_student(run, target.weights_path, target.step)
    teacher = student.teacher
    if teacher is None:
        raise MissingAssetError(
            f"{run.path}: its teacher {student.recipe.teacher!r} is not there, with which students are compared; "
            "say where its weights are: --weights FILE"
        )
    section = check_section({**student.recipe.evaluation.model_dump(), **target.changes}, EvaluationSection, "evaluate")
    data = student.recipe.data if target.data is None else target.data
    if target.data is not None and not is_data_path(student.recipe.data or ""):
        raise RecipeError(f"{run.path}: a run knows its teacher and its data; leave out --data")
    stated = _code_and_paths(
        student.recipe.evaluation.features if "features" not in target.changes else None,
        student.recipe.evaluation.reference if "reference" not in target.changes else None,
        student.recipe.data if target.data is None else None,
    )
    if reason := objection(run.recipe, read_bytes(run.recipe), stated):
        raise RecipeError(reason)
    return LoadedTarget(
        request=target,
        title=f"{run.path}, step {student.step}",
        folder=run.path,
        section=section,
        source=lambda accelerator: open_data(data, section.split, teacher, accelerator),
        teacher=teacher,
        student=(student.denoiser, student.preconditioning),
        untrained=untrained_student(teacher, student.recipe),
        facts=run_facts(run, student.recipe, student.step, student.denoiser),
    )


def check_words(path: Path, content: bytes, target: Target, given: Target) -> Target:
    """Returns what a record, a file of this `content`, asks for, and a person in its place by `given`.

    RecipeError: It was not written here, and names code or a path outside of its folder that the person does not name.
    """
    changes, words = target.changes, given.changes
    teacher = target.teacher if (target.teacher or "").endswith(WEIGHT_SUFFIXES) else None
    stated = _code_and_paths(
        changes.get("features") if "features" not in words else None,
        changes.get("reference") if "reference" not in words else None,
        target.data if given.data is None else None,
    )
    stated |= {
        "--teacher": teacher if given.teacher is None else None,
        "--weights": target.weights if given.weights is None else None,
    }
    if reason := objection(path, content, stated):
        raise RecipeError(reason)
    where = target.path
    near = where is not None and (is_own(content) or is_near(path, where))
    if where is not None and not (near and Path(where).exists()):  # moved, and the record with it
        beside = path.parent / Path(where).name
        where = str(beside if beside.exists() else path.parent)
        if not beside.exists() and not RunFolder(path.parent).recipe.is_file():
            raise RecipeError(f"{path}: {printable(target.path or '')}: not in its folder; put both where they belong")
    return replace(
        target, path=where, teacher=given.teacher or target.teacher, data=given.data or target.data,
        weights=given.weights or target.weights, changes={**changes, **words},
    )  # fmt: skip


def _code_and_paths(features: Any, reference: Any, data: str | None) -> dict[str, str | None]:
    """Returns option -> value of what is no name that this installation knows."""
    return {
        "--features": str(features) if features is not None and features not in FEATURES.names() else None,
        "--reference": str(reference) if reference not in (None, "edm") else None,
        "--data": data if data is not None and is_data_path(data) else None,
    }


def run_facts(run: RunFolder, recipe: DistillRecipe, step: int, denoiser: Denoiser) -> dict[str, Any]:
    """Returns what the record says of a run's student, as JSON."""
    return {
        "run": str(run.path),
        "step": step,
        "weights_sha256": tensor_digest(denoiser.state_dict()),
        "preconditioning": recipe.preconditioning.name,
        "coefficients_sha256": file_digest(run.coefficients) if run.coefficients.is_file() else None,
    }


def _load_other(path: Path, target: Target) -> LoadedTarget:
    """Loads a converted student, images, or a teacher alone; none of them says how it is measured."""
    teacher = None if target.teacher is None else load_teacher(target.teacher, target.weights_path)
    student, images, changes = None, None, target.changes
    facts: dict[str, Any] = {} if target.path is None else {"file": str(path)}
    if path.suffix == ".safetensors":
        student = load_converted(path)
        shape = student[0].sample_shape
        facts["weights_sha256"] = tensor_digest(student[0].state_dict())
    elif target.path is not None:
        images = load_source(str(path))
        shape, count = images.shape, len(images)
        facts["images_sha256"] = images.digest
        if changes.get("samples", count) != count:
            raise RecipeError(f"{path}: holds {count:,} images, all of which are measured; leave out --samples")
        changes = {**changes, "samples": count}
    elif teacher is not None:
        shape = teacher.shape
    else:
        raise RecipeError("evaluate: got nothing to measure; name a run, a file, or --teacher")
    section = check_section(changes, EvaluationSection, "evaluate")
    return LoadedTarget(
        request=target,
        title=f"teacher {teacher.name}" if target.path is None and teacher is not None else str(path),
        folder=path.parent,
        section=section,
        source=_data(target, section, shape, teacher),
        teacher=teacher,
        student=student,
        images=images,
        facts=facts,
    )


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
