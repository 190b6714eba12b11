"""What makes networks fast and keeps their mathematics: half weights, memory format, compilation, CUDA graphs.

Nothing is assumed: `python -m tests.benchmarks.training` measures what each of them brings on a device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cdistill.networks.denoiser import Denoiser
from cdistill.sampling.solvers import heun_step
from cdistill.training.loop import effective_precision
from cdistill.training.settings import DistillSection

Step = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""One step of a solver: x (B, ...), t (B,), u (B,), labels (B,) or None."""

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Speed:
    """How the networks of a training run.

    Attributes:
        teacher: Type of the teacher's weights, None for the type that they have.
        compiled: Whether networks are compiled, and on a GPU the solver's step is replayed as a CUDA graph.
        channels_last: Whether the student's convolutions see the channels innermost.
        teacher_channels_last: Whether the teacher's do.
    """

    teacher: torch.dtype | None
    compiled: bool
    channels_last: bool
    teacher_channels_last: bool

    def __str__(self) -> str:
        parts = [f"teacher {str(self.teacher).removeprefix('torch.')}"] if self.teacher is not None else []
        parts += ["compiled"] if self.compiled else []
        parts += ["channels_last"] if self.channels_last else []
        parts += ["teacher channels_last"] if self.teacher_channels_last else []
        return ", ".join(parts) or "eager"


def choose_speed(section: DistillSection, accelerator: Accelerator) -> Speed:
    """Returns what a recipe asks for; "auto" is what was found to be fast on the kind of device.

    On a CPU that is channels_last in float32 (in bfloat16 it is slower there), and no compilation; on a GPU, not
    measured yet, compilation, and channels_last in half precision.
    """
    cuda = accelerator.device.type == "cuda"
    own = effective_precision(accelerator).split()[0]
    wanted = own if section.teacher_precision == "same" else section.teacher_precision

    def innermost(precision: str) -> bool:
        return cuda == (precision != "fp32") if section.channels_last == "auto" else section.channels_last

    return Speed(
        teacher=None if wanted == "fp32" else _TYPES[wanted],
        compiled=cuda if section.compile == "auto" else section.compile,
        channels_last=innermost(own),
        teacher_channels_last=innermost(wanted),
    )


def tolerate_compiler() -> None:
    """Lets what cannot be compiled here run as it is, for want of a compiler say; torch logs why."""
    torch._dynamo.config.suppress_errors = True


def keep_buffers() -> None:
    """Lets one call of a compiled network be passed back through twice, as two losses of e* do through mu's call."""
    torch._functorch.config.donated_buffer = False


def lay_out(network: nn.Module, channels_last: bool) -> None:
    """Puts the weights of the convolutions into the memory format."""
    if channels_last:
        network.to(memory_format=torch.channels_last)


def compiled_call(denoiser: Denoiser, speed: Speed) -> Denoiser:
    """Returns a frozen denoiser that shares its weights and is compiled for any number of samples, or itself."""
    return cast(Denoiser, torch.compile(denoiser, dynamic=True)) if speed.compiled else denoiser


def make_solver_step(teacher: Denoiser, speed: Speed) -> Step:
    """Returns one Heun step of a frozen teacher, for samples of float32 or more.

    With half weights only what enters the network is rounded: c_in x is cast last, x and dx/dt stay as they are.
    """
    own = next(iter(teacher.state_dict().values()), torch.zeros(()))
    changed = speed.teacher is not None or speed.teacher_channels_last
    network = teacher.lowered(speed.teacher or own.dtype) if changed else teacher
    lay_out(network, speed.teacher_channels_last)

    def step(x: Tensor, t: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
        return heun_step(lambda point, level: network(point, level, None, labels), x, t, u)

    if not speed.compiled:
        return step
    fast: Step = torch.compile(step, dynamic=False)
    return Replayed(fast) if own.is_cuda else fast


class Replayed:
    """A step as a CUDA graph: recorded once for each shape, then replayed without any work of the host.

    Args:
        step: Computes with tensors on a GPU and never looks at their values.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.recorded: dict[object, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor, u: Tensor, labels: Tensor | None) -> Tensor:
        """See `Step`."""
        given = [x, t, u] if labels is None else [x, t, u, labels]
        key = (x.shape, x.dtype, labels is None)
        if key not in self.recorded:
            self.recorded[key] = self._record(given)
        graph, inputs, out = self.recorded[key]
        for place, value in zip(inputs, given, strict=True):
            place.copy_(value)
        graph.replay()
        return out.clone()

    def _record(self, given: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        inputs = [value.clone() for value in given]
        x, t, u, *labels = inputs
        classes = labels[0] if labels else None
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # compiles, chooses kernels and allocates outside of the recording
            for _ in range(3):
                self.step(x, t, u, classes)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.step(x, t, u, classes)
        return graph, inputs, out
