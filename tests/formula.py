"""Weights by a formula that any implementation can fill in, so that outputs can be compared across programs."""

import math

import torch
from torch import Tensor, nn


def formula(name: str, shape: torch.Size) -> Tensor:
    """sin(k + 0.1 length of the name), k = 1..n, scaled to keep the activations' size; near 1 for norms' weights."""
    count = math.prod(shape)
    wave = torch.sin(torch.arange(1, count + 1, dtype=torch.float64) + 0.1 * len(name)).reshape(shape)
    if len(shape) < 2:
        return 0.2 * wave + (1 if "norm" in name and name.endswith("weight") else 0)
    return wave * 1.5 / math.sqrt(math.prod(shape[1:]))


def fill(module: nn.Module) -> None:
    """Fills every parameter, and the Fourier frequencies."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not name.endswith("resample_filter"):
                tensor.copy_(formula(name, tensor.shape))


def inputs(side: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Four images by a formula, noise levels from 0.002 to 80, classes."""
    t = torch.tensor([0.002, 0.1, 2.0, 80.0])
    wave = torch.sin(0.7 * torch.arange(4 * 3 * side * side, dtype=torch.float64)).reshape(4, 3, side, side).float()
    labels = torch.tensor([0, 1, 2, 1]) % num_classes if num_classes else None
    return wave * (t.square() + 0.25).sqrt()[:, None, None, None], t, labels
