"""What README.md shows works as typed."""

import re
import shlex
from pathlib import Path

import pytest

from cdistill.cli.app import run
from cdistill.registry import (
    DISCRIMINATORS,
    DISTANCES,
    ESTIMATORS,
    FEATURES,
    METRICS,
    PRECONDITIONINGS,
    SAMPLERS,
    SOURCES,
    TEACHERS,
)
from tests.conftest import FAST

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALLER = {
    "distill": [part for value in [*FAST, "training.iterations=2"] for part in ("--set", value)],
    "estimate-coeffs": ["--samples", "64", "--timesteps", "8"],
    "sample": ["--seeds", "0-3"],
    "evaluate": ["--samples", "16"],
    "plot trajectories": ["--samples", "32", "--count", "32"],
}


def test_the_check_runs_the_readmes_test_command():
    test_command = BLOCKS[1].strip()
    assert test_command.startswith("pip install -e '.[dev]'")
    assert test_command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_first_command_installs_and_distils():
    assert BLOCKS[0].strip() == "pip install . && cdistill distill --recipe digits"


@pytest.mark.slow
def test_the_pipeline_runs_in_its_order_in_an_empty_folder(tmp_path, monkeypatch):
    """Every command of the pipeline as typed, followed by options that make it small."""
    monkeypatch.chdir(tmp_path)
    lines = BLOCKS[2].strip().splitlines()
    assert len(lines) == 7
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "cdistill"
        smaller = next((more for name, more in SMALLER.items() if line.startswith(f"cdistill {name}")), [])
        assert run([*arguments, *smaller]) == 0, line


def test_every_registered_name_is_named():
    everything = PRECONDITIONINGS, TEACHERS, SOURCES, ESTIMATORS, DISTANCES, DISCRIMINATORS, METRICS, SAMPLERS, FEATURES
    for registry in everything:
        assert all(f"`{name}`" in README for name in registry.names())


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:cdistill|tests|recipes)/[\w./-]+)`|\]\((\.github/[\w./-]+)\)", README)
    assert len(named) > 8
    for first, second in named:
        assert (ROOT / (first or second)).exists(), first or second


@pytest.mark.slow
def test_the_commands_about_coefficients_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in BLOCKS if "--target-error" in block)
    for line in block.strip().splitlines():
        _, *arguments = shlex.split(line)
        smaller = ["--samples", "64", "--timesteps", "8"] if "--teacher" in arguments else []
        assert run([*arguments, *smaller]) == 0, line


def test_nothing_is_left_to_be_filled_in():
    for name in ("README.md", "CHANGELOG.md"):
        assert not re.search(r"@[A-Z]+@", (ROOT / name).read_text())


def test_every_module_that_is_named_exists():
    named = re.findall(r"python -m (tests[\w.]+)", README)
    assert named
    assert all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in named)


def test_the_loader_of_three_lines_works_on_a_coefficient_file(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    command = ["estimate-coeffs", "--teacher", "patches", "--samples", "64", "--timesteps", "12"]
    assert run(command) == 0
    scope = {"t": torch.tensor([80.0, 1.0]), "s": torch.tensor([1.0, 1.0])}
    exec(PYTHON[0], scope)
    assert 0 < float(scope["g"][0]) < 1
    assert (float(scope["f"][1]), float(scope["g"][1])) == (1, 0)


def test_the_example_preconditioning_passes_the_boundary_condition():
    import torch

    scope: dict[str, type] = {}
    exec(PYTHON[1], scope)
    f, g = scope["Squared"]()(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.5]))
    assert (f.tolist(), g.tolist()) == ([1.0, 0.25], [0.0, 0.75])
