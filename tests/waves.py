"""Numbers that look random and are the same everywhere, for reference figures computed elsewhere."""

import torch
from torch import Tensor


def waves(count: int, size: int, phase: float) -> Tensor:
    """Returns (count, size) float32: frac(43758.5453 sin(12.9898 i + 78.233 j + phase)) + sin(i/100 + j + phase)/2."""
    i, j = torch.arange(count).double()[:, None], torch.arange(size).double()
    noise = (torch.sin(12.9898 * i + 78.233 * j + phase) * 43758.5453) % 1
    return (noise + 0.5 * torch.sin(0.01 * i + j + phase)).float()
