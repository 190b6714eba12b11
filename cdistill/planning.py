"""What a recipe will cost, counted on hollow networks before anything runs: forwards, FLOPs, memory, hours."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cdistill.losses import Distance
from cdistill.networks.denoiser import Denoiser, count_parameters, freeze
from cdistill.recipe import DistillRecipe, TeacherRecipe
from cdistill.sampling import TEACHER_POINTS
from cdistill.training.cost import step_cost

_BATCH = 2


@dataclass(frozen=True)
class CallCost:
    """What a call costs for each sample.

    Attributes:
        forward: FLOPs of the call.
        backward: FLOPs of its backward pass.
        saved: Bytes kept for the backward pass.
    """

    forward: float
    backward: float
    saved: float


@dataclass(frozen=True)
class Part:
    """A part of a training step.

    Attributes:
        name: What it is.
        forwards: Expected network forwards for each image.
        flop: Expected FLOPs for each image, backward passes included.
    """

    name: str
    forwards: float
    flop: float


@dataclass(frozen=True)
class Plan:
    """The cost of a whole run.

    Attributes:
        parts: Of a step.
        iterations: Steps.
        batch_size: Images a step.
        teacher: Parameters of the teacher, 0 without one.
        student: Parameters of the trained network.
        state_bytes: Weights, averages, gradients and optimiser, on every device.
        activation_bytes: Kept for the backward pass at once, for each image of a micro-batch; an estimate.
        micro_batch: Images of a micro-batch on one device.
        estimation: FLOPs of estimating the coefficients, 0 if they are not needed.
        evaluation: FLOPs of all evaluations.
    """

    parts: list[Part]
    iterations: int
    batch_size: int
    teacher: int
    student: int
    state_bytes: float
    activation_bytes: float
    micro_batch: float
    estimation: float
    evaluation: float

    @property
    def training(self) -> float:
        """FLOPs of all training steps."""
        return sum(part.flop for part in self.parts) * self.batch_size * self.iterations

    def hours(self, tflops: float, devices: int) -> float:
        """Hours on `devices` that sustain `tflops` TFLOP/s each."""
        return (self.training + self.estimation + self.evaluation) / (tflops * 1e12 * devices) / 3600


def plan_distillation(
    recipe: DistillRecipe, teacher: Denoiser, distance: Distance, estimates: bool, devices: int
) -> Plan:
    """Counts a distillation.

    Args:
        recipe: The recipe.
        teacher: Its teacher, on the meta device.
        distance: Its distance, hollow.
        estimates: Whether the coefficients are estimated first.
        devices: How many share the batch.
    """
    section, evaluation = recipe.training, recipe.evaluation
    student = hollow(teacher.student(section.method == "ctm", section.dropout))
    teaching, learning = network_cost(teacher), network_cost(student)
    frozen, comparing = input_cost(freeze(deepcopy(student))), distance_cost(distance, teacher.sample_shape)
    forwards = step_cost(section.method, section.points, section.max_ode_steps, section.dsm)
    parts = [
        Part("teacher (Heun's solver)", forwards.teacher, forwards.teacher * teaching.forward),
        Part("moving averages, no gradient", forwards.target, forwards.target * learning.forward),
        Part("moving averages, gradient to the input", forwards.frozen, forwards.frozen * _both(frozen)),
        Part("student, with gradient", forwards.student, forwards.student * _both(learning)),
        Part(f"distance {section.distance}", 0, 2 * comparing.forward + comparing.backward),
    ]
    size = count_parameters(student)
    averages = 1 if section.target_rate == section.ema_rate else 2
    half = 1 if section.precision == "fp32" else 0.5
    consistency = learning.saved + (frozen.saved if forwards.frozen else 0)
    calls = sum(evaluation.nfe)
    rounds = section.iterations // evaluation.every if evaluation.every else 0
    drawn = (rounds + 2) * calls * learning.forward + 2 * (TEACHER_POINTS - 1) * teaching.forward
    pairs = recipe.estimation.samples * recipe.estimation.timesteps if estimates else 0
    vjp = input_cost(teacher)
    return Plan(
        parts,
        section.iterations,
        section.batch_size,
        count_parameters(teacher),
        size,
        4.0 * (count_parameters(teacher) + (5 + averages) * size),  # weights, 2 gradients, 2 moments, averages
        half * consistency + comparing.saved,
        section.batch_size / (devices * section.accumulation),
        pairs * (vjp.forward + 3 * vjp.backward),
        evaluation.samples * drawn,
    )


def plan_teacher(recipe: TeacherRecipe, denoiser: Denoiser, devices: int) -> Plan:
    """Counts the training of a teacher; `denoiser` is on the meta device."""
    section = recipe.training
    cost, size = network_cost(denoiser.student(False)), count_parameters(denoiser)
    return Plan(
        [Part("network, with gradient", 1, _both(cost))],
        section.iterations,
        section.batch_size,
        0,
        size,
        4.0 * 5 * size,  # weights, gradient, 2 moments, average
        cost.saved * (1 if section.precision == "fp32" else 0.5),
        section.batch_size / devices,
        0,
        0,
    )


def hollow(module: Denoiser) -> Denoiser:
    """Returns a copy of a denoiser on the meta device: shapes without numbers."""
    return deepcopy(module).to("meta")


def network_cost(denoiser: Denoiser) -> CallCost:
    """Counts a call of a denoiser on the meta device, its backward pass to the weights included."""
    x, t, labels = _inputs(denoiser)
    return _count(lambda: denoiser(x, t, t, labels), denoiser)


def input_cost(denoiser: Denoiser) -> CallCost:
    """Counts a call of a frozen denoiser on the meta device, its backward pass to the input included."""
    x, t, labels = _inputs(denoiser)
    return _count(lambda: denoiser(x.requires_grad_(), t, t, labels), denoiser)


def distance_cost(distance: Distance, shape: tuple[int, ...]) -> CallCost:
    """Counts the features of one image in a hollow distance: half of its forward pass, and the backward pass to x."""
    x, y = (torch.zeros(_BATCH, *shape, device="meta") for _ in range(2))
    cost = _count(lambda: distance(x.requires_grad_(), y))
    return CallCost(cost.forward / 2, cost.backward, cost.saved)


def _both(cost: CallCost) -> float:
    return cost.forward + cost.backward


def _inputs(denoiser: Denoiser) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.zeros(_BATCH, *denoiser.sample_shape, device="meta")
    labels = torch.zeros(_BATCH, dtype=torch.int64, device="meta") if denoiser.num_classes else None
    return x, torch.ones(_BATCH, dtype=torch.float64, device="meta"), labels


def _count(call: Callable[[], Tensor], module: nn.Module | None = None) -> CallCost:
    """Runs `call` and its backward pass; counts FLOPs, and bytes that are kept beside the module's own weights."""
    own = set() if module is None else {parameter.untyped_storage()._cdata for parameter in module.parameters()}
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
