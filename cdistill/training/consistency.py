"""Consistency distillation: Eq. 7 with DSM (CTM) and Eq. 5 (CM) of Zheng et al. (2025).

One step: draw times; solve the teacher's ODE and form the targets, without gradient; back-propagate the
consistency loss, then the DSM loss; add the two gradients with CTM's adaptive weight. Each loss has its own
backward pass over its own forward pass, so that the weight costs no pass of its own and is that of the whole batch
however many micro-batches or processes share it.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import RecipeError
from cdistill.losses import Distance, balance, dsm_loss
from cdistill.networks.denoiser import Denoiser, broadcast, freeze
from cdistill.preconditionings import Preconditioning
from cdistill.randomness import derive_seed, generator
from cdistill.recipe import DistillSection
from cdistill.schedule import EPS, RHO, T, rho_grid
from cdistill.solvers import heun_step, jump, solve
from cdistill.training.batches import check_divisible, draw_data, draw_noise, on_device, own_rows
from cdistill.training.loop import Groups, Task, check_finite, check_gradients
from cdistill.training.state import load_optimizer_tensors, optimizer_tensors, update_ema


@dataclass(frozen=True)
class Batch:
    """What one step needs, of all samples or of a micro-batch.

    Attributes:
        x0: Clean samples (B, ...).
        labels: Their classes (B,) or None.
        x_t: Samples at noise level t (B, ...).
        start: Indices of t in the grid (B,).
        end: Indices of s in the grid (B,).
        z: Fresh noise for DSM, like `x0`.
        sigma: Noise levels for DSM (B,), float64.
    """

    x0: Tensor
    labels: Tensor | None
    x_t: Tensor
    start: Tensor
    end: Tensor
    z: Tensor
    sigma: Tensor

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns the fields in their order."""
        return self.x0, self.labels, self.x_t, self.start, self.end, self.z, self.sigma

    def split(self, count: int) -> list["Batch"]:
        """Cuts the batch into `count` equal micro-batches."""
        parts = [[None] * count if part is None else part.chunk(count) for part in self.tensors()]
        return [Batch(*values) for values in zip(*parts, strict=True)]


def draw_ctm_times(points: int, max_steps: int, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Draws CTM's times as indices of the grid: h ~ P(h) prop. to h on 1..M, i ~ U{0..N-1-h}, j ~ U{i+h..N-1}.

    Args:
        points: N.
        max_steps: M, at most N - 1.
        size: Samples.
        draw: Generator.

    Returns:
        i (size,), j (size,) and h, one for the whole step; t = tau_i, u = tau_{i+h}, s = tau_j.
    """
    h = 1 + int(torch.multinomial(torch.arange(1, max_steps + 1, dtype=torch.float64), 1, generator=draw))
    start = torch.randint(0, points - h, (size,), generator=draw)
    room = points - (start + h)  # how many places j has
    end = start + h + (torch.rand(size, generator=draw, dtype=torch.float64) * room).long()
    return start, end, h


def draw_dsm_sigma(size: int, draw: torch.Generator) -> Tensor:
    """Draws CTM's noise levels for DSM: every other one log-normal(-1.2, 1.2), else the rho-schedule at 0.7 U.

    Returns:
        float64 (size,).
    """
    lognormal = (-1.2 + 1.2 * torch.randn(size, generator=draw, dtype=torch.float64)).exp()
    place = 0.7 * torch.rand(size, generator=draw, dtype=torch.float64)
    schedule = (T ** (1 / RHO) + place * (EPS ** (1 / RHO) - T ** (1 / RHO))) ** RHO
    return torch.where(torch.arange(size) % 2 == 0, lognormal, schedule)


class ConsistencyTask(Task):
    """What Eqs. 5 and 7 share: student, moving averages, the two losses and their balance.

    Args:
        teacher: The frozen denoiser.
        preconditioning: f and g.
        distance: d(x, y) of Eqs. 5 and 7.
        source: The data.
        accelerator: Devices and processes.
        section: The recipe's numbers.
        seed: Seed of the run.

    Attributes:
        live: The student's weights.
        ema: Their moving average, for sampling.
        target: Their moving average inside the loss; the same module when the rates are equal.
    """

    def __init__(
        self,
        teacher: Denoiser,
        preconditioning: Preconditioning,
        distance: Distance,
        source: Source,
        accelerator: Accelerator,
        section: DistillSection,
        seed: int,
    ) -> None:
        check_divisible(section.batch_size, accelerator.num_processes, section.accumulation)
        if preconditioning.to_eps_only and section.method != "cm":
            name = type(preconditioning).__name__
            raise RecipeError(f"preconditioning.name: {name} jumps to eps only; it needs training.method = 'cm'")
        self.accelerator, self.section, self.source, self.seed = accelerator, section, source, seed
        device = accelerator.device
        self.teacher = teacher.to(device)
        self.distance = distance
        self.live = teacher.student(section.method == "ctm", section.dropout).to(device)
        self.ema = freeze(deepcopy(self.live))
        self.target = self.ema if section.target_rate == section.ema_rate else freeze(deepcopy(self.live))
        self.grid = rho_grid(section.points)
        t, s = torch.meshgrid(self.grid, self.grid, indexing="ij")
        allowed = (s <= t) & ((s == EPS) | (s == t) | (not preconditioning.to_eps_only))
        self.f, self.g = (torch.full_like(t, torch.nan).to(device) for _ in range(2))
        self.f[allowed], self.g[allowed] = (part.to(device) for part in preconditioning(t[allowed], s[allowed]))
        self.grid = self.grid.to(device)
        trained = [parameter for parameter in self.live.parameters() if parameter.requires_grad]
        optimizer = torch.optim.RAdam(trained, lr=section.learning_rate)
        self.model, self.optimizer = accelerator.prepare(self.live, optimizer)
        self.trained = trained

    @abstractmethod
    def draw(self, index: int) -> tuple[Batch, int]:
        """Draws the global batch of step `index`; returns this process's part, on the CPU, and the solver's steps h."""

    @abstractmethod
    def consistency_loss(self, batch: Batch, h: int) -> Tensor:
        """Computes the consistency loss of a micro-batch, a scalar."""

    def step(self, index: int) -> dict[str, Tensor]:
        """See :class:`Task`."""
        drawn, h = self.draw(index)
        mine = Batch(*on_device(self.accelerator, drawn.tensors()))
        micros = mine.split(self.section.accumulation)
        torch.manual_seed(derive_seed(self.seed, "dropout", index, self.accelerator.process_index))
        self.optimizer.zero_grad()
        losses = {"consistency": self._accumulate(micros, lambda batch: self.consistency_loss(batch, h))}
        if self.section.dsm:
            gradients = self._take_gradients()
            losses["dsm"] = self._accumulate(micros, self.dsm_loss)
        check_finite(losses, index)
        if self.section.dsm:
            losses["balance"] = self._combine(gradients)
        check_gradients(self, self.trained, index)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            update_ema(self.ema, self.live, self.section.ema_rate)
            if self.target is not self.ema:
                update_ema(self.target, self.live, self.section.target_rate)
        return losses

    def dsm_loss(self, batch: Batch) -> Tensor:
        """Computes the DSM loss of D_theta(x, sigma, sigma) on a micro-batch, a scalar."""
        noisy = batch.x0 + broadcast(batch.sigma, batch.x0) * batch.z
        denoised = self.model(noisy, batch.sigma, batch.sigma, batch.labels)
        return dsm_loss(denoised, batch.x0, batch.sigma, self.live.sigma_data).mean()

    def groups(self) -> Groups:
        """See :class:`Task`."""
        optimizer = optimizer_tensors(self.optimizer.optimizer, self.live)
        found = {"weights": self.live.state_dict(), "ema": self.ema.state_dict(), "optimizer": optimizer}
        return found if self.target is self.ema else {**found, "target": self.target.state_dict()}

    def load(self, groups: Groups) -> None:
        """See :class:`Task`."""
        self.live.load_state_dict(groups["weights"])
        self.ema.load_state_dict(groups["ema"])
        if self.target is not self.ema:
            self.target.load_state_dict(groups["target"])
        load_optimizer_tensors(self.optimizer.optimizer, self.live, groups["optimizer"])

    def solve_teacher(self, x: Tensor, start: Tensor, h: int, labels: Tensor | None) -> Tensor:
        """Follows the teacher's ODE for h Heun steps of the grid from the indices `start`."""
        times = self.grid[start + torch.arange(h + 1, device=start.device)[:, None]]
        with self.accelerator.autocast():
            return solve(heun_step, lambda point, t: self.teacher(point, t, None, labels), x, times)

    def jump(
        self, model: Denoiser, x: Tensor, start: Tensor, end: Tensor, labels: Tensor | None, skip: bool = True
    ) -> Tensor:
        """Jumps between grid points, from tau_start to tau_end; with `skip`, standing still costs no network call."""
        moving = (start != end).nonzero()[:, 0] if skip else torch.arange(len(x), device=x.device)
        if len(moving) == 0:
            return x
        i, j = start[moving], end[moving]
        chosen = None if labels is None else labels[moving]
        with self.accelerator.autocast():
            there = jump(model, x[moving], self.grid[i], self.grid[j], (self.f[i, j], self.g[i, j]), chosen)
        return there if len(moving) == len(x) else x.index_copy(0, moving, there)

    def _accumulate(self, micros: list[Batch], loss: Callable[[Batch], Tensor]) -> Tensor:
        """Adds the gradients of `loss` over micro-batches and processes; returns its mean, detached."""
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(micros):
            last = number == len(micros) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                value = loss(batch) / len(micros)
                self.accelerator.backward(value)
            total += value.detach().float()
        return self.accelerator.reduce(total, "mean")  # type: ignore[no-any-return]

    def _take_gradients(self) -> list[Tensor]:
        """Returns the gradients and clears them."""
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        self.optimizer.zero_grad()
        return taken

    def _combine(self, consistency: list[Tensor]) -> Tensor:
        """Leaves consistency + lambda * dsm in the parameters' gradients and returns lambda."""
        weight = next(k for k, p in enumerate(self.trained) if p is self.live.balance_weight())
        dsm = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else 1.0
        ratio = balance(consistency[weight], dsm[weight], scale)
        torch._foreach_mul_(dsm, ratio)
        torch._foreach_add_(dsm, consistency)
        for parameter, gradient in zip(self.trained, dsm, strict=True):
            parameter.grad = gradient
        return ratio


class CTMTask(ConsistencyTask):
    """Eq. 7: d(f_mu(f_theta(x_t; t->s); s->eps), f_mu(f_A(Solver(x_t; t->u); u->s); s->eps)), w(t) = 1.

    A is the moving average as in the paper, or the live student as in CTM's code (recipe: training.target).
    """

    def draw(self, index: int) -> tuple[Batch, int]:
        """See :class:`ConsistencyTask`."""
        section = self.section
        draw = generator(self.seed, "ctm", index)
        start, end, h = draw_ctm_times(section.points, section.max_ode_steps, section.batch_size, draw)
        rows = own_rows(self.accelerator, section.batch_size)
        return draw_batch(self.source, self.seed, index, section, start, end, draw, rows), h

    def consistency_loss(self, batch: Batch, h: int) -> Tensor:
        """See :class:`ConsistencyTask`."""
        final = torch.full_like(batch.end, len(self.grid) - 1)
        middle = batch.start + h
        with torch.no_grad():
            x_u = self.solve_teacher(batch.x_t, batch.start, h, batch.labels)
            inner = self.target if self.section.target == "ema" else self.live.eval()
            y = self.jump(inner, x_u, middle, batch.end, batch.labels)
            self.live.train()
            y_eps = self.jump(self.target, y, batch.end, final, batch.labels)
        e = self.jump(self.model, batch.x_t, batch.start, batch.end, batch.labels)
        e_eps = self.jump(self.target, e, batch.end, final, batch.labels)
        return self.distance(e_eps, y_eps).mean()


class CMTask(ConsistencyTask):
    """Eq. 5: d(f_theta(x_t; t->eps), f_mu(Solver(x_t; t->s); s->eps)) for neighbouring t, s; w(t) = 1."""

    def draw(self, index: int) -> tuple[Batch, int]:
        """See :class:`ConsistencyTask`."""
        section = self.section
        draw = generator(self.seed, "cm", index)
        start = torch.randint(0, section.points - 1, (section.batch_size,), generator=draw)
        rows = own_rows(self.accelerator, section.batch_size)
        return draw_batch(self.source, self.seed, index, section, start, start + 1, draw, rows), 1

    def consistency_loss(self, batch: Batch, h: int) -> Tensor:
        """See :class:`ConsistencyTask`; both networks use the same dropout mask."""
        final = torch.full_like(batch.end, len(self.grid) - 1)
        mask = int(torch.randint(2**62, ()))
        with torch.no_grad():
            x_s = self.solve_teacher(batch.x_t, batch.start, h, batch.labels)
            torch.manual_seed(mask)
            self.target.train()
            y = self.jump(self.target, x_s, batch.end, final, batch.labels, skip=False)
            self.target.eval()
        torch.manual_seed(mask)
        return self.distance(self.jump(self.model, batch.x_t, batch.start, final, batch.labels), y).mean()


def draw_batch(
    source: Source,
    seed: int,
    index: int,
    section: DistillSection,
    start: Tensor,
    end: Tensor,
    draw: torch.Generator,
    rows: slice,
) -> Batch:
    """Draws data and noise of the global batch of step `index`, and returns its part `rows`, on the CPU."""
    size = section.batch_size
    x0, labels = draw_data(source, seed, index, size, section.flips, rows)
    x_t = x0 + broadcast(rho_grid(section.points)[start[rows]], x0) * draw_noise(x0, draw, size, rows)
    z = draw_noise(x0, draw, size, rows)
    return Batch(x0, labels, x_t, start[rows], end[rows], z, draw_dsm_sigma(size, draw)[rows])
