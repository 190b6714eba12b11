"""One step of consistency distillation, written plainly: what the fast step must equal. Learn the algorithm here.

The paper's symbols: theta the student, mu its moving average, phi the teacher, tau_0 = T > ... > tau_{N-1} = eps.
One sample at a time, one loss at a time, every jump a network call. `cdistill.training.distillation` is the fast step.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cdistill.networks.denoiser import Denoiser
from cdistill.preconditionings import Preconditioning

Network = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""D(x, t, s, labels): x (1, ...), t and s (1,), labels (1,) or None."""


@dataclass(frozen=True)
class Sample:
    """One sample of a batch.

    Attributes:
        x0: Clean (1, ...).
        x_t: At noise level t (1, ...).
        z: Noise for DSM (1, ...).
        sigma: Noise level for DSM, a scalar.
        label: Its class (1,) or None.
        times: tau_i, ..., tau_{i+h} (h+1,): t first, u last.
        s: Where the jump ends, a scalar.
        eps: The last noise level, a scalar.
    """

    x0: Tensor
    x_t: Tensor
    z: Tensor | None
    sigma: Tensor | None
    label: Tensor | None
    times: Tensor
    s: Tensor
    eps: Tensor


def consistency_function(
    network: Network, form: Preconditioning, x: Tensor, t: Tensor, s: Tensor, label: Tensor | None
) -> Tensor:
    """f(t,s) x + g(t,s) D(x,t,s) (Eq. 8); the identity where t = s."""
    f, g = form(t, s)
    return f * x + g * network(x, t[None], s[None], label)


def solver(phi: Network, x: Tensor, times: Tensor, label: Tensor | None) -> Tensor:
    """Heun's steps of dx/dt = (x - D_phi(x,t))/t along `times` (Eq. 2)."""
    for t, u in itertools.pairwise(times):
        slope = (x - phi(x, t[None], None, label)) / t
        guess = x + (u - t) * slope
        x = x + (u - t) * (slope + (guess - phi(guess, u[None], None, label)) / u) / 2
    return x


def ctm_points(
    theta: Network, a: Network, mu: Network, phi: Network, form: Preconditioning, sample: Sample
) -> tuple[Tensor, Tensor]:
    """The two points that Eq. 7 compares: f_mu(f_theta(x_t; t->s); s->eps), and the same through the teacher.

    a is mu in the paper, and theta (without its gradient) in CTM's code.
    """
    t, u, s, eps, label = sample.times[0], sample.times[-1], sample.s, sample.eps, sample.label
    with torch.no_grad():
        x_u = solver(phi, sample.x_t, sample.times, label)
        y = consistency_function(a, form, x_u, u, s, label)
        y_eps = consistency_function(mu, form, y, s, eps, label)
    e = consistency_function(theta, form, sample.x_t, t, s, label)
    e_eps = consistency_function(mu, form, e, s, eps, label)
    return e_eps, y_eps


def cm_points(
    theta: Network, mu: Network, phi: Network, form: Preconditioning, sample: Sample
) -> tuple[Tensor, Tensor]:
    """The two points that Eq. 5 compares: f_theta(x_t; t->eps) and f_mu(Solver(x_t; t->s); s->eps)."""
    t, s, eps, label = sample.times[0], sample.times[1], sample.eps, sample.label
    with torch.no_grad():
        x_s = solver(phi, sample.x_t, sample.times, label)
        y = consistency_function(mu, form, x_s, s, eps, label)
    return consistency_function(theta, form, sample.x_t, t, eps, label), y


def dsm_loss(theta: Network, sample: Sample, sigma_data: float) -> Tensor:
    """(sigma^2 + sd^2)/(sigma sd)^2 |D_theta(x_0 + sigma z, sigma, sigma) - x_0|^2 / d."""
    sigma = sample.sigma
    denoised = theta(sample.x0 + sigma * sample.z, sigma[None], sigma[None], sample.label)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoised - sample.x0).square().mean()


def total_gradient(
    theta: Denoiser, consistency: Tensor, dsm: Tensor | None, gan: Tensor | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradient of L_cons + lambda_dsm L_dsm + lambda_gan L_gan, and both lambdas.

    lambda = |grad_W L_cons| / (|grad_W L| + 1e-4), W the last layer's weight, in [0, 1e4] for DSM and in [0.01, 10] for
    the GAN loss. A loss that is None is left out.
    """
    parameters = [parameter for parameter in theta.parameters() if parameter.requires_grad]
    last = next(k for k, parameter in enumerate(parameters) if parameter is theta.balance_weight())
    total = first = torch.autograd.grad(consistency, parameters, retain_graph=True)
    weights = {}
    for name, loss, low, high in (("balance", dsm, 0, 1e4), ("gan_balance", gan, 0.01, 10)):
        if loss is not None:
            other = torch.autograd.grad(loss, parameters, retain_graph=True)
            weight = weights[name] = (first[last].norm() / (other[last].norm() + 1e-4)).clamp(low, high)
            total = tuple(a + weight * b for a, b in zip(total, other, strict=True))
    return list(total), weights
