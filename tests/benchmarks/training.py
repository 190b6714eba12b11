"""What each saving of the training step brings, counted and measured side by side; and the full-size step on a GPU.

python -m tests.benchmarks.training [--device cuda] [--official]

Each line compares a step, or a part of it, without the saving and with it, by turns, on the same samples. `counted` is
the ratio of the operations of the networks by torch's own counter: what a saving can bring where it skips work.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cdistill.analysis.cost import network_cost, on_meta
from cdistill.data import Source
from cdistill.data.source import from_uint8
from cdistill.networks.denoiser import EDMDenoiser, count_parameters, freeze
from cdistill.objectives.base import Batch
from cdistill.objectives.ctm import CTM, CTMSection
from cdistill.objectives.distances import L2, Distance
from cdistill.objectives.lpips import LPIPS
from cdistill.objectives.pairs import draw_ctm_times
from cdistill.objectives.regression import Regression, RegressionSection
from cdistill.preconditionings import make_preconditioning
from cdistill.runtime.processes import set_threads
from cdistill.runtime.randomness import generator
from cdistill.sampling.trajectories import TrajectoryStore
from cdistill.teachers.official import OFFICIAL
from cdistill.training.distillation import Distillation
from cdistill.training.loop import Counters, Report, finish, read
from cdistill.training.optimizer_state import update_ema
from cdistill.training.settings import TrainingSection
from tests.benchmarks.clock import both_seconds, seconds
from tests.benchmarks.estimators import PEAK, images, peak_mib, say
from tests.edm_teacher import random_denoiser

POINTS, MAX_STEPS = 18, 17
SMALL = {"model_channels": 64, "channel_mult": [1, 2, 2], "num_blocks": 1, "augment_dim": 0, "dropout": 0.0}

OPTIONS: dict[str, dict[str, Any]] = {
    "teacher in bf16": {"teacher_precision": "bf16"},
    "channels_last": {"channels_last": True},
    "channels_last, teacher in bf16": {"channels_last": True, "teacher_precision": "bf16"},
    "compiled": {"compile": True},
    "compiled, teacher in bf16": {"compile": True, "teacher_precision": "bf16"},
    "compiled, channels_last, teacher in bf16": {"compile": True, "channels_last": True, "teacher_precision": "bf16"},
}


@dataclass(frozen=True)
class Saving:
    """Something to compare.

    Attributes:
        title: What the saving is.
        plain: Does the work without it.
        fast: Does it with it.
        counts: Whether the operations of the two are counted as well; compiled code cannot be.
    """

    title: str
    plain: Callable[[], object]
    fast: Callable[[], object]
    counts: bool = False


class StandingStill(Distillation):
    """Calls the networks for jumps that stand still, too."""

    def draw(self, index: int) -> list[Batch]:
        batches = super().draw(index)
        everywhere = torch.arange(len(batches[0].x0), device=batches[0].x0.device)
        return [replace(batch, moving=dict.fromkeys(batch.moving, everywhere)) for batch in batches]


class AllHalf(Distillation):
    """Runs all networks under bf16 autocast, as precision = "bf16" does; accelerate allows one precision a process."""

    def backward(self, index: int) -> dict[str, Tensor]:
        with torch.autocast(self.accelerator.device.type, torch.bfloat16):
            return super().backward(index)


def step(task: Distillation, index: int, reader: Callable[[Accelerator, dict[str, Tensor]], Report] = read) -> None:
    """Does one whole step as `cdistill.training.loop.train` does."""
    values = task.backward(index)
    task.prepare(index + 1)
    finish(task, index, reader(task.accelerator, values), Counters())


def read_one_by_one(accelerator: Accelerator, values: dict[str, Tensor]) -> Report:
    """Reads every value on its own, and waits for the device each time."""
    return Report({name: float(value) for name, value in values.items()}, 0)


def make_task(
    teacher: EDMDenoiser,
    batch_size: int,
    kind: type[Distillation] = Distillation,
    distance: Distance | None = None,
    store: TrajectoryStore | None = None,
    regression: RegressionSection | None = None,
    **options: Any,
) -> Distillation:
    """Returns a task of the paper's numbers; every saving that is an option is off, unless `options` say otherwise.

    With a store its objective reads it: CTM, or the regression.
    """
    plain = {"compile": False, "channels_last": False, "teacher_precision": "fp32", "precision": "fp32"}
    values = {**plain, **options}
    own = {key: value for key, value in values.items() if key in CTMSection.model_fields}
    section = TrainingSection(iterations=1, batch_size=batch_size, **{k: v for k, v in values.items() if k not in own})
    AcceleratorState._reset_state()  # it is one for the whole process, and only of one precision
    precision = {"fp32": "no"}.get(section.precision, section.precision)
    accelerator = Accelerator(cpu=not next(teacher.parameters()).is_cuda, mixed_precision=precision)
    own |= {} if store is None else {"targets": "store"}
    objective: Any = CTM(CTMSection(distance="l2", **own), teacher.sample_shape)
    if regression is not None:
        objective = Regression(regression, teacher.sample_shape)
    objective.distance = distance or objective.distance
    form = make_preconditioning("ctm")
    return kind(teacher, form, objective, images(), accelerator, section, seed=0, store=store)


def steps_of(wanted: list[int]) -> list[int]:
    """Returns numbers of steps of seed 0, increasing, that have the numbers of solver steps `wanted`."""
    chosen: list[int] = []
    for h in wanted:
        index = chosen[-1] + 1 if chosen else 0
        while draw_ctm_times(POINTS, MAX_STEPS, 1, generator(0, "ctm", index))[2] != h:
            index += 1
        chosen.append(index)
    return chosen


def savings_of_a_step(teacher: EDMDenoiser, batch_size: int, index: int) -> list[Saving]:
    """Returns what every step does: without each, against the step with all of them."""
    fast = make_task(teacher, batch_size)
    ways: dict[str, Callable[[], object]] = {
        "identity jumps skipped": _stepper(make_task(teacher, batch_size, StandingStill), index),
        "one reading a step": lambda: step(fast, index, read_one_by_one),
    }
    return [Saving(title, plain, _stepper(fast, index), counts=True) for title, plain in ways.items()]


def with_options(teacher: EDMDenoiser, batch_size: int, which: str, **more: Any) -> dict[str, Distillation]:
    """Returns tasks with the options of a recipe: "none", those without compilation ("eager") or "all"."""
    if which == "none":
        return {}
    chosen = {title: own for title, own in OPTIONS.items() if which == "all" or "compile" not in own}
    tasks = {title: make_task(teacher, batch_size, **own, **more) for title, own in chosen.items()}
    tasks["everything in bf16"] = make_task(teacher, batch_size, AllHalf, teacher_precision="bf16", **more)
    return tasks


def options_of_a_step(teacher: EDMDenoiser, batch_size: int, index: int, which: str) -> list[Saving]:
    """Returns the savings that are options of a recipe, against the step with none of them."""
    plain = make_task(teacher, batch_size)
    tasks = with_options(teacher, batch_size, which)
    return [Saving(title, _stepper(plain, index), _stepper(task, index)) for title, task in tasks.items()]


def savings_of_parts(teacher: EDMDenoiser, batch_size: int) -> list[Saving]:
    """Returns the savings outside of the networks, each against its own part of the step alone."""
    task = make_task(teacher, batch_size)
    for parameter in task.trained:
        parameter.grad = torch.full_like(parameter, 1e-3)
    single = torch.optim.RAdam(task.trained, lr=4e-4, foreach=False)
    bytes_ = images().resident(task.accelerator.device)
    floats = Source("floats", from_uint8(images().samples[:]))
    chosen = torch.randint(0, len(bytes_), (256,), generator=generator(0, "rows"))
    device = task.accelerator.device
    return [
        Saving(
            "EMA, all tensors at once",
            lambda: one_by_one(task),
            lambda: update_ema(task.student_ema, task.student, 0.999),
        ),
        Saving("RAdam, all tensors at once", single.step, task.optimizer.step),
        Saving(
            "data as uint8 on the device, a quarter of the memory",
            lambda: floats.batch(chosen)[0].to(device),
            lambda: bytes_.batch(chosen)[0].to(device),
        ),
    ]


def one_by_one(task: Distillation) -> None:
    """Moves the average tensor by tensor."""
    with torch.no_grad():
        for average, live in zip(task.student_ema.parameters(), task.student.parameters(), strict=True):
            average.mul_(0.999).add_(live, alpha=0.001)


def _stepper(task: Distillation, index: int) -> Callable[[], object]:
    return lambda: step(task, index)


def count(work: Callable[[], object]) -> float:
    """Returns the operations of the networks in `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def compare(saving: Saving, device: str, repeats: int) -> None:
    """Prints how many times as fast the saving makes its work: the middle of `repeats` turns, and their middle half."""
    counted = f"counted {count(saving.plain) / count(saving.fast):.3f}, " if saving.counts else ""
    saving.plain(), saving.fast()
    turns = []
    for turn in range(repeats):
        order = [saving.plain, saving.fast][:: 1 if turn % 2 else -1]
        taken = {work: both_seconds(work, device) for work in order}
        turns.append((taken[saving.plain], taken[saving.fast]))
    found = []
    for clock, name in enumerate(("wall", "threads") if device == "cpu" else ("wall",)):
        ratios = sorted(plain[clock] / fast[clock] for plain, fast in turns)
        spread = f"{ratios[repeats // 4]:.3f} to {ratios[-1 - repeats // 4]:.3f}"
        found.append(f"by the {name} {statistics.median(ratios):.3f} ({spread})")
    before, after = (statistics.median(turn[side][0] for turn in turns) for side in (0, 1))
    say(f"{saving.title}: {counted}{', '.join(found)}; {1e3 * before:.1f} ms to {1e3 * after:.1f} ms")


def random_lpips(device: str) -> LPIPS:
    """LPIPS with weights at random: what is measured is its speed."""
    distance = LPIPS.meta()
    distance.model.to_empty(device=device)
    with torch.no_grad():
        for tensor in [*distance.model.parameters(), *distance.model.buffers()]:
            tensor.copy_(0.02 + 0.01 * torch.randn_like(tensor))
    return distance


def print_rate(teacher: EDMDenoiser, batch_size: int, numbers: list[int], precision: str, lpips: bool) -> None:
    """Trains for some steps as `cdistill distill` would on this device, and prints its rate and peak memory."""
    device = next(teacher.parameters()).device.type
    auto: dict[str, Any] = {
        "compile": "auto",
        "channels_last": "auto",
        "teacher_precision": "same",
        "precision": precision,
    }
    task = make_task(teacher, batch_size, distance=random_lpips(device) if lpips else L2(), **auto)
    for index in numbers[: 3 if device == "cuda" else 1]:  # compiles, records graphs, fills the allocator's pools
        step(task, index)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def work() -> None:
        for index in numbers:
            step(task, index)

    taken = seconds(work, device)
    rate = batch_size * len(numbers) / taken
    cost = task.objective.cost()
    forwards = cost.teacher + cost.target + 2 * cost.frozen + 3 * (cost.student + 1)
    flops = rate * forwards * network_cost(on_meta(teacher)).forward / 1e12
    more = f", {flops / PEAK:.1%} of an H100's {PEAK:g}; peak memory {peak_mib(device) / 1024:.2f} GiB"
    say(
        f"{precision}, {'lpips' if lpips else 'l2'}, batch {batch_size}, {task.acceleration}: {rate:.3g} images/s, "
        f"{flops:.3g} TFLOP/s in the U-Nets{more if device == 'cuda' else ''}"
    )


def print_official(device: str, batch_size: int, steps: int) -> None:
    """Prints the rates of the full-size CIFAR-10 step, networks at random."""
    teacher = freeze(random_denoiser({**OFFICIAL["edm-cifar10"].architecture, "dropout": 0.0})).to(device)
    say(f"DDPM++ of {count_parameters(teacher):,} parameters; {steps} steps whose h stand for the law of h")
    for precision in ("bf16", "fp16") if device == "cuda" else ("fp32",):
        for lpips in (False, True):
            print_rate(teacher, batch_size, steps_of(quantiles_of_h(steps)), precision, lpips)


def quantiles_of_h(count_: int) -> list[int]:
    """Returns the middles of `count_` equal parts of P(h), so that a few steps stand for all."""
    weights = torch.arange(1, MAX_STEPS + 1, dtype=torch.float64)
    law = weights.cumsum(0) / weights.sum()
    return [1 + int((law < (k + 0.5) / count_).sum()) for k in range(count_)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--official", action="store_true", help="the full-size CIFAR-10 step")
    parser.add_argument("--batch-size", type=int, default=0, help="16; for the full size 128, or 2 on a CPU")
    parser.add_argument("--options", default="all", choices=["none", "eager", "all"], help="options of a recipe")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--solver-steps", type=int, default=4, help="h of the steps that are compared")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device; there is none")
    set_threads()
    if chosen.official:
        usual, steps = (128, 12) if chosen.device == "cuda" else (2, 2)
        print_official(chosen.device, chosen.batch_size or usual, steps)
        return
    batch_size = chosen.batch_size or 16
    teacher = freeze(random_denoiser({**OFFICIAL["edm-cifar10"].architecture, **SMALL})).to(chosen.device)
    unit = network_cost(on_meta(teacher)).forward / 1e9
    say(
        f"DDPM++ of {count_parameters(teacher):,} parameters, {unit:.2f} GFLOP a forward; batch {batch_size}, "
        f"{torch.get_num_threads()} threads; how many times as fast each saving makes its work:"
    )
    (index,) = steps_of([chosen.solver_steps])
    say(f"whole steps with h = {chosen.solver_steps}")
    for saving in savings_of_a_step(teacher, batch_size, index):
        compare(saving, chosen.device, chosen.repeats)
    say("parts alone")
    for saving in savings_of_parts(teacher, batch_size):
        compare(saving, chosen.device, 5 * chosen.repeats)
    say(f"options of a recipe, whole steps with h = {chosen.solver_steps}")
    for saving in options_of_a_step(teacher, batch_size, index, chosen.options):
        compare(saving, chosen.device, chosen.repeats)


if __name__ == "__main__":
    main()
