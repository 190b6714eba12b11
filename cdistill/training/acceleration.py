"""What makes networks fast and keeps their mathematics: half weights, memory format, compilation, CUDA graphs; a clock.

Nothing is assumed: `python -m tests.benchmarks.training` measures what each of them brings on a device.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cdistill.networks.denoiser import Denoiser
from cdistill.runtime.devices import compiles
from cdistill.sampling.solvers import heun_step
from cdistill.training.loop import effective_precision
from cdistill.training.settings import TrainingSection

Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""One step of a solver: x (B, ...), t (B,), u (B,), labels (B,) or None."""

_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# Where channels innermost were measured to be fast for convolutions; on a GPU not measured yet.
_CHANNELS_LAST = {("cpu", "fp32"), ("cuda", "fp16"), ("cuda", "bf16")}


@dataclass(frozen=True)
class Acceleration:
    """How the networks of a training run.

    Attributes:
        teacher_dtype: Type of the teacher's weights, None for the type that they have.
        compiled: Whether networks are compiled.
        channels_last: Whether the student's convolutions see the channels innermost.
        teacher_channels_last: Whether the teacher's do.
    """

    teacher_dtype: torch.dtype | None
    compiled: bool
    channels_last: bool
    teacher_channels_last: bool

    def __str__(self) -> str:
        dtype = str(self.teacher_dtype).removeprefix("torch.")
        words = [f"teacher {dtype}"] if self.teacher_dtype is not None else []
        words += ["compiled"] if self.compiled else []
        words += ["channels_last"] if self.channels_last else []
        words += ["teacher channels_last"] if self.teacher_channels_last else []
        return ", ".join(words) or "eager"


def choose_acceleration(section: TrainingSection, accelerator: Accelerator) -> Acceleration:
    """Returns what a recipe asks for; "auto" is what was found to be fast on the kind of device.

    For compilation see `compiles`; channels are innermost in float32 on a CPU (in bfloat16 that is slower there) and in
    half precision on a GPU.
    """
    device = accelerator.device.type
    own = effective_precision(accelerator).split()[0]
    wanted = own if section.teacher_precision == "same" else section.teacher_precision

    def innermost(precision: str) -> bool:
        return (device, precision) in _CHANNELS_LAST if section.channels_last == "auto" else section.channels_last

    return Acceleration(
        teacher_dtype=None if wanted in ("fp32", "tf32") else _TYPES[wanted],
        compiled=compiles(section.compile, device),
        channels_last=innermost(own),
        teacher_channels_last=innermost(wanted),
    )


def lay_out(network: nn.Module, channels_last: bool) -> None:
    """Puts the weights of the convolutions into the memory format."""
    if channels_last:
        network.to(memory_format=torch.channels_last)


def make_solver_step(teacher: Denoiser, acceleration: Acceleration) -> Step:
    """Returns one Heun step of a frozen teacher, for samples of float32 or more.

    With half weights only what enters the network is rounded: c_in x is cast last, x and dx/dt stay as they are. On a
    GPU the compiled step is replayed as a CUDA graph.
    """
    own = next(iter(teacher.state_dict().values()), torch.zeros(()))
    changed = acceleration.teacher_dtype is not None or acceleration.teacher_channels_last
    network = teacher.lowered(acceleration.teacher_dtype or own.dtype) if changed else teacher
    lay_out(network, acceleration.teacher_channels_last)

    def step(x: Tensor, t: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
        return heun_step(lambda point, level: network(point, level, None, labels), x, t, u)

    if not acceleration.compiled:
        return step
    if not own.is_cuda:
        return torch.compile(step, dynamic=False)
    replayed: Step = torch.compile(step, dynamic=False, mode="reduce-overhead")
    # The graph writes every result to the same place; a copy outlives the next step.
    return lambda x, t, u, labels: replayed(x, t, u, labels).clone()


class Stopwatch:
    """Adds up the time between entering and leaving; on a GPU by events, which the host reads later.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.total = self.begun = 0.0

    def __enter__(self) -> None:
        if self.cuda:
            self.spans.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.spans[-1][0].record()
        self.begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.spans[-1][1].record()
        else:
            self.total += time.perf_counter() - self.begun

    def seconds(self) -> float:
        """Returns the seconds since it was last asked; the device must have finished, as after reading a loss."""
        seconds: float = self.total + sum(first.elapsed_time(last) for first, last in self.spans) / 1000
        self.total = 0.0
        self.spans.clear()
        return seconds
