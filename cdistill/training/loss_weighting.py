"""Several losses, one gradient: L_cons + lambda_dsm L_dsm + lambda_gan L_gan with CTM's adaptive weights.

lambda = |grad_W L_cons| / (|grad_W L| + 1e-4), with W the last layer's weight, of the global batch. It is known only
when the gradients of the whole batch are, so each loss has its own pass over all micro-batches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cdistill.objectives.base import Batch

_LIMITS = {"dsm": ("balance", 0.0, 1e4), "gan": ("gan_balance", 0.01, 10.0)}  # CTM's


def backward_weighted(
    losses: Mapping[str, Callable[[Batch], Tensor]],
    batches: Sequence[Batch],
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    last: nn.Parameter,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Leaves the gradient of the weighted sum of all losses, over all micro-batches and processes, in the parameters.

    Args:
        losses: Of a micro-batch, scalars; the one that is not weighted first, then "dsm" and "gan" where they are.
        batches: Micro-batches of one size.
        model: The network, or what distributes it; it shares gradients at the last micro-batch of each loss.
        parameters: What is trained.
        last: W.
        accelerator: Devices and processes.

    Returns:
        The losses of this process's samples and "balance" and "gan_balance", scalars on the device.
    """
    values, gradients = {}, {}
    for name, loss in losses.items():
        values[name] = _accumulate(loss, batches, model, accelerator)
        gradients[name] = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
    place = next(k for k, parameter in enumerate(parameters) if parameter is last)
    scale = scaled(torch.ones((), device=last.device), accelerator)
    total, *_ = gradients.values()
    first, weights = total[place].clone(), {}
    for name, gradient in gradients.items():
        if name in _LIMITS:
            shown, low, high = _LIMITS[name]
            weights[shown] = adaptive_weight(first, gradient[place], low, high, scale).to(first.dtype)
            torch._foreach_mul_(gradient, weights[shown])
            torch._foreach_add_(total, gradient)
    for parameter, whole in zip(parameters, total, strict=True):
        parameter.grad = whole
    return {**values, **weights}


def adaptive_weight(consistency: Tensor, other: Tensor, low: float, high: float, scale: float | Tensor = 1.0) -> Tensor:
    """CTM's weight of a loss, |grad_W L_cons| / (|grad_W L| + 1e-4), clamped to [low, high].

    Args:
        consistency: Gradient of the consistency loss with respect to the last layer's weight W.
        other: The same of the loss that is weighted.
        low: 0 for DSM, 0.01 for the GAN loss.
        high: 1e4 for DSM, 10 for the GAN loss.
        scale: Factor that both gradients carry, that of a gradient scaler for fp16.

    Returns:
        A detached scalar, float32 at least.
    """
    precise = torch.promote_types(other.dtype, torch.float32)
    ratio = consistency.to(precise).norm() / (other.to(precise).norm() + 1e-4 * scale)
    weight: Tensor = ratio.clamp(low, high).detach()
    return weight


def scaled(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Multiplies by the factor of the gradient scaler for fp16, where there is one."""
    scaler = accelerator.scaler
    return value if scaler is None else scaler.scale(value)


def _accumulate(
    loss: Callable[[Batch], Tensor], batches: Sequence[Batch], model: nn.Module, accelerator: Accelerator
) -> Tensor:
    """Adds the gradients of `loss` over micro-batches and processes; returns this process's mean, detached."""
    total = []
    for number, batch in enumerate(batches):
        final = number == len(batches) - 1
        with nullcontext() if final else accelerator.no_sync(model):
            value = loss(batch) / len(batches)
            scaled(value, accelerator).backward()
        total.append(value.detach())
    return torch.stack(total).sum()
