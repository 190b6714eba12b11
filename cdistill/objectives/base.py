"""What an objective is: what a student is trained to satisfy.

A third party writes a subclass of :class:`Objective` with its settings, names it in the entry-point group
``cdistill.objectives`` and has it in every command as ``[objective] name = "..."``; README.md here has one in thirty
lines. The engine (`cdistill.training.distillation`) owns all the rest: data, batches, precision, the balance of the
losses, moving averages, checkpoints, logging.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch

from cdistill.errors import CdistillError
from cdistill.objectives.distances import make_distance
from cdistill.objectives.settings import GridSection, ObjectiveSection, SolverSection
from cdistill.registry import OBJECTIVES
from cdistill.sampling.solvers import jump
from cdistill.schedule import rho_grid

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from cdistill.networks.denoiser import Denoiser

AnyObjectiveSection = TypeVar("AnyObjectiveSection", bound=ObjectiveSection)


@dataclass(frozen=True)
class StepCost:
    """Expected network forwards an image and step.

    Attributes:
        teacher: Of the teacher.
        target: Without gradient.
        frozen: With a gradient to the input alone.
        student: With a gradient to the weights, DSM not included.
    """

    teacher: float
    target: float
    frozen: float
    student: float = 1

    def forwards(self, dsm: bool) -> float:
        """Returns the work of a step for each image in units of a forward.

        A backward pass to the weights counts 2, one to the input alone 1.
        """
        return self.teacher + self.target + 2 * self.frozen + 3 * (self.student + dsm)


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-batch, on the device.

    Attributes:
        x0: Clean samples (B, ...).
        x0_labels: Their classes (B,) or None.
        x_t: Samples at noise level t (B, ...): x_0 + t z, or points of kept trajectories of the teacher.
        labels: The classes of x_t (B,) or None.
        levels: Noise levels as the objective drew them, float64: "t" and "s" (B,), "path" (B, h+1), "eps" (B,), ...
        coefficients: f and g at the pairs of levels between which there are jumps, (B,) float64 each.
        moving: Indices of the samples whose two levels differ, for the same pairs, (at most B,).
        z: Fresh noise for DSM, like `x0`; None without it.
        sigma: Noise levels for DSM (B,), float64; None without it.
        index: Number of the step.
        rows: Where the samples are in the global batch, with start and stop.
        seed: Of the dropout masks.
        solving: Indices of the samples that each step of "path" moves; None where all are.
        points: Where the trajectories of x_t are at the levels that the objective calls `stored`, like `x_t`.
    """

    x0: Tensor
    x0_labels: Tensor | None
    x_t: Tensor
    labels: Tensor | None
    levels: Mapping[str, Tensor]
    coefficients: Mapping[tuple[str, str], tuple[Tensor, Tensor]]
    moving: Mapping[tuple[str, str], Tensor]
    z: Tensor | None
    sigma: Tensor | None
    index: int
    rows: slice
    seed: int
    solving: Sequence[Tensor | None]
    points: Mapping[str, Tensor]


@dataclass(frozen=True)
class Networks:
    """The networks that a target may call, where no graph is kept; a prediction may call `target`, which is frozen.

    Attributes:
        target: mu, the moving average of the student inside the loss.
        student: theta, as it is now.
        heun_step: One step of the teacher's solver: x (B, ...), t (B,), u (B,), labels -> x at u.
        autocast: Returns the context of mixed precision.
        solving: A context around the teacher's solver, which measures it.
    """

    target: Denoiser
    student: Denoiser
    heun_step: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    autocast: Callable[[], AbstractContextManager[object]]
    solving: AbstractContextManager[object]

    def solve(self, batch: Batch) -> Tensor:
        """Returns x_u (B, ...): from the store, or along the teacher's ODE, ``levels["path"]``, by Heun's steps."""
        if "u" in batch.points:
            return batch.points["u"]
        x, labels = batch.x_t, batch.labels
        with self.solving:
            for (t, u), some in zip(pairwise(batch.levels["path"].T.contiguous()), batch.solving, strict=True):
                if some is None:
                    x = self.heun_step(x, t, u, labels)
                else:
                    x = x.index_copy(
                        0, some, self.heun_step(x[some], t[some], u[some], None if labels is None else labels[some])
                    )
        return x

    def jump(self, network: Denoiser, x: Tensor, batch: Batch, start: str, end: str) -> Tensor:
        """Jumps from one named level to another by f x + g D(x) (Eq. 8); samples whose levels are equal cost nothing.

        Args:
            network: `target` or `student`.
            x: Points at ``levels[start]``, (B, ...); a gradient flows to them.
            batch: The micro-batch.
            start: Name of the level that the jump starts from.
            end: Name of the level that it ends at; (start, end) is one of the objective's `jumps`.

        Returns:
            Points at ``levels[end]``, like `x`.
        """
        some = batch.moving[start, end]
        if len(some) == 0:
            return x
        landed = self._jump(network, x, batch, (start, end), some)
        return landed if len(some) == len(x) else x.index_copy(0, some, landed)

    def jump_with_dropout(self, network: Denoiser, x: Tensor, batch: Batch, start: str, end: str) -> Tensor:
        """Jumps as :meth:`jump` does, with the dropout masks of the student's own jump in this batch."""
        network.train()
        torch.manual_seed(batch.seed)
        everywhere = torch.arange(len(x), device=x.device)  # all samples, or the masks would fall elsewhere
        landed = self._jump(network, x, batch, (start, end), everywhere)
        network.eval()
        return landed

    def _jump(self, network: Denoiser, x: Tensor, batch: Batch, pair: tuple[str, str], some: Tensor) -> Tensor:
        t, s = (batch.levels[name][some] for name in pair)
        f, g = (values[some] for values in batch.coefficients[pair])
        labels = None if batch.labels is None else batch.labels[some]
        with self.autocast():
            return jump(network, x[some], t, s, (f, g), labels)


class Objective(ABC, Generic[AnyObjectiveSection]):
    """An equation between the student's jump f_theta(x_t; t -> s) and a target, and how its noise levels are drawn.

    Args:
        section: The recipe's section, an instance of `section_type`.
        sample_shape: Shape of one sample, (C, H, W) or (d,).
        meta: Whether the distance works on the meta device and needs no file, for counting.

    Attributes:
        section_type: Its settings.
        takes_s: Whether the student has an input for s and jumps anywhere; else it jumps to eps only.
        takes_gan: Whether a GAN loss may look at :meth:`prediction`.
        sampler: Default sampler of its students.
        jumps: The pairs of levels, besides ("t", "s"), between which :meth:`target` and :meth:`prediction` jump.
    """

    section_type: ClassVar[type[ObjectiveSection]] = ObjectiveSection
    takes_s: ClassVar[bool] = True
    takes_gan: ClassVar[bool] = False
    sampler: ClassVar[str] = "ctm"
    jumps: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, section: AnyObjectiveSection, sample_shape: tuple[int, ...], meta: bool = False) -> None:
        self.section = section
        self.distance = make_distance(section.distance, sample_shape, meta)

    @property
    def grid(self) -> Tensor | None:
        """The noise levels that :meth:`draw` chooses from, float64 (N,), descending; None if it is continuous.

        By default the rho-grid of so many `points` as the section says, where it says so.
        """
        return rho_grid(self.section.points) if isinstance(self.section, GridSection) else None

    @property
    def stored(self) -> tuple[str, ...]:
        """Levels at which it needs the points of x_t's trajectory, in :attr:`Batch.points`; () where x_t is x_0 + t z.

        With any, x_t is taken from kept trajectories of the teacher (`cdistill.sampling.trajectories`). By default "u",
        the end of the teacher's solver, where the section has ``targets = "store"``.
        """
        return ("u",) if isinstance(self.section, SolverSection) and self.section.targets == "store" else ()

    @property
    def law(self) -> Tensor | None:
        """The probability of each pair (t, s) of the grid that :meth:`draw` draws, (N, N), for plans and reports."""
        return None

    @property
    def target_rate(self) -> float | None:
        """Rate of the moving average mu, the section's by default; None where the target needs none."""
        return self.section.target_rate if isinstance(self.section, SolverSection) else None

    @abstractmethod
    def draw(self, size: int, generator: torch.Generator, index: int) -> dict[str, Tensor]:
        """Draws the noise levels of a global batch, on the CPU, float64.

        Args:
            size: B.
            generator: Nothing else may be random.
            index: Number of the step.

        Returns:
            "t", where the student's jump starts, and "s", where it ends, (B,), s <= t; "path" (B, h+1), from t to u, if
            :meth:`target` solves the teacher's ODE; and whatever else the objective needs, (B,) or (B, ...). "eps" is
            added by the engine.
        """

    @abstractmethod
    def target(self, batch: Batch, networks: Networks) -> Tensor:
        """Computes the second argument of the distance, (B, ...), without gradient."""

    def prediction(self, landed: Tensor, batch: Batch, networks: Networks) -> Tensor:
        """Computes the first argument of the distance, (B, ...), from f_theta(x_t; t -> s); that itself by default."""
        return landed

    def loss(self, prediction: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Computes the loss of each sample, (B,); the distance by default."""
        return self.distance(prediction, target)

    @abstractmethod
    def cost(self) -> StepCost:
        """Returns the expected network forwards of one step for each image."""


def make_objective(
    section: ObjectiveSection, sample_shape: tuple[int, ...], meta: bool = False
) -> Objective[ObjectiveSection]:
    """Builds the registered objective that a recipe's section names; arguments as :class:`Objective`.

    Raises:
        UnknownNameError: No such name.
        CdistillError: What is registered is no objective.
        RecipeError: Its distance cannot compare such samples.
        MissingAssetError: Its distance needs weights that are not there.
    """
    kind = OBJECTIVES.get(section.name)
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise CdistillError(f"objective {section.name!r}: {kind!r} is no subclass of cdistill's Objective")
    return kind(section, sample_shape, meta)
