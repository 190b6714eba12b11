"""Which pairs (t, s) of the time grid a student is trained on, by what law, and where u is between them.

==========  ============================================================================================
"ctm"       CTM's: h ~ P(h) prop. to h, t uniform over what is left, s uniform from u = tau_{i+h} on
"uniform"   all t > s alike
"mixed"     every other sample as CTM draws it, the others uniform
[k, ...]    the jumps of the k-step samplers, each k and each of its jumps alike; all k divide N - 1
==========  ============================================================================================

CTM starts 43 % of its jumps at T (N = 10) and 5 % at t = 4: one call learns fast; two and more, whose second jump
starts in the middle, slowly.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

_MOST_POINTS = 256  # the law of t, u and s has the cube of their number

Law = Literal["ctm", "uniform", "mixed"] | Sequence[int]


def check_pairs(pairs: Law, points: int) -> None:
    """Raises ValueError if a number of calls makes no grid of every so many of the `points`, or these are too many."""
    if points > _MOST_POINTS:
        raise ValueError(f"points: got {points}; pairs of noise levels are drawn from at most {_MOST_POINTS}")
    wrong = [] if isinstance(pairs, str) else [calls for calls in pairs if (points - 1) % calls]
    if wrong:
        raise ValueError(
            f"pairs: {wrong[0]} calls do not divide the {points - 1} intervals of {points} points; needs points - 1 to "
            f"be a multiple of {', '.join(map(str, pairs))}"
        )


def draw_ctm_times(points: int, max_steps: int, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Draws CTM's times as indices of the grid: h ~ P(h) prop. to h on 1..M, i ~ U{0..N-1-h}, j ~ U{i+h..N-1}.

    Args:
        points: N.
        max_steps: M, at most N - 1.
        size: Samples.
        draw: Generator.

    Returns:
        i (size,), j (size,) and h, one for the whole step; t = tau_i, u = tau_{i+h}, s = tau_j.
    """
    h = 1 + int(torch.multinomial(torch.arange(1, max_steps + 1, dtype=torch.float64), 1, generator=draw))
    start = torch.randint(0, points - h, (size,), generator=draw)
    room = points - (start + h)  # how many places j has
    end = start + h + (torch.rand(size, generator=draw, dtype=torch.float64) * room).long()
    return start, end, h


def draw_times(
    pairs: Law, points: int, max_steps: int, size: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws t, u and s as indices of the grid.

    Outside CTM's draws, u is h ~ P(h) prop. to h steps below t, h at most M and at most the way to s.

    Args:
        pairs: The law of (t, s).
        points: N.
        max_steps: M, at most N - 1.
        size: Samples.
        draw: Generator.

    Returns:
        Indices (size,) of t, u and s, int64.
    """
    if pairs in ("ctm", "mixed"):
        i, j, h = draw_ctm_times(points, max_steps, size, draw)
        if pairs == "ctm":
            return i, i + h, j
    law = _flat_law("uniform" if pairs == "mixed" else pairs, points).flatten()
    place = torch.multinomial(law, size, replacement=True, generator=draw)
    start, end = place // points, place % points
    most = (end - start).clamp(max=max_steps)
    share = torch.rand(size, generator=draw, dtype=torch.float64)
    # P(h <= k) = k(k+1)/(m(m+1)): the smallest k that reaches the share.
    h_own = ((torch.sqrt(1 + 4 * share * most * (most + 1)) - 1) / 2).ceil().long().clamp(min=1).minimum(most)
    if pairs == "mixed":
        alternate = torch.arange(size) % 2 == 0
        return (
            torch.where(alternate, i, start), torch.where(alternate, i + h, start + h_own),
            torch.where(alternate, j, end),
        )  # fmt: skip
    return start, start + h_own, end


def law_of_times(pairs: Law, points: int, max_steps: int) -> Tensor:
    """Returns the probability of each t, u and s that `draw_times` draws, (N, N, N) in this order, float64."""
    ctm, own = (torch.zeros(points, points, points, dtype=torch.float64) for _ in range(2))
    if pairs in ("ctm", "mixed"):
        for h in range(1, max_steps + 1):
            for i in range(points - h):
                room = points - i - h
                ctm[i, i + h, i + h :] = 2 * h / (max_steps * (max_steps + 1)) / (points - h) / room
        if pairs == "ctm":
            return ctm
    flat = _flat_law("uniform" if pairs == "mixed" else pairs, points)
    for i, j in flat.nonzero().tolist():
        most = min(max_steps, j - i)
        steps = torch.arange(1, most + 1, dtype=torch.float64)
        own[i, i + 1 : i + most + 1, j] = flat[i, j] * steps / steps.sum()
    return ctm.add(own).div(2) if pairs == "mixed" else own


def _flat_law(pairs: Law, points: int) -> Tensor:
    """Returns the probability of each (t, s) of "uniform" or of a list of calls, (N, N), float64."""
    if pairs == "uniform":
        law = torch.ones(points, points, dtype=torch.float64).triu(1)
        law /= law.sum()
        return law
    law = torch.zeros(points, points, dtype=torch.float64)
    assert not isinstance(pairs, str)
    for calls in pairs:
        stops = torch.arange(0, points, (points - 1) // calls)
        law[stops[:-1], stops[1:]] += 1 / (calls * len(pairs))
    return law
