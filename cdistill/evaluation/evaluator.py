"""Measures samplers on the same seeds; the teacher's own samples are drawn once and kept."""

from collections.abc import Sequence
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data.source import to_uint8
from cdistill.errors import CdistillError, RecipeError, StoppedError
from cdistill.evaluation.features import FeatureNetwork
from cdistill.evaluation.metrics import SampleSet
from cdistill.evaluation.references import Reference
from cdistill.evaluation.results import Row, choose_metrics
from cdistill.evaluation.teacher_ends import PIECE, TeacherEnds
from cdistill.runtime.console import progress, say
from cdistill.sampling.drawing import Sampler, stream
from cdistill.sampling.samplers import TEACHER_POINTS
from cdistill.teachers import Teacher

TEACHER = "teacher (Heun)"


class Judge:
    """Draws samples and measures them.

    Args:
        shape: Shape of one sample.
        num_classes: Number of classes, 0 when unconditional.
        teacher: Whose trajectories `teacher-mse` compares with, on the accelerator's device; None without one.
        reference: Real data to compare with.
        network: What FID and its kin look at.
        metrics: Names; all that apply when empty.
        seeds: One sample for each.
        accelerator: Shares the work among its processes.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int,
        teacher: Teacher | None,
        reference: Reference,
        network: FeatureNetwork,
        metrics: Sequence[str],
        seeds: range,
        accelerator: Accelerator,
    ) -> None:
        self.shape, self.num_classes = shape, num_classes
        self.teacher, self.reference, self.network, self.accelerator = teacher, reference, network, accelerator
        self.seeds = seeds
        self.metrics = choose_metrics(metrics, reference, network)
        if teacher is None:
            self._leave_out_alignment(metrics)

    def _leave_out_alignment(self, asked: Sequence[str]) -> None:
        if self.metrics.pop("teacher-mse", None) is not None and "teacher-mse" in asked:
            raise RecipeError("teacher-mse: there is no teacher; name one with --teacher, or choose other metrics")

    @cached_property
    def ends(self) -> TeacherEnds | None:
        """The teacher's samples of these seeds; None without a teacher."""
        if self.teacher is None:
            return None
        ends = TeacherEnds(self.teacher, self.accelerator)
        ends.prepare(self.seeds.start, len(self.seeds))
        return ends

    def teacher_ends(self, count: int) -> Tensor:
        """Returns the teacher's samples (n, ...) of the first `count` seeds."""
        if self.ends is None:
            raise ValueError("no teacher")
        return self.ends.rows(torch.tensor(self.seeds[:count]))

    def draw(self, sampler: Sampler, title: str) -> SampleSet:
        """Draws the samples with a progress bar; every process returns all of them.

        Raises:
            StoppedError: A signal came.
        """
        images = len(self.shape) == 3
        samples = torch.zeros(len(self.seeds), *self.shape, dtype=torch.uint8 if images else torch.float64)
        wrong = torch.zeros(len(self.seeds))
        errors = None if self.ends is None else torch.zeros(len(self.seeds), dtype=torch.float64)
        with progress(len(self.seeds), title, "img") as advance:
            for drawn in stream(
                sampler, self.shape, self.seeds, self.num_classes,
                device=self.accelerator.device, advance=advance, accelerator=self.accelerator,
            ):  # fmt: skip
                samples[drawn.rows] = to_uint8(drawn.samples) if images else drawn.samples
                wrong[drawn.rows] = (~drawn.samples.isfinite().flatten(1).all(1)).float()
                if self.ends is not None and errors is not None:
                    ends = self.ends.rows(drawn.rows + self.seeds.start)
                    errors[drawn.rows] = (drawn.samples - ends).square().flatten(1).mean(1)
        if count := int(self._shared(wrong).sum()):
            say(f"{title}: {count:,} of {len(self.seeds):,} samples are not finite: the student has diverged there")
        return SampleSet(self._shared(samples), None if errors is None else self._shared(errors), self.accelerator)

    def _shared(self, part: Tensor) -> Tensor:
        """Adds up what the processes have; each has zeros where the others have something."""
        if self.accelerator.num_processes == 1:
            return part
        total: Tensor = self.accelerator.reduce(part.to(self.accelerator.device), "sum").cpu()
        return total

    def measure(self, sampler: str, nfe: int, samples: SampleSet) -> Row:
        """Measures one set of samples; a metric that fails on them is named on stderr and left out.

        Raises:
            StoppedError: A signal came.
        """
        found = {}
        for name, metric in self.metrics.items():
            try:
                found[name] = metric(samples, self.reference)
            except StoppedError:
                raise
            except CdistillError as error:
                say(f"{sampler}, {nfe} NFE: {name}: left out: {error}")
        return Row(sampler, nfe, found)

    def judge_teacher(self) -> Row:
        """Measures the teacher itself, by Heun's solver."""
        if self.ends is None:
            raise ValueError("no teacher")
        images, count = len(self.shape) == 3, len(self.seeds)
        samples = torch.zeros(count, *self.shape, dtype=torch.uint8 if images else torch.float64)
        for start in range(0, count, PIECE):  # all at once they would be four times as large, and more on the way
            part = self.ends.rows(torch.tensor(self.seeds[start : start + PIECE]))
            samples[start : start + len(part)] = to_uint8(part) if images else part
        errors = torch.zeros(count, dtype=torch.float64)
        return self.measure(TEACHER, 2 * (TEACHER_POINTS - 1), SampleSet(samples, errors, self.accelerator))
