"""Runs that are killed, stopped, crowded or damaged: nothing is lost and nothing goes on silently."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from cdistill.storage.checkpoints import load_checkpoint
from cdistill.storage.files import file_digest, list_checkpoints
from cdistill.storage.run_folder import RunFolder
from tests.conftest import command, environment, fast_distill
from tests.runner import (
    final_state,
    finish,
    finish_here,
    kill,
    outcome,
    records,
    start,
    steps_of,
    wait_for_step,
    wait_until,
)

pytestmark = pytest.mark.slow
MANY = ("training.iterations=60", "evaluation.every=20")
RESTLESS = (
    "training.iterations=60", "evaluation.every=10", "checkpoint.keep=1", 'checkpoint.best="teacher-mse@2"',
    "training.learning_rate=0.3", "training.ema_rate=0.5", "objective.target_rate=0.5", "seed=1",
)  # fmt: skip
KNOWN = "preconditioning.name=ctm"  # nothing is estimated and drawn first
ENDLESS = (KNOWN, "training.iterations=100000", "checkpoint.every=50")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    found = finish_here(fast_distill(folder / "run", *MANY), folder)
    assert found.returncode == 0, found.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The same in two processes."""
    folder = tmp_path_factory.mktemp("together")
    found = finish([*fast_distill(folder / "run", *MANY), "--nproc", "2"], folder)
    assert found.returncode == 0, found.stderr
    return folder / "run"


def works_in(run: Path, process: subprocess.Popen[str]) -> bool:
    """Whether the process has imported everything and holds the lock of the run."""
    return any(Path(file.path).is_relative_to(run) for file in psutil.Process(process.pid).open_files())


def test_killed_at_random_moments_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, uninterrupted):
    run = tmp_path / "run"
    arguments = fast_distill(run, *MANY)
    draw = random.Random(0)
    for _ in range(4):
        process = start(arguments, tmp_path)
        wait_until(partial(works_in, run, process), process)
        time.sleep(draw.uniform(0.0, 4.0))  # in the estimation, the training or the evaluation
        kill(process)
    found = finish_here(arguments, tmp_path)
    assert found.returncode == 0, found.stderr
    assert outcome(run) == outcome(uninterrupted)


def test_killed_inside_training_resumes_from_the_last_checkpoint(tmp_path, uninterrupted):
    run = tmp_path / "run"
    arguments = fast_distill(run, *MANY)
    process = start(arguments, tmp_path)
    wait_for_step(run, 20, process)
    kill(process)
    assert finish_here(arguments, tmp_path).returncode == 0
    assert final_state(run) == final_state(uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signals_save_first_and_say_so(tmp_path, number, code):
    run = tmp_path / "run"
    process = start(fast_distill(run, *ENDLESS), tmp_path)
    wait_for_step(run, 50, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "run the same command to resume" in errors
    assert "Traceback" not in errors
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    assert int(list_checkpoints(run / "checkpoints")[-1].name[5:]) == status["step"]


def test_two_processes_killed_and_resumed_are_two_processes_uninterrupted(tmp_path, together):
    run = tmp_path / "run"
    arguments = [*fast_distill(run, *MANY), "--nproc", "2"]
    process = start(arguments, tmp_path)
    wait_for_step(run, 10, process)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert steps_of(run)[-1] < 60
    found = finish(arguments, tmp_path)
    assert found.returncode == 0, found.stderr
    assert final_state(run) == final_state(together)


def children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


@pytest.mark.parametrize(
    ("number", "code", "receiver"),
    [  # SIGTERM to the launcher is in test_estimate.py
        (signal.SIGUSR1, 75, "launcher"),
        (signal.SIGINT, 130, "launcher"),
        (signal.SIGTERM, 75, "rank 0"),
        (signal.SIGUSR1, 75, "rank 1"),
    ],
)
def test_two_processes_stop_together_on_a_signal(tmp_path, number, code, receiver):
    """Whoever gets the signal, both save at the same step and end."""
    run = tmp_path / "run"
    process = start([*fast_distill(run, *ENDLESS, "checkpoint.every=10"), "--nproc", "2"], tmp_path)
    wait_for_step(run, 10, process)
    os.kill(process.pid if receiver == "launcher" else children(process.pid)[int(receiver[-1])], number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.count("run the same command to resume") == 1
    assert "Traceback" not in errors
    status = RunFolder(run).status()
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    assert steps_of(run)[-1] == status["step"]


def agree(first: Path, second: Path) -> None:
    """The weights differ by float32 rounding only."""
    ours, whole = (load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])[0] for folder in (first, second))
    for group in ("weights", "ema"):
        for name, value in whole[group].items():
            torch.testing.assert_close(ours[group][name], value, rtol=1e-4, atol=1e-5)


def test_two_processes_agree_with_one_to_rounding(uninterrupted, together):
    """Same draws, same global batch."""
    assert json.loads((together / "env.json").read_text())["processes"] == 2
    agree(together, uninterrupted)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_resumed_with_another_number_of_processes_it_agrees_to_rounding_and_says_so(
    tmp_path, uninterrupted, together, first, then
):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted if first == 1 else together, run)
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])
    assert steps_of(run)[-1] == 50
    if then == 1:
        found = finish_here(fast_distill(run, *MANY), tmp_path)
    else:
        found = finish([*fast_distill(run, *MANY), "--nproc", "2"], tmp_path)
    assert found.returncode == 0, found.stderr
    line = next(line for line in found.stderr.splitlines() if "no longer the same last bits" in line)
    assert f"processes {first} -> {then}" in line
    assert steps_of(run)[-1] == 60
    agree(run, uninterrupted)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path):
    code = (
        "import accelerate, cdistill.cli.app as c, types, cdistill.training.loop as l\n"
        "l.Accelerator = lambda **k: types.SimpleNamespace(num_processes=1)\n"
        f"raise SystemExit(c.run({fast_distill(tmp_path / 'run', KNOWN)!r}))"
    )
    variables = environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    found = subprocess.run(
        [*command([])[:1], "-c", code], cwd=Path(__file__).parents[2], env=variables, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert "each is alone" in found.stderr


def test_a_run_in_use_is_refused(tmp_path):
    run = tmp_path / "run"
    with RunFolder(run).locked():
        found = finish_here(fast_distill(run), tmp_path)
    assert found.returncode == 6
    assert found.stderr.count("\n") == 1
    assert "another process works in this run" in found.stderr


def test_two_runs_in_one_folder_do_not_meet(tmp_path):
    """The second is refused whatever its number of processes; the first does not notice."""
    run = tmp_path / "run"
    arguments = fast_distill(run, *ENDLESS)
    process = start(arguments, tmp_path)
    wait_for_step(run, 50, process)
    before = RunFolder(run).status()
    for processes, run_it in (("1", finish_here), ("2", finish)):
        found = run_it([*arguments, "--nproc", processes], tmp_path)
        assert found.returncode == 6, found.stderr
        assert found.stderr.count("another process works in this run; wait, or choose another --out") == 1
        assert "Traceback" not in found.stderr
    assert RunFolder(run).status()["state"] == before["state"] == "running"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert steps_of(run)[-1] > 50


def test_a_changed_recipe_is_refused_on_resume(uninterrupted, tmp_path):
    found = finish_here(fast_distill(uninterrupted, *MANY, "training.learning_rate=0.5"), tmp_path)
    assert found.returncode == 2
    assert "training.learning_rate: 0.002 -> 0.5" in found.stderr


def test_another_teacher_is_noticed_on_resume(tmp_path, uninterrupted):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest = list_checkpoints(run / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    state["identity"]["teacher_sha256"] = "0" * 64
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = file_digest(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    for arguments in (fast_distill(run, *MANY), ["evaluate", "--run", str(run)]):
        found = finish_here(arguments, tmp_path)
        assert found.returncode == 4
        assert "made with another teacher" in found.stderr


def test_fewer_iterations_than_are_done_are_refused(uninterrupted, tmp_path):
    found = finish_here(fast_distill(uninterrupted, "training.iterations=20"), tmp_path)
    assert found.returncode == 2
    assert "has 60 steps already" in found.stderr


def test_checkpoints_without_a_recipe_are_refused(tmp_path, uninterrupted):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "recipe.resolved.toml").unlink()
    assert finish_here(fast_distill(run, *MANY), tmp_path).returncode == 4
    assert finish_here(["evaluate", "--run", str(run)], tmp_path).returncode == 4


def test_never_refuses_a_folder_with_a_run(uninterrupted, tmp_path):
    found = finish_here([*fast_distill(uninterrupted, *MANY), "--resume", "never"], tmp_path)
    assert found.returncode == 2
    assert "already holds a run" in found.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_after_its_removal(tmp_path, uninterrupted):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest = list_checkpoints(run / "checkpoints")[-1]
    data = bytearray((newest / "weights.safetensors").read_bytes())
    data[-5] ^= 4
    (newest / "weights.safetensors").write_bytes(data)
    found = finish_here(fast_distill(run, *MANY), tmp_path)
    assert found.returncode == 4
    message = found.stderr.strip().splitlines()[-1]
    assert "weights.safetensors was altered; remove this folder to resume from step-00000050" in message
    shutil.rmtree(newest)
    assert finish_here(fast_distill(run, *MANY), tmp_path).returncode == 0
    assert outcome(run) == outcome(uninterrupted)


def test_a_full_disk_ends_with_7_and_keeps_the_previous_checkpoint(tmp_path):
    run = tmp_path / "run"
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from cdistill.cli.app import run\n"
        "import cdistill.training.loop as loop\n"
        "save = loop.save\n"
        "def small(task, folder, done, *more):\n"
        "    if done == 20: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "    save(task, folder, done, *more)\n"
        "loop.save = small\n"
        "raise SystemExit(run(sys.argv[1:]))"
    )
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [*command([])[:1], "-c", code, root, *fast_distill(run, KNOWN)], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 7, found.stderr
    assert "disk (or quota) is full" in found.stderr
    assert "Traceback" not in found.stderr
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000010"]
    assert finish_here(fast_distill(run, KNOWN), tmp_path).returncode == 0


def test_a_finished_run_is_measured_again_with_the_same_result(tmp_path, uninterrupted):
    before = RunFolder(uninterrupted).results()["rows"]
    found = finish_here(fast_distill(uninterrupted, *MANY), tmp_path)
    assert found.returncode == 0
    assert RunFolder(uninterrupted).results()["rows"] == before


def test_accelerate_runs_the_folder(tmp_path):
    run = tmp_path / "run"
    launcher = [*command([])[:1], "-m", "accelerate.commands.accelerate_cli", "launch", "cdistill"]
    found = subprocess.run(
        [*launcher, *fast_distill(run, KNOWN, recipe="recipes/mixture.toml")], cwd=Path(__file__).parents[2],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads((run / "env.json").read_text())["threads"] >= 1
    assert (run / "evaluation.json").is_file()


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc-per-node=2"],
        ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_other_launchers_start_two_processes_that_work_together(tmp_path, launcher):
    run = tmp_path / "run"
    found = subprocess.run(
        [*command([])[:1], *launcher, "cdistill", *fast_distill(run, KNOWN)], cwd=Path(__file__).parents[2],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads((run / "env.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc-per-node=2"],
        ["-m", "accelerate.commands.accelerate_cli", "launch"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_a_signal_to_another_launcher_is_no_loss(tmp_path, launcher):
    """torchrun passes SIGTERM on; accelerate's launcher of one process just dies, which counts as SIGTERM."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*command([])[:1], *launcher, "cdistill", *fast_distill(run, *ENDLESS, "checkpoint.every=10")],
        cwd=Path(__file__).parents[2], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for_step(run, 10, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # the pipe is open until the last of its processes has ended
    status = RunFolder(run).status()
    assert (status["state"], status["exit_code"]) == ("stopped", 75), errors
    assert steps_of(run)[-1] == status["step"]


@pytest.fixture(scope="module")
def restless(tmp_path_factory):
    """A run with so large steps that its measurements go up and down; every checkpoint is measured, one is kept."""
    folder = tmp_path_factory.mktemp("restless")
    found = finish_here(fast_distill(folder / "run", *RESTLESS), folder)
    assert found.returncode == 0, found.stderr
    return folder / "run"


def measured(run: Path) -> dict[int, float]:
    return {record["step"]: record["rows"][1]["values"]["teacher-mse"] for record in records(run, "evaluation")}


def test_the_best_checkpoint_is_kept_besides_the_last(restless):
    values = measured(restless)
    best = min((step for step in values if step), key=values.__getitem__)
    assert list(values) == [0, 10, 20, 30, 40, 50, 60]
    assert best < 50
    assert RunFolder(restless).best_step("teacher-mse@2") == best
    assert steps_of(restless) == [best, 60]


def test_the_best_checkpoint_outlives_a_kill_and_the_run_is_uninterrupted(tmp_path, restless):
    run = tmp_path / "run"
    best = steps_of(restless)[0]
    arguments = fast_distill(run, *RESTLESS)
    process = start(arguments, tmp_path)
    wait_until(lambda: best in measured(run), process)
    kill(process)
    found = finish_here(arguments, tmp_path)
    assert found.returncode == 0, found.stderr
    assert f"best: step {best}" in found.stderr
    assert steps_of(run) == steps_of(restless)
    assert outcome(run) == outcome(restless)


@pytest.mark.parametrize("step", ["best", "40", "last"])
def test_evaluate_measures_the_step_that_is_chosen(tmp_path, restless, step):
    """The same seeds as in the run, so the same number as its own record of that step."""
    found = finish_here(["evaluate", "--run", str(restless), "--step", step, "--json"], tmp_path)
    assert found.returncode == 0, found.stderr
    record = json.loads(found.stdout)
    assert record["step"] == (60 if step == "last" else 40)
    value = next(row["values"] for row in record["rows"] if (row["sampler"], row["nfe"]) == ("student", 2))
    assert value["teacher-mse"] == measured(restless)[record["step"]]
    assert RunFolder(restless).results()["step"] == 60


def test_sample_draws_from_the_step_that_is_chosen(tmp_path, restless):
    drawn = []
    for step, number in (("best", 40), ("40", 40), ("last", 60)):
        arguments = ["sample", "--run", str(restless), "--step", step, "--format", "npz", "--out", str(tmp_path / step)]
        found = finish_here([*arguments, "--seeds", "0-7"], tmp_path)
        assert found.returncode == 0, found.stderr
        assert f"step {number}" in found.stderr
        drawn.append(file_digest(tmp_path / step / "nfe2.npz"))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path, restless, name):
    found = finish_here([name, "--run", str(restless), "--step", "15"], tmp_path)
    assert found.returncode == 3
    assert found.stderr.splitlines()[-1].endswith(
        "no checkpoint of step 15; there are steps 40, 60; choose one with --step"
    )
