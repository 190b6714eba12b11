"""The paper's claims, the figure that each is judged by, and the verdict.

A figure is a ratio with its 95 % interval over seeds, below 1 where the arm is better than its baseline, but for the
ratio of iterations, which is above 1 where it is faster.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from cdistill.errors import RecipeError, suggest
from cdistill.workflows.reproduce.experiments import CONSISTENCY, GAN, NFE
from cdistill.workflows.reproduce.outcomes import Outcomes, Ratio

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


Rule = Callable[[float, float], str]
"""Returns the verdict that follows from an interval."""


def superior(low: float, high: float) -> str:
    """Judges "the arm is better": its figure is smaller, by more than `NEGLIGIBLE`."""
    return REPRODUCED if high < 1 / NEGLIGIBLE else REFUTED if low > NEGLIGIBLE else UNDECIDED


def comparable(low: float, high: float) -> str:
    """Judges "there is no difference": none beyond `MARGIN`."""
    if low > 1 / MARGIN and high < MARGIN:
        return REPRODUCED
    return REFUTED if high < 1 / MARGIN or low > MARGIN else UNDECIDED


def no_gain(low: float, high: float) -> str:
    """Judges "it brings nothing": no improvement beyond `MARGIN`."""
    return REPRODUCED if low > 1 / MARGIN else REFUTED if high < 1 / MARGIN else UNDECIDED


def faster(low: float, high: float) -> str:
    """Judges "two to three times fewer iterations": surely fewer, and rather twice as few than as many."""
    if high < CLAIMED:
        return REFUTED
    return REPRODUCED if low > 1 and low * high > CLAIMED else UNDECIDED


@dataclass(frozen=True)
class Figure:
    """One figure of a claim on one data set.

    Attributes:
        quantity: What it is.
        rule: How it is judged.
        ratio: Its value; None where trials are missing.
    """

    quantity: str
    rule: Rule
    ratio: Ratio | None

    def verdict(self, comparisons: int) -> str:
        """Returns the verdict, if it is one of so many figures of its claim and data set.

        All of them have to say "reproduced" for the claim to be, and one alone can say "not reproduced": that one needs
        an interval for all of them at once.
        """
        if self.ratio is None:
            return NOT_RUN
        found = self.rule(*self.ratio.interval())
        if found == REFUTED:
            return self.rule(*self.ratio.interval(comparisons))
        return UNDECIDED if found == REPRODUCED and self.ratio.lost else found


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
    judge: Callable[[Outcomes], list[Figure]]


def _acceleration(found: Outcomes) -> list[Figure]:
    how = "analytic", "ctm", 2, found.data.metric
    return [
        Figure(f"untrained, 2 NFE: {how[3]}", superior, found.before(*how)),
        Figure(f"iterations, 2 NFE: {how[3]}", faster, found.speed(*how)),
    ]


def _one_step(found: Outcomes) -> list[Figure]:
    metric = found.data.metric
    return [
        Figure(f"CTM, 1 NFE: {metric}", comparable, found.late("analytic", "ctm", 1, metric)),
        *(
            Figure(f"CM, {nfe} NFE: {metric}", comparable, found.late("cm-analytic", "cm", nfe, metric))
            for nfe in (1, 2)
        ),
    ]


def _at(rule: Rule, arm: str, baseline: str, calls: Sequence[int], found: Outcomes) -> list[Figure]:
    metric = found.data.metric
    return [Figure(f"{nfe} NFE: {metric}", rule, found.late(arm, baseline, nfe, metric)) for nfe in calls]


def _alignment(found: Outcomes) -> list[Figure]:
    return [
        Figure(f"{nfe} NFE: {ALIGNMENT}", superior, found.late("analytic", "ctm", nfe, ALIGNMENT))
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
        "alignment", "Analytic ends nearer to the teacher than CTM, at every NFE from 2 on", ("ctm", "analytic"),
        _alignment,
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


def arms_of(letters: Iterable[str], there: Collection[str]) -> set[str]:
    """Returns the arms to train on a data set that has those in `there`: none of claims that cannot be judged on it.

    Analytic's other forms come beside the backward one, for the study.
    """
    wanted = [CLAIMS[letter].arms for letter in letters if set(CLAIMS[letter].arms) <= set(there)]
    found = {arm for arms in wanted for arm in arms}
    return found | ({"analytic-forward", "analytic-bounded"} & set(there) if "analytic" in found else set())


def judge(found: Iterable[Outcomes], letters: Sequence[str]) -> list[Finding]:
    """Judges claims on every data set that has their arms; see `judge_mixture` for (f)."""
    return [
        finding
        for letter in letters
        for outcomes in found
        if set(CLAIMS[letter].arms) <= set(outcomes.data.arms)
        for finding in _findings(letter, outcomes.data.name, CLAIMS[letter].judge(outcomes))
    ]


def judge_mixture(ratios: Mapping[str, Ratio]) -> list[Finding]:
    """Judges claim (f): quantity -> analytic over CTM."""
    figures = [Figure(f"untrained, 3 NFE: {name}", superior, ratio) for name, ratio in ratios.items()]
    return _findings(MIXTURE, "mixture-1d", figures)


def _findings(letter: str, data: str, figures: Sequence[Figure]) -> list[Finding]:
    return [Finding(letter, data, one.quantity, one.ratio, one.verdict(len(figures))) for one in figures]


def by_data(findings: Sequence[Finding], letter: str) -> dict[str, str]:
    """Returns data set -> verdict on a claim: all its figures have to say "reproduced", one says "not reproduced"."""
    mine = [finding for finding in findings if finding.claim == letter]
    return {
        data: _joint({one.verdict for one in mine if one.data == data})
        for data in dict.fromkeys(one.data for one in mine)
    }


def _joint(verdicts: Collection[str]) -> str:
    for word in (REFUTED, NOT_RUN, UNDECIDED):
        if word in verdicts:
            return word
    return REPRODUCED


def conclusions(findings: Sequence[Finding]) -> dict[str, str]:
    """Returns letter -> conclusion about all data sets.

    "reproduced" where all that were run say so, "not reproduced" where some contradict and none agrees, "not
    distinguishable" where none says either, else on which data sets it holds and on which not.
    """
    return {letter: _conclude(by_data(findings, letter)) for letter in dict.fromkeys(one.claim for one in findings)}


def _conclude(verdicts: Mapping[str, str]) -> str:
    told = {data: verdict for data, verdict in verdicts.items() if verdict != NOT_RUN}
    yes, no = ([data for data, verdict in told.items() if verdict == word] for word in (REPRODUCED, REFUTED))
    if not told:
        return NOT_RUN
    if len(yes) == len(told):
        return REPRODUCED
    if not yes:
        return REFUTED if no else UNDECIDED
    contradicted = f", {REFUTED} on {', '.join(no)}" if no else ""
    return f"{REPRODUCED} on {', '.join(yes)} ({len(yes)} of {len(told)}){contradicted}"
