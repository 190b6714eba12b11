"""Torch's fused attention against the plain one, forward and with backward, side by side: when is it faster?

python -m tests.benchmarks.attention [--device cuda]
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.networks.unet import plain_attention, split_heads
from tests.benchmarks.clock import seconds

SHAPES = {  # (images, channels, side, channels of a head) as the networks have them
    "digits 4x4": (64, 64, 4, 64),
    "DDPM++ 16x16": (16, 256, 16, 256),
    "ADM 8x8": (16, 768, 8, 64),
    "ADM 16x16": (16, 576, 16, 64),
    "ADM 32x32": (4, 384, 32, 64),
}


def ratios(shape: tuple[int, ...], device: str, repeats: int = 15) -> tuple[float, float]:
    """Time of the plain way over the fused one's, forward and with backward; the best of `repeats` each."""
    batch, channels, side, head = shape
    qkv = torch.randn(batch, 3 * channels, side, side, device=device, requires_grad=True)

    def attend(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        return way(*split_heads(qkv, head)).transpose(-1, -2).reshape(batch, channels, side, side)

    best = {}
    for _ in range(repeats):
        for way in (plain_attention, F.scaled_dot_product_attention):
            with torch.no_grad():
                forward = seconds(lambda way=way: attend(way), device)
            both = seconds(lambda way=way: attend(way).sum().backward(), device)
            old = best.get(way, (forward, both))
            best[way] = min(forward, old[0]), min(both, old[1])
    plain, fused = best.values()
    return plain[0] / fused[0], plain[1] / fused[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    for name, shape in SHAPES.items():
        forward, backward = ratios(shape, device)
        sys.stdout.write(f"{name}: fused is {forward:.2f} times as fast forward, {backward:.2f} with backward\n")


if __name__ == "__main__":
    main()
