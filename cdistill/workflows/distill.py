"""``cdistill distill`` and ``cdistill train-teacher``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator

from cdistill.data import Source, load_source
from cdistill.errors import CdistillError, RecipeError
from cdistill.evaluation.evaluator import Evaluator
from cdistill.evaluation.pipeline import evaluate_networks, evaluate_student, save_evaluation, save_images
from cdistill.evaluation.records import STUDENT, Evaluation
from cdistill.networks.architecture import build_denoiser
from cdistill.networks.denoiser import Denoiser, count_parameters
from cdistill.objectives.base import Objective, make_objective
from cdistill.objectives.settings import ObjectiveSection
from cdistill.preconditionings import Preconditioning, load_preconditioning
from cdistill.recipe.files import load_recipe, to_toml
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.registry import PRECONDITIONINGS, is_data_path, is_script
from cdistill.runtime.console import Table, say, table
from cdistill.runtime.processes import world_size
from cdistill.runtime.randomness import derive_seed
from cdistill.sampling.samplers import SamplerChoice
from cdistill.sampling.teacher_data import open_data
from cdistill.sampling.trajectories import TrajectoryStore, open_trajectories
from cdistill.storage.files import copy_file, list_checkpoints
from cdistill.storage.run_folder import RUNS, RunFolder
from cdistill.teachers import Teacher, load_teacher, save_teacher
from cdistill.teachers.official import WEIGHT_SUFFIXES
from cdistill.training.denoising import DenoisingTask
from cdistill.training.distillation import Distillation
from cdistill.training.gan import Adversary
from cdistill.training.loop import effective_precision, make_accelerator, train
from cdistill.training.trackers import check_trackers, log_record, tracking
from cdistill.workflows.estimate import draw_coefficients, estimate_coefficients, is_estimate, with_fit
from cdistill.workflows.plan import with_micro_batches
from cdistill.workflows.runs import check_run, opened_run
from cdistill.workflows.students import Student, load_student, recipe_preconditioning, untrained_student
from cdistill.workflows.targets import Target, run_facts

Warmup = tuple[Objective[ObjectiveSection], int] | None

AnyRecipe = TypeVar("AnyRecipe", DistillRecipe, TeacherRecipe)


def train_teacher(recipe: TeacherRecipe, out: Path, resume: str, accept_data: bool = False) -> Path:
    """Trains a teacher in the run folder `out` and returns the path of its file."""
    check_trackers(recipe.logging.trackers)
    recipe = with_absolute_paths(recipe)
    source = load_source(recipe.data)
    section, checkpoint = recipe.training, recipe.checkpoint
    recipe.network.check_shape(source.name, source.shape)
    architecture = recipe.architecture(source.shape, source.num_classes)
    folder, path = RunFolder(out), out / "teacher.safetensors"
    accelerator = make_accelerator(section.precision)
    follow = tracking(recipe.logging, folder, recipe.model_dump(), accelerator)
    with opened_run(folder, recipe, resume, accelerator), follow:
        torch.manual_seed(recipe.seed)
        denoiser = build_denoiser(architecture, section.sigma_data)
        denoiser.known_classes = source.classes
        say(
            f"teacher: {count_parameters(denoiser):,} parameters; data {source.name}: {len(source):,} samples"
            f"{_uneven(source)}"
        )
        task = DenoisingTask(denoiser, source, accelerator, section, recipe.seed)
        task.identity, task.accept_data = {"data_sha256": source.digest}, accept_data
        train(task, folder, section.iterations, checkpoint, section.patience, recipe.logging.every)
        if accelerator.is_main_process:
            save_teacher(path, Teacher(str(path), task.average, source.name), architecture, {"recipe": to_toml(recipe)})
            folder.write_status(state="finished", exit_code=0)
    return path


@dataclass(frozen=True)
class DistilledRun:
    """A finished distillation.

    Attributes:
        folder: The run folder.
        evaluation: The figures of the teacher, the untrained and the trained student.
    """

    folder: Path
    evaluation: Evaluation

    @cached_property
    def student(self) -> Student:
        """The trained student."""
        return load_student(self.folder)

    def table(self) -> Table:
        """Returns the figures as text."""
        return self.evaluation.table()

    def to_dict(self) -> dict[str, Any]:
        """Returns the record of the evaluation as JSON."""
        return self.evaluation.to_dict()


def distill(
    recipe: str | Path | DistillRecipe,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    micro_batch: str | None = None,
    accept_data: bool = False,
) -> DistilledRun:
    """Distils a teacher into a student, estimating coefficients first if need be.

    Args:
        recipe: Name or file of a recipe, or one that is loaded.
        overrides: ``section.key=value`` each, as on the command line.
        out: The run folder; runs/RECIPE by default. A run that was interrupted there is resumed.
        resume: "never" refuses a folder that holds a run.
        accept_data: Whether a run is resumed though its data have changed since, as where a damaged image was replaced.
        micro_batch: Images that a device works on at once, or "auto" for as many as fit, half as many if those do not
            after all; the recipe's accumulation by default.

    Raises:
        RecipeError: The recipe is wrong, or the folder holds a run of another one.
        StoppedError: A signal came; everything is saved, and the same call resumes.
        DivergedError: The training produced NaN or infinity.
        CdistillError: Files are missing or damaged, or do not fit.

    >>> small = ["training.iterations=2", "training.batch_size=16", "evaluation.samples=16", "evaluation.nfe=[1, 2]"]
    >>> run = distill("mixture", [*small, "preconditioning.name=ctm"], out="example")
    >>> run.student.sample(nfe=2, seeds=range(4)).shape
    torch.Size([4, 1])
    """
    if not isinstance(recipe, DistillRecipe):
        out = out or RUNS / Path(recipe).stem
        recipe = load_recipe(Path(recipe), DistillRecipe, overrides)
    elif overrides:
        raise RecipeError("overrides: got some for a recipe that is loaded; load it with them")
    if out is None:
        raise RecipeError("out: missing; a recipe that is loaded has no name to call the run folder by")
    folder, tried = RunFolder(Path(out)), micro_batch
    while True:
        try:
            return DistilledRun(folder.path, _distill(recipe, folder, resume, tried, accept_data))
        except torch.OutOfMemoryError:
            smaller = _smaller_micro_batch(folder, micro_batch)
        tried, resume = str(smaller), "auto"  # outside of `except`, which would keep what is in memory
        torch.cuda.empty_cache()


def _distill(
    recipe: DistillRecipe, folder: RunFolder, resume: str, micro_batch: str | None, accept_data: bool
) -> Evaluation:
    check_trackers(recipe.logging.trackers)
    recipe = with_absolute_paths(recipe)
    teacher = load_teacher(recipe.teacher, recipe.weights_path)
    objective = make_objective(recipe.objective, teacher.shape)
    section, checkpoint = recipe.evaluation, recipe.checkpoint
    accelerator = make_accelerator(recipe.training.precision)
    if micro_batch is not None:
        recipe = with_micro_batches(recipe, micro_batch, accelerator, folder)
    adversary = make_adversary(recipe, teacher, accelerator)
    check_run(folder, recipe, resume)  # before anything that takes long
    accelerator.wait_for_everyone()  # every process has looked before the main one writes
    teacher.denoiser.to(accelerator.device)
    source = open_data(recipe.data, "train", teacher, accelerator)
    real = source if section.split == "train" else open_data(recipe.data, section.split, teacher, accelerator)
    evaluator = Evaluator(section, teacher.shape, source.classes, teacher, real, accelerator)
    follow = tracking(recipe.logging, folder, recipe.model_dump(), accelerator)
    with opened_run(folder, recipe, resume, accelerator), follow:
        form = prepare_preconditioning(recipe, teacher, source, folder, accelerator)
        warmup = make_warmup(recipe, teacher)
        store = open_store(recipe, teacher, [objective, *(warmup or ())[:1]], source, accelerator)
        task = make_task(recipe, teacher, form, objective, source, accelerator, adversary, store, warmup)
        task.accept_data = accept_data
        say(
            f"{folder.path}: {recipe.objective.name}, {recipe.preconditioning.name}; teacher {teacher.name}, "
            f"{count_parameters(teacher.denoiser):,} parameters; student {count_parameters(task.student):,}; "
            f"{accelerator.num_processes} x {accelerator.device.type}, {effective_precision(accelerator)}, "
            f"{task.acceleration}{_uneven(source)}"
        )

        def evaluate_now(step: int) -> None:
            if not _evaluated(folder, step, accelerator):
                evaluation = evaluate_student(evaluator, (task.averaged(), form))
                save_images(evaluator, folder.path, f"step-{step:08d}", evaluation.drawn)
                _log_evaluation(folder, evaluator, step, evaluation)

        iterations = recipe.training.iterations
        train(
            task, folder, iterations, checkpoint, recipe.training.patience, recipe.logging.every,
            section.every, evaluate_now, checkpoint.best,
        )  # fmt: skip
        final = _final(folder, evaluator, recipe, teacher, (task.averaged(), form))
        if not _evaluated(folder, iterations, accelerator):
            _log_evaluation(folder, evaluator, iterations, evaluator.evaluation(final.of(STUDENT)))
        best = folder.best_step(checkpoint.best)
        if best not in (None, iterations):
            say(f"best: step {best}; cdistill sample --run {folder.path} --step best draws from it")
        if accelerator.is_main_process:
            folder.write_status(state="finished", exit_code=0)
    return final


def _smaller_micro_batch(folder: RunFolder, wanted: str | None) -> int:
    """Returns how many images to try at once where those of "auto" did not fit, before the first checkpoint."""
    full = "the device's memory is full"
    if not folder.recipe.is_file():
        raise CdistillError(f"{folder.path}: {full}; is another program using it?")
    before = load_recipe(folder.recipe, DistillRecipe).training
    images = before.batch_size // world_size() // before.accumulation
    if wanted != "auto" or images == 1 or world_size() > 1 or list_checkpoints(folder.checkpoints):
        advice = f"--micro-batch {images // 2} has the same result" if images > 1 else "fp16 takes less"
        raise CdistillError(f"{folder.path}: {full}, with {images} images at once; {advice}")
    say(f"{folder.path}: {full}, with {images} images at once; {images // 2} are tried")
    return images // 2


def _uneven(source: Source) -> str:
    """Returns how often classes occur that do not occur alike, for a line about a run."""
    return f"; classes: {source.classes.law}" if source.classes.law not in ("", "alike") else ""


def make_adversary(recipe: DistillRecipe, teacher: Teacher, accelerator: Accelerator) -> Adversary | None:
    """Builds the discriminator of a recipe's GAN loss; None without one."""
    if recipe.gan is None:
        return None
    return Adversary(recipe.gan, teacher.shape, teacher.denoiser.num_classes, accelerator, recipe.seed)


def make_warmup(recipe: DistillRecipe, teacher: Teacher) -> Warmup:
    """Returns the objective that a recipe trains by first, and its steps; None without one."""
    if recipe.warmup is None:
        return None
    return make_objective(recipe.warmup, teacher.shape), recipe.warmup.iterations


def open_store(
    recipe: DistillRecipe,
    teacher: Teacher,
    objectives: Sequence[Objective[ObjectiveSection]],
    source: Source,
    accelerator: Accelerator,
) -> TrajectoryStore | None:
    """Returns the trajectories that the objectives read, followed now if they are not there; None if none is read.

    Raises:
        RecipeError: The objectives read trajectories on different grids.
    """
    readers = [objective for objective in objectives if objective.stored]
    grids = [objective.grid for objective in readers if objective.grid is not None]
    if not readers:
        return None
    if len(grids) < len(readers) or any(not torch.equal(grid, grids[0]) for grid in grids):
        raise RecipeError("objective, warmup: those that read kept trajectories need one grid of noise levels")
    return open_trajectories(recipe.trajectories, grids[0], teacher, source, accelerator)


def make_task(
    recipe: DistillRecipe,
    teacher: Teacher,
    form: Preconditioning,
    objective: Objective[ObjectiveSection],
    source: Source,
    accelerator: Accelerator,
    adversary: Adversary | None,
    store: TrajectoryStore | None,
    warmup: Warmup,
) -> Distillation:
    """Builds the student and what trains it; the teacher is on the accelerator's device."""
    torch.manual_seed(derive_seed(recipe.seed, "student"))
    task = Distillation(
        teacher.denoiser, form, objective, source, accelerator, recipe.training, recipe.seed, adversary, store,
        warmup,
    )  # fmt: skip
    task.identity = {"teacher_sha256": teacher.digest, "data_sha256": source.digest}
    network = {"architecture": task.student.architecture, "sigma_data": task.student.sigma_data}
    task.facts = {"network": network, "classes": source.classes.to_dict()}
    if store is not None:
        task.identity["trajectory_store_sha256"] = store.digest
    return task


def with_absolute_paths(recipe: AnyRecipe) -> AnyRecipe:
    """Returns the recipe with absolute paths of its files, so that the run finds them from any folder."""
    paths: dict[str, Any] = {}
    if isinstance(recipe, DistillRecipe):
        measured = recipe.evaluation
        files = {"reference": measured.reference not in (None, "edm"), "features": is_script(measured.features)}
        moved = {key: str(Path(getattr(measured, key)).absolute()) for key, is_file in files.items() if is_file}
        paths["evaluation"] = measured.model_copy(update=moved)
        if recipe.teacher.endswith(WEIGHT_SUFFIXES):
            paths["teacher"] = str(Path(recipe.teacher).absolute())
        if recipe.weights is not None:
            paths["weights"] = str(Path(recipe.weights).absolute())
    if recipe.data is not None and is_data_path(recipe.data):
        paths["data"] = str(Path(recipe.data).absolute())
    return recipe.model_copy(update=paths)


def prepare_preconditioning(
    recipe: DistillRecipe, teacher: Teacher, source: Source, folder: RunFolder, accelerator: Accelerator
) -> Preconditioning:
    """Returns the preconditioning of a run; its coefficients are copied into the run folder, or estimated there.

    Coefficients that are there stay when the run has begun, or when they are what this recipe would estimate.
    """
    section, settings = recipe.preconditioning, with_fit(recipe.estimation, [recipe.preconditioning.name])
    if PRECONDITIONINGS.get(section.name).needs_coefficients:
        begun = bool(list_checkpoints(folder.checkpoints)) and folder.coefficients.is_file()
        estimated = section.coefficients is None and is_estimate(folder.coefficients, teacher, source, settings)
        accelerator.wait_for_everyone()  # every process has looked before the main one writes
        if section.coefficients is not None and not begun:
            given = Path(section.coefficients)
            load_preconditioning(section.name, teacher, given, allow_other_teacher=section.allow_other_teacher)
            if accelerator.is_main_process:
                copy_file(given, folder.coefficients)
            accelerator.wait_for_everyone()
        elif not begun and not estimated:
            estimate = estimate_coefficients(
                teacher, source, settings, out=folder.coefficients, accelerator=accelerator,
                compiled=recipe.training.compile,
            )  # fmt: skip
            if accelerator.is_main_process:
                table(*estimate.table(rows=8))
                for note in filter(None, (estimate.samples_note(), estimate.fit_note())):
                    say(note)
                draw_coefficients(folder.path / "plots" / "coefficients.png", estimate)
    return recipe_preconditioning(recipe, teacher, folder.coefficients)


def _evaluated(folder: RunFolder, step: int, accelerator: Accelerator) -> bool:
    """Whether the log has an evaluation of `step`; the main process looks for all, since they stay together."""
    found = any(record["step"] == step and record["event"] == "evaluation" for record in folder.metrics())
    return bool(accelerator.gather(torch.tensor([found], device=accelerator.device))[0])


def _final(
    folder: RunFolder,
    evaluator: Evaluator,
    recipe: DistillRecipe,
    teacher: Teacher,
    student: tuple[Denoiser, Preconditioning],
) -> Evaluation:
    """Measures teacher, untrained and trained student; writes evaluation.json and pictures."""
    step = recipe.training.iterations
    untrained = untrained_student(teacher, recipe).to(evaluator.accelerator.device)
    request = {"target": asdict(Target(str(folder.path), step=str(step))), "choice": asdict(SamplerChoice())}
    seeds = f"{evaluator.seeds[0]}..{evaluator.seeds[-1]}"
    facts = {**run_facts(folder, recipe, step, student[0]), "seeds": seeds, "request": request}
    evaluation = evaluate_networks(evaluator, SamplerChoice(), student, untrained, **facts)
    return save_evaluation(evaluator, evaluation, folder.path, "evaluation", f"step-{step:08d}")


def _log_evaluation(folder: RunFolder, evaluator: Evaluator, step: int, evaluation: Evaluation) -> None:
    accelerator = evaluator.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = {"step": step, "event": "evaluation", **evaluation.to_dict()}
        log_record(folder, record, accelerator, durable=True)
    accelerator.wait_for_everyone()
