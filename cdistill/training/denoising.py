"""Training of a teacher by denoising score matching (Karras et al. 2022, Table 1)."""

from copy import deepcopy

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.data import Source
from cdistill.networks.denoiser import Denoiser, broadcast, freeze
from cdistill.objectives.dsm import dsm_loss
from cdistill.runtime.devices import send
from cdistill.runtime.randomness import derive_seed, generator
from cdistill.training.loop import Groups, Task, gradient_norm, step_scaled
from cdistill.training.loss_weighting import scaled
from cdistill.training.optimizer_state import load_optimizer_tensors, optimizer_tensors, update_ema
from cdistill.training.settings import DenoisingSection, cosine_rate
from cdistill.training.step_data import check_divisible, draw_data, draw_noise, own_rows


class DenoisingTask(Task):
    """E |D(x_0 + sigma z, sigma) - x_0|^2 with log-normal sigma; Adam, cosine decay, moving average.

    The moving average is warmed up: its rate at step k is at most (1+k)/(10+k).

    Args:
        denoiser: The network to train.
        source: Its data.
        accelerator: Devices and processes.
        section: The recipe's numbers.
        seed: Seed of the run.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        source: Source,
        accelerator: Accelerator,
        section: DenoisingSection,
        seed: int,
    ) -> None:
        check_divisible(section.batch_size, accelerator.num_processes, 1)
        self.accelerator, self.section, self.seed = accelerator, section, seed
        self.source = source.resident(accelerator.device)
        self.images = section.batch_size
        self.network = denoiser.to(accelerator.device).train()
        self.average = freeze(deepcopy(self.network))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=section.learning_rate)
        self.wrapped = accelerator.prepare(self.network)

    def backward(self, index: int) -> dict[str, Tensor]:
        """See :class:`Task`."""
        x0, z, sigma, labels = self._draw(index)
        torch.manual_seed(derive_seed(self.draw_seed, "dropout", index, self.accelerator.process_index))
        denoised = self.wrapped(x0 + broadcast(sigma, x0) * z, sigma, None, labels)
        loss = dsm_loss(denoised, x0, sigma, self.network.sigma_data).mean()
        self.optimizer.zero_grad()
        scaled(loss, self.accelerator).backward()
        return {"loss": loss.detach(), "gradient_norm": gradient_norm(self.optimizer, self.accelerator.scaler)}

    def update(self, index: int) -> None:
        """See :class:`Task`; the learning rate decays like a cosine."""
        for group in self.optimizer.param_groups:
            group["lr"] = cosine_rate(self.section, index)
        step_scaled(self.optimizer, self.accelerator.scaler)
        update_ema(self.average, self.network, min(self.section.ema_rate, (1 + index) / (10 + index)))

    def groups(self) -> Groups:
        """See :class:`Task`."""
        optimizer = optimizer_tensors(self.optimizer, self.network)
        return {"weights": self.network.state_dict(), "ema": self.average.state_dict(), "optimizer": optimizer}

    def load(self, groups: Groups) -> None:
        """See :class:`Task`."""
        self.network.load_state_dict(groups["weights"])
        self.average.load_state_dict(groups["ema"])
        load_optimizer_tensors(self.optimizer, self.network, groups["optimizer"])

    def _draw(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns this process's part of step `index`, on the device: x0, z, sigma, labels."""
        section, device = self.section, self.accelerator.device
        size, rows = section.batch_size, own_rows(self.accelerator, section.batch_size)
        x0, labels = draw_data(self.source, self.draw_seed, index, size, section.flips, rows)
        z = draw_noise(self.draw_seed, "denoising noise", index, rows, x0)
        draw = generator(self.draw_seed, "denoising", index)
        log_sigma = section.p_mean + section.p_std * torch.randn(size, generator=draw, dtype=torch.float64)[rows]
        x0, z, sigma = (send(part, device) for part in (x0, z, log_sigma.exp()))
        return x0, z, sigma, None if labels is None else send(labels, device)
