"""Runs of the package, in processes of their own or here, and what two runs of the same recipe have in common."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cdistill.cli.app import run as run_app
from cdistill.runtime import console
from cdistill.storage.checkpoints import load_checkpoint, tensor_digest
from cdistill.storage.files import list_checkpoints, step_of
from cdistill.storage.run_folder import RunFolder
from tests.conftest import command, environment


def start(arguments: Sequence[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Starts `cdistill ...` in a process group of its own."""
    return subprocess.Popen(
        command(arguments), cwd=cwd, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def finish(arguments: Sequence[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `cdistill ...` to its end."""
    return subprocess.run(
        command(arguments), cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=300
    )


def finish_here(arguments: Sequence[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `cdistill ...` to its end in this process, which has all of it imported already."""
    out, errors = StringIO(), StringIO()
    with (
        patch.dict(os.environ, environment(**variables)), chdir(cwd), redirect_stdout(out), redirect_stderr(errors),
        patch.object(console, "_tables", console._tables),  # the place of tables, which every command sets
    ):  # fmt: skip
        code = run_app(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def kill(process: subprocess.Popen[str]) -> None:
    """Kills a process and its group, whatever it does, and waits for its end."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Waits until `happened`, while the process lives."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until the run has a checkpoint of `step` or a later one."""
    wait_until(lambda: (steps := steps_of(run)) and steps[-1] >= step, process)


def steps_of(run: Path) -> list[int]:
    """The steps that a run has checkpoints of."""
    return [step_of(path) for path in list_checkpoints(run / "checkpoints")]


def final_state(run: Path) -> dict[str, str]:
    """Digest of every tensor group of the newest checkpoint."""
    groups, _ = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return {stem: tensor_digest(tensors) for stem, tensors in groups.items()}


def records(run: Path, event: str) -> list[dict[str, Any]]:
    """The records of metrics.jsonl of one kind, but for what depends on the clock."""
    found = [record for record in RunFolder(run).metrics() if record["event"] == event]
    timed = {"images_per_second", "teacher_share"}
    return [{key: value for key, value in record.items() if key not in timed} for record in found]


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must be the same, bit for bit, however often a run was interrupted."""
    folder = RunFolder(run)
    return {
        **{f"tensors of {stem}": digest for stem, digest in final_state(run).items()},
        "training's records": records(run, "train"),
        "evaluations": records(run, "evaluation"),
        "results": folder.results()["rows"],
        "best step": folder.best_step(),
        "coefficients": folder.coefficients.read_bytes(),
    }
