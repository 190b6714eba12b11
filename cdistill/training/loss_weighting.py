"""Several losses, one gradient: L_cons + lambda_dsm L_dsm + lambda_gan L_gan with CTM's adaptive weights.

lambda = |grad_W L_cons| / (|grad_W L| + 1e-4), with W the last layer's weight, of the global batch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cdistill.objectives.losses import balance, gan_weight
from cdistill.training.step_data import Batch

Loss = Callable[[Batch], Tensor]
"""A loss of a micro-batch, a scalar."""

_WEIGHTS = {"dsm": ("balance", balance), "gan": ("gan_balance", gan_weight)}


@dataclass(frozen=True)
class Term:
    """A loss, and its gradient where the graph is cut between it and the network.

    Attributes:
        output: What the network gave (B, ...).
        loss: Detached, a scalar.
        cotangent: Gradient of the loss with respect to `output`, times the scaler's factor.
    """

    output: Tensor
    loss: Tensor
    cotangent: Tensor


def cut(output: Tensor) -> Tensor:
    """Returns a leaf of the graph with the values of `output`."""
    return output.detach().requires_grad_()


def pull(loss: Tensor, place: Tensor, accelerator: Accelerator) -> Tensor:
    """Returns the gradient of a loss at a leaf, times the scaler's factor; the graph between them is given up."""
    return torch.autograd.grad(scaled(loss, accelerator), place)[0]


def backward_once(terms: Mapping[str, Term], last: nn.Parameter, accelerator: Accelerator) -> dict[str, Tensor]:
    """Leaves the gradient of all terms in the parameters, by one backward pass through the network.

    The last layer alone turns the gradient of each loss at the network's output into the norm that its weight needs;
    then the weighted gradients go back together.

    Args:
        terms: "consistency" first, then "dsm" and "gan" where they are.
        last: W.
        accelerator: Devices and processes.

    Returns:
        The losses and "balance" and "gan_balance", scalars on the device.
    """
    weights = {}
    if len(terms) > 1:
        at_last = [torch.autograd.grad(t.output, last, t.cotangent, retain_graph=True)[0] for t in terms.values()]
        weights = adaptive_weights(dict(zip(terms, accelerator.reduce(at_last, "mean"), strict=True)), accelerator)
    first, *others = [term.cotangent for term in terms.values()]
    weighted = [weight * cotangent for weight, cotangent in zip(weights.values(), others, strict=True)]
    torch.autograd.backward([term.output for term in terms.values()], [first, *weighted])
    return {**{name: term.loss for name, term in terms.items()}, **weights}


def backward_separately(
    losses: Mapping[str, Loss],
    batches: Sequence[Batch],
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    last: nn.Parameter,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Leaves the same gradient, of all micro-batches, by a pass for each loss: their weights are known only at the end.

    Args:
        losses: "consistency" first, then "dsm" and "gan" where they are.
        batches: All of the same size.
        model: The network, or what distributes it; it shares gradients at the last micro-batch of each loss.
        parameters: What is trained.
        last: W.
        accelerator: Devices and processes.

    Returns:
        As `backward_once`.
    """
    values, gradients = {}, {}
    for name, loss in losses.items():
        values[name] = _accumulate(loss, batches, model, accelerator)
        gradients[name] = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
    place = next(k for k, parameter in enumerate(parameters) if parameter is last)
    weights = adaptive_weights({name: gradient[place] for name, gradient in gradients.items()}, accelerator)
    total, *others = gradients.values()
    for other, weight in zip(others, weights.values(), strict=True):
        torch._foreach_mul_(other, weight)
        torch._foreach_add_(total, other)
    for parameter, gradient in zip(parameters, total, strict=True):
        parameter.grad = gradient
    return {**values, **weights}


def adaptive_weights(at_last: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Returns the weights of all losses but the first from their gradients at W, under the names of the log."""
    first, *_ = at_last.values()
    scale = scaled(torch.ones((), device=first.device), accelerator)
    found = {}
    for name, gradient in at_last.items():
        if name in _WEIGHTS:
            shown, weight = _WEIGHTS[name]
            found[shown] = weight(first, gradient, scale).to(first.dtype)
    return found


def scaled(value: Tensor, accelerator: Accelerator) -> Tensor:
    """Multiplies by the factor of the gradient scaler for fp16, where there is one."""
    scaler = accelerator.scaler
    return value if scaler is None else scaler.scale(value)


def _accumulate(loss: Loss, batches: Sequence[Batch], model: nn.Module, accelerator: Accelerator) -> Tensor:
    """Adds the gradients of `loss` over micro-batches and processes; returns this process's mean, detached."""
    parts = []
    for number, batch in enumerate(batches):
        final = number == len(batches) - 1
        with nullcontext() if final else accelerator.no_sync(model):
            value = loss(batch) / len(batches)
            scaled(value, accelerator).backward()
        parts.append(value.detach())
    return torch.stack(parts).sum()
