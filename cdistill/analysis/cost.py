"""What a recipe will cost, counted on the meta device before anything runs: forwards, FLOPs, memory, hours."""

import math
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cdistill.networks.denoiser import Denoiser, count_parameters, freeze
from cdistill.networks.discriminator import Discriminator
from cdistill.objectives.base import Objective, StepCost, make_objective
from cdistill.objectives.distances import Distance
from cdistill.objectives.settings import ObjectiveSection
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.registry import teacher_data_count
from cdistill.sampling.samplers import TEACHER_POINTS
from cdistill.sampling.trajectories import SHARD
from cdistill.settings import Precision
from cdistill.training.gan import check_discriminator
from cdistill.training.settings import GanSection, precision_of_teacher
from cdistill.training.step_data import check_divisible

_BATCH = 2
# Autocast keeps what its norms read in float32: counted over the official networks, 0.88 of the bytes remain.
_SHRINKS: dict[Precision, float] = {"fp32": 1.0, "tf32": 1.0, "fp16": 0.88, "bf16": 0.88}
# What a forward pass without a backward pass holds at most, of what one with it keeps; counted as above, 0.05 to 0.09.
_FORWARD_SHARE = 0.1


@dataclass(frozen=True)
class CallCost:
    """What a call costs for each sample."""

    forward: float  # FLOPs of the call
    backward: float  # FLOPs of its backward pass
    saved: float  # bytes kept for the backward pass


Part = tuple[str, float, float]
"""A part of a training step, and its expected network forwards and FLOPs for each image, with backward passes."""


@dataclass(frozen=True)
class Plan:
    """The cost of a whole run."""

    parts: list[Part]  # of a step
    iterations: int  # steps
    batch_size: int  # images a step
    teacher: int  # parameters of the teacher, 0 without one
    student: int  # parameters that are trained
    state_bytes: float  # weights, averages, gradients and optimiser, on every device
    activation_bytes: float  # kept for the backward pass at once, for each image of a micro-batch; an estimate
    micro_batch: int  # images of a micro-batch on one device
    data: float  # FLOPs of drawing data from the teacher, 0 if there are real data
    estimation: float  # FLOPs of estimating the coefficients, 0 if they are not needed
    evaluation: float  # FLOPs of drawing all samples that are evaluated; the metrics' own networks are not counted
    trajectories: float = 0  # FLOPs of following the kept trajectories once, 0 if none are read
    trajectory_bytes: float = 0  # their size on the disk
    graph_bytes: float = 0  # of the CUDA graph of the solver's step, for each image of a micro-batch; an estimate
    levels: Sequence[float] = ()
    """The objective's noise levels, [] where it has no grid or does not say how it draws from it."""
    starts: Sequence[float] = ()  # how often a jump starts at each of them
    ends: Sequence[float] = ()  # how often it ends there

    @property
    def device_bytes(self) -> float:
        """Bytes that a device needs, an estimate."""
        return self.state_bytes + (self.activation_bytes + self.graph_bytes) * self.micro_batch

    @property
    def training(self) -> float:
        """FLOPs of all training steps."""
        return sum(flop for _, _, flop in self.parts) * self.batch_size * self.iterations

    def hours(self, tflops: float, devices: int) -> float:
        """Hours on `devices` that sustain `tflops` TFLOP/s each."""
        work = self.data + self.trajectories + self.estimation + self.training + self.evaluation
        return work / (tflops * 1e12 * devices) / 3600


def plan_distillation(recipe: DistillRecipe, teacher: Denoiser, backwards: int | None, devices: int) -> Plan:
    """Counts a distillation.

    Args:
        recipe: The recipe.
        teacher: Its teacher, frozen, on the meta device.
        backwards: Backward passes of the estimator for each sample; None if no coefficients are estimated.
        devices: How many share the batch.

    Raises:
        RecipeError: The batch cannot be divided among them.
    """
    section = recipe.training
    check_divisible(section.batch_size, devices, section.accumulation)
    objective = make_objective(recipe.objective, teacher.sample_shape, meta=True)
    student = on_meta(teacher.student(objective.takes_s, section.dropout))
    teaching, learning = network_cost(teacher, bool(backwards)), network_cost(student)
    phases = _phases(recipe, teacher.sample_shape)
    compared = [(share, distance_cost(each.distance, teacher.sample_shape)) for share, each in phases]
    costs = [(share, each.cost(), each.section.dsm) for share, each in phases]
    forwards = StepCost(
        *(sum(share * getattr(cost, key) for share, cost, _ in costs) for key in ("teacher", "target", "frozen"))
    )
    frozen = network_cost(freeze(deepcopy(student))) if forwards.frozen else CallCost(0.0, 0.0, 0.0)
    trained = sum(share * (cost.student + dsm) for share, cost, dsm in costs)
    losses = 1 + any(dsm for *_, dsm in costs) + (recipe.gan is not None)
    copies = losses + (1 if objective.target_rate in (None, section.ema_rate) else 2)
    kept = learning.saved + frozen.saved
    # Beside the teacher by which the student is judged there is the one that runs.
    teaching_bytes = 8.0 if precision_of_teacher(section) == "fp32" else 6.0
    drawing = 2 * (TEACHER_POINTS - 1) * teaching.forward
    pairs = recipe.estimation.samples * recipe.estimation.timesteps if backwards is not None else 0
    discriminating, judging, judge_bytes, judge_saved = gan_cost(
        recipe.gan, section.iterations, teacher.sample_shape, teacher.num_classes
    )
    followed, kept_bytes = _trajectories(recipe, [each for _, each in phases], teacher.sample_shape)
    fakes = discriminating * (1 + forwards.frozen)
    parts = [
        ("teacher (Heun's solver)", forwards.teacher, teaching.forward),
        ("targets, no gradient", forwards.target, learning.forward),
        ("targets, gradient to the input", forwards.frozen, _both(frozen)),
        ("student, with gradient", trained, _both(learning)),
    ]
    distances = (1 - discriminating) * sum(share * (2 * cost.forward + cost.backward) for share, cost in compared)
    return Plan(
        parts=[
            *[(name, (1 - discriminating) * n, (1 - discriminating) * n * flop) for name, n, flop in parts],
            (f"distance {recipe.objective.distance}", 0, distances),
            ("images for the discriminator", fakes, fakes * learning.forward),
            ("discriminator", 0, judging),
        ],
        iterations=section.iterations,
        batch_size=section.batch_size,
        teacher=count_parameters(teacher),
        student=trained_parameters(student),
        state_bytes=teaching_bytes * count_parameters(teacher)
        + _state_bytes(student, copies, section.precision, devices)
        + judge_bytes,
        activation_bytes=_SHRINKS[section.precision] * kept + max(cost.saved for _, cost in compared) + judge_saved,
        micro_batch=section.batch_size // (devices * section.accumulation),
        data=teacher_data_count(recipe.data) * (1 if recipe.evaluation.split == "train" else 2) * drawing,
        estimation=pairs * (teaching.forward + (backwards or 0) * teaching.backward),
        evaluation=recipe.evaluation.samples * (_judged_calls(recipe) * learning.forward + drawing),
        trajectories=followed * teaching.forward,
        trajectory_bytes=kept_bytes,
        graph_bytes=_FORWARD_SHARE * learning.saved if forwards.teacher and section.compile is not False else 0.0,
        **trained_jumps(objective),
    )


def _phases(recipe: DistillRecipe, shape: tuple[int, ...]) -> list[tuple[float, Objective[ObjectiveSection]]]:
    """Returns the objective, and that of the warm-up, with the share of the steps that each has."""
    early = recipe.warmup.iterations / recipe.training.iterations if recipe.warmup else 0.0
    phases = [(1 - early, make_objective(recipe.objective, shape, meta=True))]
    return phases + ([(early, make_objective(recipe.warmup, shape, meta=True))] if recipe.warmup else [])


def _trajectories(
    recipe: DistillRecipe, objectives: Sequence[Objective[ObjectiveSection]], shape: tuple[int, ...]
) -> tuple[float, float]:
    """Counts the kept trajectories of a recipe: forwards of following them, and bytes; 0 where none are read."""
    section = recipe.trajectories
    grids = [objective.grid for objective in objectives if objective.stored and objective.grid is not None]
    if not grids:
        return 0.0, 0.0
    last, kept = max(section.levels, default=len(grids[0]) - 1), len(section.levels) or len(grids[0])
    count = -(-section.count // SHARD) * SHARD
    size = count * kept * math.prod(shape) * (2 if section.precision == "fp16" else 4)
    return count * 2.0 * last * section.substeps, float(size)


def trained_jumps(objective: Objective[ObjectiveSection]) -> dict[str, Any]:
    """Returns how often the jumps that are trained start and end at each noise level, where the objective says it."""
    law, grid = objective.law, objective.grid
    if law is None or grid is None:
        return {}
    return {"levels": grid.tolist(), "starts": law.sum(1).tolist(), "ends": law.sum(0).tolist()}


def plan_teacher(recipe: TeacherRecipe, denoiser: Denoiser, devices: int) -> Plan:
    """Counts the training of a teacher; `denoiser` is on the meta device; errors as `plan_distillation`."""
    section = recipe.training
    check_divisible(section.batch_size, devices, 1)
    network = denoiser.student(False)
    cost = network_cost(network)
    return Plan(
        parts=[("network, with gradient", 1, _both(cost))],
        iterations=section.iterations,
        batch_size=section.batch_size,
        teacher=0,
        student=trained_parameters(network),
        state_bytes=_state_bytes(network, 2, section.precision, devices),  # a gradient and an average
        activation_bytes=cost.saved * _SHRINKS[section.precision],
        micro_batch=section.batch_size // devices,
        data=0,
        estimation=0,
        evaluation=0,
    )


def _judged_calls(recipe: DistillRecipe) -> int:
    """Network calls for each evaluated sample: within the run, at its end, and of the untrained student."""
    every = recipe.evaluation.every
    rounds = math.ceil(recipe.training.iterations / every) if every else 0
    return (rounds + 2) * sum(recipe.evaluation.nfe)


def trained_parameters(module: nn.Module) -> int:
    """Returns the number of scalars that are trained."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _state_bytes(network: Denoiser, copies: int, precision: Precision, devices: int) -> float:
    """Weights, two moments and `copies` more in float32; half copies of the weights; DDP's buckets of gradients."""
    size = count_parameters(network)
    return size * (4.0 * (3 + copies) + (0 if precision == "fp32" else 2) + (4 if devices > 1 else 0))


def on_meta(module: Denoiser) -> Denoiser:
    """Returns a copy of a denoiser on the meta device: shapes without numbers."""
    return deepcopy(module).to("meta")


def network_cost(denoiser: Denoiser, backward: bool = True) -> CallCost:
    """Counts a call of a denoiser on the meta device with its backward pass: to the weights; of a frozen one, to x.

    Without `backward` a frozen one is called alone, in a third of the time.
    """
    to_x = backward and trained_parameters(denoiser) == 0
    x = torch.zeros(_BATCH, *denoiser.sample_shape, device="meta", requires_grad=to_x)
    t = torch.ones(_BATCH, dtype=torch.float64, device="meta")
    labels = torch.zeros(_BATCH, dtype=torch.int64, device="meta") if denoiser.num_classes else None
    return _count(lambda: denoiser(x, t, t, labels), denoiser.parameters())


def distance_cost(distance: Distance, shape: tuple[int, ...]) -> CallCost:
    """Counts the features of one image by a distance on the meta device: half of its forward, its backward to x."""
    x, y = (torch.zeros(_BATCH, *shape, device="meta") for _ in range(2))
    cost = _count(lambda: distance(x.requires_grad_(), y))
    return CallCost(cost.forward / 2, cost.backward, cost.saved)


def gan_cost(
    section: GanSection | None, iterations: int, shape: tuple[int, ...], num_classes: int
) -> tuple[float, float, float, float]:
    """Counts the GAN loss of a run; nothing without a section.

    From `section.start` on, the odd steps train the discriminator, on as many real as fake images, and the even ones
    the student with the GAN loss.

    Returns:
        The share of the steps that train the discriminator; expected FLOPs of the discriminator in a step, for each
        image, backward passes included; bytes of its weights, gradients, moments and backbone; bytes kept for the
        backward pass through it, for each image of the student.

    Raises:
        RecipeError: The discriminator cannot judge the samples.
    """
    if section is None:
        return 0.0, 0.0, 0.0, 0.0
    network = check_discriminator(section.discriminator, shape).meta(shape, num_classes)
    learning, judging = _judge_cost(network, shape, num_classes, True), _judge_cost(network, shape, num_classes, False)
    share = (iterations // 2 - section.start // 2) / iterations
    flop = share * (2 * _both(learning) + _both(judging))
    state = 4.0 * (4 * count_parameters(network) + sum(weight.numel() for weight in network.frozen()))
    return share, flop, state, judging.saved


def _judge_cost(network: Discriminator, shape: tuple[int, ...], num_classes: int, trained: bool) -> CallCost:
    """Counts a call of a discriminator and its backward pass, to the weights if `trained`, else to the images."""
    x = torch.zeros(_BATCH, *shape, device="meta", requires_grad=not trained)
    labels = torch.zeros(_BATCH, dtype=torch.int64, device="meta") if num_classes else None
    network.requires_grad_(trained)
    return _count(lambda: torch.cat(network(x, labels), dim=1), [*network.parameters(), *network.frozen()])


def _both(cost: CallCost) -> float:
    return cost.forward + cost.backward


def _count(call: Callable[[], Tensor], weights: Iterable[Tensor] = ()) -> CallCost:
    """Runs `call` and its backward pass; counts FLOPs, and bytes that are kept beside the weights."""
    own = {weight.untyped_storage()._cdata for weight in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as forward, watched:
        out = call()
    with FlopCounterMode(display=False) as backward:
        if out.requires_grad:
            out.sum().backward()
    saved = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    return CallCost(forward.get_total_flops() / _BATCH, backward.get_total_flops() / _BATCH, saved / _BATCH)
