"""The folder of one run: its recipe, status, metrics, checkpoints, results; and the lock that keeps others out.

`RunFolder` is where a running command writes; `read_run` is the one reader of what it left, finished or not.

::

    RUN/recipe.resolved.toml   the recipe with every default filled in
        env.json               versions, device, processes, effective precision
        status.json            state, step, exit code
        metrics.jsonl          one JSON object a line
        evaluation.json        the last evaluation; evaluation-*.json those of `cdistill evaluate`
        coefficients.safetensors
        checkpoints/step-N/    weights, optimiser, counters, manifest
        samples/  plots/       pictures
        tracking/              TensorBoard's and Weights & Biases' files, where the recipe asks for them
"""

import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError, create_model

from cdistill.errors import MissingAssetError, RecipeError, RunLockedError, printable
from cdistill.runtime.processes import is_gone, this_process
from cdistill.storage.bounded import damaged, explain, load_json, parse_json, parse_toml, read_bytes, read_json
from cdistill.storage.files import list_checkpoints, step_of, sync, write_text

RUNS = Path("runs")
_LARGEST_LOG = 128 << 20  # bytes of metrics.jsonl
_BEFORE = (".lock", "status.json", "coefficients.safetensors")  # what may be there before a run begins
_UNFINISHED = re.compile(r"\.tmp-\d+-.+")
_STATUS = {"state": str, "kind": str, "error": str, "time": str, "step": int, "iterations": int, "exit_code": int}
_ROW = create_model("Row", sampler=(str, ...), nfe=(int, ...), values=(dict[str, float | None], ...))
_RECORD = create_model(  # of metrics.jsonl, beside the numbers of a training; None is a number that is not finite
    "Record",
    step=(Annotated[int, Field(ge=0)], ...),
    event=(str, ...),
    samples=(int | None, None),
    metrics=(dict[str, dict[str, Any]], {}),
    rows=(list[_ROW], []),  # type: ignore[valid-type]
)


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of a run, in the folder `path`."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.resolved.toml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def coefficients(self) -> Path:
        """The coefficients that the run uses, where its preconditioning needs some."""
        return self.path / "coefficients.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for this process, even until a kill -9; RunLockedError if another process holds it."""
        with held(self.path / ".lock", f"{self.path}: another process works in this run"):
            self._sweep()
            yield

    def _sweep(self) -> None:
        """Removes what a killed process had begun to write, and nothing else."""
        for path in self.path.glob(".tmp-*"):
            if path.is_file() and _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
        for path in self.checkpoints.glob(".tmp-step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def foreign_entries(self) -> list[str]:
        """Returns the names in a folder without a recipe that no run begins with."""
        names = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        return [name for name in names if name not in _BEFORE and not _UNFINISHED.fullmatch(name)]

    def write_status(self, **values: Any) -> None:
        """Merges `values` into status.json."""
        status = {
            **read_json(self.path / "status.json"),
            "process": this_process(),
            **values,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_text(self.path / "status.json", json.dumps(status, indent=1) + "\n")

    def status(self) -> dict[str, Any]:
        """Returns what status.json says, see `true_status`, {} when there is none."""
        return true_status(read_json(self.path / "status.json"))

    def results(self) -> dict[str, Any]:
        """Returns the record in evaluation.json, {} when there is none."""
        return read_json(self.path / "evaluation.json")

    def log(self, record: dict[str, Any], durable: bool = False) -> None:
        """Appends a line to metrics.jsonl; one that is `durable` survives a loss of power."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if durable:
            sync(self.path / "metrics.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the records of metrics.jsonl; half-written lines are left out, CorruptFileError for wrong ones."""
        path = self.path / "metrics.jsonl"
        try:
            lines = read_bytes(path, _LARGEST_LOG).decode().splitlines()
        except FileNotFoundError:
            return []
        except UnicodeDecodeError as error:
            raise damaged(path, str(error)) from error
        read = (_parse(line, f"{path}: line {number}") for number, line in enumerate(lines, 1))
        return [record for record in read if record is not None]

    def truncate_metrics(self, step: int) -> None:
        """Drops the records after `step`, which a resumed run will write again."""
        kept = [json.dumps(record) + "\n" for record in self.metrics() if record["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(kept))

    def latest_checkpoint(self) -> Path:
        """Returns the newest checkpoint; MissingAssetError if there is none."""
        checkpoints = list_checkpoints(self.checkpoints)
        if not checkpoints:
            raise MissingAssetError(
                f"{self.path}: no checkpoint in this folder; train first: cdistill distill --recipe R"
            )
        return checkpoints[-1]

    def find_checkpoint(self, wanted: str, goal: str | None = None) -> Path:
        """Returns the checkpoint that is `wanted`: "last", "best" (see `best_step`) or the number of its steps.

        RecipeError: It is neither. MissingAssetError: There is none of that step, or none that was evaluated; the
        message lists what there is.
        """
        last = self.latest_checkpoint()
        if wanted == "last":
            return last
        if wanted != "best" and not re.fullmatch("[0-9]{1,12}", wanted):
            raise RecipeError(f"step: got {printable(wanted)!r}; needs last, best or the number of a step")
        step = self.best_step(goal) if wanted == "best" else int(wanted)
        checkpoints = {step_of(path): path for path in list_checkpoints(self.checkpoints)}
        if step not in checkpoints:
            lacking = "evaluated checkpoint" if step is None else f"checkpoint of step {step}"
            raise MissingAssetError(
                f"{self.path}: no {lacking}; there are steps {', '.join(map(str, checkpoints))}; choose one with --step"
            )
        return checkpoints[step]

    def best_step(self, goal: str | None = None) -> int | None:
        """Returns the step whose student was measured best of those with a checkpoint, by metrics.jsonl, if any was.

        `goal` is METRIC@NFE, by default the first metric at the first NFE of the newest evaluation. The lowest value is
        best, or the highest where the metric is one of which more is better; the earliest step among equals; what is
        not finite never is. Only evaluations with as many samples as the newest compare.
        """
        records = [record for record in self.metrics() if record.get("event") == "evaluation"]
        alike = [record for record in records if record.get("samples") == records[-1].get("samples")]
        measured = {record["step"]: _values(record) for record in alike}
        goal = goal or next((name for values in reversed(measured.values()) for name in values), None)
        if not alike or goal is None:
            return None
        there = {step_of(path) for path in list_checkpoints(self.checkpoints)}
        candidates = {step: values[goal] for step, values in measured.items() if step in there and goal in values}
        metric = records[-1].get("metrics", {}).get(goal.rpartition("@")[0], {})
        sign = -1 if metric.get("better") == "higher" else 1
        finite = {step: sign * value for step, value in candidates.items() if math.isfinite(value)}
        return min(finite, key=lambda step: (finite[step], step), default=None)


@dataclass(frozen=True)
class RunRecord:
    """What the small files of a run hold; those that an unfinished or old run lacks are empty here.

    Attributes:
        evaluations: Records of the evaluations in metrics.jsonl by step; of two at one step, the later.
    """

    folder: RunFolder
    recipe: str  # text of the resolved recipe
    values: Mapping[str, Any]  # its values by dotted keys, such as "training.points"
    status: Mapping[str, Any]
    environment: Mapping[str, Any]
    training: Sequence[dict[str, Any]]  # records of metrics.jsonl other than evaluations, in their order
    evaluations: Sequence[dict[str, Any]]
    results: Mapping[str, dict[str, Any]]  # file name -> record: evaluation.json, then every evaluation-*.json
    checkpoints: Mapping[int, Path]  # number of steps -> folder, oldest first


def read_run(folder: RunFolder) -> RunRecord:
    """Reads a run, finished or not, but no tensors; MissingAssetError if there is none, CorruptFileError if damaged."""
    if not folder.recipe.is_file():
        raise MissingAssetError(
            f"{folder.path}: no run here, {folder.recipe.name} is missing; name the folder of a run"
        )
    try:
        recipe = read_bytes(folder.recipe).decode()
        values = flatten(parse_toml(recipe))
    except ValueError as error:
        raise damaged(folder.recipe, str(error)) from error
    records = folder.metrics()
    evaluations = {record["step"]: record for record in records if record.get("event") == "evaluation"}
    results = [folder.path / "evaluation.json", *sorted(folder.path.glob("evaluation-*.json"))]
    return RunRecord(
        folder=folder,
        recipe=recipe,
        values=values,
        status=true_status(_object(folder.path / "status.json")),
        environment=_object(folder.path / "env.json"),
        training=[record for record in records if record.get("event") != "evaluation"],
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        results={path.name: _result(path) for path in results if path.is_file()},
        checkpoints={step_of(path): path for path in list_checkpoints(folder.checkpoints)},
    )


def true_status(status: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a status without what is of another type than is written, "died" where its process is no longer there."""
    status = {
        key: value for key, value in status.items() if value is None or isinstance(value, _STATUS.get(key, object))
    }
    dead = status.get("state") in ("preparing", "running") and is_gone(status.get("process"))
    return (
        {**status, "state": "died", "error": "its process is gone; the same command resumes it"} if dead else {**status}
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values by their dotted keys.

    >>> flatten({"seed": 0, "training": {"points": 18}})
    {'seed': 0, 'training.points': 18}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _result(path: Path) -> dict[str, Any]:
    """Returns a record of an evaluation; CorruptFileError unless its rows have the form of those in metrics.jsonl."""
    record = _object(path)
    try:
        _RECORD.model_validate(
            {**record, "step": 0 if record.get("step") is None else record["step"], "event": "evaluation"}, strict=True
        )
    except ValidationError as error:
        raise damaged(path, explain(error)) from error
    return record


def _object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} where there is no file."""
    return load_json(path) if path.exists() else {}


@contextmanager
def held(lock: Path, taken: str) -> Iterator[None]:
    """Holds a lock until this process ends, even by kill -9; RunLockedError with `taken` if another has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout as error:
        raise RunLockedError(f"{taken}; wait, or choose another --out") from error


def latest_run(root: Path = RUNS) -> RunFolder:
    """Returns the run below `root` that distilled a student and was worked on last; MissingAssetError if none did."""
    runs = [RunFolder(path.parent) for path in root.glob("*/status.json")]
    runs = [run for run in runs if run.status().get("kind") == "distill" and list_checkpoints(run.checkpoints)]
    if not runs:
        raise MissingAssetError(
            f"{root}: no run here; make one: cdistill distill --recipe digits, or name one with --run"
        )
    return max(runs, key=lambda run: list_checkpoints(run.checkpoints)[-1].stat().st_mtime)


def run_names(paths: Sequence[Path], where: str) -> list[str]:
    """Returns each run's name, or its path where names are equal; RecipeError, after `where`, if one is named twice."""
    places = [path.resolve() for path in paths]
    if repeated := [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise RecipeError(f"{where}: {repeated[0]} is named twice; name each run once")
    names = Counter(place.name for place in places)
    return [str(path) if names[place.name] > 1 else place.name for path, place in zip(paths, places, strict=True)]


def _values(record: dict[str, Any]) -> dict[str, float]:
    """Returns METRIC@NFE -> value of an evaluation's record, in its order, without those that are not finite."""
    return {
        f"{metric}@{row['nfe']}": value
        for row in record.get("rows", [])
        for metric, value in row["values"].items()
        if value is not None
    }


def _parse(line: str, where: str) -> dict[str, Any] | None:
    """Returns the record in a line of metrics.jsonl, None if it is no JSON object."""
    try:
        value = parse_json(line)
        _RECORD.model_validate(value, strict=True)
    except ValidationError as error:
        if isinstance(value, dict):
            raise damaged(where, explain(error)) from error
        return None
    except ValueError:
        return None
    return dict(value)
