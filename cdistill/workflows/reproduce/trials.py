"""``cdistill reproduce --dry-run``: what the trainings cost, how far they are, and their commands."""

import shlex
from typing import Any

from cdistill.analysis.cost import Plan
from cdistill.reporting.records import training_curves
from cdistill.runtime.console import say, table
from cdistill.storage.run_folder import RunFolder
from cdistill.workflows.plan import duration, plan, scaled
from cdistill.workflows.reproduce.experiments import NFE, Trial
from cdistill.workflows.reproduce.outcomes import read_outcome
from cdistill.workflows.reproduce.request import Request


def list_trials(request: Request, tflops: float | None) -> dict[str, Any]:
    """Prints what each training costs and what came out so far, and the commands; returns that as JSON.

    Args:
        request: What is asked for.
        tflops: TFLOP/s that each device sustains; None where nobody knows.
    """
    devices = request.processes
    costs = {
        (data.name, arm): plan(Trial(data, arm, 0).load(), devices)
        for data in request.data
        for arm in {trial.arm for trial in request.trials if trial.data is data}
    }
    entries = [describe(request, trial, costs[trial.data.name, trial.arm], tflops) for trial in request.trials]
    rows = [
        [
            one["name"], f"{one['iterations']:,} x {one['batch_size']:,}", scaled(one["training_flop"], "FLOP"),
            "-" if one["hours"] is None else duration(one["hours"]),
            "-" if one["sustained"] is None else scaled(one["sustained"], "FLOP/s"),
            ", ".join(map(_short, one["results"].values())) or one["state"],
        ]
        for one in entries
    ]  # fmt: skip
    time = f"on {devices} device(s)" + ("" if tflops is None else f" at {tflops:g} TFLOP/s")
    result = f"result at {', '.join(map(str, NFE))} NFE"
    table("Trainings", ["training", "steps x images", "work", time, "sustained here", result], rows)
    for one in entries:
        say(shlex.join(one["command"]))
    return {"devices": devices, "tflops": tflops, "trials": entries}


def describe(request: Request, trial: Trial, cost: Plan, tflops: float | None) -> dict[str, Any]:
    """Returns what is known about a training, as JSON."""
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
        "sustained": sustained(run, cost),
        "results": {
            str(nfe): curves[nfe, trial.data.metric][-1][1] if (nfe, trial.data.metric) in curves else None
            for nfe in NFE
            if curves
        },
    }


def sustained(run: RunFolder, cost: Plan) -> float | None:
    """Returns the FLOP/s that a training sustained, the median of what it logged; None if it has not begun."""
    rates = sorted(rate for _, rate in training_curves(run.metrics()).get("images_per_second", []))
    return rates[len(rates) // 2] * cost.training / cost.iterations / cost.batch_size if rates else None


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
