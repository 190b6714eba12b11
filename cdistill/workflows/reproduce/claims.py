"""The paper's claims, the figure that each is judged by, and the verdict.

A figure is a ratio with its 95 % interval over seeds, below 1 where the arm is better than its baseline, but for the
ratio of iterations, which is above 1 where it is faster.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cdistill.errors import RecipeError, suggest
from cdistill.workflows.reproduce.experiments import ALIGNMENT, NFE
from cdistill.workflows.reproduce.outcomes import Outcomes, Ratio

REPRODUCED, REFUTED, UNDECIDED, NOT_RUN = "reproduced", "not reproduced", "not distinguishable", "not run"
MARGIN = 1.1  # figures within this factor are called comparable
NEGLIGIBLE = 1.01  # a difference within this factor makes nothing superior, however sure it is
CLAIMED = 2.0  # "2x to 3x training acceleration"
MIXTURE = "f"  # judged by `judge_mixture`: it needs no training


@dataclass(frozen=True)
class Finding:
    """One figure of a claim on one data set, and the verdict that follows."""

    claim: str  # its letter
    data: str
    quantity: str  # what the figure is
    ratio: Ratio | None  # None where the trials are missing
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


def verdict(rule: Rule, ratio: Ratio | None, comparisons: int) -> str:
    """Returns the verdict on a figure that is one of so many figures of its claim and data set.

    All of them have to say "reproduced" for the claim to be, and one alone can say "not reproduced": that one needs
    an interval for all of them at once.
    """
    if ratio is None:
        return NOT_RUN
    alone = rule(*ratio.interval())
    if alone == REFUTED:
        return rule(*ratio.interval(comparisons))
    return UNDECIDED if alone == REPRODUCED and ratio.lost else alone


class Figure(NamedTuple):
    """A figure that a claim is judged by."""

    quantity: str
    rule: Rule
    measure: Callable[[Outcomes, str, str, int, str], Ratio | None]
    arm: str
    baseline: str
    nfe: int
    metric: str = ""  # the data set's own by default


class Claim(NamedTuple):
    """A claim of the paper."""

    name: str  # as on the command line; its letter does too
    statement: str
    figures: Sequence[Figure]

    @property
    def arms(self) -> set[str]:
        """What has to be trained."""
        return {arm for figure in self.figures for arm in (figure.arm, figure.baseline)}


def _late(rule: Rule, arm: str, baseline: str, calls: Iterable[int], about: str = "", metric: str = "") -> list[Figure]:
    """Returns figures of the second half of the training, one for each number of network calls."""
    return [Figure(f"{about}{nfe} NFE", rule, Outcomes.late, arm, baseline, nfe, metric) for nfe in calls]


CLAIMS: Mapping[str, Claim] = {
    "a": Claim(
        "acceleration", "Analytic starts better than CTM and needs 2 to 3 times fewer iterations, 2 NFE",
        [
            Figure("untrained, 2 NFE", superior, Outcomes.before, "analytic", "ctm", 2),
            Figure("iterations, 2 NFE", faster, Outcomes.speed, "analytic", "ctm", 2),
        ],
    ),
    "b": Claim(
        "one-step", "no difference between the preconditionings in one step, and in CM",
        [*_late(comparable, "analytic", "ctm", (1,), "CTM, "), *_late(comparable, "cm-analytic", "cm", (1, 2), "CM, ")],
    ),
    "c": Claim("bcm", "BCM's form improves nothing on CTM's", _late(no_gain, "bcm", "ctm", (1, 2))),
    "d": Claim(
        "alignment", "Analytic ends nearer to the teacher than CTM, at every NFE from 2 on",
        _late(superior, "analytic", "ctm", NFE[1:], metric=ALIGNMENT),
    ),
    "e": Claim(
        "gan", "with the GAN loss Analytic and CTM are comparable",
        _late(comparable, "gan-analytic", "gan-ctm", (1, 2)),
    ),
    MIXTURE: Claim(
        "mixture", "Fig. 7: in 3 untrained steps Analytic follows the 1-D mixture's teacher better than CTM", ()
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

    With Analytic's backward form its other forms are trained too, for the comparison with the scores before training.
    """
    arms: set[str] = set().union(*(CLAIMS[letter].arms for letter in letters if CLAIMS[letter].arms <= set(there)))
    return arms | ({"analytic-forward", "analytic-bounded"} & set(there) if "analytic" in arms else set())


def judge(outcomes: Iterable[Outcomes], letters: Sequence[str]) -> list[Finding]:
    """Judges claims on every data set that has their arms; see `judge_mixture` for (f)."""
    findings = []
    for letter in letters:
        figures = CLAIMS[letter].figures
        for one in outcomes:
            if CLAIMS[letter].arms <= set(one.data.arms):
                for figure in figures:
                    metric = figure.metric or one.data.metric
                    ratio = figure.measure(one, figure.arm, figure.baseline, figure.nfe, metric)
                    word = verdict(figure.rule, ratio, len(figures))
                    findings.append(Finding(letter, one.data.name, f"{figure.quantity}: {metric}", ratio, word))
    return findings


def judge_mixture(ratios: Mapping[str, Ratio]) -> list[Finding]:
    """Judges claim (f): quantity -> analytic over CTM."""
    return [
        Finding(MIXTURE, "mixture-1d", f"untrained, 3 NFE: {name}", ratio, verdict(superior, ratio, len(ratios)))
        for name, ratio in ratios.items()
    ]


def by_data(findings: Sequence[Finding], letter: str) -> dict[str, str]:
    """Returns data set -> verdict on a claim: all its figures have to say "reproduced", one says "not reproduced"."""
    verdicts: dict[str, set[str]] = {}
    for finding in findings:
        if finding.claim == letter:
            verdicts.setdefault(finding.data, set()).add(finding.verdict)
    worst_first = REFUTED, NOT_RUN, UNDECIDED, REPRODUCED
    return {data: next(word for word in worst_first if word in words) for data, words in verdicts.items()}


def conclusions(findings: Sequence[Finding]) -> dict[str, str]:
    """Returns letter -> conclusion about all data sets.

    "reproduced" where all that were run say so, "not reproduced" where some contradict and none agrees, "not
    distinguishable" where none says either, else on which data sets it holds and on which not.
    """
    return {letter: _conclude(by_data(findings, letter)) for letter in dict.fromkeys(one.claim for one in findings)}


def _conclude(verdicts: Mapping[str, str]) -> str:
    run = {data: verdict for data, verdict in verdicts.items() if verdict != NOT_RUN}
    yes, no = ([data for data, verdict in run.items() if verdict == word] for word in (REPRODUCED, REFUTED))
    if not run:
        return NOT_RUN
    if len(yes) == len(run):
        return REPRODUCED
    if not yes:
        return REFUTED if no else UNDECIDED
    contradicted = f", {REFUTED} on {', '.join(no)}" if no else ""
    return f"{REPRODUCED} on {', '.join(yes)} ({len(yes)} of {len(run)}){contradicted}"


def with_figures(findings: Sequence[Finding], letters: Sequence[str], names: Collection[str]) -> list[Finding]:
    """Returns all findings of a claim on a data set that has at least one figure, or that was asked for."""
    begun = {(one.claim, one.data) for one in findings if one.ratio is not None}
    return [one for one in findings if (one.claim, one.data) in begun or (one.claim in letters and one.data in names)]
