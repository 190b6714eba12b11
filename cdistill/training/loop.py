"""The loop that every training runs in: step, log, save, evaluate, stop when asked."""

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill import stopping
from cdistill.checkpoint import check_identity, load_checkpoint, save_checkpoint
from cdistill.console import progress
from cdistill.errors import CdistillError, DivergedError, MismatchError, RecipeError, StoppedError
from cdistill.launch import set_threads, world_size
from cdistill.runs import RunFolder
from cdistill.storage import list_checkpoints

_PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
_LOG_EVERY = 10

Groups = dict[str, dict[str, Tensor]]


class Task(ABC):
    """What is trained: one optimisation step and the state that it leaves.

    Attributes:
        accelerator: Devices and processes.
        identity: Digests of what the state depends on; a checkpoint with others is refused.
    """

    accelerator: Accelerator
    identity: dict[str, str]

    @abstractmethod
    def step(self, index: int) -> dict[str, Tensor]:
        """Does optimisation step `index` (0, 1, ...) and returns scalars to log; randomness depends on `index` only."""

    @abstractmethod
    def groups(self) -> Groups:
        """Returns the whole state: file stem -> name -> tensor."""

    @abstractmethod
    def load(self, groups: Groups) -> None:
        """Puts back what :meth:`groups` returned."""


def make_accelerator(precision: str) -> Accelerator:
    """Returns accelerate's handle on devices and processes, and sets the threads, which accelerate changes.

    Raises:
        CdistillError: The launcher started several processes that do not know of each other.
    """
    try:
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=_PRECISION[precision])
    except ValueError as error:
        raise CdistillError(f"launch: {error}; unset RANK and WORLD_SIZE, or use a launcher that sets all") from error
    set_threads()
    if world_size() > 1 and accelerator.num_processes == 1:
        raise CdistillError(
            f"launch: {world_size()} processes were started but each is alone; start them with "
            "cdistill distill --nproc N, torchrun --nproc_per_node N, or accelerate launch --multi_gpu"
        )
    return accelerator


def effective_precision(accelerator: Accelerator) -> str:
    """Returns the precision that is really used: accelerate turns fp16 on a CPU silently into fp32."""
    asked = str(accelerator.mixed_precision)
    if asked == "fp16" and accelerator.device.type == "cpu":
        return "fp32 (fp16 was asked for; a CPU has none)"
    return "fp32" if asked == "no" else asked


def check_finite(values: dict[str, Tensor], index: int) -> None:
    """Raises DivergedError if a loss or a gradient's norm is NaN or infinite, before the weights are touched."""
    for name, value in values.items():
        if not math.isfinite(float(value)):
            raise DivergedError(
                f"step {index}: {name} is {float(value)}; nothing was saved of it: start again with a lower "
                "training.learning_rate, or fp32, and another --out"
            )


def check_gradients(task: Task, parameters: Iterable[Tensor], index: int) -> None:
    """Raises DivergedError if the gradient is not finite; with fp16 its scaler does that by skipping the step."""
    if task.accelerator.scaler is None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        check_finite({"the gradient's norm": torch.stack(torch._foreach_norm(gradients)).norm()}, index)


def restore(task: Task, folder: RunFolder, iterations: int) -> int:
    """Loads the newest checkpoint, if there is one, and returns the number of finished steps.

    Raises:
        MismatchError: It was made with another teacher or other data, or its tensors do not fit.
        RecipeError: It has more steps than `iterations`.
    """
    found = list_checkpoints(folder.checkpoints)
    if not found:
        return 0
    groups, state = load_checkpoint(found[-1])
    check_identity(found[-1], state, task.identity)
    done = int(state["step"])
    if done > iterations:
        raise RecipeError(f"training.iterations: got {iterations}, but {folder.path} has {done} steps already")
    try:
        task.load(groups)
    except (RuntimeError, KeyError) as error:
        raise MismatchError(f"{found[-1]}: its tensors do not fit this recipe ({error})") from error
    if (scaler := task.accelerator.scaler) is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return done


def train(
    task: Task,
    folder: RunFolder,
    iterations: int,
    save_every: int,
    keep: int,
    images: int,
    evaluate_every: int = 0,
    evaluate: Callable[[int], None] | None = None,
    best: str | None = None,
) -> None:
    """Trains from where the folder's checkpoints end to `iterations`.

    Args:
        task: What to train; it is restored here.
        folder: Where everything goes; the caller holds its lock.
        iterations: Number of steps of the whole run.
        save_every: Steps between checkpoints.
        keep: Checkpoints to keep, besides the best.
        images: Images a step, all processes together, for the rate.
        evaluate_every: Steps between evaluations, the start included, the end not; 0 for none.
        evaluate: Called with the number of finished steps, on every process.
        best: By what a checkpoint is the best, see `RunFolder.best_step`.

    Raises:
        StoppedError: A signal came; the state is saved.
        DivergedError: A loss became NaN or infinite; the last checkpoint is intact.
    """
    main = task.accelerator.is_main_process
    done = restore(task, folder, iterations)
    if main:
        folder.truncate_metrics(done)
        folder.write_status(state="running", step=done, iterations=iterations)
    task.accelerator.wait_for_everyone()

    def measure() -> None:
        if evaluate and evaluate_every and done % evaluate_every == 0 and done < iterations:
            evaluate(done)

    measure()
    log = _Log(folder, images, done, iterations)
    with progress(iterations, "training", "it", done) as advance:
        while done < iterations:
            losses = task.step(done)
            done += 1
            stop = _agree_to_stop(task.accelerator)
            values = {name: float(value) for name, value in losses.items()}
            advance(1, " ".join(f"{name} {value:.4g}" for name, value in values.items()))
            if main:
                log.record(done, values)
            if done % save_every == 0 or done == iterations or stop:
                save(task, folder, done, keep, best)
            if stop and done < iterations:
                _stop(folder, done, stop)
            measure()


class _Log:
    """Writes every tenth step, and the last, with the rate since the one before."""

    def __init__(self, folder: RunFolder, images: int, done: int, iterations: int) -> None:
        self.folder, self.images, self.iterations = folder, images, iterations
        self.done, self.time = done, time.monotonic()

    def record(self, done: int, values: dict[str, float]) -> None:
        if done % _LOG_EVERY == 0 or done == self.iterations:
            now = time.monotonic()
            rate = (done - self.done) * self.images / (now - self.time)
            self.folder.log({"step": done, "event": "train", **values, "images_per_second": round(rate, 2)})
            self.done, self.time = done, now


def save(task: Task, folder: RunFolder, done: int, keep: int, best: str | None = None) -> None:
    """Writes a checkpoint from the main process, and keeps the best besides the last `keep`; the others wait."""
    if task.accelerator.is_main_process:
        scaler = task.accelerator.scaler
        state = {"scaler": scaler.state_dict() if scaler is not None else None, "identity": task.identity}
        kept = folder.best_step(best)
        save_checkpoint(folder.checkpoints, done, task.groups(), state, keep, () if kept is None else (kept,))
        folder.write_status(step=done)
    task.accelerator.wait_for_everyone()


def _agree_to_stop(accelerator: Accelerator) -> int:
    """Returns the signal that any process received, the same on all, or 0."""
    mine = stopping.requested()
    if accelerator.num_processes == 1:
        return mine
    everyone = accelerator.gather(torch.tensor([mine], device=accelerator.device))
    return int(everyone.max())


def _stop(folder: RunFolder, done: int, number: int) -> None:
    code = stopping.EXIT_CODES[number]
    name = signal.Signals(number).name
    raise StoppedError(f"{folder.path}: {name} came, saved at step {done}; run the same command to go on", code)
