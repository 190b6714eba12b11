"""Shared fixtures: small recipes, a command runner, and coefficients of the 1-D mixture."""

from tests import pretended_cuda  # isort: skip  # noqa: F401  (before torch, see there)

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cdistill.preconditionings.coefficients import Coefficients
from cdistill.runtime import console
from cdistill.sampling.moments import collect_moments, fit_f_and_g
from cdistill.schedule import log_uniform_grid
from cdistill.teachers import load_teacher
from tests.quadrature import exact_estimate

# Two single-thread tests side by side do more work than one with two threads.
os.environ |= {"CDISTILL_THREADS": "1", "OMP_NUM_THREADS": "1"}
os.environ["CDISTILL_OFFLINE"] = "1"  # no test downloads weights; those of downloading serve files of their own
PACKAGE = Path(__file__).resolve().parents[1] / "cdistill"

# Small enough for seconds, whole enough to pass through every stage of `distill`.
FAST = [
    "training.iterations=30", "training.batch_size=32", "estimation.samples=64", "estimation.timesteps=16",
    "evaluation.samples=64", "evaluation.nfe=[1,2]", "checkpoint.every=10",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def audible() -> None:
    """Takes back what an earlier test's --quiet left behind."""
    console.set_verbosity(0)


@pytest.fixture(scope="session")
def exact_coefficients() -> Coefficients:
    """l and s of the paper's 1-D mixture by quadrature, on 120 log-uniform noise levels, and f and g fitted to it."""
    moments = collect_moments(load_teacher("mixture-1d").denoiser, 18, 256, 0, 4)
    return replace(exact_estimate(None, log_uniform_grid(120)).coefficients, fit=fit_f_and_g(moments))


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `cdistill ...` in a process of its own, in an empty folder."""

    def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Runs code in a process of its own, which may end in any way, and returns what it printed."""

    def run(code: str, **values: str) -> str:
        path = str(PACKAGE.parent)
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=path, **values), text=True,
            stdout=subprocess.PIPE, timeout=60, check=False,
        ).stdout  # fmt: skip

    return run


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of a process that runs the package."""
    return [sys.executable, str(PACKAGE), *arguments]


def environment(**values: str) -> dict[str, str]:
    """An environment without a terminal's colours and without weights from elsewhere."""
    return {**os.environ, "NO_COLOR": "1", "CDISTILL_ASSETS": os.devnull, **values}


def fast_distill(out: Path, *more: str, recipe: str = "mixture") -> list[str]:
    """Arguments of a training that takes a second or two."""
    sets = [part for value in [*FAST, *more] for part in ("--set", value)]
    return ["distill", "--recipe", recipe, "--out", str(out), *sets]
