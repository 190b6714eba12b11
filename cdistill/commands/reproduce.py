"""``cdistill reproduce``: the paper's claims on data that ship with the package, trained, measured and judged."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cdistill.commands.common import versions
from cdistill.commands.plot import draw_trajectories
from cdistill.console import say, table
from cdistill.errors import DivergedError, RecipeError
from cdistill.evaluation.results import finite
from cdistill.preconditionings import Preconditioning
from cdistill.preconditionings.coefficients import load_coefficients
from cdistill.recipe import DistillRecipe, differences, load_recipe
from cdistill.registry import PRECONDITIONINGS
from cdistill.reproduction.claims import (
    ALIGNMENT,
    CLAIMS,
    MIXTURE,
    Finding,
    arms_of,
    judge,
    judge_mixture,
    verdicts,
)
from cdistill.reproduction.experiments import CONSISTENCY, GAN, NFE, TRAJECTORY, DataSet, Trial, trials
from cdistill.reproduction.figures import Mark, Panel, panel, plot_heat_maps, plot_panels, plot_single_step, plot_study
from cdistill.reproduction.outcomes import Outcomes, Ratio, geometric, read_outcome
from cdistill.reproduction.page import write_page
from cdistill.reproduction.running import Job, run_jobs
from cdistill.reproduction.study import Comparison, compare, decades, predict
from cdistill.runs import RunFolder
from cdistill.storage import copy_file, read_json, write_text
from cdistill.student import load_preconditioning
from cdistill.teachers import load_teacher

_TRAJECTORIES = 4096  # of Fig. 7, for each seed


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        letters: Claims.
        data: Data sets.
        seeds: Trainings of each arm.
        out: Folder of everything.
    """

    letters: Sequence[str]
    data: Sequence[DataSet]
    seeds: int
    out: Path

    @property
    def trials(self) -> list[Trial]:
        """The trainings that the claims need, seed by seed."""
        arms = arms_of(self.letters)
        return [trial for trial in trials(self.data, self.seeds) if trial.arm in arms]

    def run(self, trial: Trial) -> Path:
        """Returns the folder of a trial."""
        return self.out / "runs" / trial.name

    def coefficients(self, teacher: str) -> Path:
        """Returns the file of a teacher's coefficients."""
        return self.out / "coefficients" / f"{teacher}.safetensors"

    def laboratory(self, teacher: str) -> Path:
        """Returns the folder of what the laboratory says of a teacher."""
        return self.out / "laboratory" / teacher


def reproduce(request: Request, at_once: int) -> dict[str, Any]:
    """Trains what is not trained yet, judges the claims, draws the figures; returns all of it as JSON."""
    logs = request.out / "logs"
    check_trials(request)
    run_jobs(coefficient_jobs(request), at_once, logs, "coefficients")
    run_jobs(laboratory_jobs(request), at_once, logs, "laboratory")
    run_jobs(training_jobs(request), at_once, logs, "trainings")
    return conclude(request)


def coefficient_jobs(request: Request) -> list[Job]:
    """Returns the estimation of each teacher's coefficients, as the recipes have it."""
    jobs = []
    for teacher, recipe in _teachers(request).items():
        file, section = request.coefficients(teacher), recipe.estimation
        options = [
            f"--{name.replace('_', '-')}={value}" for name, value in section.model_dump().items() if value is not None
        ]
        arguments = ["estimate-coeffs", "--teacher", teacher, *options, "--out", str(file)]
        jobs.append(Job(f"coefficients-{teacher}", arguments, 20, partial(_is_there, file)))
    return jobs


def laboratory_jobs(request: Request) -> list[Job]:
    """Returns the comparison of all preconditionings before training, for each teacher."""
    jobs = []
    for teacher in _teachers(request):
        folder = request.laboratory(teacher)
        arguments = [
            "compare", "--teacher", teacher, "--coefficients", str(request.coefficients(teacher)),
            "--nfe", ",".join(map(str, NFE)), "--out", str(folder),
        ]  # fmt: skip
        jobs.append(Job(f"laboratory-{teacher}", arguments, 20, partial(_is_there, folder / "compare.json")))
    return jobs


def training_jobs(request: Request) -> list[Job]:
    """Returns the trainings."""
    return [
        Job(
            trial.name, trial.command(request.run(trial)),
            trial.data.cost * trial.load().training.iterations,
            partial(_progress, request.run(trial), trial.load()), partial(_prepare, request, trial),
        )
        for trial in request.trials
    ]  # fmt: skip


def _teachers(request: Request) -> dict[str, DistillRecipe]:
    """Returns the teachers, each with a recipe of one of its trials."""
    found: dict[str, DistillRecipe] = {}
    for trial in request.trials:
        recipe = trial.load()
        found.setdefault(recipe.teacher, recipe)
    return found


def _is_there(file: Path) -> float:
    return float(file.is_file())


def _progress(folder: Path, recipe: DistillRecipe) -> float:
    """Returns how much of a training is done; 1 when it has finished or diverged."""
    status = RunFolder(folder).status()
    if status.get("state") == "finished" or status.get("exit_code") == DivergedError.exit_code:
        return 1.0
    return min(0.99, int(status.get("step", 0)) / recipe.training.iterations)


def _prepare(request: Request, trial: Trial) -> None:
    """Gives a training the coefficients that it would estimate itself."""
    recipe, run = trial.load(), RunFolder(request.run(trial))
    if PRECONDITIONINGS.get(recipe.preconditioning.name).needs_coefficients and not run.coefficients.is_file():
        run.path.mkdir(parents=True, exist_ok=True)
        copy_file(request.coefficients(recipe.teacher), run.coefficients)


def check_trials(request: Request) -> None:
    """Raises RecipeError if a folder holds a run of another recipe than the trial's, an older version's say."""
    for trial in request.trials:
        run = RunFolder(request.run(trial))
        if run.recipe.is_file():
            changed = differences(load_recipe(run.recipe, DistillRecipe), trial.load(), ("weights",))
            if changed:
                raise RecipeError(f"{run.path}: holds another run ({'; '.join(changed)}); choose another --out")


def conclude(request: Request) -> dict[str, Any]:
    """Judges the claims on what has been trained, draws the figures and writes everything; returns it as JSON."""
    found = [read_outcomes(request, data) for data in request.data]
    findings = judge(found, request.letters)
    if MIXTURE in request.letters:
        findings += judge_mixture(measure_mixture(request))
    comparisons = study(request, found)
    pictures = draw(request, found, comparisons)
    record = as_record(request, found, findings, comparisons)
    write_text(request.out / "reproduction.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    title = f"`cdistill reproduce`, {request.seeds} seeds; every run is a folder in `runs`."
    write_text(
        request.out / "reproduction.md",
        write_page(title, found, findings, spans(request), comparisons, predict(comparisons), pictures),
    )
    print_verdicts(findings)
    say(f"results: {request.out / 'reproduction.md'}   numbers: {request.out / 'reproduction.json'}")
    return record


def read_outcomes(request: Request, data: DataSet) -> Outcomes:
    """Returns what the finished trials of a data set measured."""
    read = [read_outcome(trial, request.run(trial)) for trial in request.trials if trial.data is data]
    return Outcomes(data, {(one.trial.arm, one.trial.seed): one for one in read if one is not None})


def measure_mixture(request: Request) -> dict[str, Ratio]:
    """Fig. 7: draws it, and returns Analytic's errors over CTM's for several seeds of the noise."""
    values: dict[str, list[float]] = {}
    for seed in range(max(request.seeds, 2)):
        picture = request.out / "figures" / ("figure-7.png" if seed == 0 else f"figure-7-seed-{seed}.png")
        results = {
            one.preconditioning: one
            for one in draw_trajectories(
                ["ctm", "analytic", "analytic-forward"], 3, _TRAJECTORIES, seed, _TRAJECTORIES, picture
            )
        }
        ours, theirs = results["analytic"], results["ctm"]
        values.setdefault(ALIGNMENT, []).append(ours.mse_end / theirs.mse_end)
        values.setdefault("wasserstein", []).append(ours.wasserstein / theirs.wasserstein)
    return {name: geometric(ratios) for name, ratios in values.items()}


def study(request: Request, found: Sequence[Outcomes]) -> list[Comparison]:
    """Returns how the forms compare with CTM's before and after the training, on the data sets with a laboratory."""
    comparisons = []
    for outcomes in found:
        laboratory = read_json(request.laboratory(_teacher_of(outcomes.data)) / "compare.json")
        if laboratory:
            comparisons += compare(outcomes, laboratory)
    return comparisons


def _teacher_of(data: DataSet) -> str:
    return Trial(data, data.arms[0], 0).load().teacher


def load_forms(request: Request, data: DataSet, names: Sequence[str]) -> dict[str, Preconditioning]:
    """Returns preconditionings with the coefficients of a data set's teacher."""
    name = _teacher_of(data)
    return {form: load_preconditioning(form, load_teacher(name), request.coefficients(name)) for form in names}


def spans(request: Request) -> dict[str, float]:
    """Returns over how many decades of t each data set's l falls from 0.9 to 0.1."""
    files = {data.name: request.coefficients(_teacher_of(data)) for data in request.data}
    return {name: decades(load_coefficients(file)[0]) for name, file in files.items() if file.is_file()}


def draw(request: Request, found: Sequence[Outcomes], comparisons: Sequence[Comparison]) -> list[str]:
    """Draws Figures 2 to 6 and the study's; returns the names of all that are there, Figure 7 too."""
    folder = request.out / "figures"
    single = [
        (panel(one, CONSISTENCY, 1), panel(one, TRAJECTORY, 1), one.data.name,
         load_forms(request, one.data, ("cm", "ctm", "analytic")))
        for one in found
        if one.found and set(CONSISTENCY) <= set(one.data.arms)
    ]  # fmt: skip
    if single:
        plot_single_step(folder / "figure-2.png", single)
    curves = {
        "figure-3": ("Fig. 3: two steps", ("ctm", "analytic", "analytic-forward"), (2,)),
        "figure-5": ("Fig. 5: BCM's preconditioning", ("ctm", "bcm"), (1, 2)),
        "figure-6": ("Fig. 6: with the GAN loss", GAN, (1, 2)),
    }
    for name, (title, arms, calls) in curves.items():
        rows = [[panel(one, arms, nfe) for nfe in calls] for one in found]
        rows = [row for row in rows if all(part.arms for part in row)]
        if rows:
            plot_panels(folder / f"{name}.png", title, _wrapped(rows))
    forms = {
        f"{form}: {data.name}" if form != "ctm" else "CTM": one
        for data in request.data
        for form, one in load_forms(request, data, ("ctm", "analytic")).items()
    }
    plot_heat_maps(folder / "figure-4.png", forms)
    if comparisons:
        shown = {
            f"{metric}, 2 NFE": [
                Mark(one.data, one.form, one.scores["untrained MSE"], one.after)
                for one in comparisons
                if one.nfe == 2 and (one.metric == ALIGNMENT) == (metric == ALIGNMENT)
            ]
            for metric in (ALIGNMENT, "distance to the data")
        }
        plot_study(folder / "study.png", shown)
    return sorted(path.stem for path in folder.glob("*.png") if "seed" not in path.stem)


def _wrapped(rows: Sequence[Sequence[Panel]]) -> list[Sequence[Panel]]:
    """Puts single panels three in a row."""
    if len(rows[0]) > 1:
        return list(rows)
    panels = [row[0] for row in rows]
    return [panels[first : first + 3] for first in range(0, len(panels), 3)]


def as_record(
    request: Request, found: Sequence[Outcomes], findings: Sequence[Finding], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """Returns everything that was measured and concluded, as JSON."""
    finals = [
        {"data": one.data.name, "arm": arm, "nfe": nfe, "metric": metric, **_as_json(value)}
        for one in found
        for arm in one.data.arms
        for metric in (one.data.metric, ALIGNMENT)
        for nfe in NFE
        if (value := one.final(arm, nfe, metric)) is not None
    ]
    return {
        "verdicts": verdicts(findings),
        "statements": {letter: CLAIMS[letter].statement for letter in request.letters},
        "findings": [{**asdict(one), "ratio": None if one.ratio is None else _as_json(one.ratio)} for one in findings],
        "table_2": finals,
        "comparisons": [{**asdict(one), "after": _as_json(one.after)} for one in comparisons],
        "predictions": [{**asdict(one), "correlation": finite(one.correlation)} for one in predict(comparisons)],
        "trials": {
            trial.name: {
                "command": ["cdistill", *trial.command(request.run(trial))],
                "state": RunFolder(request.run(trial)).status().get("state", "not run"),
            }
            for trial in request.trials
        },
        "versions": versions(),
    }


def _as_json(ratio: Ratio) -> dict[str, Any]:
    return {**asdict(ratio), "high": finite(ratio.high)}


def print_verdicts(findings: Sequence[Finding]) -> None:
    """Prints the figures behind the verdicts, and the verdicts."""
    rows = [
        [f"{one.claim} {one.data}", one.quantity, "-" if one.ratio is None else str(one.ratio), one.verdict]
        for one in findings
    ]
    caption = "ratio of the arm to its baseline, with its 95 % interval over the seeds"
    table("What came out", ["claim, data", "figure", "ratio", "verdict"], rows, caption)
    rows = [[f"{letter} {CLAIMS[letter].statement}", verdict] for letter, verdict in verdicts(findings).items()]
    table("The paper's claims", ["claim", "verdict"], rows)


def list_trials(request: Request) -> dict[str, Any]:
    """Prints the commands of all trainings, in their order, and how much they are; returns them as JSON."""
    commands = [["cdistill", *trial.command(request.run(trial))] for trial in request.trials]
    for command in commands:
        say(shlex.join(command))
    return {"trials": commands}
