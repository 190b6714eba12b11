"""The folder of one run: its recipe, status, metrics, checkpoints; and the lock that keeps others out.

::

    RUN/recipe.resolved.toml   the recipe with every default filled in
        env.json               versions, device, processes, effective precision
        status.json            state, step, exit code
        metrics.jsonl          one JSON object a line
        coefficients.safetensors
        checkpoints/step-N/    weights, optimiser, counters, manifest
        samples/  plots/       pictures
        tracking/              TensorBoard's and Weights & Biases' files, where the recipe asks for them
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cdistill.errors import MissingAssetError, RunLockedError
from cdistill.storage import list_checkpoints, read_json, write_text

RUNS = Path("runs")
_UNFINISHED = re.compile(r"\.tmp-\d+-.+")


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of a run.

    Attributes:
        path: The folder.
        listeners: Called with every record behind its line in metrics.jsonl.
    """

    path: Path
    listeners: tuple[Callable[[dict[str, Any]], None], ...] = ()

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
        """Holds the run for this process; the system releases it even after kill -9.

        Raises:
            RunLockedError: Another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / ".lock", timeout=0):
                self._sweep()
                yield
        except Timeout as error:
            raise RunLockedError(
                f"{self.path}: another process works in this run; wait, or choose another --out"
            ) from error

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
        return [name for name in names if name not in (".lock", "status.json") and not _UNFINISHED.fullmatch(name)]

    def write_status(self, **values: Any) -> None:
        """Merges `values` into status.json."""
        status = {**self.status(), **values, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_text(self.path / "status.json", json.dumps(status, indent=1) + "\n")

    def status(self) -> dict[str, Any]:
        """Returns what status.json says, {} when there is none."""
        return read_json(self.path / "status.json")

    def results(self) -> dict[str, Any]:
        """Returns the record in evaluation.json, {} when there is none."""
        return read_json(self.path / "evaluation.json")

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, and tells the listeners."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        for listener in self.listeners:
            listener(record)

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the records of metrics.jsonl; a half-written last line is left out."""
        try:
            lines = (self.path / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [record for line in lines if (record := _parse(line)) is not None]

    def truncate_metrics(self, step: int) -> None:
        """Drops the records behind `step`, which a resumed run will make again."""
        kept = [json.dumps(record) + "\n" for record in self.metrics() if record["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(kept))

    def latest_checkpoint(self) -> Path:
        """Returns the newest checkpoint.

        Raises:
            MissingAssetError: There is none.
        """
        found = list_checkpoints(self.checkpoints)
        if not found:
            raise MissingAssetError(
                f"{self.path}: no checkpoint in this folder; train first: cdistill distill --recipe R"
            )
        return found[-1]


def latest_run(root: Path = RUNS) -> RunFolder:
    """Returns the run below `root` that distilled a student and was worked on last.

    Raises:
        MissingAssetError: There is none.
    """
    found = [RunFolder(path.parent) for path in root.glob("*/status.json")]
    found = [run for run in found if run.status().get("kind") == "distill" and list_checkpoints(run.checkpoints)]
    if not found:
        raise MissingAssetError(
            f"{root}: no run here; make one: cdistill distill --recipe digits, or name one with --run"
        )
    return max(found, key=lambda run: list_checkpoints(run.checkpoints)[-1].stat().st_mtime)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("step"), int) else None
