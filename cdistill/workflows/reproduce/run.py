"""``cdistill reproduce``: the paper's claims on data that ship with the package, trained, measured and judged."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cdistill.analysis.cost import Plan
from cdistill.errors import CdistillError, RecipeError, StoppedError
from cdistill.evaluation.records import finite
from cdistill.preconditionings.coefficients import load_coefficients
from cdistill.reporting.curves import training_curves
from cdistill.runtime.processes import versions
from cdistill.storage.bounded import read_json
from cdistill.storage.files import write_text
from cdistill.storage.run_folder import RunFolder, held
from cdistill.workflows.plan import plan
from cdistill.workflows.reproduce.claims import (
    CLAIMS,
    MIXTURE,
    Finding,
    by_data,
    conclusions,
    judge,
    judge_mixture,
    with_figures,
)
from cdistill.workflows.reproduce.experiments import ALIGNMENT, NFE, DataSet, Trial, choose_data, trials
from cdistill.workflows.reproduce.figures import draw_all, draw_trajectories
from cdistill.workflows.reproduce.jobs import Request, preparations, run_jobs, trainings
from cdistill.workflows.reproduce.outcomes import (
    Comparison,
    Outcomes,
    Ratio,
    compare,
    decades,
    geometric,
    predict,
    read_outcome,
)
from cdistill.workflows.reproduce.page import write_page

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
    runs = trainings(request)
    logs, at_once = request.out / "logs", jobs or request.at_once
    with held(request.out / ".lock", f"{request.out}: another process works here"):
        for stage, title in zip(preparations(request), ("coefficients", "comparison"), strict=True):
            run_jobs(stage, at_once, logs, title)
        try:
            run_jobs(runs, at_once, logs, "trainings")
        except StoppedError:
            raise
        except CdistillError:
            conclude(request)
            raise
        return conclude(request)


def conclude(request: Request) -> dict[str, Any]:
    """Judges the claims on all that has been trained, draws the figures, writes everything; returns it as JSON."""
    asked = request
    request = request.everything(choose_data(request.kind, None))
    outcomes = [one for data in request.data if (one := read_outcomes(request, data)).by_trial or data in asked.data]
    findings = with_figures(judge(outcomes, list(CLAIMS)), asked.letters, {data.name for data in asked.data})
    if MIXTURE in asked.letters or (request.out / "figures" / "figure-7.png").exists():
        findings += judge_mixture(measure_mixture(request))
    comparisons = [
        comparison
        for one in outcomes
        if (before := read_json(request.comparison(one.data.teacher)))
        for comparison in compare(one, before)
    ]
    files = {data.name: request.coefficients(data.teacher) for data in request.data}
    spans = {name: decades(load_coefficients(file)[0]) for name, file in files.items() if file.is_file()}
    pictures = draw_all(request, outcomes)
    record = as_record(request, outcomes, findings, comparisons)
    write_text(request.out / "reproduction.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    title = f"Experiments `{request.kind}`; every training is a folder in `runs`, its command stands in the JSON."
    page = write_page(title, outcomes, findings, spans, comparisons, pictures)
    write_text(request.out / "reproduction.md", page)
    return record


def read_outcomes(request: Request, data: DataSet) -> Outcomes:
    """Returns what the trials of a data set measured, as far as they have ended."""
    read = [read_outcome(trial, request.run(trial)) for trial in trials([data], request.seeds)]
    return Outcomes(data, {(one.trial.arm, one.trial.seed): one for one in read if one is not None})


def measure_mixture(request: Request) -> dict[str, Ratio]:
    """Fig. 7: draws it, and returns Analytic's errors over CTM's for several seeds of the noise."""
    values: dict[str, list[float]] = {ALIGNMENT: [], "wasserstein": []}
    names = ["ctm", "analytic", "analytic-forward"]
    for seed in range(max(request.seeds, 3)):
        picture = request.out / "figures" / ("figure-7.png" if seed == 0 else f"figure-7-seed-{seed}.png")
        results = draw_trajectories(names, 3, _TRAJECTORIES, seed, _TRAJECTORIES, picture)
        theirs, ours, _ = results
        values[ALIGNMENT].append(ours["mse_end"] / theirs["mse_end"])
        values["wasserstein"].append(ours["wasserstein"] / theirs["wasserstein"])
    return {name: geometric(ratios) for name, ratios in values.items()}


def as_record(
    request: Request, outcomes: Sequence[Outcomes], findings: Sequence[Finding], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """Returns everything that was measured and concluded, as JSON."""
    finals = [
        {"data": one.data.name, "arm": arm, "nfe": nfe, "metric": metric, **_as_json(value)}
        for one in outcomes
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
        "predictions": [{**one, "correlation": finite(one["correlation"])} for one in predict(comparisons)],
        "trials": {
            trial.name: {"command": ["cdistill", *request.command(trial)], "diverged": list(outcome.lost)}
            for trial, outcome in ((outcome.trial, outcome) for one in outcomes for outcome in one.by_trial.values())
        },
        "versions": versions(),
    }


def _as_json(ratio: Ratio) -> dict[str, Any]:
    return {**asdict(ratio), "low": ratio.low, "high": finite(ratio.high)}


def list_trials(request: Request, tflops: float | None) -> dict[str, Any]:
    """Returns what each training costs, what came out so far, and its command, as JSON.

    Hours follow from the TFLOP/s that each device sustains, where that is known.
    """
    devices = request.processes
    costs = {
        (data.name, arm): plan(Trial(data, arm, 0).load(), devices)
        for data in request.data
        for arm in {trial.arm for trial in request.trials if trial.data is data}
    }
    entries = [_entry(request, trial, costs[trial.data.name, trial.arm], tflops) for trial in request.trials]
    return {"devices": devices, "tflops": tflops, "trials": entries}


def _entry(request: Request, trial: Trial, cost: Plan, tflops: float | None) -> dict[str, Any]:
    run = RunFolder(request.run(trial))
    outcome = read_outcome(trial, run.path)
    curves = {} if outcome is None else outcome.curves
    return {
        "name": trial.name,
        "command": ["cdistill", *request.command(trial)],
        "iterations": cost.iterations,
        "batch_size": cost.batch_size,
        "training_flop": cost.training,
        "hours": None if tflops is None else cost.hours(tflops, request.processes),
        "state": run.status().get("state", "not run"),
        "sustained": _sustained(run, cost),
        "results": {
            str(nfe): curves[nfe, trial.data.metric][-1][1] if (nfe, trial.data.metric) in curves else None
            for nfe in NFE
            if curves
        },
    }


def _sustained(run: RunFolder, cost: Plan) -> float | None:
    """Returns the FLOP/s that a training sustained, the median of what it logged; None if it has not begun."""
    rates = sorted(rate for _, rate in training_curves(run.metrics()).get("images_per_second", []))
    return rates[len(rates) // 2] * cost.training / cost.iterations / cost.batch_size if rates else None
