"""TensorBoard and Weights & Biases, through accelerate's own trackers: they get the numbers that metrics.jsonl gets."""

import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from cdistill.errors import CdistillError, RecipeError, brief
from cdistill.runtime.console import say
from cdistill.runtime.processes import let_main
from cdistill.storage.bounded import read_bytes
from cdistill.storage.files import list_checkpoints, step_of, write_text
from cdistill.storage.run_folder import RunFolder
from cdistill.training.settings import LoggingSection

_INSTALLED = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the packages of the trackers are installed.

    Raises:
        RecipeError: One is not.
    """
    missing = [name for name in names if not _INSTALLED[name]()]
    if missing:
        raise RecipeError(
            f"logging.trackers: {', '.join(missing)} not installed; pip install {' '.join(missing)}, "
            "or --set logging.trackers=[]"
        )


@contextmanager
def tracking(
    section: LoggingSection, folder: RunFolder, config: Mapping[str, Any], accelerator: Accelerator
) -> Iterator[None]:
    """Starts a recipe's trackers in the main process, as `accelerator.trackers`, and finishes them in any case.

    Args:
        section: Names them.
        folder: The run that they follow.
        config: The recipe's values, for Weights & Biases.
        accelerator: Devices and processes.

    Raises:
        CdistillError: A tracker could not be started, because nobody is logged in for example.
    """

    def begin() -> None:
        for name in section.trackers:
            accelerator.trackers.append(_start(name, folder, config))

    try:
        let_main(begin, folder.path, accelerator)
        yield
    finally:
        _each_tracker(accelerator, lambda tracker: tracker.finish())
        accelerator.trackers.clear()


def log_record(folder: RunFolder, record: dict[str, Any], accelerator: Accelerator, durable: bool = False) -> None:
    """Appends a record to metrics.jsonl, then passes its numbers to the trackers; for the main process.

    A tracker that fails is dropped with a line on stderr: it does not end a training of days.

    Args:
        folder: The run.
        record: JSON values, with "step" and "event".
        accelerator: Holds the trackers.
        durable: Whether the line must survive a loss of power.
    """
    folder.log(record, durable)
    _each_tracker(accelerator, lambda tracker: tracker.log(scalars(record), step=record["step"]))


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a record of metrics.jsonl under a tracker's names.

    >>> scalars({"step": 10, "event": "train", "dsm": 0.5})
    {'train/dsm': 0.5}
    >>> rows = [{"sampler": "student", "nfe": 2, "values": {"fid": 3.0}}]
    >>> scalars({"step": 10, "event": "evaluation", "rows": rows})
    {'evaluation/student/nfe2/fid': 3.0}
    """
    event = record["event"]
    plain = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
    return {f"{event}/{key}": value for key, value in plain.items()} | {
        f"{event}/{row['sampler']}/nfe{row['nfe']}/{metric}": value
        for row in record.get("rows", [])
        for metric, value in row["values"].items()
        if value is not None  # a figure that is not finite
    }


def _each_tracker(accelerator: Accelerator, action: Callable[[GeneralTracker], object]) -> None:
    for tracker in list(accelerator.trackers):
        try:
            action(tracker)
        except Exception as error:
            accelerator.trackers.remove(tracker)
            reason = f"{type(error).__name__}: {brief(error)}"
            say(f"{tracker.name}: left out from here on, metrics.jsonl continues: {reason}")


def _start(name: str, folder: RunFolder, config: Mapping[str, Any]) -> GeneralTracker:
    try:
        return _tensorboard(folder) if name == "tensorboard" else _wandb(folder, config)
    except CdistillError:
        raise
    except Exception as error:
        raise CdistillError(
            f"logging.trackers: {name} does not start: {type(error).__name__}: {brief(error)}; fix that, "
            "or leave it out: --set logging.trackers=[]"
        ) from error


def _tensorboard(folder: RunFolder) -> GeneralTracker:
    """Starts TensorBoard's writer in RUN/tracking; what it wrote after the newest checkpoint is hidden."""
    checkpoints = list_checkpoints(folder.checkpoints)
    done = step_of(checkpoints[-1]) if checkpoints else 0
    tracker = TensorBoardTracker("tracking", folder.path, purge_step=done + 1)
    tracker.start()
    return tracker


def _wandb(folder: RunFolder, config: Mapping[str, Any]) -> GeneralTracker:
    """Starts or resumes the run of Weights & Biases that belongs to this folder; the user's variables come first."""
    place = folder.path / "tracking"
    place.mkdir(exist_ok=True)
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT") or "cdistill",
        name=os.environ.get("WANDB_NAME") or folder.path.resolve().name,
        id=os.environ.get("WANDB_RUN_ID") or _identity(place / "wandb-id.txt"),
        dir=os.environ.get("WANDB_DIR") or str(place),
        resume="allow",
    )
    tracker.start()
    tracker.store_init_configuration(dict(config))
    return tracker


def _identity(path: Path) -> str:
    """Returns by what Weights & Biases knows the run; made up at first, and where the file holds something else."""
    with suppress(FileNotFoundError, CdistillError):
        text = read_bytes(path, 1000).decode(errors="replace")
        if re.fullmatch("[0-9a-f]{32}", text):
            return text
    write_text(path, identity := uuid.uuid4().hex)
    return identity
