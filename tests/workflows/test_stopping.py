"""What ends a command from outside, and what is known of it afterwards."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from cdistill.cli.app import run
from cdistill.errors import DivergedError
from cdistill.runtime.processes import _free_port, is_gone, this_process
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.storage.files import list_checkpoints
from cdistill.storage.run_folder import RunFolder
from tests.archives import encode, random_images, write_folder
from tests.conftest import FAST, command, environment
from tests.runner import kill, start, steps_of, wait_for_step

LONG = ["distill", "--recipe", "mixture", "--out", "r", *(
    word for value in [*FAST, "preconditioning.name=ctm", "training.iterations=100000"] for word in ("--set", value)
)]  # fmt: skip


def start_with(handler: signal.Handlers, cwd: Path) -> subprocess.Popen[str]:
    """Starts a long run that a shell has told what SIGHUP means; else it would depend on how the tests were started."""
    return subprocess.Popen(
        command(LONG), cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, handler),
    )  # fmt: skip


@pytest.mark.slow
def test_a_terminal_that_closes_stops_a_run_that_saves(tmp_path):
    process = start_with(signal.SIG_DFL, tmp_path)
    wait_for_step(tmp_path / "r", 10, process)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, RunFolder(tmp_path / "r").status()["state"]) == (75, "stopped"), errors
    assert "SIGHUP came, saved at step" in errors


@pytest.mark.slow
def test_nohup_outlives_the_terminal_and_a_killed_run_is_known_to_be_dead(tmp_path, capsys):
    process = start_with(signal.SIG_IGN, tmp_path)
    folder = RunFolder(tmp_path / "r")
    wait_for_step(folder.path, 10, process)
    process.send_signal(signal.SIGHUP)
    wait_for_step(folder.path, folder.status()["step"] + 20, process)
    assert folder.status()["state"] == "running"
    kill(process)
    assert folder.status()["state"] == "died"
    assert run(["inspect", str(folder.path)]) == 0
    assert "died" in capsys.readouterr().out
    assert run(["report", str(folder.path), "--out", str(tmp_path / "x.html")]) == 0
    assert "died: its process is gone" in (tmp_path / "x.html").read_text()


def second_of_two(parent: int, port: int, cwd: Path) -> subprocess.Popen[str]:
    """Starts rank 1 of two; rank 0 would listen on the port."""
    launched = {
        "CDISTILL_PARENT": parent, "RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    there = environment(**{name: str(value) for name, value in launched.items()})
    return subprocess.Popen(command(LONG), cwd=cwd, env=there, stderr=subprocess.PIPE, text=True)


def test_a_process_whose_launcher_died_before_it_could_ask_ends_before_it_waits(tmp_path):
    process = second_of_two(1, _free_port(), tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_process_that_waits_for_another_ends_on_a_signal(tmp_path):
    """The other never answers; torch waits there for half an hour, and no handler of Python's is run."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = second_of_two(os.getpid(), silent.getsockname()[1], tmp_path)
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            time.sleep(0.5)
            process.terminate()
            process.communicate(timeout=10)
        assert process.returncode == 75


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.4, 1.5])
def test_a_launcher_that_is_killed_takes_its_processes_with_it(tmp_path, delay):
    process = start([*LONG, "--nproc", "2"], tmp_path)
    launcher = psutil.Process(process.pid)
    while len(children := launcher.children()) < 2:
        time.sleep(0.005)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert not psutil.wait_procs(children, timeout=60)[1]


def test_a_process_is_gone_when_it_has_ended_and_another_one_has_its_number():
    own = this_process()
    assert not is_gone(own)
    assert is_gone({**own, "began": own["began"] - 60})
    child = subprocess.Popen(["true"])
    there = {**own, "pid": child.pid}
    child.wait()
    assert is_gone(there)
    for unknown in (
        None,
        {},
        [],
        {**own, "host": "elsewhere", "pid": child.pid},
        {**own, "pid": "x"},
        {**own, "pid": -1},
    ):
        assert not is_gone(unknown)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"CDISTILL_THREADS": "99999"}, "$CDISTILL_THREADS: got '99999'; needs a whole number from 1 to 1,024"),
        ({"CDISTILL_THREADS": "0"}, "$CDISTILL_THREADS: got '0'"),
        ({"CDISTILL_THREADS": "-1"}, "$CDISTILL_THREADS: got '-1'"),
        ({"CDISTILL_THREADS": "²"}, "$CDISTILL_THREADS: got '²'"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "$RANK: got 'x'"),
        ({"RANK": "1"}, "launch: $RANK is 1, $WORLD_SIZE None"),
        ({"WORLD_SIZE": "2"}, "launch: $RANK is None, $WORLD_SIZE 2"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "launch: $RANK is 2, $WORLD_SIZE 2"),
        ({"LOCAL_WORLD_SIZE": "0"}, "$LOCAL_WORLD_SIZE: got '0'"),
    ],
)
def test_what_the_environment_says_makes_sense_or_is_refused(variables, words, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = run(["ls"])
    monkeypatch.undo()
    assert (code, words in capsys.readouterr().err or variables.get("RANK") in ("1", "2")) == (2, True)


def break_weights(path: Path, kind: str) -> None:
    tensors, header = load_tensors(path, kind)
    next(tensor for name, tensor in tensors.items() if tensor.ndim > 1)[0, 0] = torch.nan
    save_tensors(path, tensors, kind, {key: header[key] for key in header if key not in ("kind", "schema")})


def test_networks_that_hold_nan_are_not_drawn_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shipped = Path(__file__).parents[2] / "cdistill/teachers/assets/digits.safetensors"
    Path("t.safetensors").write_bytes(shipped.read_bytes())
    break_weights(Path("t.safetensors"), "teacher")
    assert run(["sample", "--teacher", "t.safetensors", "--seeds", "0"]) == 4
    assert "holds NaN or infinity: this network has diverged" in capsys.readouterr().err
    small = [*FAST, "preconditioning.name=ctm", "training.iterations=1"]
    assert run(["distill", "--recipe", "mixture", *(w for v in small for w in ("--set", v)), "--out", "r"]) == 0
    checkpoint = list_checkpoints(Path("r/checkpoints"))[-1]
    break_weights(checkpoint / "ema.safetensors", "checkpoint")
    (checkpoint / "manifest.json").unlink()
    from cdistill.storage.files import file_digest

    names = sorted(path.name for path in checkpoint.iterdir())
    (checkpoint / "manifest.json").write_text(json.dumps({name: file_digest(checkpoint / name) for name in names}))
    assert run(["sample", "--run", "r", "--nfe", "1", "--seeds", "0", "--format", "npz"]) == 4
    assert "this student has diverged; choose another --step" in capsys.readouterr().err


def test_a_training_that_changed_nothing_at_its_end_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from cdistill.training import loop

    plain = loop.read

    def break_last(accelerator, values):
        report = plain(accelerator, values)
        step = json.loads(Path("r/status.json").read_text())["step"]
        return loop.Report({**report.values, "consistency": torch.nan}, 0) if step >= broken_from else report

    monkeypatch.setattr(loop, "read", break_last)
    small = [*FAST, "preconditioning.name=ctm", "training.iterations=6", "checkpoint.every=4", "training.patience=5"]
    arguments = ["distill", "--recipe", "mixture", *(w for v in small for w in ("--set", v))]
    broken_from = 4
    assert run([*arguments, "--out", "r"]) == 0
    assert "the last 2 steps were skipped, not finite: the weights are those before them" in capsys.readouterr().err
    assert "the last 2 steps were skipped" in RunFolder(Path("r")).status()["note"]
    Path("r").rename("first")
    broken_from = 0
    assert run([*arguments, "--set", "training.patience=9", "--out", "r"]) == DivergedError.exit_code
    assert "all 6 steps were skipped, not finite: nothing is trained" in capsys.readouterr().err


def test_a_student_is_drawn_from_without_its_teacher(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    shipped = Path(__file__).parents[2] / "cdistill/teachers/assets/digits.safetensors"
    Path("t.safetensors").write_bytes(shipped.read_bytes())
    small = [*FAST, "teacher=t.safetensors", "training.iterations=1", "evaluation.samples=16"]
    assert run(["distill", "--recipe", "digits-paper", *(w for v in small for w in ("--set", v)), "--out", "r"]) == 0
    draw = ["sample", "--run", "r", "--nfe", "1", "--seeds", "0-3", "--format", "npz"]
    assert run([*draw, "--out", "before"]) == 0
    Path("t.safetensors").rename("moved.safetensors")
    assert run([*draw, "--out", "after"]) == 0
    assert Path("before/nfe1.npz").read_bytes() == Path("after/nfe1.npz").read_bytes()
    capsys.readouterr()
    assert run(["evaluate", "r", "--nfe", "1"]) == 3
    assert (
        "is not there, with which students are compared; say where its weights are: --weights"
        in capsys.readouterr().err
    )
    assert run(["evaluate", "r", "--nfe", "1", "--weights", "moved.safetensors"]) == 0
    assert run([*draw, "--out", "wrong", "--weights", "nowhere.safetensors"]) == 3


def test_data_that_were_repaired_are_accepted_when_a_person_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    images = random_images(40, 12, 1)
    write_folder(tmp_path / "data", {f"{k:02d}.png": encode(image) for k, image in enumerate(images)})
    small = [*FAST, "data=data/", "evaluation.split=train", "evaluation.samples=16", "training.iterations=2"]
    arguments = ["distill", "--recipe", "patches-paper", "--out", "r"]
    assert run([*arguments, *(w for v in small for w in ("--set", v))]) == 0
    (tmp_path / "data" / "07.png").write_bytes(encode(255 - images[7]))
    longer = [*arguments, *(w for v in [*small[:-1], "training.iterations=3"] for w in ("--set", v))]
    assert run(longer) == 4
    assert "made with other data than given now; give these, or --accept-data" in capsys.readouterr().err
    assert run([*longer, "--accept-data"]) == 0
    assert RunFolder(Path("r")).status()["step"] == 3


def test_windows_is_told_what_runs_there(monkeypatch):

    from cdistill.__main__ import main

    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="runs on Linux and macOS; on Windows, run it in WSL 2"):
        main()


def test_nothing_that_macos_lacks_is_needed_at_import(run_python):
    gone = "import os, sys, torch\nsys.platform = 'darwin'\ndel os.sched_getaffinity\n"
    code = f"{gone}import cdistill.cli.app, cdistill.workflows.distill\nprint(cdistill.__version__)"
    assert run_python(code).strip()


@pytest.mark.slow
def test_two_nodes_share_a_folder_and_when_one_dies_the_other_ends_and_the_run_resumes(tmp_path):
    """Two agents of torchrun, as on two machines; the second is killed with its process, which sends nothing."""
    port = _free_port()

    def node(rank: int) -> subprocess.Popen[str]:
        options = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
        place = ["--master_addr", "127.0.0.1", "--master_port", str(port), "-m", "cdistill"]
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *place, *LONG], cwd=tmp_path,
            env=environment(PYTHONPATH=str(Path(__file__).parents[2])), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip

    first, second = nodes = node(0), node(1)
    wait_for_step(tmp_path / "r", 10, first)
    for process in (*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)):
        process.kill()
    _, errors = first.communicate(timeout=60)
    second.communicate()
    assert errors.count("error: another of the processes has died; what was saved is kept") == 1, errors
    status = RunFolder(tmp_path / "r").status()
    assert (status["state"], status["exit_code"]) == ("stopped", 75)
    done = steps_of(tmp_path / "r")[-1]
    nodes = node(0), node(1)
    wait_for_step(tmp_path / "r", done + 10, nodes[0])
    for process in nodes:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    assert RunFolder(tmp_path / "r").status()["state"] == "stopped"
