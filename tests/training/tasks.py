"""Small distillations: the digits in float64, a small network, every objective and option."""

from typing import Any, cast

import torch
from accelerate import Accelerator

from cdistill.data import Source, load_source
from cdistill.networks.denoiser import EDMDenoiser, freeze
from cdistill.networks.song import SongUNet
from cdistill.objectives.base import make_objective
from cdistill.objectives.settings import ObjectiveSection
from cdistill.preconditionings import make_preconditioning
from cdistill.registry import OBJECTIVES
from cdistill.runtime.randomness import generator
from cdistill.training.distillation import Distillation
from cdistill.training.gan import Adversary
from cdistill.training.loop import Counters, Report, finish, read
from cdistill.training.settings import TrainingSection

POINTS = 8


def small_teacher(dtype: torch.dtype = torch.float64) -> EDMDenoiser:
    torch.manual_seed(0)
    network = SongUNet(8, 1, 10, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return freeze(EDMDenoiser(network, (1, 8, 8), 0.5, 10).to(dtype))


def sections(objective: str = "ctm", **values: Any) -> tuple[TrainingSection, ObjectiveSection]:
    """The two sections of a recipe, with small values but for those given."""
    kind = OBJECTIVES.get(objective).section_type
    given: dict[str, Any] = {
        "iterations": 10,
        "batch_size": 12,
        "points": POINTS,
        "max_ode_steps": POINTS - 1,
        "distance": "l2",
    }
    given |= {"target_rate": 0.9, "ema_rate": 0.9, "learning_rate": 1e-3, **values}
    training = {key: value for key, value in given.items() if key in TrainingSection.model_fields}
    own = {key: value for key, value in given.items() if key in kind.model_fields}
    return TrainingSection(**training), kind(name=objective, **own)


class Doubles(Source):
    """The digits in float64, so that only the mathematics is compared."""

    def batch(self, indices, flip=None):
        x, labels = super().batch(indices, flip)
        return x.double(), labels


def digits() -> Source:
    source = load_source("digits")
    return Doubles(source.name, source.samples, source.labels, source.num_classes)


def make_task(
    table, name="analytic", teacher=None, source=None, accelerator=None, gan=None, store=None, warmup=None, **values
) -> Distillation:
    """A task in float64, unless `source` and `teacher` are of another type."""
    training, chosen = sections(**values)
    teacher, accelerator = teacher or small_teacher(), accelerator or Accelerator(cpu=True)
    adversary = gan and Adversary(gan, teacher.sample_shape, teacher.num_classes, accelerator, 1)
    if adversary and next(teacher.parameters()).dtype == torch.float64:
        adversary.discriminator.double()
    form = make_preconditioning(name, table=table)
    objective = make_objective(chosen, teacher.sample_shape)
    task: Any = Distillation(
        teacher, form, objective, source or digits(), accelerator, training, 1, adversary, store, warmup
    )
    task.form, task.phi = form, small_teacher()
    return cast(Distillation, task)


def moved(task: Distillation) -> Distillation:
    """Moves the student away from the start, so that target and student differ and every branch is live."""
    with torch.no_grad():
        for k, (live, target) in enumerate(zip(task.student.parameters(), task.target_net.parameters(), strict=True)):
            for moving, purpose in ((live, "live"), (target, "target")):
                noise = torch.randn(moving.shape, generator=generator(k, purpose), dtype=moving.dtype)
                moving.add_(0.02 * noise.to(moving.device))
    return task


def step(task: Distillation, index: int) -> Report:
    """A step as the loop does it."""
    report = read(task.accelerator, task.backward(index))
    finish(task, index, report, Counters())
    return report


def gradients(task: Distillation) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in task.student.named_parameters() if p.grad is not None}


def tensors(task: Distillation) -> list[torch.Tensor]:
    return [value.clone() for group in task.groups().values() for value in group.values()]


def force_levels(task: Distillation, monkeypatch, t: int, s: int, h: int) -> None:
    """Lets every sample jump from the t-th to the s-th noise level, u being h below t."""

    def draw(size: int, generator: torch.Generator, index: int) -> dict[str, torch.Tensor]:
        grid = task.objective.grid
        assert grid is not None
        path = grid[t : t + h + 1].expand(size, -1)
        return {"t": path[:, 0], "u": path[:, -1], "s": grid[s].expand(size), "path": path}

    monkeypatch.setattr(task.objective, "draw", draw)
    task.ready = None
