"""Runs that are killed, stopped, crowded or damaged: nothing is lost and nothing goes on silently."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cdistill.checkpoint import load_checkpoint, tensor_digest
from cdistill.runs import RunFolder
from cdistill.storage import file_digest, list_checkpoints
from tests.conftest import command, environment, fast_distill

pytestmark = pytest.mark.slow
MANY = "training.iterations=60"


def start(arguments: list[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(arguments), cwd=cwd, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def finish(arguments: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(arguments), cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=300
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not any(int(path.name[5:]) >= step for path in list_checkpoints(run / "checkpoints")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def final_state(run: Path) -> dict[str, str]:
    """Digest of every tensor group of the newest checkpoint."""
    groups, _ = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return {stem: tensor_digest(tensors) for stem, tensors in groups.items()}


def train_records(run: Path) -> list[dict[str, float]]:
    records = [r for r in RunFolder(run).metrics() if r["event"] == "train"]
    return [{key: value for key, value in r.items() if key != "images_per_second"} for r in records]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    found = finish(fast_distill(folder / "run", MANY), folder)
    assert found.returncode == 0, found.stderr
    return folder / "run"


def test_killed_at_random_moments_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, uninterrupted):
    run = tmp_path / "run"
    arguments = fast_distill(run, MANY)
    draw = random.Random(0)
    for _ in range(4):
        process = start(arguments, tmp_path)
        time.sleep(draw.uniform(2.0, 6.0))  # in the start, the estimation, the training or the evaluation
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    found = finish(arguments, tmp_path)
    assert found.returncode == 0, found.stderr
    assert final_state(run) == final_state(uninterrupted)
    assert train_records(run) == train_records(uninterrupted)
    assert RunFolder(run).results()["rows"] == RunFolder(uninterrupted).results()["rows"]
    name = "coefficients.safetensors"
    assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_killed_inside_training_resumes_from_the_last_checkpoint(tmp_path, uninterrupted):
    run = tmp_path / "run"
    arguments = fast_distill(run, MANY)
    process = start(arguments, tmp_path)
    wait_for_step(run, 20, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert finish(arguments, tmp_path).returncode == 0
    assert final_state(run) == final_state(uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signals_save_first_and_say_so(tmp_path, uninterrupted, number, code):
    run = tmp_path / "run"
    arguments = fast_distill(run, "training.iterations=100000", "checkpoint.every=50")
    process = start(arguments, tmp_path)
    wait_for_step(run, 50, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "run the same command to go on" in errors
    assert "Traceback" not in errors
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    assert int(list_checkpoints(run / "checkpoints")[-1].name[5:]) == status["step"]


def test_two_processes_killed_and_resumed_are_two_processes_uninterrupted(tmp_path):
    results = []
    for name, interrupt in (("whole", False), ("killed", True)):
        run = tmp_path / name
        arguments = [*fast_distill(run), "--nproc", "2"]
        if interrupt:
            process = start(arguments, tmp_path)
            wait_for_step(run, 10, process)
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)
            process.communicate(timeout=60)
            assert process.returncode != 0
        found = finish(arguments, tmp_path)
        assert found.returncode == 0, found.stderr
        results.append(final_state(run))
    assert results[0] == results[1]


def children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]


def test_two_processes_stop_together_on_a_signal(tmp_path):
    run = tmp_path / "run"
    process = start([*fast_distill(run, "training.iterations=100000"), "--nproc", "2"], tmp_path)
    wait_for_step(run, 10, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.count("run the same command to go on") == 1
    assert "Traceback" not in errors


def test_two_processes_agree_with_one_to_rounding(tmp_path):
    """Same draws, same global batch: the weights differ by float32 rounding only."""
    import torch

    states = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        found = finish([*fast_distill(run), "--nproc", str(processes)], tmp_path)
        assert found.returncode == 0, found.stderr
        states.append(load_checkpoint(list_checkpoints(run / "checkpoints")[-1])[0]["weights"])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path):
    code = (
        "import accelerate, cdistill.cli as c, types, cdistill.training.loop as l\n"
        "l.Accelerator = lambda **k: types.SimpleNamespace(num_processes=1)\n"
        f"raise SystemExit(c.run({fast_distill(tmp_path / 'run')!r}))"
    )
    variables = environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    found = subprocess.run(
        [*command([])[:1], "-c", code], cwd=Path(__file__).parents[1], env=variables, capture_output=True, text=True
    )
    assert found.returncode == 2
    assert "each is alone" in found.stderr


def test_a_run_in_use_is_refused(tmp_path):
    run = tmp_path / "run"
    with RunFolder(run).locked():
        found = finish(fast_distill(run), tmp_path)
    assert found.returncode == 6
    assert found.stderr.count("\n") == 1
    assert "another process works in this run" in found.stderr


def test_a_changed_recipe_is_refused_on_resume(uninterrupted, tmp_path):
    found = finish(fast_distill(uninterrupted, MANY, "training.learning_rate=0.5"), tmp_path)
    assert found.returncode == 2
    assert "training.learning_rate: 0.002 -> 0.5" in found.stderr


def test_another_teacher_is_noticed_on_resume(tmp_path, uninterrupted):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest = list_checkpoints(run / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    state["identity"]["teacher_sha256"] = "0" * 64
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = file_digest(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    for arguments in (fast_distill(run, MANY), ["evaluate", "--run", str(run)]):
        found = finish(arguments, tmp_path)
        assert found.returncode == 4
        assert "made with another teacher" in found.stderr


def test_fewer_iterations_than_are_done_are_refused(uninterrupted, tmp_path):
    found = finish(fast_distill(uninterrupted, "training.iterations=20"), tmp_path)
    assert found.returncode == 2
    assert "has 60 steps already" in found.stderr


def test_checkpoints_without_a_recipe_are_refused(tmp_path, uninterrupted):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "recipe.resolved.toml").unlink()
    assert finish(fast_distill(run, MANY), tmp_path).returncode == 4
    assert finish(["evaluate", "--run", str(run)], tmp_path).returncode == 4


def test_never_refuses_a_folder_with_a_run(uninterrupted, tmp_path):
    found = finish([*fast_distill(uninterrupted, MANY), "--resume", "never"], tmp_path)
    assert found.returncode == 2
    assert "already holds a run" in found.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_after_its_removal(tmp_path, uninterrupted):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    newest = list_checkpoints(run / "checkpoints")[-1]
    data = bytearray((newest / "weights.safetensors").read_bytes())
    data[-5] ^= 4
    (newest / "weights.safetensors").write_bytes(data)
    found = finish(fast_distill(run, MANY), tmp_path)
    assert found.returncode == 4
    assert "weights.safetensors was altered" in found.stderr
    shutil.rmtree(newest)
    assert finish(fast_distill(run, MANY), tmp_path).returncode == 0
    assert final_state(run) == final_state(uninterrupted)


def test_a_full_disk_ends_with_7_and_keeps_the_previous_checkpoint(tmp_path):
    run = tmp_path / "run"
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from cdistill.cli import run\n"
        "import cdistill.training.loop as loop\n"
        "save = loop.save\n"
        "def small(task, folder, done, keep):\n"
        "    if done == 20: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "    save(task, folder, done, keep)\n"
        "loop.save = small\n"
        "raise SystemExit(run(sys.argv[1:]))"
    )
    root = str(Path(__file__).parents[1])
    found = subprocess.run(
        [*command([])[:1], "-c", code, root, *fast_distill(run)], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 7, found.stderr
    assert "disk (or quota) is full" in found.stderr
    assert "Traceback" not in found.stderr
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000010"]
    assert finish(fast_distill(run), tmp_path).returncode == 0


def test_a_finished_run_is_measured_again_with_the_same_result(tmp_path, uninterrupted):
    before = RunFolder(uninterrupted).results()["rows"]
    found = finish(fast_distill(uninterrupted, MANY), tmp_path)
    assert found.returncode == 0
    assert RunFolder(uninterrupted).results()["rows"] == before


def test_accelerate_runs_the_folder(tmp_path):
    run = tmp_path / "run"
    launcher = [*command([])[:1], "-m", "accelerate.commands.accelerate_cli", "launch", "cdistill"]
    found = subprocess.run(
        [*launcher, *fast_distill(run, recipe="recipes/mixture.toml")], cwd=Path(__file__).parents[1],
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
        [*command([])[:1], *launcher, "cdistill", *fast_distill(run)], cwd=Path(__file__).parents[1],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads((run / "env.json").read_text())["processes"] == 2
