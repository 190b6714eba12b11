"""A trained student, put together from its run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cdistill.errors import CorruptFileError, MismatchError, MissingAssetError, RecipeError, brief
from cdistill.networks.architecture import load_denoiser
from cdistill.networks.classes import Classes
from cdistill.networks.denoiser import Denoiser, freeze
from cdistill.preconditionings import Preconditioning, load_preconditioning, make_preconditioning
from cdistill.recipe.files import load_recipe
from cdistill.recipe.schema import DistillRecipe
from cdistill.registry import OBJECTIVES
from cdistill.sampling.drawing import generate
from cdistill.sampling.samplers import STUDENT_NFE, make_sampler
from cdistill.storage.bounded import read_bytes
from cdistill.storage.checkpoints import check_identity, load_checkpoint, load_tensors
from cdistill.storage.own_words import objection
from cdistill.storage.run_folder import RunFolder
from cdistill.teachers import Teacher, load_teacher
from cdistill.teachers.official import WEIGHT_SUFFIXES


@dataclass(frozen=True)
class Student:
    """A trained student.

    Attributes:
        denoiser: D(x, t, s) with the averaged weights, frozen.
        preconditioning: f and g.
        teacher: The teacher that it was distilled from; None if its weights are not there any more.
        recipe: The recipe of its run.
        step: Training steps that these weights have had.
    """

    denoiser: Denoiser
    preconditioning: Preconditioning
    teacher: Teacher | None
    recipe: DistillRecipe
    step: int

    def sample(
        self,
        nfe: int = STUDENT_NFE,
        seeds: Sequence[int] = range(16),
        classes: Sequence[int | str] | None = None,
        sampler: str | None = None,
    ) -> Tensor:
        """Draws a sample for each seed; a sample depends on its seed alone.

        Args:
            nfe: Network calls for a sample.
            seeds: One sample each.
            classes: Numbers or names, repeated along the seeds; None draws them by seed, as often as in the data.
            sampler: A registered name; the student's default if None.

        Returns:
            float64 (n, C, H, W) with values about -1 to 1, or (n, d), on the CPU.

        Raises:
            RecipeError: The sampler does not fit the student, or there is no such class.
        """
        built = make_sampler(self.denoiser, self.preconditioning, sampler, nfe)
        known = self.denoiser.known_classes
        numbers = None if classes is None else known.numbers(list(map(str, classes)))
        chosen = None if numbers is None else [numbers[k % len(numbers)] for k in range(len(seeds))]
        device = next(self.denoiser.parameters()).device
        return generate(built, self.denoiser.sample_shape, seeds, known.shares, chosen, device)[0]


def load_student(run: RunFolder | str | Path, weights: Path | None = None, step: str = "last") -> Student:
    """Loads a student of a run; a U-Net without its teacher, if that is not there any more.

    Args:
        run: The run, or its folder.
        weights: File of its teacher's weights, where it has moved since.
        step: Which: "last", "best" (as the recipe's checkpoint.best says) or the number of its steps.

    Raises:
        MissingAssetError: The run has no such checkpoint.
        RecipeError: The run was not made here, and names a teacher's file outside of its folder.
        CorruptFileError: A file of the run is damaged.
        MismatchError: The teacher is no longer the one that the run was made with.

    >>> from cdistill.workflows.distill import distill
    >>> small = ["training.iterations=1", "training.batch_size=16", "evaluation.samples=16", "preconditioning.name=ctm"]
    >>> run = distill("mixture", small, out="example")
    >>> load_student("example").step
    1
    """
    run = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    run.latest_checkpoint()  # a folder without a checkpoint is refused first
    if not run.recipe.is_file():
        raise CorruptFileError(f"{run.recipe}: missing; this folder is no longer a whole run")
    recipe = load_recipe(run.recipe, DistillRecipe)
    chosen = run.find_checkpoint(step, recipe.checkpoint.best)
    groups, state = load_checkpoint(chosen)
    named = recipe.teacher if recipe.teacher.endswith(WEIGHT_SUFFIXES) else recipe.weights
    reason = None if weights else objection(run.recipe, read_bytes(run.recipe), {"--weights": named})
    if reason is not None and not _describes_network(state):
        raise RecipeError(reason)
    teacher = None if reason is not None else _find_teacher(recipe, weights, state)
    if teacher is not None:
        check_identity(chosen, state, {"teacher_sha256": teacher.digest})
    try:
        if teacher is None:
            denoiser: Denoiser = freeze(load_denoiser(**state["network"], tensors=groups["ema"]))
        else:
            denoiser = untrained_student(teacher, recipe)
            denoiser.load_state_dict(groups["ema"])
        denoiser.known_classes = Classes.parse(state.get("classes"), denoiser.num_classes)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{chosen}: its weights do not fit a student of {recipe.teacher!r} ({error})") from error
    if broken := next((name for name, tensor in groups["ema"].items() if not bool(tensor.isfinite().all())), None):
        raise CorruptFileError(
            f"{chosen}: {broken} holds NaN or infinity: this student has diverged; choose another --step"
        )
    form = recipe_preconditioning(recipe, teacher, run.coefficients, denoiser.sigma_data)
    return Student(denoiser, form, teacher, recipe, int(state["step"]))


def _find_teacher(recipe: DistillRecipe, weights: Path | None, state: Mapping[str, Any]) -> Teacher | None:
    """Loads the teacher of a run; None if its weights have gone and the checkpoint describes the student's network."""
    try:
        if weights is not None and recipe.teacher.endswith(WEIGHT_SUFFIXES):
            return load_teacher(str(weights))
        return load_teacher(recipe.teacher, weights or recipe.weights_path)
    except MissingAssetError as error:
        if weights is not None or not _describes_network(state):
            raise MissingAssetError(f"{error}; if it has moved, say where: --weights FILE") from error
        return None


def _describes_network(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint describes the student's network, which is then built without its teacher."""
    return bool((state.get("network") or {}).get("architecture"))


def load_converted(path: Path) -> tuple[Denoiser, Preconditioning]:
    """Loads a student that `convert` wrote: a CTM, CD or CT network and the preconditioning it was trained with.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged or no student.
    """
    tensors, header = load_tensors(path, "student")
    try:
        denoiser = load_denoiser(header["architecture"], header["sigma_data"], tensors)
        form = make_preconditioning(str(header["preconditioning"]), denoiser.sigma_data)
    except (RuntimeError, KeyError, TypeError, ValueError, RecipeError) as error:
        raise CorruptFileError(f"{path}: its tensors do not fit its header ({brief(error)})") from error
    return freeze(denoiser), form


def untrained_student(teacher: Teacher, recipe: DistillRecipe) -> Denoiser:
    """Returns the student of `recipe` as it is before training: equal to the teacher for every s."""
    return freeze(teacher.denoiser.student(takes_s(recipe), recipe.training.dropout))


def recipe_preconditioning(
    recipe: DistillRecipe, teacher: Teacher | None, coefficients: Path, sigma_data: float | None = None
) -> Preconditioning:
    """Builds the preconditioning of a run, see `load_preconditioning`; without an input for s it jumps to eps only."""
    section = recipe.preconditioning
    other = section.allow_other_teacher
    form = load_preconditioning(section.name, teacher, coefficients, sigma_data=sigma_data, allow_other_teacher=other)
    form.to_eps_only = form.to_eps_only or not takes_s(recipe)
    return form


def takes_s(recipe: DistillRecipe) -> bool:
    """Whether the student of a recipe has an input for s."""
    return bool(OBJECTIVES.get(recipe.objective.name).takes_s)
