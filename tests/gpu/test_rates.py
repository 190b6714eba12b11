"""What a GPU does in a second, beside what is counted, for a network of CIFAR-10's size with weights at random."""

import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from cdistill.analysis.cost import network_cost, on_meta
from cdistill.estimation.forward import Forward
from cdistill.estimation.settings import EstimationSection
from cdistill.networks.denoiser import EDMDenoiser, freeze
from cdistill.objectives.regression import RegressionSection
from cdistill.preconditionings import make_preconditioning
from cdistill.sampling.drawing import generate
from cdistill.sampling.samplers import make_sampler
from cdistill.sampling.trajectories import TrajectoryStore
from cdistill.schedule import log_uniform_grid
from cdistill.teachers.official import OFFICIAL
from cdistill.training.distillation import Distillation
from tests.benchmarks.clock import seconds
from tests.benchmarks.estimators import images
from tests.benchmarks.training import make_task, quantiles_of_h, step, steps_of
from tests.edm_teacher import random_denoiser
from tests.quadrature import collect_sums

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

BATCH, STEPS = 64, 8
Rows = Callable[[str, str, str], None]


@pytest.fixture(scope="module")
def teacher() -> EDMDenoiser:
    return freeze(random_denoiser({**OFFICIAL["edm-cifar10"].architecture, "dropout": 0.0})).to("cuda")


def rate(task: Distillation, numbers: list[int]) -> float:
    """Images a second over these steps, after two of the same shapes."""
    for index in numbers[:2]:
        step(task, index)
    torch.cuda.synchronize()

    def work() -> None:
        for index in numbers:
            step(task, index)

    return BATCH * len(numbers) / seconds(work, "cuda")


@pytest.mark.parametrize("compiled", [False, True])
def test_images_a_second_of_the_published_step_and_of_a_regression(teacher, compiled, measured: Rows):
    """The regression's targets come from its own x_t here: what it reads from a store costs nothing beside networks."""
    options: dict[str, Any] = {
        "precision": "fp16",
        "teacher_precision": "fp16",
        "compile": compiled,
        "channels_last": True,
    }
    published = make_task(teacher, BATCH, **options)
    cheap = make_task(
        teacher, BATCH, regression=RegressionSection(dsm=False), store=cast(TrajectoryStore, Still()), **options
    )
    found = {name: rate(task, steps_of(quantiles_of_h(STEPS))) for name, task in (("a", published), ("b", cheap))}
    counts = [task.objective.cost().forwards(dsm=task.objective.section.dsm) for task in (published, cheap)]
    cost = network_cost(on_meta(teacher)).forward
    how = "fp16, compiled" if compiled else "fp16"
    flops = found["a"] * counts[0] * cost / 1e12
    measured(f"CTM as published, {how}", f"{found['a']:.1f} images/s, {flops:.1f} TFLOP/s in the networks", "-")
    ratio, counted = found["b"] / found["a"], counts[0] / counts[1]
    measured(f"regression over CTM as published, {how}", f"{ratio:.2f} times as fast", f"counted {counted:.2f}")
    assert 0.5 < ratio / counted < 2


class Still:
    """Trajectories of smooth noise, at all levels alike."""

    digest, flips = "still", False

    def __len__(self) -> int:
        return 512

    def points(self, which: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        x, _ = images().batch(which % 512)
        return x * levels[:, None, None, None].float()

    def labels(self, which: torch.Tensor) -> None:
        return None


def test_the_coefficients_of_a_network_of_cifar_10s_size_take_seconds(teacher, measured: Rows):
    """120 noise levels, 1,024 samples; a second estimate, which does not compile."""
    settings, grid, source = EstimationSection(samples=1024), log_uniform_grid(120), images(50_000)
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        collect_sums(Forward(), teacher, source, grid, settings)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    flops = network_cost(on_meta(teacher)).forward * 120 * 1024 / taken[1] / 1e12
    measured(
        "coefficients, 120 x 1,024", f"{taken[1]:.1f} s ({taken[0]:.1f} s the first time), {flops:.0f} TFLOP/s", "-"
    )
    assert taken[1] < 120


def test_images_a_second_of_samples(teacher, measured: Rows):
    """Two jumps a sample, drawn and brought to the host, beside the same calls of the network alone."""
    sampler = make_sampler(teacher.student(), make_preconditioning("ctm"), nfe=2)
    freeze(sampler.denoiser).to("cuda")
    x, t = torch.randn(256, 3, 32, 32, device="cuda"), torch.ones(256, dtype=torch.float64, device="cuda")

    def bare() -> None:
        with torch.inference_mode():
            for _ in range(8):
                sampler.denoiser(x, t, t)

    def drawn() -> None:
        generate(sampler, (3, 32, 32), range(1024), device="cuda")

    bare()
    drawn()
    alone, whole = seconds(bare, "cuda"), seconds(drawn, "cuda")
    measured("samples, 2 calls, fp32", f"{1024 / whole:.0f} images/s", f"{1024 / alone:.0f} of the calls alone")
    assert whole < 3 * alone
