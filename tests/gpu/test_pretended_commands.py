"""Every command that uses a network on a CUDA device that is pretended, and what it waits for."""

from pathlib import Path

import pytest

from cdistill.cli.app import run
from cdistill.estimation import collecting
from cdistill.storage.run_folder import RunFolder
from tests import pretended_cuda
from tests.conftest import fast_distill

pytestmark = pytest.mark.skipif(not pretended_cuda.LOADED[0], reason="needs a C++ compiler, and no GPU")


def commands(data: str, folder: Path) -> dict[str, list[str]]:
    """Each command that uses a network, in an order in which it finds what it needs."""
    recipe, teacher = {"digits": ("digits-paper", "digits"), "mixture": ("mixture", "mixture-1d")}[data]
    first, second = str(folder / "first"), str(folder / "second")
    few, short = ["--samples", "64"], ("training.iterations=4", "estimation.timesteps=4")
    listed = {
        "doctor": ["doctor"],
        "plan": ["plan", "--recipe", recipe],
        "estimate-coeffs": [
            "estimate-coeffs",
            "--teacher",
            teacher,
            *few,
            "--timesteps",
            "4",
            "--out",
            "c.safetensors",
        ],
        "estimate-coeffs by derivatives": [
            "estimate-coeffs",
            "--teacher",
            teacher,
            *few,
            "--timesteps",
            "4",
            "--estimator",
            "autodiff",
            "--out",
            "d.safetensors",
        ],
        "trajectories": ["trajectories", "--teacher", teacher, "--points", "5", "--count", "8"],
        "compare": [
            "compare",
            "--teacher",
            teacher,
            "--points",
            "5",
            "--trajectories",
            "8",
            "--substeps",
            "1",
            "--coefficients",
            "c.safetensors",
        ],
        "distill": fast_distill(folder / "first", *short, recipe=recipe),
        "distill from trajectories": fast_distill(
            folder / "second", *short, "objective.name=regression", "trajectories.count=64", recipe=recipe
        ),
        "sample": ["sample", "--run", first, "--seeds", "0-3", "--format", "npz", "--out", "drawn"],
        "sample of a teacher": ["sample", "--teacher", teacher, "--seeds", "0-3", "--format", "npz", "--out", "theirs"],
        "evaluate": ["evaluate", first, "--nfe", "1,2", *few],
        "evaluate several": ["evaluate", first, second, "--nfe", "1,2", *few],
        "evaluate --check": ["evaluate", "--check", f"{first}/evaluation.json"],
        "plot trajectories": ["plot", "trajectories", "--samples", "64", "--count", "8"],
        "inspect": ["inspect", first],
        "report": ["report", first, second],
        "plot curves": ["plot", "curves", first, second],
        "plot coefficients": ["plot", "coefficients", "c.safetensors"],
    }
    if data == "digits":
        listed |= {
            "invert": ["invert", "drawn/nfe2.npz", "--teacher", teacher, "--nfe", "8"],
            "reference-stats": ["reference-stats", "--data", "digits", "--features", "pixels"],
            "train-teacher": [
                "train-teacher", "--recipe", "teacher-digits", "--out", "teacher", "--set", "training.iterations=3",
                "--set", "training.batch_size=16",
            ],
        }  # fmt: skip
    return listed


# What the host waits for beside uploads of weights: no place is inside of a network's calls or a sampler's steps.
ONCE = {
    "value runtime/processes.py:let_main", "read storage/checkpoints.py:tensor_digest",
    "size sampling/sample_store.py:draw",
    "read sampling/sample_store.py:draw", "value sampling/sample_store.py:draw", "value sampling/trajectories.py:open",
    "value workflows/distill.py:_evaluated",
    "read storage/checkpoints.py:<dictcomp>",  # each tensor that is written
    "read estimation/collecting.py:_add_up",  # each round of an estimate
    "read sampling/drawing.py:sample",  # each chunk of samples
    "read workflows/sample.py:<genexpr>",  # the end of an inversion
    "read sampling/moments.py:<listcomp>",  # each chunk of trajectories
    "read training/loop.py:read",  # each step of a training
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "mixture"])
def test_every_command_runs_and_waits_for_results_alone(data, tmp_path, monkeypatch, device, capsys):
    monkeypatch.setattr(collecting, "_CUDA_BLOCKS", 1)  # a GPU's eight take a CPU eight times as long
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    for name, arguments in commands(data, tmp_path).items():
        device.waits.clear()
        assert run(arguments) == 0, (name, capsys.readouterr().err)
        assert {place for place in device.waits if not place.startswith("upload")} <= ONCE, name
        uploads = sum(count for place, count in device.waits.items() if "sampl" in place and "upload" in place)
        assert uploads <= 200, (name, device.waits)
    assert RunFolder(tmp_path / "first").results()["rows"]
