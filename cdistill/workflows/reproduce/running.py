"""Runs commands of this program side by side, each in its own process; what is done already is not run again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdistill.errors import CdistillError, DivergedError
from cdistill.runtime import signals as stopping
from cdistill.runtime.console import progress, say

_POLL = 0.2  # seconds
_GRACE = 60.0  # seconds that jobs get to save


@dataclass(frozen=True)
class Job:
    """A command of this program.

    Attributes:
        name: Of its log.
        arguments: Command line without the program.
        cost: How long it takes, in any unit.
        threads: How many it has; 0 for all that there are.
        done: Returns how much of it is done, from 0 to 1; 1 means that it need not run.
        prepare: Called before it starts.
        may_diverge: Whether it is no failure when it ends with the code of a training that diverged.
    """

    name: str
    arguments: Sequence[str]
    cost: float
    threads: int
    done: Callable[[], float]
    prepare: Callable[[], object] = lambda: None
    may_diverge: bool = False


def run_jobs(jobs: Sequence[Job], at_once: int, logs: Path, title: str) -> None:
    """Runs what is not done yet, `at_once` at a time, in their order, and shows a bar.

    Raises:
        StoppedError: A signal came; the jobs that ran have saved.
        CdistillError: Some failed, the others are done; the error is the first one's.
    """
    failures: list[CdistillError] = []
    waiting = [job for job in jobs if job.done() < 1]
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    logs.mkdir(parents=True, exist_ok=True)
    shown = _work(jobs)
    try:
        with progress(round(sum(job.cost for job in jobs)), title, "step", shown) as advance:
            while waiting or running:
                stopping.check("reproduce")
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job.name] = job, _start(job, logs)
                time.sleep(_POLL)
                for name, (job, child) in list(running.items()):
                    if child.poll() is not None:
                        del running[name]
                        failures += _failure(job, child.returncode, logs)
                now = _work(jobs)
                if now > shown:
                    advance(now - shown, f"{len(waiting) + len(running)} to go: {', '.join(running)}")
                    shown = now
    finally:
        _stop([child for _, child in running.values()])
    if failures:
        raise failures[0]


def log_of(logs: Path, name: str) -> Path:
    """Returns the file that holds what a job said."""
    return logs / f"{name}.log"


def _work(jobs: Sequence[Job]) -> int:
    return round(sum(job.cost * job.done() for job in jobs))


def _start(job: Job, logs: Path) -> subprocess.Popen[bytes]:
    job.prepare()
    environment = {**os.environ, stopping.PARENT: str(os.getpid())}
    if job.threads:
        environment |= {"CDISTILL_THREADS": str(job.threads), "OMP_NUM_THREADS": str(job.threads)}
    with log_of(logs, job.name).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cdistill", *job.arguments], env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _failure(job: Job, code: int, logs: Path) -> list[CdistillError]:
    """Returns the error of a job that ended with `code`, if it is one, and says so."""
    if code == 0:
        return []
    if code == DivergedError.exit_code and job.may_diverge:
        say(f"{job.name}: diverged")
        return []
    lines = log_of(logs, job.name).read_text(errors="replace").splitlines() or [""]
    error = CdistillError(f"{job.name}: ended with code {code}: {lines[-1].removeprefix('error: ')}")
    error.exit_code = code if code > 0 else 1
    say(str(error))
    return [error]


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tells jobs to save and stop, waits for them, and kills those that do not."""
    for child in children:
        child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
