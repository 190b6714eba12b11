"""``cdistill reproduce``: the paper's claims on data that ship with the package, trained, measured and judged."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cdistill.errors import CdistillError, DivergedError, RecipeError, StoppedError
from cdistill.evaluation.records import finite
from cdistill.recipe.files import differences, load_recipe
from cdistill.recipe.schema import DistillRecipe
from cdistill.registry import PRECONDITIONINGS
from cdistill.runtime.console import say, table
from cdistill.runtime.processes import versions
from cdistill.storage.files import copy_file, read_json, write_text
from cdistill.storage.run_folder import RunFolder, held
from cdistill.workflows.plot import draw_trajectories
from cdistill.workflows.reproduce.claims import (
    ALIGNMENT,
    CLAIMS,
    MIXTURE,
    Finding,
    by_data,
    conclusions,
    judge,
    judge_mixture,
)
from cdistill.workflows.reproduce.experiments import NFE, DataSet, Trial, choose_data, trials
from cdistill.workflows.reproduce.figures import draw_all
from cdistill.workflows.reproduce.outcomes import Outcomes, Ratio, geometric, read_outcome
from cdistill.workflows.reproduce.page import write_page
from cdistill.workflows.reproduce.request import Request
from cdistill.workflows.reproduce.running import Job, run_jobs
from cdistill.workflows.reproduce.study import Comparison, compare, predict, spans

_TRAJECTORIES = 4096  # of Fig. 7, for each seed


def reproduce(request: Request, jobs: int | None) -> dict[str, Any]:
    """Trains what is not trained yet, judges the claims, draws the figures; returns all of it as JSON.

    Raises:
        RecipeError: No data set can judge a claim, or the folder holds runs of other experiments.
        RunLockedError: Another process works in the folder.
        CdistillError: A training failed; the others are done and judged.
    """
    if not request.trials and MIXTURE not in request.letters:
        raise RecipeError(f"reproduce: none of these data sets can judge {', '.join(request.letters)}; name others")
    check_trials(request)
    logs, at_once = request.out / "logs", jobs or request.at_once
    with held(request.out / ".lock", f"{request.out}: another process works here"):
        run_jobs(coefficient_jobs(request), at_once, logs, "coefficients")
        run_jobs(laboratory_jobs(request), at_once, logs, "laboratory")
        try:
            run_jobs(training_jobs(request), at_once, logs, "trainings")
        except StoppedError:
            raise
        except CdistillError:
            conclude(request)
            raise
        return conclude(request)


def coefficient_jobs(request: Request) -> list[Job]:
    """Returns the estimation of each teacher's coefficients, as the recipes have it."""
    jobs = []
    for teacher, recipe in _teachers(request).items():
        file, section = request.coefficients(teacher), recipe.estimation
        options = [
            f"--{name.replace('_', '-')}={value}" for name, value in section.model_dump().items() if value is not None
        ]
        arguments = ["estimate-coeffs", "--teacher", teacher, *options, "--out", str(file), *request.several]
        jobs.append(Job(f"coefficients-{teacher}", arguments, 20, request.threads, partial(_is_there, file)))
    return jobs


def laboratory_jobs(request: Request) -> list[Job]:
    """Returns the comparison of all preconditionings before training, for each teacher."""
    jobs = []
    for teacher in _teachers(request):
        folder = request.laboratory(teacher)
        arguments = [
            "compare", "--teacher", teacher, "--coefficients", str(request.coefficients(teacher)),
            "--nfe", ",".join(map(str, NFE)), "--out", str(folder), *request.several,
        ]  # fmt: skip
        done = partial(_is_there, folder / "compare.json")
        jobs.append(Job(f"laboratory-{teacher}", arguments, 20, request.threads, done))
    return jobs


def training_jobs(request: Request) -> list[Job]:
    """Returns the trainings."""
    return [
        Job(
            trial.name, request.command(trial),
            trial.data.cost * trial.load().training.iterations, trial.data.threads,
            partial(_progress, request.run(trial), trial.load()), partial(_prepare, request, trial), may_diverge=True,
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
    """Judges the claims on all that has been trained, draws the figures, writes everything; returns it as JSON."""
    asked = request
    request = request.everything(choose_data(request.kind, None))
    found = [one for data in request.data if (one := read_outcomes(request, data)).found or data in asked.data]
    findings = with_figures(judge(found, list(CLAIMS)), asked.letters, {data.name for data in asked.data})
    if MIXTURE in asked.letters or (request.out / "figures" / "figure-7.png").exists():
        findings += judge_mixture(measure_mixture(request))
    comparisons = study(request, found)
    pictures = draw_all(request, found, comparisons)
    record = as_record(request, found, findings, comparisons)
    write_text(request.out / "reproduction.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    title = f"Experiments `{request.kind}`; every training is a folder in `runs`, its command stands in the JSON."
    page = write_page(title, found, findings, spans(request), comparisons, predict(comparisons), pictures)
    write_text(request.out / "reproduction.md", page)
    print_verdicts(findings)
    say(f"results: {request.out / 'reproduction.md'}   numbers: {request.out / 'reproduction.json'}")
    return record


def with_figures(findings: Sequence[Finding], letters: Sequence[str], names: Collection[str]) -> list[Finding]:
    """Returns all findings of a claim on a data set that has at least one figure, or that was asked for."""
    begun = {(one.claim, one.data) for one in findings if one.ratio is not None}
    return [one for one in findings if (one.claim, one.data) in begun or (one.claim in letters and one.data in names)]


def read_outcomes(request: Request, data: DataSet) -> Outcomes:
    """Returns what the trials of a data set measured, as far as they have ended."""
    read = [read_outcome(trial, request.run(trial)) for trial in trials([data], request.seeds)]
    return Outcomes(data, {(one.trial.arm, one.trial.seed): one for one in read if one is not None})


def measure_mixture(request: Request) -> dict[str, Ratio]:
    """Fig. 7: draws it, and returns Analytic's errors over CTM's for several seeds of the noise."""
    values: dict[str, list[float]] = {}
    for seed in range(max(request.seeds, 3)):
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
        laboratory = read_json(request.laboratory(outcomes.data.teacher) / "compare.json")
        if laboratory:
            comparisons += compare(outcomes, laboratory)
    return comparisons


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
        "experiments": request.kind,
        "claims": {
            letter: {
                "statement": CLAIMS[letter].statement,
                "conclusion": conclusion,
                "data": by_data(findings, letter),
            }
            for letter, conclusion in conclusions(findings).items()
        },
        "findings": [{**asdict(one), "ratio": None if one.ratio is None else _as_json(one.ratio)} for one in findings],
        "table_2": finals,
        "comparisons": [{**asdict(one), "after": _as_json(one.after)} for one in comparisons],
        "predictions": [{**asdict(one), "correlation": finite(one.correlation)} for one in predict(comparisons)],
        "trials": {
            trial.name: {"command": ["cdistill", *request.command(trial)], "diverged": list(outcome.lost)}
            for trial, outcome in ((outcome.trial, outcome) for one in found for outcome in one.found.values())
        },
        "versions": versions(),
    }


def _as_json(ratio: Ratio) -> dict[str, Any]:
    return {**asdict(ratio), "low": ratio.low, "high": finite(ratio.high)}


def print_verdicts(findings: Sequence[Finding]) -> None:
    """Prints the figures, the verdict of each data set, and the conclusions."""
    rows = [
        [f"{one.claim} {one.data}", one.quantity, "-" if one.ratio is None else str(one.ratio), one.verdict]
        for one in findings
    ]
    caption = "ratio of the arm to its baseline, with its 95 % interval over the seeds"
    table("What came out", ["claim, data", "figure", "ratio", "verdict"], rows, caption)
    rows = [[f"{letter} {CLAIMS[letter].statement}", verdict] for letter, verdict in conclusions(findings).items()]
    table("The paper's claims", ["claim", "verdict"], rows)
