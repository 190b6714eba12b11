"""DiffAugment (Zhao et al. 2020): random changes of images that a gradient passes through, the same for real and fake.

The constants are those of the projected GANs that CTM builds on: translation by an eighth of the side, a cut-out square
of a fifth of it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cdistill.networks.denoiser import broadcast
from cdistill.runtime.randomness import generator

KINDS = ("color", "translation", "cutout")
_NUMBERS = 7  # of each image: three for the colour, two for the translation, two for the cut-out
_SHIFT, _CUT = 0.125, 0.2


def draw_numbers(seed: int, purpose: str, index: int, rows: slice) -> Tensor:
    """Draws what the augmentation of the images `rows` of the global batch of step `index` needs.

    The numbers of a row depend on (seed, purpose, index, row) alone: neither on the batch size nor on the processes.

    Args:
        seed: Seed of the run.
        purpose: What the images are.
        index: Number of the step.
        rows: Rows of the global batch, with a stop.

    Returns:
        Uniform on [0, 1), float64 (rows, 7), on the CPU.
    """
    draw = generator(seed, f"augment {purpose}", index)
    return torch.rand(rows.stop, _NUMBERS, generator=draw, dtype=torch.float64)[rows]


def diff_augment(x: Tensor, numbers: Tensor, kinds: Sequence[str]) -> Tensor:
    """Augments each image in its own way.

    Args:
        x: Images (B, C, H, W), values about [-1, 1]; they may leave it.
        numbers: Uniform on [0, 1), (B, 7), see `draw_numbers`.
        kinds: Which of "color", "translation" and "cutout"; they are done in this order.

    Returns:
        Like `x`.
    """
    first, second, third, *places = numbers.unbind(1)
    if "color" in kinds:
        x = jitter_color(x, first - 0.5, 2 * second, 0.5 + third)
    if "translation" in kinds:
        reach = [int(side * _SHIFT + 0.5) for side in x.shape[2:]]
        moves = [(u * (2 * most + 1)).long() - most for u, most in zip(places[:2], reach, strict=True)]
        x = translate(x, *moves)
    if "cutout" in kinds:
        sizes = [int(side * _CUT + 0.5) for side in x.shape[2:]]
        room = zip(places[2:], x.shape[2:], sizes, strict=True)
        corners = [(u * (side + 1 - size % 2)).long() - size // 2 for u, side, size in room]
        x = cut_out(x, corners, sizes)
    return x


def jitter_color(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Adds `brightness`, scales colours about their pixel's mean, then all values about their image's mean.

    Args:
        x: (B, C, H, W).
        brightness: (B,).
        saturation: (B,), a factor; it has no effect on grey images.
        contrast: (B,), a factor.
    """
    x = x + broadcast(brightness, x)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * broadcast(saturation, x)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * broadcast(contrast, x)


def translate(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Moves each image by whole pixels; zeros come in.

    Args:
        x: (B, C, H, W).
        down: (B,), int64, at most H/8 rounded either way.
        right: (B,), int64, likewise of W.
    """
    height, width = x.shape[2:]
    margins = [int(side * _SHIFT + 0.5) for side in (height, width)]
    padded = F.pad(x, [margins[1], margins[1], margins[0], margins[0]])
    rows, columns = (
        torch.arange(side, device=x.device) + margin - move.to(x.device)[:, None]
        for side, margin, move in zip((height, width), margins, (down, right), strict=True)
    )
    moved = padded.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, padded.shape[3]))
    return moved.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], height, -1))


def cut_out(x: Tensor, corners: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Sets a rectangle of each image to zero; what of it lies outside of the image is nothing.

    Args:
        x: (B, C, H, W).
        corners: Its first row and its first column, (B,) each, int64, possibly negative.
        sizes: Its rows and columns.
    """
    inside = []
    for side, corner, size in zip(x.shape[2:], corners, sizes, strict=True):
        place = torch.arange(side, device=x.device) - corner.to(x.device)[:, None]
        inside.append((place >= 0) & (place < size))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(hole, 0.0)
