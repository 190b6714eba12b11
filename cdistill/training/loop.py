"""The loop that every training runs in: step, log, save, evaluate, skip what is not finite, stop when asked.

The host reads from the device once a step: the losses, whether all is finite, and who was asked to stop, in one vector
over all processes. By then everything of the step is queued and the next batch is drawn.
"""

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.optim import Optimizer

from cdistill.errors import CdistillError, DivergedError, MismatchError, RecipeError, StoppedError, printable
from cdistill.runtime import signals
from cdistill.runtime.console import progress, say
from cdistill.runtime.processes import local_processes, set_threads, world_size
from cdistill.runtime.randomness import derive_seed
from cdistill.storage.bounded import damaged, explain, read_json
from cdistill.storage.checkpoints import check_identity, load_checkpoint, remove_checkpoint, save_checkpoint
from cdistill.storage.files import list_checkpoints, step_of
from cdistill.storage.run_folder import RunFolder
from cdistill.training.settings import CheckpointSection
from cdistill.training.trackers import log_record

_PRECISION = {"fp32": "no", "tf32": "no", "fp16": "fp16", "bf16": "bf16"}

Groups = dict[str, dict[str, Tensor]]


class Task(ABC):
    """What is trained: one optimisation step and the state that it leaves.

    Attributes:
        accelerator: Devices and processes.
        identity: Digests of what the state depends on; a checkpoint with others is refused.
        images: Images a step, all processes together.
        facts: What else a checkpoint says, JSON values.
        accept_data: Whether a checkpoint made with other data is resumed all the same.
        seed: Seed of the run.
        attempt: How often the run went back to a checkpoint; every attempt draws other numbers.
    """

    accelerator: Accelerator
    identity: dict[str, str]
    facts: Mapping[str, Any] = MappingProxyType({})
    accept_data: bool = False
    images: int
    seed: int
    attempt: int = 0

    @property
    def draw_seed(self) -> int:
        """Seed of the draws of this attempt."""
        return derive_seed(self.seed, "attempt", self.attempt) if self.attempt else self.seed

    @abstractmethod
    def backward(self, index: int) -> dict[str, Tensor]:
        """Back-propagates step `index` (0, 1, ...) and returns scalars to log, this process's, on the device.

        Randomness depends on `index` and `draw_seed` only. Nothing is read from the device, no weight is changed.
        """

    @abstractmethod
    def update(self, index: int) -> None:
        """Changes the weights by the gradients of step `index`, which are finite; what follows the weights follows."""

    @abstractmethod
    def groups(self) -> Groups:
        """Returns the whole state: file stem -> name -> tensor."""

    @abstractmethod
    def load(self, groups: Groups) -> None:
        """Puts back what :meth:`groups` returned."""

    def prepare(self, index: int) -> None:  # noqa: B027
        """Draws what step `index` needs; called while the device works on the step before."""

    def kind(self, index: int) -> str:
        """Returns what step `index` trains, where steps alternate between networks."""
        return "step"

    def skip(self, index: int) -> None:
        """Leaves the gradients of step `index` out, which are not finite; only the scaler for fp16 learns from them."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    def more(self, seconds: float) -> dict[str, float]:
        """Returns more to log about the last `seconds`."""
        return {}


@dataclass
class Counters:
    """What a run counts, saved with every checkpoint.

    Attributes:
        skipped: Steps whose loss or gradient was not finite; they changed nothing.
        in_a_row: How many of them came last, one after the other, of each kind of step.
        attempt: How often the run went back to a checkpoint.
        returned_to: The step that it went back to last, or -1.
        latest: The last values of everything since the last line of the log; None stands for what is not finite.
    """

    skipped: int = 0
    in_a_row: dict[str, int] = field(default_factory=dict)
    attempt: int = 0
    returned_to: int = -1
    latest: dict[str, float | None] = field(default_factory=dict)

    def row(self) -> int:
        """The longest row of skipped steps that has not ended."""
        return max(self.in_a_row.values(), default=0)


_COUNTERS = TypeAdapter(Counters)


@dataclass(frozen=True)
class Report:
    """What all processes know of a step.

    Attributes:
        values: Losses and the like, means over the processes.
        stop: The signal that any process received, or 0.
    """

    values: dict[str, float]
    stop: int

    @property
    def wrong(self) -> list[str]:
        """Names of the values that are not finite."""
        return [name for name, value in self.values.items() if not math.isfinite(value)]

    def __str__(self) -> str:
        return " ".join(f"{name} {value:.4g}" for name, value in self.values.items())


def train(
    task: Task,
    folder: RunFolder,
    iterations: int,
    checkpoint: CheckpointSection,
    patience: int,
    log_every: int,
    evaluate_every: int = 0,
    evaluate: Callable[[int], None] = lambda done: None,
    best: str | None = None,
) -> None:
    """Trains from where the folder's checkpoints end to `iterations`.

    Args:
        task: What to train; it is restored here.
        folder: Where everything goes; the caller holds its lock.
        iterations: Number of steps of the whole run.
        checkpoint: When the state is saved.
        patience: Skipped steps in a row before the run goes back to its last checkpoint.
        log_every: Steps between lines of the log.
        evaluate_every: Steps between evaluations, the start included, the end not; 0 for none.
        evaluate: Called with the number of finished steps, on every process.
        best: By what a checkpoint is kept as the best, see `RunFolder.best_step`.

    Raises:
        StoppedError: A signal came; the state is saved.
        DivergedError: Going back did not help either, or no step was finite; the last checkpoint is intact.
    """
    done, counters = start(task, folder, iterations)
    log = _Log(task, folder, log_every, iterations)

    def now(every: int) -> bool:
        return every > 0 and done % every == 0 and done < iterations

    if now(evaluate_every) and not counters.row():
        evaluate(done)
    with progress(iterations, "training", "it", done) as advance:
        while done < iterations:
            with log.step():
                values = task.backward(done)
                task.prepare(done + 1)
                report = read(task.accelerator, values)  # the host waits here, and nowhere else
                finish(task, done, report, counters)
            done += 1
            advance(1, str(report))
            log.record(done, report, counters)
            if counters.row() == patience:
                back = go_back(task, folder, done, report, counters)
                advance(back - done, "")
                done = back
            last = done == iterations
            due = not counters.row() and (now(checkpoint.every) or now(evaluate_every) or last)
            if due or report.stop or last:
                save(task, folder, done, counters, due, checkpoint.keep, best)
            if report.stop and not last:
                _stop(folder, done, report.stop)
            if due and now(evaluate_every):
                evaluate(done)
    _check_end(folder, task.accelerator, iterations, counters)


def _check_end(folder: RunFolder, accelerator: Accelerator, iterations: int, counters: Counters) -> None:
    """Says so where the last steps changed nothing; DivergedError if none did."""
    advice = "a lower training.learning_rate, or fp32, may help; start again with another --out"
    if counters.skipped >= iterations and not counters.attempt:
        raise DivergedError(
            f"{folder.path}: all {iterations} steps were skipped, not finite: nothing is trained; {advice}"
        )
    if counters.row():
        note = f"the last {counters.row()} steps were skipped, not finite"
        say(f"{folder.path}: {note}: the weights are those before them; {advice}")
        if accelerator.is_main_process:
            folder.write_status(note=note)


def start(task: Task, folder: RunFolder, iterations: int) -> tuple[int, Counters]:
    """Restores the newest checkpoint, if there is one; returns the number of finished steps, and the counters.

    Raises:
        MismatchError: It was made with another teacher or other data, or its tensors do not fit.
        RecipeError: It has more steps than `iterations`.
    """
    found = list_checkpoints(folder.checkpoints)
    done, counters = restore(task, found[-1]) if found else (0, Counters())
    if done > iterations:
        raise RecipeError(f"training.iterations: got {iterations}, but {folder.path} has {done} steps already")
    if task.accelerator.is_main_process:
        folder.truncate_metrics(done)
        folder.write_status(state="running", step=done, iterations=iterations)
    task.accelerator.wait_for_everyone()
    return done, counters


def restore(task: Task, checkpoint: Path) -> tuple[int, Counters]:
    """Loads a checkpoint into the task; returns its number of steps and its counters."""
    groups, state = load_checkpoint(checkpoint)
    identity = {key: digest for key, digest in task.identity.items() if key != "data_sha256" or not task.accept_data}
    check_identity(checkpoint, state, identity)
    try:
        task.load(groups)
    except (RuntimeError, KeyError, ValueError) as error:
        raise MismatchError(f"{checkpoint}: its tensors do not fit this recipe ({error})") from error
    if (scaler := task.accelerator.scaler) is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    known, given = {part.name for part in fields(Counters)}, state.get("counters", {})
    if isinstance(given, dict) and not given.keys() <= known:
        unknown = printable(", ".join(given.keys() - known))
        raise MismatchError(f"{checkpoint}: counts {unknown}; made by a newer cdistill")
    try:
        counters = _COUNTERS.validate_python(given)
    except ValidationError as error:
        raise damaged(checkpoint / "state.json", f"counters: {explain(error)}") from error
    task.attempt = counters.attempt
    return int(state["step"]), counters


def read(accelerator: Accelerator, values: dict[str, Tensor]) -> Report:
    """Reads what all processes computed and whether one was asked to stop: one transfer from the device."""
    stop = signals.requested()
    mine = torch.stack([value.detach().double() for value in values.values()])
    if accelerator.num_processes == 1:
        return Report(dict(zip(values, mine.tolist(), strict=True)), stop)
    asked = torch.full((1,), stop, dtype=mine.dtype, device=mine.device)
    everyone = accelerator.gather(torch.cat([mine, asked])[None]).tolist()
    *columns, stops = zip(*everyone, strict=True)
    means = [sum(column) / len(column) for column in columns]
    return Report(dict(zip(values, means, strict=True)), int(max(stops)))


def gradient_norm(optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> Tensor:
    """Returns the norm of the gradients that `optimizer` will use, the scaler's factor taken out, on the device."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
    return norm


def step_scaled(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Does a step of the optimiser whose gradients `gradient_norm` has seen."""
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def finish(task: Task, index: int, report: Report, counters: Counters) -> None:
    """Changes the weights if everything is finite, else counts the step as skipped."""
    if report.wrong:
        counters.skipped += 1
        counters.in_a_row[task.kind(index)] = counters.in_a_row.get(task.kind(index), 0) + 1
        task.skip(index)
    else:
        counters.in_a_row.pop(task.kind(index), None)
        task.update(index)


def go_back(task: Task, folder: RunFolder, done: int, report: Report, counters: Counters) -> int:
    """Loads the last checkpoint that was due; the run continues from there with other random numbers.

    One that was saved because of a signal does not count, so that an interrupted run goes back where any other does.

    Returns:
        Its step.

    Raises:
        DivergedError: There is none, or the run went back to it once already.
    """
    skipped = f"step {done}: {counters.row()} steps in a row were skipped, {' and '.join(report.wrong)} not finite"
    there = list_checkpoints(folder.checkpoints)
    found = _due(there)
    advice = "start again with a lower training.learning_rate, or fp32, and another --out"
    if not found:
        raise DivergedError(f"{skipped}; there is no checkpoint to go back to: {advice}")
    if counters.returned_to == step_of(found[-1]):
        raise DivergedError(f"{skipped}, after the run had gone back to {found[-1]} once; {advice}")
    back, then = restore(task, found[-1])
    task.accelerator.wait_for_everyone()
    counters.attempt += 1
    counters.in_a_row, counters.returned_to, counters.latest = {}, back, then.latest
    task.attempt = counters.attempt
    say(f"{folder.path}: {skipped}; goes back to step {back}, with other random numbers")
    if task.accelerator.is_main_process:
        for newer in there[there.index(found[-1]) + 1 :]:  # this run will not come there again
            remove_checkpoint(newer)
        folder.truncate_metrics(back)
        record = {"step": done, "event": "went back", "to": back, "attempt": counters.attempt}
        log_record(folder, record, task.accelerator)
        folder.write_status(step=back)
    task.accelerator.wait_for_everyone()
    return back


def _due(checkpoints: list[Path]) -> list[Path]:
    """Returns those that were saved because they were due, not because of a signal."""
    return [path for path in checkpoints if read_json(path / "state.json").get("due", True)]


class _Log:
    """Writes every n-th step, and the last, with the rate since the one before; evaluating and saving do not count."""

    def __init__(self, task: Task, folder: RunFolder, every: int, iterations: int) -> None:
        self.task, self.folder, self.every, self.iterations = task, folder, every, iterations
        self.steps, self.seconds = 0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures a step."""
        begun = time.perf_counter()
        yield
        self.steps += 1
        self.seconds += time.perf_counter() - begun

    def record(self, done: int, report: Report, counters: Counters) -> None:
        """Writes a line if one is due, the last value of everything."""
        counters.latest |= {name: None if name in report.wrong else value for name, value in report.values.items()}
        if done % self.every and done != self.iterations:
            return
        rate = round(self.steps * self.task.images / self.seconds, 2)
        more = self.task.more(self.seconds)
        if self.task.accelerator.is_main_process:
            record = {"step": done, "event": "train", **counters.latest, "images_per_second": rate, **more}
            log_record(self.folder, {**record, "skipped": counters.skipped}, self.task.accelerator)
        self.steps, self.seconds, counters.latest = 0, 0.0, {}


def save(task: Task, folder: RunFolder, done: int, counters: Counters, due: bool, keep: int, best: str | None) -> None:
    """Writes a checkpoint from the main process, and keeps the best besides the last `keep`; the others wait.

    Before one that is not `due` the last that was stays too, because the run may have to go back there.
    """
    if task.accelerator.is_main_process:
        scaler = task.accelerator.scaler
        state = {
            "scaler": scaler.state_dict() if scaler is not None else None,
            "identity": task.identity,
            **task.facts,
            "counters": asdict(counters),
            "due": due,
        }
        needed = {step_of(path) for path in _due(list_checkpoints(folder.checkpoints))[-1:] if not due}
        protected = needed | ({kept} if (kept := folder.best_step(best)) is not None else set())
        save_checkpoint(folder.checkpoints, done, task.groups(), state, keep, protected)
        folder.write_status(step=done)
    task.accelerator.wait_for_everyone()


def _stop(folder: RunFolder, done: int, number: int) -> None:
    code = signals.EXIT_CODES[number]
    name = signal.Signals(number).name
    raise StoppedError(f"{folder.path}: {name} came, saved at step {done}; run the same command to resume", code)


def make_accelerator(precision: str) -> Accelerator:
    """Returns accelerate's handle on devices and processes, and sets the threads, which accelerate changes.

    float32 is float32 on a GPU too, where torch would compute convolutions in TF32 by default; `precision` "tf32" asks
    for that.

    Raises:
        CdistillError: The launcher started several processes that do not know of each other, there are fewer GPUs than
            processes, or the device has no bfloat16.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_processes():
        raise CdistillError(
            f"launch: {local_processes()} processes on this machine, which has {gpus} GPUs; start one for each GPU"
        )
    if precision == "bf16" and gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise CdistillError("training.precision: this GPU has no bf16; choose fp16 or fp32")
    try:
        with signals.ending_at_once() if world_size() > 1 else nullcontext():
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
    if asked != "no":
        return asked
    return "tf32" if accelerator.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "fp32"
