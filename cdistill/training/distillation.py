"""Consistency distillation, fast: Eq. 7 with DSM (CTM) and Eq. 5 (CM) of Zheng et al. (2025).

`cdistill.training.reference` has the same plainly. What is done differently here, and changes nothing but rounding:

* The teacher and the targets run before the student, without a graph; the teacher in half precision where asked.
* Jumps that stand still (s = u, s = eps) cost no network call.
* The student's jump and its DSM prediction are one batch.
* One backward pass, the weights of the losses included (`cdistill.training.loss_weighting`).
* The host waits for the device once a step, when the next batch is ready (see `cdistill.training.loop`).

With micro-batches the weight must still be that of the whole batch, which is known only at the end of it. Then each
loss has its own forward and backward pass over all micro-batches, which is the same work, and the two gradients are
added.
"""

from abc import abstractmethod
from copy import deepcopy

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.errors import RecipeError
from cdistill.networks.denoiser import Denoiser, broadcast, freeze
from cdistill.objectives.losses import Distance, dsm_loss
from cdistill.preconditionings import Preconditioning
from cdistill.runtime.randomness import generator
from cdistill.sampling.solvers import jump
from cdistill.schedule import EPS, rho_grid
from cdistill.training.acceleration import choose_speed, compiled_call, keep_buffers, lay_out, make_solver_step
from cdistill.training.gan import Adversary, Pair, discriminates
from cdistill.training.loop import Groups, Task, gradient_norm, step_scaled
from cdistill.training.loss_weighting import Loss, Term, backward_once, backward_separately, cut, pull
from cdistill.training.optimizer_state import load_optimizer_tensors, optimizer_tensors, update_ema
from cdistill.training.settings import DistillSection
from cdistill.training.step_data import (
    Batch,
    Times,
    check_divisible,
    draw_batches,
    draw_ctm_times,
    draw_dsm_sigma,
    noisy,
    own_rows,
)
from cdistill.training.stopwatch import Stopwatch


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
        adversary: The discriminator of the GAN loss, if there is one.

    Attributes:
        live: theta, the student's weights.
        ema: Their moving average, for sampling.
        target: mu, their moving average inside the loss; the same module when the rates are equal.
        speed: How the networks run.
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
        adversary: Adversary | None = None,
    ) -> None:
        check_divisible(section.batch_size, accelerator.num_processes, section.accumulation)
        if preconditioning.to_eps_only and section.method != "cm":
            name = type(preconditioning).__name__
            raise RecipeError(f"preconditioning.name: {name} jumps to eps only; it needs training.method = 'cm'")
        device = accelerator.device
        self.accelerator, self.section, self.seed, self.distance = accelerator, section, seed, distance
        self.images = section.batch_size
        self.source = source.resident(device)
        self.speed = choose_speed(section, accelerator)
        grid = rho_grid(section.points)
        self.grid = grid.to(device)
        self.f, self.g = (table.to(device) for table in coefficient_tables(preconditioning, grid))
        self.watch = Stopwatch(device)
        self.live = teacher.student(section.method == "ctm", section.dropout).to(device)
        lay_out(self.live, self.speed.channels_last)
        self.ema = freeze(deepcopy(self.live))
        self.target = self.ema if section.target_rate == section.ema_rate else freeze(deepcopy(self.live))
        self.mu = compiled_call(self.target, self.speed)
        self.solver_step = make_solver_step(teacher.to(device), self.speed)
        if self.speed.compiled:
            self.live.compile_body()
        if self.speed.compiled and adversary is not None:
            keep_buffers()
        self.trained = [parameter for parameter in self.live.parameters() if parameter.requires_grad]
        self.model = accelerator.prepare(self.live)
        self.optimizer = torch.optim.RAdam(self.trained, lr=section.learning_rate, foreach=True)
        self.adversary = adversary
        self.ready: tuple[int, int, list[Batch]] | None = None

    @abstractmethod
    def draw_times(self, index: int) -> Times:
        """Draws the noise levels of the global batch of step `index`."""

    @abstractmethod
    def goal(self, batch: Batch) -> Tensor:
        """Computes the second argument of the distance, (B, ...), without gradient."""

    @abstractmethod
    def destination(self, batch: Batch) -> Tensor:
        """Returns where the student jumps to from t, as indices of the grid, (B,)."""

    def land(self, batch: Batch, denoised: Tensor) -> Tensor:
        """Computes the first argument of the distance, (B, ...): Eq. 8 with D_theta(x_t, t, s)."""
        i, j = batch.start, self.destination(batch)
        f, g = (broadcast(table[i, j], denoised) for table in (self.f, self.g))
        return f * batch.x_t + g * denoised

    def gradients(self, index: int) -> dict[str, Tensor]:
        """See :class:`Task`; a step of the student, or of the discriminator."""
        batches = self.draw(index)
        if self.adversary is not None:
            self.adversary.seed = self.draw_seed
        if self.adversary is not None and self.discriminates(index):
            found = self.adversary.backward((self.pair(batch) for batch in batches), index)
            return {**found, "discriminator_norm": gradient_norm(self.adversary.optimizer)}
        self.optimizer.zero_grad()
        last = self.live.balance_weight()
        if len(batches) == 1:
            found = backward_once(self.terms(batches[0]), last, self.accelerator)
        else:
            losses = self.losses(index)
            found = backward_separately(losses, batches, self.model, self.trained, last, self.accelerator)
        return {**found, "gradient_norm": gradient_norm(self.optimizer, self.accelerator.scaler)}

    def discriminates(self, index: int) -> bool:
        """Whether step `index` trains the discriminator in place of the student."""
        return self.adversary is not None and discriminates(index, self.adversary.section.start)

    def draw(self, index: int) -> list[Batch]:
        """Returns this process's micro-batches of step `index`, on the device."""
        section = self.section
        if self.ready is None or self.ready[:2] != (index, self.attempt):
            rows = own_rows(self.accelerator, section.batch_size)
            batches = draw_batches(
                self.source, self.draw_seed, index, section.batch_size, section.flips, self.draw_times(index),
                self.grid, rows, section.accumulation,
            )  # fmt: skip
            self.ready = (index, self.attempt, batches)
        return self.ready[2]

    def prepare(self, index: int) -> None:
        """See :class:`Task`."""
        self.draw(index)

    def update(self, index: int) -> None:
        """See :class:`Task`; mu follows theta (Eq. 28)."""
        if self.adversary is not None and self.discriminates(index):
            self.adversary.update()
            return
        step_scaled(self.optimizer, self.accelerator.scaler)
        update_ema(self.ema, self.live, self.section.ema_rate)
        if self.target is not self.ema:
            update_ema(self.target, self.live, self.section.target_rate)

    def kind(self, index: int) -> str:
        """See :class:`Task`."""
        return "discriminator" if self.discriminates(index) else "student"

    def skip(self, index: int) -> None:
        """See :class:`Task`."""
        if not self.discriminates(index):
            super().skip(index)

    def consistency_loss(self, landed: Tensor, goal: Tensor) -> Tensor:
        """Computes the mean of d over a micro-batch."""
        with self.accelerator.autocast():
            return self.distance(landed, goal).mean()

    def gan_loss(self, batch: Batch, landed: Tensor) -> Tensor:
        """Computes the student's GAN loss of e* (CTM), a mean over a micro-batch."""
        assert self.adversary is not None
        return self.adversary.generator_loss(landed, batch.labels, batch.index, batch.rows)

    def dsm_loss(self, batch: Batch, denoised: Tensor) -> Tensor:
        """Computes the mean DSM loss over a micro-batch from D_theta(x, sigma, sigma)."""
        return dsm_loss(denoised, batch.x0, batch.sigma, self.live.sigma_data).mean()

    def student(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Computes D_theta(x_t, t, s) and D_theta(x_0 + sigma z, sigma, sigma), (B, ...) each, in one call."""
        s = self.grid[self.destination(batch)]
        labels = None if batch.labels is None else torch.cat([batch.labels, batch.labels])
        x, t = torch.cat([batch.x_t, noisy(batch)]), torch.cat([self.grid[batch.start], batch.sigma])
        torch.manual_seed(batch.seed)
        denoised: Tensor = self.model(x, t, torch.cat([s, batch.sigma]), labels)
        first, second = denoised.chunk(2)
        return first, second

    def student_jump(self, batch: Batch) -> Tensor:
        """Computes D_theta(x_t, t, s) alone, (B, ...)."""
        torch.manual_seed(batch.seed)
        out: Tensor = self.model(batch.x_t, self.grid[batch.start], self.grid[self.destination(batch)], batch.labels)
        return out

    def student_dsm(self, batch: Batch) -> Tensor:
        """Computes D_theta(x_0 + sigma z, sigma, sigma) alone, (B, ...)."""
        torch.manual_seed(batch.seed + 1)
        out: Tensor = self.model(noisy(batch), batch.sigma, batch.sigma, batch.labels)
        return out

    @torch.no_grad()
    def pair(self, batch: Batch) -> Pair:
        """Returns what the discriminator learns from: x_0 and e*."""
        return Pair(batch.x0, self.land(batch, self.student_jump(batch)), batch.labels, batch.rows)

    def competes(self, index: int) -> bool:
        """Whether the student has a GAN loss in step `index`."""
        return self.adversary is not None and index >= self.adversary.section.start

    def terms(self, batch: Batch) -> dict[str, Term]:
        """Computes all losses of a batch from one call of the student."""
        goal = self.goal(batch)
        jumped, denoised = self.student(batch) if self.section.dsm else (self.student_jump(batch), None)
        found = {}
        if denoised is not None:
            leaf = cut(denoised)
            loss = self.dsm_loss(batch, leaf)
            found["dsm"] = Term(denoised, loss.detach(), pull(loss, leaf, self.accelerator))
        leaf = cut(jumped)
        landed = self.land(batch, leaf)
        place = cut(landed)  # no loss's own graph outlives its gradient here
        losses = {"consistency": self.consistency_loss(place, goal)}
        pulls = {"consistency": pull(losses["consistency"], place, self.accelerator)}
        if self.competes(batch.index):
            losses["gan"] = self.gan_loss(batch, place)
            pulls["gan"] = pull(losses["gan"], place, self.accelerator)
        for name, cotangent in pulls.items():
            (back,) = torch.autograd.grad(landed, leaf, cotangent, retain_graph=len(pulls) > 1)
            found[name] = Term(jumped, losses[name].detach(), back)
        return {name: found[name] for name in ("consistency", "dsm", "gan") if name in found}

    def losses(self, index: int) -> dict[str, Loss]:
        """Returns the losses of step `index`, each with a call of the student of its own."""

        def consistency(batch: Batch) -> Tensor:
            goal = self.goal(batch)
            return self.consistency_loss(self.land(batch, self.student_jump(batch)), goal)

        found: dict[str, Loss] = {"consistency": consistency}
        if self.section.dsm:
            found["dsm"] = lambda batch: self.dsm_loss(batch, self.student_dsm(batch))
        if self.competes(index):
            found["gan"] = lambda batch: self.gan_loss(batch, self.land(batch, self.student_jump(batch)))
        return found

    def averaged(self) -> Denoiser:
        """Returns the averaged student as it comes back from a file, whatever its layout here: for evaluation."""
        return deepcopy(self.ema).to(memory_format=torch.contiguous_format)

    def groups(self) -> Groups:
        """See :class:`Task`."""
        optimizer = optimizer_tensors(self.optimizer, self.live)
        found = {"weights": self.live.state_dict(), "ema": self.ema.state_dict(), "optimizer": optimizer}
        if self.target is not self.ema:
            found["target"] = self.target.state_dict()
        return found if self.adversary is None else {**found, **self.adversary.groups()}

    def load(self, groups: Groups) -> None:
        """See :class:`Task`."""
        self.live.load_state_dict(groups["weights"])
        self.ema.load_state_dict(groups["ema"])
        if self.target is not self.ema:
            self.target.load_state_dict(groups["target"])
        load_optimizer_tensors(self.optimizer, self.live, groups["optimizer"])
        if self.adversary is not None:
            self.adversary.load(groups)

    def more(self, seconds: float) -> dict[str, float]:
        """See :class:`Task`: the share of the time that the teacher's solver took."""
        return {"teacher_share": round(self.watch.seconds() / seconds, 3)}

    def solve_teacher(self, batch: Batch) -> Tensor:
        """Follows the teacher's ODE for h Heun steps of the grid from t; returns x_u, (B, ...)."""
        x = batch.x_t
        with self.watch:
            for k in range(batch.h):
                times = self.grid[batch.start + k], self.grid[batch.start + k + 1]
                x = self.solver_step(x, *times, batch.labels)
        return x

    def jump_some(
        self, model: Denoiser, x: Tensor, places: tuple[Tensor, Tensor], some: Tensor, batch: Batch
    ) -> Tensor:
        """Jumps with the samples `some` from tau_i to tau_j, places = (i, j), each (B,); the others stand still."""
        if len(some) == 0:
            return x
        i, j = (place[some] for place in places)
        labels = None if batch.labels is None else batch.labels[some]
        with self.accelerator.autocast():
            there = jump(model, x[some], self.grid[i], self.grid[j], (self.f[i, j], self.g[i, j]), labels)
        return there if len(some) == len(x) else x.index_copy(0, some, there)

    def last(self, batch: Batch) -> Tensor:
        """Returns the index of eps for every sample, (B,)."""
        return torch.full_like(batch.end, len(self.grid) - 1)


class CTMTask(ConsistencyTask):
    """Eq. 7: d(f_mu(f_theta(x_t; t->s); s->eps), f_mu(f_A(Solver(x_t; t->u); u->s); s->eps)), w(t) = 1.

    A is the moving average as in the paper, or the live student as in CTM's code (recipe: training.target).
    """

    def draw_times(self, index: int) -> Times:
        """See :class:`ConsistencyTask`."""
        section, draw = self.section, generator(self.draw_seed, "ctm", index)
        start, end, h = draw_ctm_times(section.points, section.max_ode_steps, section.batch_size, draw)
        return Times(start, end, draw_dsm_sigma(section.batch_size, draw), h)

    @torch.no_grad()
    def goal(self, batch: Batch) -> Tensor:
        """See :class:`ConsistencyTask`."""
        x_u = self.solve_teacher(batch)
        places = batch.start + batch.h, batch.end
        if self.section.target == "ema":
            y = self.jump_some(self.mu, x_u, places, batch.inner, batch)
        else:
            y = self.jump_some(self.live.eval(), x_u, places, batch.inner, batch)
            self.live.train()
        return self.jump_some(self.mu, y, (batch.end, self.last(batch)), batch.outer, batch)

    def destination(self, batch: Batch) -> Tensor:
        """See :class:`ConsistencyTask`."""
        return batch.end

    def land(self, batch: Batch, denoised: Tensor) -> Tensor:
        """See :class:`ConsistencyTask`; the gradient flows through mu's last jump, not into its weights."""
        e = super().land(batch, denoised)
        return self.jump_some(self.mu, e, (batch.end, self.last(batch)), batch.outer, batch)


class CMTask(ConsistencyTask):
    """Eq. 5: d(f_theta(x_t; t->eps), f_mu(Solver(x_t; t->s); s->eps)) for neighbouring t, s; w(t) = 1."""

    def draw_times(self, index: int) -> Times:
        """See :class:`ConsistencyTask`."""
        section, draw = self.section, generator(self.draw_seed, "cm", index)
        start = torch.randint(0, section.points - 1, (section.batch_size,), generator=draw)
        return Times(start, start + 1, draw_dsm_sigma(section.batch_size, draw), 1)

    @torch.no_grad()
    def goal(self, batch: Batch) -> Tensor:
        """See :class:`ConsistencyTask`; both networks use the same dropout masks."""
        x_s = self.solve_teacher(batch)
        self.target.train()
        torch.manual_seed(batch.seed)
        everywhere = torch.arange(len(x_s), device=x_s.device)  # all samples, or the masks would fall elsewhere
        y = self.jump_some(self.mu, x_s, (batch.end, self.last(batch)), everywhere, batch)
        self.target.eval()
        return y

    def destination(self, batch: Batch) -> Tensor:
        """See :class:`ConsistencyTask`."""
        return self.last(batch)

    def student(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See :class:`ConsistencyTask`; two calls, because masks depend on the size of a batch."""
        return self.student_jump(batch), self.student_dsm(batch)


def coefficient_tables(preconditioning: Preconditioning, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns f and g at all pairs (t, s) of grid points, (N, N) float64 on the CPU, NaN where there is no jump."""
    t, s = torch.meshgrid(grid, grid, indexing="ij")
    allowed = (s <= t) & ((s == EPS) | (s == t) | (not preconditioning.to_eps_only))
    tables = [torch.full_like(t, torch.nan) for _ in range(2)]
    for table, values in zip(tables, preconditioning(t[allowed], s[allowed]), strict=True):
        table[allowed] = values
    return tables[0], tables[1]
