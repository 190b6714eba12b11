"""What is run, where its files lie, and commands side by side, each in its own process; nothing is run twice.

::

    OUT/runs/DATA-ARM-SEED/         a run of `cdistill distill`
        coefficients/TEACHER.*      as `cdistill estimate-coeffs` writes them
        comparison/TEACHER/         as `cdistill compare` writes it; `laboratory` in folders of version 0.1
        logs/                       what these commands printed
        figures/  reproduction.md  reproduction.json
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cdistill.errors import CdistillError, DivergedError, RecipeError
from cdistill.recipe.files import differences, load_recipe
from cdistill.recipe.schema import DistillRecipe
from cdistill.registry import PRECONDITIONINGS
from cdistill.runtime import signals
from cdistill.runtime.console import progress, say
from cdistill.runtime.processes import thread_count
from cdistill.storage.files import copy_file
from cdistill.storage.run_folder import RunFolder
from cdistill.workflows.reproduce.claims import CLAIMS, arms_of
from cdistill.workflows.reproduce.experiments import NFE, DataSet, Trial, trials

_POLL = 0.2  # seconds
_GRACE = 60.0  # seconds that jobs get to save


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    letters: Sequence[str]  # of claims
    kind: str  # name of the experiments
    data: Sequence[DataSet]
    seeds: int  # trainings of each arm
    processes: int  # of each training
    out: Path

    @property
    def trials(self) -> list[Trial]:
        """The trainings that the claims need, seed by seed; all arms of a study that judges none."""
        if not self.letters:
            return trials(self.data, self.seeds)
        arms = {data.name: arms_of(self.letters, data.arms) for data in self.data}
        return [trial for trial in trials(self.data, self.seeds) if trial.arm in arms[trial.data.name]]

    def everything(self, data: Sequence[DataSet]) -> "Request":
        """Returns the request for all claims on `data` with all seeds that were ever trained here.

        What is concluded is about all that lies in the folder, whatever was asked for last.
        """
        suffixes = [path.name.rpartition("-")[2] for path in (self.out / "runs").glob("*-*")]
        seeds = max([self.seeds, *(int(text) + 1 for text in suffixes if text.isdecimal())])
        return replace(self, letters=list(CLAIMS), data=data, seeds=seeds)

    @property
    def threads(self) -> int:
        """Threads of a command; 0 for all that there are."""
        return min(data.threads for data in self.data)

    @property
    def at_once(self) -> int:
        """How many commands share the cores of this machine."""
        return thread_count() if self.processes == 1 and self.threads else 1

    @property
    def nproc(self) -> list[str]:
        """The options of a command that start its processes."""
        return ["--nproc", str(self.processes)] if self.processes > 1 else []

    def command(self, trial: Trial) -> list[str]:
        """Returns the command line, without the program, of a training."""
        changes = [word for override in trial.overrides for word in ("--set", override)]
        return ["distill", "--recipe", trial.data.recipe, "--out", str(self.run(trial)), *changes, *self.nproc]

    def run(self, trial: Trial) -> Path:
        """Returns the folder of a trial."""
        return self.out / "runs" / trial.name

    def coefficients(self, teacher: str) -> Path:
        """Returns the file of a teacher's coefficients."""
        return self.out / "coefficients" / f"{teacher}.safetensors"

    def comparison(self, teacher: str) -> Path:
        """Returns what `cdistill compare` writes about a teacher."""
        old = self.out / "laboratory" / teacher / "compare.json"
        return old if old.is_file() else self.out / "comparison" / teacher / "compare.json"


@dataclass(frozen=True)
class Job:
    """A command of this program."""

    name: str  # of its log, too
    arguments: Sequence[str]
    cost: float  # how long it takes, in any unit
    threads: int  # 0 for all that there are
    done: Callable[[], float]  # from 0 to 1, when it need not run
    prepare: Callable[[], object] = lambda: None  # called before it starts
    may_diverge: bool = False  # and is no failure then


def preparations(request: Request) -> list[list[Job]]:
    """Returns the estimation of each teacher's coefficients, as the recipes have it, and then its comparison.

    The comparison is that of all preconditionings before training.
    """
    recipes: dict[str, DistillRecipe] = {}
    for trial in request.trials:
        recipe = trial.load()
        recipes.setdefault(recipe.teacher, recipe)
    estimations, comparisons = [], []
    for teacher, recipe in recipes.items():
        file, result, section = request.coefficients(teacher), request.comparison(teacher), recipe.estimation
        options = [
            f"--{name.replace('_', '-')}={value}" for name, value in section.model_dump().items() if value is not None
        ]
        arguments = ["estimate-coeffs", "--teacher", teacher, *options, "--out", str(file), *request.nproc]
        estimations.append(_job(f"coefficients-{teacher}", arguments, file, request.threads))
        arguments = [
            "compare", "--teacher", teacher, "--coefficients", str(file), "--nfe", ",".join(map(str, NFE)),
            "--out", str(result.parent), *request.nproc,
        ]  # fmt: skip
        comparisons.append(_job(f"comparison-{teacher}", arguments, result, request.threads))
    return [estimations, comparisons]


def _job(name: str, arguments: Sequence[str], result: Path, threads: int) -> Job:
    return Job(name, arguments, 20, threads, lambda: float(result.is_file()))


def trainings(request: Request) -> list[Job]:
    """Returns the trainings.

    Raises:
        RecipeError: A folder holds a run of another recipe than the trial's, one of an older version for example.
    """
    jobs = []
    for trial in request.trials:
        recipe, run = trial.load(), RunFolder(request.run(trial))
        if run.recipe.is_file():
            changed = differences(load_recipe(run.recipe, DistillRecipe), recipe, ("weights",))
            if changed:
                raise RecipeError(f"{run.path}: holds another run ({'; '.join(changed)}); choose another --out")
        jobs.append(
            Job(
                trial.name, request.command(trial), trial.data.cost * recipe.training.iterations, trial.data.threads,
                partial(_share_done, run, recipe), partial(_copy_coefficients, request, recipe, run), may_diverge=True,
            )
        )  # fmt: skip
    return jobs


def _share_done(run: RunFolder, recipe: DistillRecipe) -> float:
    """Returns how much of a training is done; 1 when it has finished or diverged."""
    status = run.status()
    if status.get("state") == "finished" or status.get("exit_code") == DivergedError.exit_code:
        return 1.0
    return min(0.99, int(status.get("step", 0)) / recipe.training.iterations)


def _copy_coefficients(request: Request, recipe: DistillRecipe, run: RunFolder) -> None:
    """Gives a training the coefficients that it would estimate itself."""
    if PRECONDITIONINGS.get(recipe.preconditioning.name).needs_coefficients and not run.coefficients.is_file():
        run.path.mkdir(parents=True, exist_ok=True)
        copy_file(request.coefficients(recipe.teacher), run.coefficients)


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
                signals.check("reproduce")
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
                    advance(now - shown, f"{len(waiting) + len(running)} left: {', '.join(running)}")
                    shown = now
    finally:
        _stop([child for _, child in running.values()])
    if failures:
        raise failures[0]


def _work(jobs: Sequence[Job]) -> int:
    return round(sum(job.cost * job.done() for job in jobs))


def _start(job: Job, logs: Path) -> subprocess.Popen[bytes]:
    job.prepare()
    environment = {**os.environ, signals.PARENT: str(os.getpid())}
    if job.threads:
        environment |= {"CDISTILL_THREADS": str(job.threads), "OMP_NUM_THREADS": str(job.threads)}
    with (logs / f"{job.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cdistill", *job.arguments], env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _failure(job: Job, code: int, logs: Path) -> list[CdistillError]:
    """Returns the error of a job that ended with `code`, if it is one, and reports it."""
    if code == 0:
        return []
    if code == DivergedError.exit_code and job.may_diverge:
        say(f"{job.name}: diverged")
        return []
    lines = (logs / f"{job.name}.log").read_text(errors="replace").splitlines() or [""]
    error = CdistillError(f"{job.name}: ended with code {code}: {lines[-1].removeprefix('error: ')}")
    error.exit_code = code if code > 0 else 1
    say(str(error))
    return [error]


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks jobs to save and stop, waits for them, and kills those that do not."""
    for child in children:
        child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
