"""Counting: how many network forwards a training step makes for each sample, by enumerating its times."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCost:
    """Expected network forwards a sample and step.

    Attributes:
        teacher: In the solver.
        target: Of the moving averages, without gradient.
        frozen: Of the moving average with a gradient to its input.
        student: With gradient, DSM included.
    """

    teacher: float
    target: float
    frozen: float
    student: float


def step_cost(method: str, points: int, max_steps: int, dsm: bool) -> StepCost:
    """Returns the expected forwards of one step; jumps that stand still cost nothing.

    Args:
        method: "ctm" or "cm".
        points: N of the time grid.
        max_steps: M, the most solver steps.
        dsm: Whether the DSM loss is on.

    >>> round(step_cost("ctm", 18, 17, True).teacher, 2)
    23.33
    """
    if method == "cm":
        return StepCost(2, 1, 0, 1 + dsm)
    teacher = inner = outer = 0.0
    weights = range(1, max_steps + 1)
    for h in weights:
        chance = h / sum(weights)
        teacher += chance * 2 * h
        starts = range(points - h)
        same = sum(1 / (points - i - h) for i in starts) / len(starts)  # P(s = u | h) = P(s = eps | h)
        inner += chance * (1 - same)
        outer += chance * (1 - same)
    return StepCost(teacher, inner + outer, outer, 1 + dsm)
