"""One step of distillation, for any objective: what `cdistill.objectives` says, for batches, processes, half precision.

Targets run before the student and without a graph, the teacher in half precision where asked; jumps between equals
(s = u, s = eps) cost no network call; the host waits for the device once a step, when the next batch is ready (see
`cdistill.training.loop`). Each loss has its own forward and backward pass, because CTM's weights of the losses are
known only when the gradients of the whole batch are (`cdistill.training.loss_weighting`).
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from typing_extensions import override

from cdistill.data import Source
from cdistill.errors import RecipeError
from cdistill.networks.denoiser import Denoiser, broadcast, freeze
from cdistill.objectives.base import AnyObjectiveSection, Batch, Networks, Objective
from cdistill.objectives.dsm import dsm_loss
from cdistill.objectives.settings import ObjectiveSection
from cdistill.preconditionings.base import Preconditioning
from cdistill.sampling.trajectories import TrajectoryStore
from cdistill.training.acceleration import Stopwatch, choose_acceleration, lay_out, make_solver_step
from cdistill.training.gan import Adversary, discriminates
from cdistill.training.loop import Groups, Task, gradient_norm, step_scaled
from cdistill.training.loss_weighting import backward_weighted
from cdistill.training.optimizer_state import load_optimizer_tensors, optimizer_tensors, update_ema
from cdistill.training.settings import TrainingSection, cosine_rate
from cdistill.training.step_data import check_divisible, draw_batches, own_rows, tabulate


class Distillation(Task):
    """Trains a student to satisfy an objective.

    Args:
        teacher: The frozen denoiser.
        preconditioning: f and g.
        objective: What the student is trained to satisfy.
        source: The data.
        accelerator: Devices and processes.
        section: The recipe's numbers.
        seed: Seed of the run.
        adversary: The discriminator of the GAN loss, if there is one.
        store: Trajectories of the teacher, for objectives that read them.
        warmup: Another objective and for how many steps the student is trained by it first.

    Attributes:
        student: theta, the network that is trained.
        student_ema: The moving average of its weights, for sampling.
        target_net: mu, the moving average inside the loss; the same module when the rates are equal.
        acceleration: How the networks run.

    Raises:
        RecipeError: The batch cannot be divided, or the preconditioning has no jumps that the objective needs.
    """

    def __init__(
        self,
        teacher: Denoiser,
        preconditioning: Preconditioning,
        objective: Objective[AnyObjectiveSection],
        source: Source,
        accelerator: Accelerator,
        section: TrainingSection,
        seed: int,
        adversary: Adversary | None = None,
        store: TrajectoryStore | None = None,
        warmup: tuple[Objective[ObjectiveSection], int] | None = None,
    ) -> None:
        check_divisible(section.batch_size, accelerator.num_processes, section.accumulation)
        if preconditioning.to_eps_only and objective.takes_s:
            name = type(preconditioning).__name__
            raise RecipeError(f"preconditioning.name: {name} jumps to eps only; {type(objective).__name__} needs any s")
        device = accelerator.device
        self.accelerator, self.section, self.seed = accelerator, section, seed
        self.objective, self.warmup, self.store = objective, warmup, store
        self.images = section.batch_size
        self.source = source.resident(device)
        self.acceleration = choose_acceleration(section, accelerator)
        self.f_and_g = tabulate(preconditioning, objective.grid)
        self.warmup_f_and_g = tabulate(preconditioning, warmup[0].grid) if warmup else self.f_and_g
        self.watch = Stopwatch(device)
        self.student = teacher.student(objective.takes_s, section.dropout).to(device)
        lay_out(self.student, self.acceleration.channels_last)
        self.student_ema = freeze(deepcopy(self.student))
        shared = objective.target_rate in (None, section.ema_rate)
        self.target_net = self.student_ema if shared else freeze(deepcopy(self.student))
        compiled = self.acceleration.compiled
        self.networks = Networks(
            target=cast(Denoiser, torch.compile(self.target_net, dynamic=True)) if compiled else self.target_net,
            student=self.student,
            heun_step=make_solver_step(teacher.to(device), self.acceleration),
            autocast=accelerator.autocast,
            solving=self.watch,
        )
        if compiled:
            self.student.compile()
        self.trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        self.wrapped = accelerator.prepare(self.student)
        self.optimizer = torch.optim.RAdam(self.trained, lr=section.learning_rate, foreach=True)
        self.adversary = adversary
        self.ready: tuple[int, int, list[Batch]] | None = None

    @override
    def backward(self, index: int) -> dict[str, Tensor]:
        batches = self.draw(index)
        if self.adversary is not None and self.discriminates(index):
            pairs = ((batch, self.fake(batch)) for batch in batches)
            values = self.adversary.backward(pairs, index, self.draw_seed)
            return {**values, "discriminator_norm": gradient_norm(self.adversary.optimizer)}
        self.optimizer.zero_grad()
        values = backward_weighted(
            self.losses(index), batches, self.wrapped, self.trained, self.student.balance_weight(), self.accelerator
        )
        return {**values, "gradient_norm": gradient_norm(self.optimizer, self.accelerator.scaler)}

    def objective_at(self, index: int) -> Objective[Any]:
        """Returns what step `index` trains the student for."""
        return self.warmup[0] if self.warmup is not None and index < self.warmup[1] else self.objective

    def losses(self, index: int) -> dict[str, Callable[[Batch], Tensor]]:
        """Returns the losses of step `index`, each a mean over a micro-batch, the one that is not weighted first."""
        losses: dict[str, Callable[[Batch], Tensor]] = {"consistency": self.consistency_loss}
        if self.objective_at(index).section.dsm:
            losses["dsm"] = self.dsm_loss
        if self.adversary is not None and index >= self.adversary.section.start:
            losses["gan"] = self.gan_loss
        return losses

    def consistency_loss(self, batch: Batch) -> Tensor:
        """Computes the objective's loss of a micro-batch, a scalar; the target comes before the student."""
        target = self.target(batch)
        prediction = self.predict(batch, self.denoise(batch))
        with self.accelerator.autocast():
            return self.objective_at(batch.index).loss(prediction, target, batch).mean()

    def gan_loss(self, batch: Batch) -> Tensor:
        """Computes the student's GAN loss of the prediction, a scalar."""
        assert self.adversary is not None
        prediction = self.predict(batch, self.denoise(batch))
        return self.adversary.generator_loss(prediction, batch.labels, batch.index, batch.rows, self.draw_seed)

    def dsm_loss(self, batch: Batch) -> Tensor:
        """Computes the DSM loss of D_theta(x_0 + sigma z, sigma, sigma), a scalar."""
        assert batch.sigma is not None and batch.z is not None  # noqa: PT018
        torch.manual_seed(batch.seed + 1)
        noisy = batch.x0 + broadcast(batch.sigma, batch.x0) * batch.z
        # A tensor of its own for s: with the same one twice a compiled student would be compiled once more.
        denoised = self.wrapped(noisy, batch.sigma, batch.sigma.clone(), batch.x0_labels)
        return dsm_loss(denoised, batch.x0, batch.sigma, self.student.sigma_data).mean()

    def denoise(self, batch: Batch) -> Tensor:
        """Computes D_theta(x_t, t, s), (B, ...)."""
        torch.manual_seed(batch.seed)
        denoised: Tensor = self.wrapped(batch.x_t, batch.levels["t"], batch.levels["s"], batch.labels)
        return denoised

    def predict(self, batch: Batch, denoised: Tensor) -> Tensor:
        """Computes the first argument of the distance, (B, ...), from D_theta(x_t, t, s) by Eq. 8."""
        f, g = (broadcast(values, denoised) for values in batch.coefficients["t", "s"])
        return self.objective_at(batch.index).prediction(f * batch.x_t + g * denoised, batch, self.networks)

    @torch.no_grad()
    def target(self, batch: Batch) -> Tensor:
        """Computes the second argument of the distance, (B, ...), without gradient; the student evaluates."""
        self.student.eval()
        target = self.objective_at(batch.index).target(batch, self.networks)
        self.student.train()
        return target

    @torch.no_grad()
    def fake(self, batch: Batch) -> Tensor:
        """Computes e*, the prediction that the discriminator shall tell from x_0."""
        return self.predict(batch, self.denoise(batch))

    def discriminates(self, index: int) -> bool:
        """Whether step `index` trains the discriminator in place of the student."""
        return self.adversary is not None and discriminates(index, self.adversary.section.start)

    def draw(self, index: int) -> list[Batch]:
        """Returns this process's micro-batches of step `index`, on the device."""
        if self.ready is None or self.ready[:2] != (index, self.attempt):
            rows = own_rows(self.accelerator, self.section.batch_size)
            objective = self.objective_at(index)
            f_and_g = self.f_and_g if objective is self.objective else self.warmup_f_and_g
            batches = draw_batches(
                objective, f_and_g, self.source, self.store, self.section, self.draw_seed, index, rows,
                self.accelerator.device,
            )  # fmt: skip
            self.ready = (index, self.attempt, batches)
        return self.ready[2]

    @override
    def prepare(self, index: int) -> None:
        self.draw(index)

    @override
    def update(self, index: int) -> None:
        if self.adversary is not None and self.discriminates(index):
            self.adversary.update()
            return
        if self.section.decay == "cosine":
            for group in self.optimizer.param_groups:
                group["lr"] = cosine_rate(self.section, index)
        step_scaled(self.optimizer, self.accelerator.scaler)
        update_ema(self.student_ema, self.student, self.section.ema_rate)
        if self.target_net is not self.student_ema and self.objective.target_rate is not None:
            update_ema(self.target_net, self.student, self.objective.target_rate)

    @override
    def kind(self, index: int) -> str:
        return "discriminator" if self.discriminates(index) else "student"

    @override
    def skip(self, index: int) -> None:
        if not self.discriminates(index):
            super().skip(index)

    @override
    def groups(self) -> Groups:
        optimizer = optimizer_tensors(self.optimizer, self.student)
        groups = {
            "weights": self.student.state_dict(), "ema": self.student_ema.state_dict(), "optimizer": optimizer,
        }  # fmt: skip
        if self.target_net is not self.student_ema:
            groups["target"] = self.target_net.state_dict()
        return groups if self.adversary is None else {**groups, **self.adversary.groups()}

    @override
    def load(self, groups: Groups) -> None:
        self.student.load_state_dict(groups["weights"])
        self.student_ema.load_state_dict(groups["ema"])
        if self.target_net is not self.student_ema:
            self.target_net.load_state_dict(groups["target"])
        load_optimizer_tensors(self.optimizer, self.student, groups["optimizer"])
        if self.adversary is not None:
            self.adversary.load(groups)

    @override
    def more(self, seconds: float) -> dict[str, float]:
        return {"teacher_share": round(self.watch.seconds() / seconds, 3)}

    def averaged(self) -> Denoiser:
        """Returns the averaged student as it comes back from a file, whatever its layout here: for evaluation."""
        return deepcopy(self.student_ema).to(memory_format=torch.contiguous_format)
