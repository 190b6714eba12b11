"""Kills one run at random moments, resumes it each time, and compares it with an uninterrupted one, bit for bit.

python -m tests.benchmarks.kills --kills 50 --seed 0

The first tenth of the kills come at random while coefficients are estimated, the others in the start of the process,
in training and its evaluations, or while a checkpoint is written. Prints where the kills hit and what differs at the
end, and ends with 1 if anything does; the folders are left.
"""

import argparse
import collections
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from cdistill.runtime.console import say, table
from cdistill.storage.run_folder import RunFolder
from tests.conftest import fast_distill
from tests.runner import finish, kill, outcome, records, start, steps_of

MEASURED_EVERY = 50
STEPS_A_KILL = 20  # so that the run lasts as long as the kills do
MODES = {"start": 2, "training": 5, "checkpoint": 3}


@dataclass(frozen=True)
class Times:
    """Seconds of the uninterrupted run: up to its own work, of estimation, and of training with its evaluations."""

    start: float
    estimation: float
    training: float


def arguments_of(run: Path, kills: int) -> list[str]:
    return fast_distill(
        run, f"training.iterations={STEPS_A_KILL * kills}", "checkpoint.every=5", "training.learning_rate=0.01",
        f"evaluation.every={MEASURED_EVERY}", "evaluation.samples=2048", "estimation.samples=8192",
        "estimation.timesteps=60",
    )  # fmt: skip


def ends_first(process: Popen[str], happened: Callable[[], object]) -> bool:
    """Waits until something `happened`; whether the process ended before."""
    while not happened():
        if process.poll() is not None:
            return True
        time.sleep(0.001)
    return False


def works_since(run: Path, begun: int, *states: str) -> bool:
    """Whether a process that began at that time, in ns, has come to its own work in the run, or so far in it."""
    status = run / "status.json"
    fresh = status.is_file() and status.stat().st_mtime_ns > begun
    return fresh and (not states or RunFolder(run).status().get("state") in states)


def uninterrupted(run: Path, kills: int) -> Times:
    begun, first = time.time_ns(), time.monotonic()
    process = start(arguments_of(run, kills), run.parent)
    ends_first(process, lambda: works_since(run, begun))
    second = time.monotonic()
    ends_first(process, RunFolder(run).coefficients.is_file)
    third = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return Times(second - first, third - second, time.monotonic() - third)


def is_killed(run: Path, mode: str, times: Times, kills: int, draw: random.Random) -> tuple[bool, int]:
    """Starts the run and kills it in a certain state; whether it lived until then, and when it began, in ns."""
    begun = time.time_ns()
    process = start(arguments_of(run, kills), run.parent)
    if mode == "start":
        wait = draw.uniform(0, 1.2 * times.start)
    elif mode == "estimation":
        ends_first(process, lambda: works_since(run, begun))
        wait = draw.uniform(0, times.estimation / 2)
    elif mode == "training":
        ends_first(process, lambda: works_since(run, begun, "running"))
        wait = draw.uniform(0, 4 * times.training / kills)
    else:
        for _ in range(draw.randint(1, 3)):
            known = steps_of(run)
            ends_first(process, lambda: steps_of(run) != known)  # noqa: B023 - called at once
        ends_first(process, lambda: list((run / "checkpoints").glob(".tmp-*")))
        wait = draw.uniform(0, 0.01)
    deadline = time.monotonic() + wait
    ended = ends_first(process, lambda: time.monotonic() > deadline)
    if ended:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    else:
        kill(process)
    return not ended, begun


def place_of(run: Path, begun: int) -> str:
    """What a killed process was doing, by what it left."""
    if not works_since(run, begun):
        return "start"
    state, steps = RunFolder(run).status().get("state"), steps_of(run)
    if list((run / "checkpoints").glob(".tmp-*")):
        return "writing or removing a checkpoint"
    if state != "running":
        return "opening the run" if RunFolder(run).coefficients.is_file() else "estimation"
    due = [step for step in steps[-1:] if step % MEASURED_EVERY == 0]
    return "training" if {*due} <= {record["step"] for record in records(run, "evaluation")} else "evaluation"


def main() -> None:
    """Runs, kills, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    whole, run = folder / "whole", folder / "killed"
    times = uninterrupted(whole, options.kills)
    places: collections.Counter[str] = collections.Counter()
    while places.total() < options.kills:
        early = places.total() < options.kills // 10
        mode = "estimation" if early else draw.choices([*MODES], [*MODES.values()])[0]
        killed, begun = is_killed(run, mode, times, options.kills, draw)
        if killed:
            places[place_of(run, begun)] += 1
            sys.stderr.write(f"kill {places.total()}: {place_of(run, begun)}; steps {steps_of(run)}\n")
    done = steps_of(run)[-1]
    last = finish(arguments_of(run, options.kills), folder)
    assert last.returncode == 0, last.stderr
    ours, theirs = outcome(run), outcome(whole)
    same = {name: ours[name] == value for name, value in theirs.items()}
    left = list(run.rglob(".tmp-*"))
    say(f"{folder}: {done} of {STEPS_A_KILL * options.kills} steps were done before the last start")
    table("killed in", ["", "kills"], [[name, str(count)] for name, count in places.most_common()])
    table("at the end", ["", ""], [[name, "same" if equal else "DIFFERENT"] for name, equal in same.items()])
    sys.exit(not all(same.values()) or bool(left))


if __name__ == "__main__":
    main()
