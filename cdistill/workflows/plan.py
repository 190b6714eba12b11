"""``cdistill plan`` and ``--dry-run``; ``--micro-batch``: into how many parts a batch is cut, so that a step fits."""

import math
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from cdistill.analysis.cost import Plan, on_meta, plan_distillation, plan_teacher
from cdistill.data import load_source
from cdistill.data.memory import free_memory
from cdistill.networks.architecture import build_denoiser
from cdistill.networks.denoiser import Denoiser, freeze
from cdistill.recipe.files import load_recipe
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.registry import ESTIMATORS, PRECONDITIONINGS
from cdistill.runtime.console import facts, say, table
from cdistill.runtime.processes import local_processes
from cdistill.storage.files import list_checkpoints
from cdistill.storage.run_folder import RunFolder
from cdistill.teachers import Teacher, load_teacher
from cdistill.teachers.official import OFFICIAL
from cdistill.training.step_data import check_divisible

NEVER_ON_A_GPU = ("memory", "hours")
_SHARE = 0.8  # of the free memory that may be planned with: the plan is an estimate, and data may take a tenth


def plan(recipe: DistillRecipe | TeacherRecipe, devices: int) -> Plan:
    """Counts what a recipe costs on `devices` devices; no weights of EDM's teachers are needed for it."""
    if isinstance(recipe, TeacherRecipe):
        source = load_source(recipe.data)
        recipe.network.check_shape(source.name, source.shape)
        with torch.device("meta"):
            network = build_denoiser(recipe.architecture(source.shape, source.num_classes), 0.5)
        return plan_teacher(recipe, network, devices)
    section = recipe.preconditioning
    estimates = PRECONDITIONINGS.get(section.name).needs_coefficients and section.coefficients is None
    teacher, suited = _meta_teacher(recipe)
    name = suited if recipe.estimation.estimator == "auto" else recipe.estimation.estimator
    backwards = ESTIMATORS.get(name).backwards if estimates else None
    return plan_distillation(recipe, teacher, backwards, devices)


def print_plan(found: Plan, devices: int, tflops: float) -> None:
    """Prints a plan as two tables."""
    sums = sum(forwards for _, forwards, _ in found.parts), sum(flop for *_, flop in found.parts)
    rows = [
        [name, f"{forwards:.2f}", f"{forwards * found.batch_size:.0f}", f"{flop / 1e9:.4g}"]
        for name, forwards, flop in [*found.parts, ("sum", *sums)]
        if flop
    ]
    columns = ["a training step", "forwards an image", "a step", "GFLOP an image"]
    table(f"{found.iterations:,} steps of {found.batch_size:,} images", columns, rows)
    activations = found.activation_bytes * found.micro_batch
    lines = [["parameters, trained", f"{found.student:,}"]]
    if found.teacher:
        lines.insert(0, ["parameters, teacher", f"{found.teacher:,}"])
    hours = found.hours(tflops, 1)
    lines += [
        ["memory of a device: weights, gradients, optimiser", scaled(found.state_bytes, "B")],
        [f"memory: activations of {found.micro_batch} images, about", scaled(activations, "B")],
        *(
            [["memory: CUDA graph of the solver, on a GPU", scaled(found.graph_bytes * found.micro_batch, "B")]]
            if found.graph_bytes
            else []
        ),
        *([["work: data drawn from the teacher", scaled(found.data, "FLOP")]] if found.data else []),
        *(
            [
                ["work: trajectories of the teacher, once", scaled(found.trajectories, "FLOP")],
                ["disk: trajectories", scaled(found.trajectory_bytes, "B")],
            ]
            if found.trajectories
            else []
        ),
        ["work: coefficients", scaled(found.estimation, "FLOP")],
        ["work: training", scaled(found.training, "FLOP")],
        ["work: samples for evaluation", scaled(found.evaluation, "FLOP")],
        [f"time on {devices} device(s) at {tflops:g} TFLOP/s each", duration(found.hours(tflops, devices))],
        ["device-hours", f"{hours:,.0f}" if hours > 100 else f"{hours:.3g}"],
    ]
    facts("the run", lines)
    if found.levels:
        shares = zip(found.levels, found.starts, found.ends, strict=True)
        table(
            "which jumps are trained",
            ["noise level", "start there", "end there"],
            [[f"{level:.4g}", f"{start:.1%}", f"{end:.1%}"] for level, start, end in shares],
        )
    say("activations shrink with distill --micro-batch N: N images at once, the same result")
    say(f"{' and '.join(NEVER_ON_A_GPU)} were never compared with a GPU's; forwards and FLOP are counted exactly")


def scaled(value: float, unit: str) -> str:
    """Writes a number with a decimal prefix.

    >>> scaled(1.5e12, "FLOP")
    '1.5 TFLOP'
    """
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    power = max(0, min(len(prefixes) - 1, math.floor(math.log10(value) / 3))) if value else 0
    return f"{value / 1000**power:.3g} {prefixes[power]}{unit}"


def duration(hours: float) -> str:
    """Writes a time in days, hours, minutes or seconds.

    >>> duration(36)
    '36 h'
    """
    for size, unit in ((48.0, "d"), (1.0, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{hours / (24 if unit == 'd' else size):.3g} {unit}"
    return f"{hours * 3600:.3g} s"


def as_record(found: Plan, devices: int, tflops: float) -> dict[str, Any]:
    """Returns a plan as JSON."""
    values = {key: value for key, value in vars(found).items() if key != "parts"}
    return {
        "parts": [dict(zip(("name", "forwards", "flop"), part, strict=True)) for part in found.parts],
        **values,
        "training": found.training,
        "devices": devices,
        "tflops": tflops,
        "never_compared_with_a_gpu": list(NEVER_ON_A_GPU),
        "hours": found.hours(tflops, devices),
    }


def _meta_teacher(recipe: DistillRecipe) -> tuple[Denoiser, str]:
    """Returns a teacher on the meta device and the estimator that suits it."""
    if recipe.teacher in OFFICIAL:
        with torch.device("meta"):
            return freeze(build_denoiser(OFFICIAL[recipe.teacher].architecture, 0.5)), Teacher.estimator
    teacher = load_teacher(recipe.teacher, recipe.weights_path)
    return freeze(on_meta(teacher.denoiser)), teacher.estimator


def with_micro_batches(recipe: DistillRecipe, wanted: str, accelerator: Accelerator, run: RunFolder) -> DistillRecipe:
    """Returns the recipe with the number of micro-batches that a device needs; the results do not depend on it.

    But for rounding, and for the dropout masks, which are drawn for each micro-batch.

    Args:
        recipe: The recipe; its own `accumulation` does not count.
        wanted: "auto" for as few as fit in the memory that is free now, or the most images of one, a number.
        accelerator: Devices and processes; all agree on the largest number that one needs.
        run: With "auto" a resumed run keeps its micro-batches, if they still divide the batch.

    Raises:
        RecipeError: The batch cannot be divided among the processes.
    """
    processes: int = accelerator.num_processes
    check_divisible(recipe.training.batch_size, processes, 1)
    own = recipe.training.batch_size // processes
    if wanted == "auto" and list_checkpoints(run.checkpoints) and run.recipe.is_file():
        before = load_recipe(run.recipe, DistillRecipe).training.accumulation
        if own % before == 0:
            return _divided(recipe, before)
    if wanted == "auto":
        limit = _SHARE * free_bytes(accelerator.device)
        whole = plan(_divided(recipe, 1), processes)
        parts = plan(_divided(recipe, own), processes)

    def fits(count: int) -> bool:
        if wanted != "auto":
            return own // count <= int(wanted)
        return replace(whole if count == 1 else parts, micro_batch=own // count).device_bytes <= limit

    fewest = next((count for count in range(1, own) if own % count == 0 and fits(count)), own)
    count = int(accelerator.gather(torch.tensor([fewest], device=accelerator.device)).max())
    say(f"{count} micro-batch(es) of {own // count} images on each of {processes} process(es)")
    return _divided(recipe, count)


def free_bytes(device: torch.device) -> float:
    """Returns the bytes that a process may still take on its device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_memory() / local_processes()


def _divided(recipe: DistillRecipe, count: int) -> DistillRecipe:
    training = recipe.training.model_copy(update={"accumulation": count})
    return recipe.model_copy(update={"training": training})
