"""Draws the samples of fixed seeds and measures them; the teacher's own samples are drawn once and kept."""

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.data.memory import check_memory
from cdistill.data.source import QUANTISATION, to_uint8
from cdistill.errors import CdistillError, RecipeError, StoppedError
from cdistill.evaluation.estimates import LEVEL, Estimate
from cdistill.evaluation.features import FeatureNetwork, load_features
from cdistill.evaluation.metrics import FeatureMetric, Metric, SampleSet
from cdistill.evaluation.records import SCHEMA, TEACHER, Evaluation, Row
from cdistill.evaluation.references import Reference, find_statistics
from cdistill.evaluation.settings import EvaluationSection
from cdistill.networks.classes import Classes
from cdistill.networks.denoiser import chunk_size
from cdistill.registry import FEATURES, METRICS
from cdistill.runtime.console import progress, say
from cdistill.runtime.processes import versions
from cdistill.sampling.drawing import Sampler, stream
from cdistill.sampling.sample_store import SampleStore
from cdistill.sampling.samplers import TEACHER_NFE
from cdistill.sampling.teacher_data import teacher_endpoints
from cdistill.teachers import Teacher


class Evaluator:
    """Measures samplers on the same seeds as a recipe's section says; `accelerator` shares the work.

    `teacher`, on the accelerator's device, is whose trajectories `teacher-mse` compares with; `source` are real data,
    None where the section names statistics of them. CdistillError, before anything is drawn, if what is asked for
    cannot be measured. `classes` are drawn as often as they occur there, or all alike if the section says so.
    """

    def __init__(
        self,
        section: EvaluationSection,
        shape: tuple[int, ...],
        classes: Classes,
        teacher: Teacher | None,
        source: Source | None,
        accelerator: Accelerator,
    ) -> None:
        self.section, self.shape = section, shape
        drawn = classes.alike() if section.classes == "uniform" else classes
        self.shares, self.class_law = drawn.shares, drawn.law
        self.teacher, self.accelerator = teacher, accelerator
        self.seeds = range(section.first_seed, section.first_seed + section.samples)
        width = prod(shape) * (1 if len(shape) == 3 else 8)
        check_memory(len(self.seeds) * width, f"evaluation.samples: {section.samples:,} of shape {shape}")
        network = load_features(section.features)
        if section.features not in FEATURES.names():
            network.check(shape)  # one's own, by its path: it must be there, even if no metric asks for it
        stats = None
        if section.reference is not None:
            stats = find_statistics(section.reference, "" if source is None else source.name)
        self.reference = Reference(source, stats, accelerator)
        self.reference.digest()  # a missing or damaged file is reported before anything is drawn
        self.metrics = choose_metrics(section.metrics, self.reference, network)
        if teacher is None and self.metrics.pop("teacher-mse", None) is not None and "teacher-mse" in section.metrics:
            raise RecipeError("teacher-mse: there is no teacher; name one with --teacher, or choose other metrics")

    @cached_property
    def _endpoints(self) -> SampleStore | None:
        """The teacher's samples of these seeds; None without a teacher."""
        if self.teacher is None:
            return None
        return teacher_endpoints(self.teacher, self.seeds, self.shares, self.accelerator)

    def teacher_endpoints(self, count: int) -> Tensor:
        """Returns the teacher's samples (n, ...) of the first `count` seeds."""
        assert self._endpoints is not None
        return self._endpoints.rows(self.seeds[:count])[0]

    def draw(self, sampler: Sampler, title: str) -> SampleSet:
        """Draws the samples with a progress bar; every process returns all of them; StoppedError if a signal came."""
        images = len(self.shape) == 3
        samples = self._empty()
        diverged = torch.zeros(len(self.seeds))
        errors = None if self._endpoints is None else torch.zeros(len(self.seeds), dtype=torch.float64)
        with progress(len(self.seeds), title, "img") as advance:
            for drawn in stream(
                sampler, self.shape, self.seeds, self.shares,
                device=self.accelerator.device, advance=advance, accelerator=self.accelerator,
            ):  # fmt: skip
                samples[drawn.rows] = to_uint8(drawn.samples) if images else drawn.samples
                diverged[drawn.rows] = (~drawn.samples.isfinite().flatten(1).all(1)).float()
                if self._endpoints is not None and errors is not None:
                    endpoints, _ = self._endpoints.rows((drawn.rows + self.seeds.start).tolist())
                    errors[drawn.rows] = (drawn.samples - endpoints).square().flatten(1).mean(1)
        if count := int(self._sum(diverged).sum()):
            say(f"{title}: {count:,} of {len(self.seeds):,} samples are not finite: the student has diverged there")
        return SampleSet(self._sum(samples), None if errors is None else self._sum(errors), self.accelerator)

    def _empty(self) -> Tensor:
        """Returns room for all samples: uint8 images or float64 vectors, zeros."""
        kind = torch.uint8 if len(self.shape) == 3 else torch.float64
        return torch.zeros(len(self.seeds), *self.shape, dtype=kind)

    def _sum(self, own: Tensor) -> Tensor:
        """Adds up what the processes have; each has zeros where the others have something."""
        if self.accelerator.num_processes == 1:
            return own
        total: Tensor = self.accelerator.reduce(own.to(self.accelerator.device), "sum").cpu()
        return total

    def measure(self, sampler: str, nfe: int, samples: SampleSet) -> Row:
        """Measures one set of samples; a metric that fails on them is named on stderr and left out."""
        estimates: dict[str, Estimate] = {}
        for name, metric in self.metrics.items():
            try:
                estimates[name] = metric(samples, self.reference)
            except StoppedError:
                raise
            except CdistillError as error:
                say(f"{sampler}, {nfe} NFE: {name}: left out: {error}")
        return Row.of(sampler, nfe, estimates)

    def measure_teacher(self) -> Row:
        """Measures the teacher itself, by Heun's solver."""
        assert self._endpoints is not None
        images, count, samples = len(self.shape) == 3, len(self.seeds), self._empty()
        for batch in self._endpoints.read(self.seeds):  # all at once they would be four times as large
            endpoints = torch.from_numpy(batch.samples)
            samples[batch.start : batch.start + len(endpoints)] = to_uint8(endpoints) if images else endpoints
        errors = torch.zeros(count, dtype=torch.float64)
        return self.measure(TEACHER, TEACHER_NFE, SampleSet(samples, errors, self.accelerator))

    def evaluation(self, rows: Sequence[Row], **facts: Any) -> Evaluation:
        """Returns rows as a record, with `facts` about how they were made."""
        metrics = {name: _described(metric) for name, metric in self.metrics.items()}
        facts = {"schema": SCHEMA, **facts, "samples": len(self.seeds)}
        return Evaluation(**facts, level=LEVEL, metrics=metrics, rows=list(rows))

    def facts(self) -> dict[str, Any]:
        """Returns what the figures depend on besides what was drawn from, as JSON."""
        source, teacher = self.reference.source, self.teacher
        return {
            "split": self.section.split,
            "classes": self.class_law,
            "quantisation": QUANTISATION,
            "teacher": None if teacher is None else teacher.name,
            "teacher_sha256": None if teacher is None else teacher.digest,
            "data": None if source is None else source.name,
            "data_sha256": None if source is None else source.digest,
            "reference_sha256": self.reference.digest(),
            "network_batch": chunk_size(self.shape),
            "precision": "fp32",
            "kept_features": self.reference.keep,
            "device": self.accelerator.device.type,
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def choose_metrics(names: Sequence[str], reference: Reference, network: FeatureNetwork) -> dict[str, Metric]:
    """Returns the metrics called `names`, or all that apply to this kind of data when none is named.

    One that cannot be computed here is named on stderr, with what to do, and left out; CdistillError if all that are
    named are.
    """
    source = reference.source
    wanted = names or (METRICS.names() if source else ("fid", "teacher-mse"))  # of the data, or of their statistics
    chosen: dict[str, Metric] = {name: METRICS.get(name)(network) for name in wanted}
    if not names and source is not None:
        chosen = {name: metric for name, metric in chosen.items() if metric.applies(source)}
    usable, failure = {}, None
    for name, metric in chosen.items():
        try:
            metric.check(reference)
            usable[name] = metric
        except StoppedError:
            raise
        except CdistillError as error:
            failure = error
            say(f"{name}: left out: {error}")
    if names and not usable and failure is not None:
        raise failure
    return usable


def _described(metric: Metric) -> dict[str, str]:
    facts = {"title": metric.title, "better": metric.better}
    if isinstance(metric, FeatureMetric):
        facts |= {"features": metric.network.name, "features_sha256": metric.network.digest}
    return facts
