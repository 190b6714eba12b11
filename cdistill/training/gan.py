"""CTM's GAN loss (Kim et al. 2024; Zheng et al. 2025, Fig. 6): the discriminator and its steps.

Real are the data x_0, fake the student's estimates e*, both augmented, each by its own draws. The discriminator is
computed in float32 whatever the student's precision, as in CTM's code.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from cdistill.errors import RecipeError
from cdistill.networks.denoiser import freeze
from cdistill.networks.discriminator import Discriminator, power_iteration
from cdistill.objectives.base import Batch
from cdistill.registry import DISCRIMINATORS
from cdistill.runtime.devices import send
from cdistill.runtime.randomness import derive_seed
from cdistill.training.augment import diff_augment, draw_numbers
from cdistill.training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from cdistill.training.settings import GanSection

_BETAS = (0.5, 0.9)  # CTM's


def discriminates(index: int, start: int) -> bool:
    """Whether step `index` trains the discriminator: from `start` on, the odd steps do (as in CTM's code).

    >>> [index for index in range(8) if discriminates(index, 4)]
    [5, 7]
    """
    return index >= start and index % 2 == 1


def check_discriminator(name: str, shape: tuple[int, ...]) -> type[Discriminator]:
    """Returns the class of a discriminator, if the samples are something that it can judge.

    Raises:
        RecipeError: They are not grey or RGB images.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise RecipeError(f"gan.discriminator: {name!r} judges grey or RGB images; the samples have shape {shape}")
    kind: type[Discriminator] = DISCRIMINATORS.get(name)
    return kind


class Adversary:
    """The discriminator with its optimiser, RAdam with CTM's betas.

    Its weights ask for no gradient except within :meth:`backward`. Nothing here reads a tensor on the host. All
    processes hold the same weights, because they begin with the same and share their gradients.

    Args:
        section: The recipe's section.
        shape: (C, H, W) of an image.
        num_classes: Number of classes, 0 when unconditional.
        accelerator: Devices and processes.
        seed: Seed of the run.

    Attributes:
        discriminator: The network.
        trained: Its parameters, to look at their gradients between :meth:`backward` and :meth:`update`.

    Raises:
        RecipeError: The samples are no images.
        MissingAssetError: The discriminator needs weights that are not there.
    """

    def __init__(
        self, section: GanSection, shape: tuple[int, ...], num_classes: int, accelerator: Accelerator, seed: int
    ) -> None:
        kind = check_discriminator(section.discriminator, shape)
        self.section, self.accelerator = section, accelerator
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, "discriminator"))
            self.discriminator = freeze(kind(shape, num_classes)).to(accelerator.device)
        self.trained = list(self.discriminator.parameters())
        self.optimizer = torch.optim.RAdam(self.trained, lr=section.learning_rate, betas=_BETAS)

    def generator_loss(self, fake: Tensor, labels: Tensor | None, index: int, rows: slice, seed: int) -> Tensor:
        """Computes the student's GAN loss of a micro-batch; its gradient flows to `fake`, not to the discriminator.

        Args:
            fake: e*, (B, C, H, W).
            labels: (B,), or None.
            index: Number of the step.
            rows: Where the images are in the global batch, with start and stop.
            seed: Of the augmentation's draws.

        Returns:
            A scalar.
        """
        return generator_hinge(self.discriminator(self._augment(fake, "fake", index, rows, seed), labels))

    def backward(self, pairs: Iterable[tuple[Batch, Tensor]], index: int, seed: int) -> dict[str, Tensor]:
        """Leaves the gradient of the discriminator's loss over all micro-batches and processes in its parameters.

        Args:
            pairs: The process's micro-batches and e* of each, like x_0; each is drawn when the one before is done with.
            index: Number of the step.
            seed: Of the augmentation's draws.

        Returns:
            "discriminator", the hinge loss, "logit_real" and "logit_fake", the mean logits; scalars on the device.
        """
        self.optimizer.zero_grad()
        totals, count = self.trained[0].detach().new_zeros(3), 0
        for batch, fake in pairs:
            size = len(fake)
            with self._learning():
                loss, *logits = self._compare(batch, fake, index, seed)
                (size * loss).backward()
            totals += size * torch.stack([loss.detach(), *logits])
            count += size
        self._share_gradients(count)
        means = self.accelerator.reduce(totals / count, "mean")
        return dict(zip(("discriminator", "logit_real", "logit_fake"), means, strict=True))

    def update(self) -> None:
        """Steps along the gradient that :meth:`backward` left; leave it out if that is not finite."""
        self.optimizer.step()
        power_iteration(self.discriminator)

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Returns the whole state, see `Task`; the weights of a frozen backbone are not part of it."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": optimizer_tensors(self.optimizer, self.discriminator),
        }

    def load(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts back what :meth:`groups` returned, among other groups possibly."""
        self.discriminator.load_state_dict(groups["discriminator"])
        load_optimizer_tensors(self.optimizer, self.discriminator, groups["discriminator_optimizer"])

    def _augment(self, x: Tensor, purpose: str, index: int, rows: slice, seed: int) -> Tensor:
        """Augments images in the type of the discriminator's weights."""
        numbers = send(draw_numbers(seed, purpose, index, rows), x.device)
        return diff_augment(x.to(self.trained[0].dtype), numbers, self.section.augment)

    def _compare(self, batch: Batch, fake: Tensor, index: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the hinge loss of a micro-batch and the mean logits of its real and fake images."""
        real = self._augment(batch.x0, "real", index, batch.rows, seed)
        fake = self._augment(fake.detach(), "fake", index, batch.rows, seed)
        labels = None
        if batch.x0_labels is not None and batch.labels is not None:
            labels = torch.cat([batch.x0_labels, batch.labels])
        logits = [head.chunk(2) for head in self.discriminator(torch.cat([real, fake]), labels)]
        first, second = zip(*logits, strict=True)
        return discriminator_hinge(first, second), mean_logit(first).detach(), mean_logit(second).detach()

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """Lets the weights ask for gradients."""
        self.discriminator.requires_grad_(True)
        try:
            yield
        finally:
            self.discriminator.requires_grad_(False)

    def _share_gradients(self, count: int) -> None:
        """Divides the gradients by the number of images, and averages them over the processes."""
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / count
        parts = self.accelerator.reduce(flat, "mean").split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def discriminator_hinge(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """mean_k E[max(0, 1 - d_k(x))] + E[max(0, 1 + d_k(e*))] (Lim & Ye 2017, Eq. 9, averaged over heads k).

    Args:
        real: Logits of real images (B, n_k), of each head.
        fake: Logits of the student's images, likewise.

    Returns:
        A scalar; E is the mean over images and over the places that a head looks at.
    """
    pairs = zip(real, fake, strict=True)
    return torch.stack([(1 - x).relu().mean() + (1 + e).relu().mean() for x, e in pairs]).mean()


def generator_hinge(fake: Sequence[Tensor]) -> Tensor:
    """-mean_k E[d_k(e*)], the student's side of `discriminator_hinge`; a scalar."""
    return -mean_logit(fake)


def mean_logit(logits: Sequence[Tensor]) -> Tensor:
    """mean_k E[d_k], a scalar."""
    return torch.stack([head.mean() for head in logits]).mean()
