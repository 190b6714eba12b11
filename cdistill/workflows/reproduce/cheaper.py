"""``cdistill reproduce cheaper``: what exact targets from kept trajectories save, against CTM as published.

Each arm has all that the one before it has and one thing more. Work is counted in forwards of the network (a backward
pass counts 2, one to the input alone 1) and measured in seconds of training; following the trajectories is stated apart
and included where it says so. "Work to CTM's final value" is CTM's work until it first had that value, the mean of its
last three evaluations, over the arm's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from cdistill.objectives.base import make_objective
from cdistill.reporting.curves import crossing, training_curves
from cdistill.reporting.panels import Line, Panel, draw_panels, save_figure
from cdistill.runtime.console import Table
from cdistill.runtime.processes import versions
from cdistill.sampling.trajectories import SHARD
from cdistill.storage.files import write_text
from cdistill.storage.run_folder import RunFolder, held
from cdistill.workflows.reproduce.experiments import ALIGNMENT, ARMS, DataSet, Trial, named
from cdistill.workflows.reproduce.jobs import Request, preparations, run_jobs, trainings
from cdistill.workflows.reproduce.outcomes import Outcome, Ratio, geometric, late_goal, read_outcome
from cdistill.workflows.trajectories import follow_for_recipe

BASELINE = "published"
STEPS = ("published", "published-rate", "store", "regression", "no-dsm", "uniform", "cheap")
FORMS = ("cheap-mixed", "cheap-forward", "cheap-least-squares")
KINDS = ("forwards", "forwards + store", "seconds + store")
_SOLVER = ("published", "published-rate", "store")  # whose objective is Eq. 7, with a moving average in the loss
_EQ_7 = {"name": '"ctm"', "pairs": '"ctm"', "dsm": "true", "target_rate": "0.98"}
_ARMS = (*STEPS, *FORMS)
_Budget = tuple[int, int, str]  # steps, batch size, learning rate


def _study(
    data: DataSet, evaluations: int, trajectories: int, plain: _Budget, higher_rate: str, fast: _Budget, **eq_7: str
) -> DataSet:
    """Returns a data set with the budget of each arm, `fast` where all is together; all are evaluated as often."""
    own = {}
    for arm in data.arms:
        steps, batch, rate = fast if "cheap" in arm else plain
        own[arm] = {
            **{f"objective.{key}": value for key, value in ({**_EQ_7, **eq_7} if arm in _SOLVER else {}).items()},
            "training.decay": '"cosine"' if "cheap" in arm else '"none"',
            "training.iterations": str(steps), "training.batch_size": str(batch),
            "training.learning_rate": higher_rate if arm == "published-rate" else rate,
            "evaluation.every": str(steps // evaluations), "checkpoint.every": str(steps // evaluations),
        }  # fmt: skip
    changes = {
        "teacher": f'"{data.name}"', "evaluation.nfe": "[1, 2, 3, 5, 8]", "estimation.form": '"least-squares"',
        "trajectories.count": str(trajectories), "objective.distance": '"l2"', "training.ema_rate": "0.98",
    }  # fmt: skip
    return replace(data, own=own, changes={**changes, **data.changes})


def _images(
    name: str, plain: tuple[int, int], steps: int, samples: int, evaluations: int, count: int,
    arms: Sequence[str] = _ARMS,
) -> DataSet:  # fmt: skip
    """Returns a study of images: steps and batch of the plain arms, steps of the fast ones, which take half of it."""
    data = DataSet(name, f"{name}-paper", {"objective.points": "10"}, "frechet-pixels", arms, samples)
    fast = steps, plain[1] // 2, "8e-3"
    return _study(data, evaluations, count, (*plain, "1e-3"), "2e-3", fast, max_ode_steps="9")


def _mixture(
    name: str, steps: int, samples: int, evaluations: int, count: int = 16_384, arms: Sequence[str] = _ARMS
) -> DataSet:
    data = DataSet(name, "mixture", {}, "frechet-vectors", arms, samples)
    return _study(data, evaluations, count, (steps, 128, "3e-3"), "1e-2", (steps // 4, 128, "3e-2"))


STUDIES = {
    "cheaper": named(
        _images("patches", (720, 64), 480, 1000, 6, 2048), _images("digits", (320, 96), 480, 1000, 8, 3072),
        _mixture("mixture-broad", 1600, 2000, 8), _mixture("mixture-narrow", 1600, 2000, 8),
    ),
    "cheaper-quick": named(
        _images("digits", (96, 48), 96, 256, 4, 1024, ("published", "store", "no-dsm", "cheap")),
        _mixture("mixture-broad", 480, 1000, 6, 4096, (*STEPS[:3], "no-dsm", "cheap", *FORMS[1:])),
    ),
}  # fmt: skip


Work = Mapping[str, tuple[float, float]]
"""Kind of work -> what a step takes, and what following the trajectories took once, 0 where none are read."""

Courses = dict[tuple[str, int], tuple[Outcome, Work]]
"""(arm, seed) -> what came out of a training and what it took; all of a data set that have finished."""


def read_courses(data: DataSet, request: Request) -> Courses:
    """Reads the trainings of a data set that have finished, arm by arm."""
    courses: Courses = {}
    following: float | None = None  # seconds of following the trajectories, which all arms share
    for trial in (Trial(data, arm, seed) for arm in data.arms for seed in range(request.seeds)):
        outcome, recipe = read_outcome(trial, request.run(trial)), trial.load()
        rates = training_curves(RunFolder(request.run(trial)).metrics()).get("images_per_second", [])
        if outcome is None or not outcome.curves or not rates:
            continue
        size, store = recipe.training.batch_size, 0.0
        if reads := _reads(trial):
            if following is None:
                following = follow_for_recipe(recipe, {}).seconds or 0.0
            count = -(-recipe.trajectories.count // SHARD) * SHARD
            points = getattr(recipe.objective, "points", 2)
            store = count * 2.0 * (points - 1) * recipe.trajectories.substeps
        forwards, seconds = size * _cost(trial), size / median(rate for _, rate in rates)
        work = (forwards, 0.0), (forwards, store), (seconds, following or 0.0 if reads else 0.0)
        courses[trial.arm, trial.seed] = outcome, dict(zip(KINDS, work, strict=True))
    return courses


def work_ratio(courses: Courses, arm: str, nfe: int, metric: str, kind: str) -> tuple[Ratio | None, int, int]:
    """Returns CTM's work to its final value over an arm's, the seeds that came there, and all seeds."""
    values, seeds = [], [seed for name, seed in courses if name == arm and (BASELINE, seed) in courses]
    for seed in seeds:
        both = [courses[name, seed] for name in (BASELINE, arm)]
        curves = [outcome.curves[nfe, metric] for outcome, _ in both]
        reached = [crossing(points, late_goal(curves[0]), logarithmic=True) for points in curves]
        if None not in reached:  # where it was there before the training: the first evaluation
            steps = [step or points[1][0] for step, points in zip(reached, curves, strict=True)]
            theirs, ours = (work_until(step, work[kind]) for step, (_, work) in zip(steps, both, strict=True))
            values.append(theirs / ours)
    return (geometric(values) if values else None), len(values), len(seeds)


def work_until(step: float, work: tuple[float, float]) -> float:
    """Returns the work up to a step, with what was needed once."""
    return step * work[0] + work[1]


def _by_arm(courses: Courses) -> dict[str, list[tuple[Outcome, Work]]]:
    """Returns what came out with all seeds of each arm that has finished with one at least."""
    arms = dict.fromkeys(arm for arm, _ in courses)
    return {arm: [one for (name, _), one in courses.items() if name == arm] for arm in arms}


def _calls(courses: Courses) -> list[int]:
    """Returns the numbers of network calls that were measured."""
    return sorted({nfe for outcome, _ in courses.values() for nfe, _ in outcome.curves})


def _reads(trial: Trial) -> bool:
    """Whether an arm reads kept trajectories."""
    return bool(make_objective(trial.load().objective, (1,), meta=True).stored)


def _cost(trial: Trial) -> float:
    """Returns the forwards of a step for each image."""
    section = trial.load().objective
    return make_objective(section, (1,), meta=True).cost().forwards(section.dsm)


def study(request: Request, jobs: int | None) -> dict[str, Any]:
    """Trains what is not trained yet, compares, draws; returns all of it as JSON.

    Raises:
        RunLockedError: Another process works in the folder.
        CdistillError: A training failed; the others are done.
    """
    logs, at_once = request.out / "logs", jobs or request.at_once
    with held(request.out / ".lock", f"{request.out}: another process works here"):
        run_jobs(preparations(request)[0], at_once, logs, "coefficients")
        for data in request.data:
            if reading := next((trial for trial in request.trials if trial.data is data and _reads(trial)), None):
                follow_for_recipe(reading.load(), {})
        run_jobs(trainings(request), at_once, logs, "trainings")
        return conclude(request)


def conclude(request: Request) -> dict[str, Any]:
    """Compares all that has been trained; writes ``cheaper.md``, ``cheaper.json`` and figures; returns it as JSON."""
    courses = {data.name: read_courses(data, request) for data in request.data}
    record = {
        "study": request.kind,
        "seeds": request.seeds,
        "data": {name: _as_record(of_data) for name, of_data in courses.items()},
        "versions": versions(),
    }
    write_text(request.out / "cheaper.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    for kind in ("forwards", "seconds + store"):
        name = kind.partition(" ")[0]
        if finished := [of_data for of_data in courses.values() if of_data]:
            save_figure(_figure(finished, kind), request.out / "figures" / f"{name}.png")
    seeds = max((1 + seed for of_data in courses.values() for _, seed in of_data), default=0)
    write_text(request.out / "cheaper.md", _page({**record, "seeds": seeds}))
    return record


def _as_record(courses: Courses) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for arm, of_arm in _by_arm(courses).items():
        outcome, spent = of_arm[0]
        metrics = (outcome.trial.data.metric, ALIGNMENT)
        finals = {metric: {str(k): _numbers(_final(of_arm, k, metric)) for k in _calls(courses)} for metric in metrics}
        training, seconds = outcome.trial.load().training, [took["seconds + store"][0] for _, took in of_arm]
        work: dict[str, Any] = {}
        for kind in KINDS:
            for metric in metrics:
                for k in _calls(courses):
                    value, reached, seeds = work_ratio(courses, arm, k, metric, kind)
                    entry = {**(_numbers(value) or {"value": None}), "reached": reached, "seeds": seeds}
                    work.setdefault(kind, {}).setdefault(metric, {})[str(k)] = entry
        record[arm] = {
            "title": ARMS[arm].title, "forwards_an_image": _cost(outcome.trial),
            "images_per_second": median(training.batch_size / one for one in seconds),
            "store_forwards": spent["forwards + store"][1], "store_seconds": spent["seconds + store"][1],
            "seconds": median(one * training.iterations for one in seconds),
            "final": finals, "work_to_the_final_value_of_ctm": work,
        }  # fmt: skip
    return record


def _final(of_arm: Sequence[tuple[Outcome, Work]], nfe: int, metric: str) -> Ratio | None:
    """Returns the last figure: the geometric mean over the seeds."""
    values = [outcome.curves[nfe, metric][-1][1] for outcome, _ in of_arm]
    return geometric(values) if min(values) > 0 else None


def _numbers(value: Ratio | None) -> dict[str, Any] | None:
    if value is None:
        return None
    ends = {"low": value.low, "high": value.high} if value.seeds > 1 else {"low": None, "high": None}
    return {"value": value.value, **ends}


def tables(record: dict[str, Any]) -> list[Table]:
    """Returns the tables of a record: for each data set the final figures, and the work to CTM's final value."""
    out = []
    for name, arms in record["data"].items():
        for metric in next(iter(arms.values()), {"final": {}})["final"]:
            finals, works = [], []
            for arm in arms.values():
                values, reached = arm["final"][metric], arm["work_to_the_final_value_of_ctm"]
                cost = [f"{arm[key]:.3g}" for key in ("forwards_an_image", "images_per_second", "seconds")]
                numbers = ["-" if one is None else f"{one['value']:.3g}" for one in values.values()]
                finals.append([arm["title"], *cost, f"{arm['store_seconds']:.3g}", *numbers])
                if arm["title"] != ARMS[BASELINE].title:
                    works += [[arm["title"], kind, *map(_cell, reached[kind][metric].values())] for kind in KINDS]
            heads = [f"{nfe} NFE" for nfe in values]
            costs = ["F an image", "images/s", "train s", "store s"]
            out.append(Table(f"{name}: {metric} at the end of the training", ["", *costs, *heads], finals))
            caption = f"[95 % interval over the seeds]; (n): only n of {record['seeds']} seeds came there; -: none"
            title = f"{name}: how many times less work than CTM until CTM's final {metric}"
            out.append(Table(title, ["", "work", *heads], works, caption))
    return out


def _cell(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return "-"
    text = f"{entry['value']:.3g}"
    if entry["low"] is not None and entry["reached"] == entry["seeds"]:
        text += f" [{entry['low']:.2g}, {entry['high']:.2g}]"
    return text if entry["reached"] == entry["seeds"] else f"{text} ({entry['reached']})"


def _figure(courses: Sequence[Courses], kind: str) -> Any:
    """Draws the distance to the data against work, a row for each data set, a panel for each number of calls."""
    rows = [[_panel(one, nfe, kind) for nfe in _calls(one) if nfe in (1, 2, 3, 5)] for one in courses]
    unit = "network forwards, trajectories not included" if kind == "forwards" else "seconds, trajectories included"
    return draw_panels(f"Distance to the data against work: {unit}", rows)


def _panel(courses: Courses, nfe: int, kind: str) -> Panel:
    lines, data = [], next(iter(courses.values()))[0].trial.data
    for place, (arm, of_arm) in enumerate(_by_arm(courses).items()):
        curves, work = [outcome.curves[nfe, data.metric] for outcome, _ in of_arm], of_arm[0][1][kind]
        steps = [step for step, _ in curves[0] if step > 0]
        values = [[dict(points)[step] for points in curves] for step in steps]
        if all(min(row) > 0 for row in values):
            points = [(work_until(step, work), geometric(row).value) for step, row in zip(steps, values, strict=True)]
            lines.append(Line(ARMS[arm].title, points, [(min(row), max(row)) for row in values], place))
    title = f"{data.name}, {nfe} NFE"
    return Panel(title, kind.partition(" ")[0], lines, y=data.metric, x_log=True, y_log=True)


def _page(record: dict[str, Any]) -> str:
    parts = ["# The same student for less work", (__doc__ or "").partition("\n\n")[2].strip()]
    for title, columns, rows, caption in tables(record):
        lines = [" | ".join(row) for row in [columns, ["---"] * len(columns), *rows]]
        parts.append("\n".join([f"## {title}", "", *(f"| {line} |" for line in lines), "", caption or ""]))
    parts += [f"![{name}](figures/{name}.png)" for name in ("forwards", "seconds")]
    return "\n\n".join(parts) + "\n"
