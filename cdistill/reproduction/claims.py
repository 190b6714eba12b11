"""The paper's claims, the figure that each is judged by, and the verdict.

The rules were written before the trials were run. A figure is a ratio with its 95 % interval over seeds, below 1 where
the arm is better than its baseline, but for the ratio of iterations, which is above 1 where it is faster.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cdistill.errors import RecipeError, suggest
from cdistill.reproduction.experiments import CONSISTENCY, GAN, NFE
from cdistill.reproduction.outcomes import Outcomes, Ratio

REPRODUCED, REFUTED, UNDECIDED, NOT_RUN = "reproduced", "not reproduced", "not distinguishable", "not run"
MARGIN = 1.1  # figures within this factor are called comparable
NEGLIGIBLE = 1.01  # a difference within this factor makes nothing superior, however sure it is
CLAIMED = 2.0  # "2x to 3x training acceleration"
ALIGNMENT = "teacher-mse"
MIXTURE = "f"  # judged by `judge_mixture`: it needs no training


@dataclass(frozen=True)
class Finding:
    """One figure of a claim on one data set.

    Attributes:
        claim: Letter.
        data: Name of the data set.
        quantity: What the figure is.
        ratio: The figure; None where the trials are missing.
        verdict: What follows.
    """

    claim: str
    data: str
    quantity: str
    ratio: Ratio | None
    verdict: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        name: As on the command line; its letter does too.
        statement: What is claimed.
        arms: What has to be trained.
        judge: Judges a data set.
    """

    name: str
    statement: str
    arms: Sequence[str]
    judge: Callable[[Outcomes], list[tuple[str, Ratio | None, str]]]


def superior(ratio: Ratio) -> str:
    """Judges "the arm is better": its figure is smaller, and not by a trifle."""
    if ratio.low > 1 / NEGLIGIBLE and ratio.high < NEGLIGIBLE:
        return UNDECIDED
    return REPRODUCED if ratio.high < 1 else REFUTED if ratio.low > 1 else UNDECIDED


def comparable(ratio: Ratio) -> str:
    """Judges "there is no difference": none beyond `MARGIN`."""
    if ratio.low > 1 / MARGIN and ratio.high < MARGIN:
        return REPRODUCED
    return REFUTED if ratio.high < 1 or ratio.low > 1 else UNDECIDED


def no_gain(ratio: Ratio) -> str:
    """Judges "it brings nothing": no improvement beyond `MARGIN`."""
    return REPRODUCED if ratio.low > 1 / MARGIN else REFUTED if ratio.high < 1 else UNDECIDED


def faster(ratio: Ratio) -> str:
    """Judges "two to three times fewer iterations"."""
    if ratio.high < CLAIMED:
        return REFUTED
    return REPRODUCED if ratio.low > 1 else UNDECIDED


def _judged(rule: Callable[[Ratio], str], quantity: str, ratio: Ratio | None) -> tuple[str, Ratio | None, str]:
    return quantity, ratio, NOT_RUN if ratio is None else rule(ratio)


def _acceleration(found: Outcomes) -> list[tuple[str, Ratio | None, str]]:
    how = "analytic", "ctm", 2, found.data.metric
    return [
        _judged(superior, f"untrained, 2 NFE: {how[3]}", found.before(*how)),
        _judged(faster, f"iterations, 2 NFE: {how[3]}", found.speed(*how)),
    ]


def _one_step(found: Outcomes) -> list[tuple[str, Ratio | None, str]]:
    metric = found.data.metric
    return [
        _judged(comparable, f"CTM, 1 NFE: {metric}", found.late("analytic", "ctm", 1, metric)),
        *(
            _judged(comparable, f"CM, {nfe} NFE: {metric}", found.late("cm-analytic", "cm", nfe, metric))
            for nfe in (1, 2)
        ),
    ]


def _at(
    rule: Callable[[Ratio], str], arm: str, baseline: str, calls: Sequence[int], found: Outcomes
) -> list[tuple[str, Ratio | None, str]]:
    metric = found.data.metric
    return [_judged(rule, f"{nfe} NFE: {metric}", found.late(arm, baseline, nfe, metric)) for nfe in calls]


def _alignment(found: Outcomes) -> list[tuple[str, Ratio | None, str]]:
    return [
        _judged(superior, f"{nfe} NFE: {ALIGNMENT}", found.late("analytic", "ctm", nfe, ALIGNMENT))
        for nfe in NFE
        if nfe > 1
    ]


CLAIMS: Mapping[str, Claim] = {
    "a": Claim(
        "acceleration", "Analytic starts better than CTM and needs 2 to 3 times fewer iterations, 2 NFE",
        ("ctm", "analytic"), _acceleration,
    ),
    "b": Claim(
        "one-step", "no difference between the preconditionings in one step, and in CM",
        ("ctm", "analytic", *CONSISTENCY), _one_step,
    ),
    "c": Claim(
        "bcm", "BCM's form improves nothing on CTM's", ("ctm", "bcm"), partial(_at, no_gain, "bcm", "ctm", (1, 2))
    ),
    "d": Claim(
        "alignment", "Analytic ends nearer to the teacher than CTM at every NFE", ("ctm", "analytic"), _alignment
    ),
    "e": Claim(
        "gan", "with the GAN loss Analytic and CTM are comparable", GAN,
        partial(_at, comparable, "gan-analytic", "gan-ctm", (1, 2)),
    ),
    MIXTURE: Claim(
        "mixture", "Fig. 7: in 3 untrained steps Analytic follows the 1-D mixture's teacher better than CTM",
        (), lambda found: [],
    ),
}  # fmt: skip


def choose_claims(names: Sequence[str]) -> list[str]:
    """Returns the letters of claims named by letter or name, in order; all when none is named.

    Raises:
        RecipeError: There is no such claim.
    """
    by_name = {claim.name: letter for letter, claim in CLAIMS.items()} | {letter: letter for letter in CLAIMS}
    if unknown := [name for name in names if name not in by_name]:
        raise RecipeError(f"claim: got {unknown[0]!r}; {suggest(unknown[0], by_name)}")
    return sorted({by_name[name] for name in names}) or list(CLAIMS)


def judge(found: Iterable[Outcomes], letters: Sequence[str]) -> list[Finding]:
    """Judges claims on every data set that has their arms; see `judge_mixture` for (f)."""
    return [
        Finding(letter, outcomes.data.name, *figure)
        for letter in letters
        for outcomes in found
        if set(CLAIMS[letter].arms) <= set(outcomes.data.arms)
        for figure in CLAIMS[letter].judge(outcomes)
    ]


def judge_mixture(ratios: Mapping[str, Ratio]) -> list[Finding]:
    """Judges claim (f): quantity -> analytic over CTM."""
    return [
        Finding(MIXTURE, "mixture-1d", f"untrained, 3 NFE: {name}", ratio, superior(ratio))
        for name, ratio in ratios.items()
    ]


def verdicts(findings: Sequence[Finding]) -> dict[str, str]:
    """Returns letter -> verdict of the claims that have findings."""
    letters = dict.fromkeys(finding.claim for finding in findings)
    return {letter: overall([one for one in findings if one.claim == letter]) for letter in letters}


def overall(findings: Sequence[Finding]) -> str:
    """Returns the verdict on a claim: reproduced where all its figures say so, not reproduced where one says not."""
    verdicts = {finding.verdict for finding in findings}
    if not verdicts - {NOT_RUN}:
        return NOT_RUN
    return REPRODUCED if verdicts == {REPRODUCED} else REFUTED if REFUTED in verdicts else UNDECIDED


def arms_of(letters: Iterable[str]) -> set[str]:
    """Returns the arms that claims need, and Analytic's other forms beside the backward one, for the study."""
    found = {arm for letter in letters for arm in CLAIMS[letter].arms}
    return found | ({"analytic-forward", "analytic-bounded"} if "analytic" in found else set())
