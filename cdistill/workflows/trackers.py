"""TensorBoard and Weights & Biases, through accelerate's trackers: they get what metrics.jsonl gets."""

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from cdistill.errors import CdistillError, RecipeError, brief
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.runtime.console import say
from cdistill.runtime.processes import let_main
from cdistill.storage.files import list_checkpoints, write_text
from cdistill.storage.run_folder import RunFolder

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
def tracked(folder: RunFolder, recipe: DistillRecipe | TeacherRecipe, accelerator: Accelerator) -> Iterator[RunFolder]:
    """Yields the folder with the recipe's trackers as listeners, on the main process; closes them in any case.

    One that fails later is left out with a line on stderr: a run of days does not end for a tracker.

    Raises:
        CdistillError: A tracker could not be started: nobody is logged in, say.
    """
    with ExitStack() as stack:
        listeners: list[_Listener] = []

        def begin() -> None:
            for name in recipe.logging.trackers:
                listeners.append(_Listener(name, _start(name, folder, recipe)))
                stack.callback(listeners[-1].close)

        let_main(begin, folder.path, accelerator)
        yield replace(folder, listeners=(*folder.listeners, *listeners))


def scalars(record: dict[str, Any]) -> dict[str, float]:
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
    }


class _Listener:
    """Passes records on to a tracker until that fails."""

    def __init__(self, name: str, tracker: GeneralTracker) -> None:
        self.name, self.tracker, self.failed = name, tracker, False

    def __call__(self, record: dict[str, Any]) -> None:
        self._attempt(lambda: self.tracker.log(scalars(record), step=record["step"]))

    def close(self) -> None:
        self._attempt(self.tracker.finish)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:
            self.failed = True
            say(f"{self.name}: left out from here on, metrics.jsonl goes on: {type(error).__name__}: {brief(error)}")


def _start(name: str, folder: RunFolder, recipe: DistillRecipe | TeacherRecipe) -> GeneralTracker:
    try:
        return _tensorboard(folder) if name == "tensorboard" else _wandb(folder, recipe)
    except CdistillError:
        raise
    except Exception as error:
        raise CdistillError(
            f"logging.trackers: {name} does not start: {type(error).__name__}: {brief(error)}; mend that, "
            "or leave it out: --set logging.trackers=[]"
        ) from error


def _tensorboard(folder: RunFolder) -> GeneralTracker:
    """Starts TensorBoard's writer in RUN/tracking; what it holds behind the newest checkpoint is hidden."""
    found = list_checkpoints(folder.checkpoints)
    done = int(found[-1].name.removeprefix("step-")) if found else 0
    tracker = TensorBoardTracker("tracking", folder.path, purge_step=done + 1)
    tracker.start()
    return tracker


def _wandb(folder: RunFolder, recipe: DistillRecipe | TeacherRecipe) -> GeneralTracker:
    """Starts or resumes the run of Weights & Biases that belongs to this folder; the user's variables come first."""
    tracking = folder.path / "tracking"
    tracking.mkdir(exist_ok=True)
    own = tracking / "wandb-id.txt"
    if not own.is_file():
        write_text(own, uuid.uuid4().hex)
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT") or "cdistill",
        name=os.environ.get("WANDB_NAME") or folder.path.resolve().name,
        id=os.environ.get("WANDB_RUN_ID") or own.read_text(),
        dir=os.environ.get("WANDB_DIR") or str(tracking),
        resume="allow",
    )
    tracker.start()
    tracker.store_init_configuration(recipe.model_dump())
    return tracker
