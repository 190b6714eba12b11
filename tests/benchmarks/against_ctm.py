"""Our CTM step beside the public CTM code's own: the same DDPM++, batch size, distance and solver steps h, by turns.

Their code is not part of this project. Export it to a folder of its own first, never into the repository:

git clone https://github.com/Kim-Dongjun/ctm-cifar10 FOLDER   (or https://github.com/sony/ctm, and FOLDER/code)
python -m tests.benchmarks.against_ctm --ctm FOLDER
"""

import argparse
import ctypes
import importlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cdistill.analysis.cost import network_cost, on_meta
from cdistill.networks.denoiser import EDMDenoiser, count_parameters, freeze
from cdistill.objectives.ctm import CTM, CTMSection
from cdistill.objectives.distances import L2
from cdistill.objectives.regression import Regression, RegressionSection
from cdistill.runtime.processes import keep_memory, set_threads
from cdistill.sampling.trajectories import SHARD
from cdistill.teachers.official import OFFICIAL
from cdistill.training.distillation import Distillation
from tests.benchmarks.clock import both_seconds
from tests.benchmarks.estimators import images, say
from tests.benchmarks.training import (
    POINTS,
    SMALL,
    make_task,
    quantiles_of_h,
    step,
    steps_of,
    with_options,
)
from tests.benchmarks.trajectories import make as make_store
from tests.edm_teacher import random_denoiser

RATE, LEARNING_RATE = 0.999, 4e-4
KEPT = ", memory kept"
ABSENT = [
    "blobfile", "cv2", "flash_attn", "mpi4py", "nvidia_smi", "piq", "skimage", "skimage.metrics", "tensorflow",
    "tensorflow.compat", "tensorflow.compat.v1",
]  # fmt: skip


class Adapter(nn.Module):
    """F(c_in x; t, s) under the conventions of CTM's code: times as 250 ln t, and `module` as DDP has it.

    Args:
        denoiser: Whose free network is called; its parameters are shared.
    """

    def __init__(self, denoiser: EDMDenoiser) -> None:
        super().__init__()
        self.model = denoiser.model

    @property
    def module(self) -> "Adapter":
        """Itself, where DDP would have wrapped it."""
        return self

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, teacher: bool = False) -> Tensor:
        """Computes F; whether `teacher` is set makes no difference to a network of its own class."""
        return self.model(x, t / 1000, None if s is None else s / 1000, None)


def load_theirs(folder: Path) -> dict[str, ModuleType]:
    """Imports CTM's modules from `folder`, with stand-ins for packages that are absent and that no step needs."""
    sys.path.insert(0, str(folder))
    for name in ABSENT:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = MagicMock()
    evaluator = MagicMock()  # not part of a step
    evaluator.Evaluator.return_value.read_statistics.return_value = None, None
    sys.modules["cm.evaluator"] = evaluator
    names = ("logger", "script_util", "karras_diffusion", "train_util")
    modules = {name: importlib.import_module(f"cm.{name}") for name in names}
    modules["logger"].Logger.CURRENT = modules["logger"].Logger(None, [])  # keeps the numbers, writes nothing
    return modules


def their_settings(script: ModuleType, batch_size: int) -> SimpleNamespace:
    """Their own defaults for CIFAR-10, in float32, without evaluation, one moving average beside the target's."""
    kinds = ["train", "model_and_diffusion", "cm_train", "ctm_train", "ctm_eval", "ctm_loss", "ctm_data"]
    values: dict[str, Any] = {}
    for kind in kinds:
        values |= getattr(script, f"{kind}_defaults")("cifar10")
    values |= {
        "use_fp16": False,
        "microbatch": -1,
        "batch_size": batch_size,
        "ema_rate": str(RATE),
        "lr": LEARNING_RATE,
    }
    values |= {"eval_num_samples": 1, "sampling_batch": 1, "eval_fid": False, "eval_similarity": False}
    return SimpleNamespace(**{**values, "check_dm_performance": False, "data_name": "none"})


def build_theirs(folder: Path, teacher: EDMDenoiser, batch_size: int) -> Callable[[Tensor, int], None]:
    """Returns CTM's own training step, of clean images (B, 3, 32, 32) and h."""
    modules = load_theirs(folder)
    script, settings = modules["script_util"], their_settings(modules["script_util"], batch_size)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    class Denoiser(modules["karras_diffusion"].KarrasDenoiser):
        """Theirs with a given h and the plain squared distance, which theirs has not."""

        steps = 1

        def get_num_heun_step(self, **_: Any) -> int:
            return self.steps

        def get_CTM_loss(self, estimate: Tensor, target: Tensor, weights: Tensor, step: int) -> Tensor:
            return L2()(estimate, target) * weights

    samplers = [
        script.create_named_schedule_sampler(settings, name, POINTS)
        for name in (settings.schedule_sampler, settings.diffusion_schedule_sampler)
    ]
    diffusion = Denoiser(settings, *samplers)
    scale = script.create_ema_and_scales_fn(
        settings.target_ema_mode, RATE, settings.scale_mode, POINTS, POINTS, settings.total_training_steps, 0
    )
    loop = modules["train_util"].CMTrainLoop(
        model=Adapter(teacher.student()), target_model=Adapter(teacher.student()), teacher_model=Adapter(teacher),
        ema_scale_fn=scale, discriminator=None, diffusion=diffusion, data=None, batch_size=batch_size, args=settings,
    )  # fmt: skip
    settings.data_name = "cifar10"  # only now: its loop would have fetched Inception; it tells the last layer's name
    loop.ddp_discriminator = None

    def their_step(x0: Tensor, h: int) -> None:
        diffusion.steps = h
        loop.run_step(x0, {})

    return their_step


@contextmanager
def kept_memory() -> Iterator[None]:
    """Runs with keep_memory(), as `cdistill distill` does, and restores what glibc does itself.

    Theirs gives the memory back in between, so ours has to fill its pages again: this counts too little of the saving.
    """
    keep_memory()
    yield
    libc = ctypes.CDLL(None)
    for number, value in ((-4, 65536), (-3, 32 * 2**20), (-1, 64 * 2**20)):  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_...
        libc.mallopt(number, value)


@dataclass(frozen=True)
class Pair:
    """One step of each, of the same h.

    Attributes:
        theirs: Seconds of theirs on the wall, and of its threads.
        ours: The same of ours.
        counted: Forwards a sample of theirs over those of ours, in this very pair.
    """

    theirs: tuple[float, float]
    ours: tuple[float, float]
    counted: float

    def ratio(self, clock: int) -> float:
        """How many times as fast ours is, by the wall (0) or by the work of the threads (1)."""
        return self.theirs[clock] / self.ours[clock]


def count_forwards(task: Distillation, index: int) -> tuple[int, float, float]:
    """Returns h, and the forwards a sample of their step and of ours; a gradient to the input costs one more, to the
    weights yet one more, and theirs takes one backward pass through the frozen network twice.
    """
    (batch,) = task.draw(index)
    if isinstance(task.objective, Regression):
        return 0, 0, own_forwards(task, 0)
    inner, outer = (len(batch.moving[pair]) / len(batch.x0) for pair in task.objective.jumps)
    h = batch.levels["path"].shape[1] - 1
    return h, 2 * h + 2 + 2 + 3 + 3 + 1, own_forwards(task, 2 * h + inner + 3 * outer)


def own_forwards(task: Distillation, targets: float) -> float:
    """Returns the forwards a sample of a step of ours, whose roll-out and jumps for the targets cost `targets`."""
    return targets + 3 * (1 + task.objective.section.dsm)


def expected_ratio() -> float:
    """Returns the counted ratio over the law of h, i and j."""
    cost = CTM(CTMSection(distance="l2"), (3, 32, 32)).cost()
    ours = cost.forwards(dsm=True)
    theirs = cost.teacher + 2 + 2 + 3 + 3 + 1
    say(f"counted over the law of h: {theirs:.1f} F against {ours:.1f} F, a ratio of {theirs / ours:.3f}")
    return theirs / ours


def check_count(theirs: Callable[[Tensor, int], None], task: Distillation, index: int, x0: Tensor, unit: float) -> None:
    """Counts one step of each by its operations; raises if that is not what `count_forwards` says, to 1 %."""
    h, *expected = count_forwards(task, index)
    for name, work, forwards in zip(
        ("theirs", "ours"), (lambda: theirs(x0, h), lambda: step(task, index)), expected, strict=True
    ):
        # torch's counter knows no formula for the attention kernel of a CPU: it would miss 2.7 % of the work.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        found = counter.get_total_flops() / len(x0) / unit
        say(f"{name}: h = {h}: {found:.2f} F by torch's counter, {forwards:.2f} F by the formula")
        if abs(found / forwards - 1) > 0.01:
            raise SystemExit(f"{name}: the two do not agree")


def measure(
    theirs: Callable[[Tensor, int], None], tasks: dict[str, Distillation], chosen: list[int], x0: Tensor
) -> dict[str, list[Pair]]:
    """Times one step of theirs and of every task for every chosen number, the order changing from turn to turn."""
    pairs: dict[str, list[Pair]] = {title: [] for title in tasks}
    works: dict[str, Callable[[], object]] = {}

    def ours(task: Distillation, index: int, kept: bool) -> None:
        with kept_memory() if kept else nullcontext():
            step(task, index)

    for number, index in enumerate(chosen):
        h, work, _ = count_forwards(next(iter(tasks.values())), index)
        counts = {title: count_forwards(task, index)[2] for title, task in tasks.items()}
        counts |= {title: counts[title] - 2 * h for title, task in tasks.items() if task.objective.stored == ("u",)}
        works[""] = lambda h=h: theirs(x0, h)
        works |= {title: partial(ours, task, index, title.endswith(KEPT)) for title, task in tasks.items()}
        order = list(works)[number % len(works) :] + list(works)[: number % len(works)]
        taken = {title: both_seconds(works[title], "cpu") for title in order}
        for title in tasks:
            pairs[title].append(Pair(taken[""], taken[title], work / counts[title]))
    return pairs


def report(title: str, pairs: list[Pair], batch_size: int, expected: float) -> None:
    """Prints images a second, the measured ratio and how much of the counted one it is."""
    theirs, ours = (batch_size * len(pairs) / sum(side) for side in zip(*_wall(pairs), strict=True))
    say(f"{title}: {theirs:.2f} images/s against {ours:.2f} on the wall, {ours / theirs:.3f} times theirs")
    for clock, name in enumerate(("wall", "threads")):
        ratios = sorted(pair.ratio(clock) for pair in pairs)
        share = statistics.median(pair.ratio(clock) / pair.counted for pair in pairs)
        quarter = len(ratios) // 4
        say(
            f"  by the {name}: {statistics.median(ratios):.3f} times theirs in the middle pair ({ratios[quarter]:.3f} "
            f"to {ratios[-1 - quarter]:.3f} in the middle half of {len(pairs)}); {share:.3f} of what is counted in "
            f"each pair, so {expected * share:.3f} over the law of h for Eq. 7 as published"
        )


def _wall(pairs: list[Pair]) -> list[tuple[float, float]]:
    return [(pair.theirs[0], pair.ours[0]) for pair in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctm", type=Path, required=True, help="folder with CTM's code: the one that holds cm/")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--keep-memory", action="store_true", help="also ours with freed memory kept (glibc)")
    parser.add_argument("--options", default="none", choices=["none", "eager", "all"], help="also ours with these")
    chosen = parser.parse_args()
    set_threads()
    teacher = freeze(random_denoiser({**OFFICIAL["edm-cifar10"].architecture, **SMALL}))
    unit = network_cost(on_meta(teacher)).forward
    say(
        f"DDPM++ of {count_parameters(teacher):,} parameters, {unit / 1e9:.2f} GFLOP a forward (F); "
        f"batch {chosen.batch_size}, {torch.get_num_threads()} threads, l2"
    )
    expected = expected_ratio()
    theirs = build_theirs(chosen.ctm, teacher, chosen.batch_size)
    tasks = {"eager float32": make_task(teacher, chosen.batch_size, target="live")}
    x0, _ = images().batch(torch.arange(chosen.batch_size))
    steps = steps_of(quantiles_of_h(chosen.pairs))
    check_count(theirs, tasks["eager float32"], steps[0], x0, unit)
    tasks |= with_options(teacher, chosen.batch_size, chosen.options, target="live")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), SHARD)
        store.open(Accelerator(cpu=True))
        tasks["Eq. 7 from the store"] = make_task(teacher, chosen.batch_size, store=store, target="live")
        for dsm in (True, False):
            section = RegressionSection(dsm=dsm)
            title = f"regression, {'with' if dsm else 'without'} DSM"
            tasks[title] = make_task(teacher, chosen.batch_size, store=store, regression=section)
    for task in tasks.values():
        step(task, steps[0])
    tasks |= {title + KEPT: task for title, task in tasks.items()} if chosen.keep_memory else {}
    for title, pairs in measure(theirs, tasks, steps, x0).items():
        report(title, pairs, chosen.batch_size, expected)


if __name__ == "__main__":
    main()
