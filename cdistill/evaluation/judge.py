"""Measures samplers of one teacher on the same seeds; the teacher's own samples are drawn once."""

from collections.abc import Sequence
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.console import progress
from cdistill.data import Source
from cdistill.evaluation.metrics import Metric, Reference
from cdistill.evaluation.results import Row, choose_metrics, measure
from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning
from cdistill.sampling import TEACHER_POINTS, Sampler, generate, student_sampler, teacher_sampler
from cdistill.teachers import Teacher


class Judge:
    """Draws samples of seeds 0 .. n-1 and measures them.

    Args:
        teacher: Whose trajectories are the reference of `teacher-mse`.
        source: Real data to compare with.
        samples: n.
        metrics: Names; all that apply when empty.
        accelerator: Shares the sampling among its processes.
    """

    def __init__(
        self,
        teacher: Teacher,
        source: Source,
        samples: int,
        metrics: Sequence[str] = (),
        accelerator: Accelerator | None = None,
    ) -> None:
        self.teacher, self.source, self.accelerator = teacher, source, accelerator
        self.seeds = range(samples)
        self.device = accelerator.device if accelerator else torch.device("cpu")
        self.main = accelerator is None or accelerator.is_main_process
        self.metrics: dict[str, Metric] = choose_metrics(metrics, source)

    def draw(self, sampler: Sampler, title: str) -> Tensor:
        """Draws the samples (n, ...), with a progress bar."""
        with progress(len(self.seeds), title, "img") as advance:
            return generate(
                sampler, self.teacher.shape, self.seeds, self.teacher.denoiser.num_classes,
                device=self.device, advance=advance, accelerator=self.accelerator,
            )[0]  # fmt: skip

    @cached_property
    def reference(self) -> Reference:
        """The data and the teacher's samples."""
        sampler = teacher_sampler(self.teacher.denoiser)
        return Reference(self.source, self.draw(sampler, "teacher's samples"))

    def judge_teacher(self) -> Row:
        """Measures the teacher itself, by Heun's solver."""
        samples = self.reference.teacher_samples
        return measure("teacher (Heun)", 2 * (TEACHER_POINTS - 1), self.metrics, samples, self.reference)

    def judge_student(
        self, name: str, denoiser: Denoiser, form: Preconditioning, nfe: Sequence[int]
    ) -> tuple[list[Row], list[Tensor]]:
        """Measures a student at each number of network calls; returns the rows and the samples behind them."""
        drawn = [self.draw(student_sampler(denoiser, form, k), f"{name}, {k} NFE") for k in nfe]
        rows = [measure(name, k, self.metrics, samples, self.reference) for k, samples in zip(nfe, drawn, strict=True)]
        return rows, drawn

    def wait(self) -> None:
        """Waits until every process is here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
