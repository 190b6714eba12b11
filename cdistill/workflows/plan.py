"""``cdistill plan`` and ``--dry-run``."""

import math
from typing import Any

import torch

from cdistill.analysis.cost import Plan, on_meta, plan_distillation, plan_teacher
from cdistill.data import load_source
from cdistill.networks.architecture import build_denoiser
from cdistill.networks.denoiser import Denoiser, freeze
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.registry import ESTIMATORS, PRECONDITIONINGS
from cdistill.runtime.console import facts, say, table
from cdistill.teachers import Teacher, load_teacher
from cdistill.teachers.official import OFFICIAL


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
        "hours": found.hours(tflops, devices),
    }


def _meta_teacher(recipe: DistillRecipe) -> tuple[Denoiser, str]:
    """Returns a teacher on the meta device and the estimator that suits it."""
    if recipe.teacher in OFFICIAL:
        with torch.device("meta"):
            return freeze(build_denoiser(OFFICIAL[recipe.teacher].architecture, 0.5)), Teacher.estimator
    teacher = load_teacher(recipe.teacher, recipe.weights_path)
    return freeze(on_meta(teacher.denoiser)), teacher.estimator
