"""What came out, as a page of Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from cdistill.workflows.reproduce.claims import ALIGNMENT, CLAIMS, MARGIN, Finding, by_data, conclusions
from cdistill.workflows.reproduce.experiments import ARMS, NFE, TRAJECTORY
from cdistill.workflows.reproduce.outcomes import Outcomes
from cdistill.workflows.reproduce.study import Comparison, Prediction

_CAPTIONS = {
    "figure-2": "One step: training curves of CM and CTM, and f and g of jumps to eps (Fig. 2)",
    "figure-3": "Two steps: training curves (Fig. 3)",
    "figure-4": "g(t, s) of CTM and of Analytic on each data set (Fig. 4)",
    "figure-5": "BCM's preconditioning (Fig. 5)",
    "figure-6": "With the GAN loss (Fig. 6)",
    "figure-7": "The 1-D mixture: the teacher's trajectories and those of untrained 3-step students (Fig. 7)",
    "study": "Before and in the second half of the training",
}
_METHOD = f"""Figures are ratios of an arm's value to its baseline's, with 95 % intervals over the seeds; below 1 is
better, but for iterations, where 2 is twice as fast. Unless they say "untrained" or "iterations", they are averaged
over the second half of the training: one evaluation depends on the last steps' luck. Iterations are counted until
CTM's final value, the mean of its last three evaluations (where the arm does not reach that, until the arm's own),
less the delay of the weights' moving average. Comparable means within a factor of {MARGIN:g}. A claim is reproduced
on a data set if all its figures say so, and not reproduced if one of them contradicts it with an interval for all
of them at once. Intervals hold what changes with a seed: batches, noise, the samples that are measured; not the
coefficients, which all seeds share. A Frechet distance sees means and covariances only, and that of few samples is
not zero for the real data either: compare the teacher's."""


def write_page(
    title: str,
    found: Sequence[Outcomes],
    findings: Sequence[Finding],
    spans: Mapping[str, float],
    comparisons: Sequence[Comparison],
    predictions: Sequence[Prediction],
    figures: Iterable[str],
) -> str:
    """Returns the page.

    Args:
        title: How it was made.
        found: The outcomes of each data set.
        findings: The figures behind the verdicts.
        spans: Data set -> decades of t over which l falls.
        comparisons: Forms before and after the training.
        predictions: How well the scores before predict what comes after.
        figures: Names of the pictures in the folder ``figures``.
    """
    parts = [
        "# The paper's claims, tested", title, _METHOD,
        "## Verdicts", _verdicts(findings), _verdicts_by_data(findings), _findings(findings), _lost(found),
        "## Table 2", *[_table_2(outcomes) for outcomes in found],
        "## Analytic over CTM, in the second half of the training", _ratios(found),
        "## Iterations until CTM's final value at 2 NFE", _speeds(found),
        "## On which data do they differ, and does the score before training tell?",
        _study(spans, comparisons), _predictions(predictions), _tally(comparisons),
        "## Figures", *[f"{_CAPTIONS[name]}:\n\n![{_CAPTIONS[name]}](figures/{name}.png)" for name in figures],
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdicts(findings: Sequence[Finding]) -> str:
    return markdown_table(
        ["claim", "of the paper", "verdict"],
        [[letter, CLAIMS[letter].statement, f"**{verdict}**"] for letter, verdict in conclusions(findings).items()],
    )


def _verdicts_by_data(findings: Sequence[Finding]) -> str:
    letters = list(dict.fromkeys(one.claim for one in findings))
    found = {letter: by_data(findings, letter) for letter in letters}
    names = list(dict.fromkeys(one.data for one in findings))
    return markdown_table(
        ["data", *letters], [[name, *(found[letter].get(name, "") for letter in letters)] for name in names]
    )


def _findings(findings: Sequence[Finding]) -> str:
    return markdown_table(
        ["claim", "data", "figure", "ratio", "seeds", "verdict"],
        [
            [
                one.claim, one.data, one.quantity, "-" if one.ratio is None else str(one.ratio),
                "0" if one.ratio is None else str(one.ratio.seeds), one.verdict,
            ]
            for one in findings
        ],
    )  # fmt: skip


def _lost(found: Sequence[Outcomes]) -> str:
    lost = [one for outcomes in found for one in outcomes.found.values() if one.lost]
    if not lost:
        return ""
    return "Diverged, and left out: " + "; ".join(f"{one.trial.name} ({', '.join(one.lost)})" for one in lost) + "."


def _table_2(found: Outcomes) -> str:
    blocks = []
    for metric in (found.data.metric, ALIGNMENT):
        rows = []
        for arm in found.data.arms:
            values = [found.final(arm, nfe, metric) for nfe in NFE]
            if any(values):
                rows.append([ARMS[arm].title, *("-" if value is None else str(value) for value in values)])
        teacher = found.teacher(metric)
        heading = f"### {found.data.name}: {metric}" + (f", the teacher's {teacher}" if teacher else "")
        blocks.append(heading + "\n\n" + markdown_table(["NFE", *map(str, NFE)], rows))
    return "\n\n".join(blocks)


def _ratios(found: Sequence[Outcomes]) -> str:
    rows = []
    for outcomes in found:
        for metric in (outcomes.data.metric, ALIGNMENT):
            ratios = [outcomes.late("analytic", "ctm", nfe, metric) for nfe in NFE]
            if any(ratios):
                rows.append([outcomes.data.name, metric, *("-" if ratio is None else str(ratio) for ratio in ratios)])
    return markdown_table(["data", "metric", *(f"{nfe} NFE" for nfe in NFE)], rows) if rows else ""


def _speeds(found: Sequence[Outcomes]) -> str:
    present = {arm for outcomes in found for arm, _ in outcomes.found}
    arms = [arm for arm in TRAJECTORY if arm in present - {"ctm"}]
    rows = []
    for outcomes in found:
        ratios = [outcomes.speed(arm, "ctm", 2, outcomes.data.metric) for arm in arms]
        rows.append([outcomes.data.name, *("-" if ratio is None else str(ratio) for ratio in ratios)])
    return markdown_table(["data", *(ARMS[arm].title for arm in arms)], rows)


def _study(spans: Mapping[str, float], comparisons: Sequence[Comparison]) -> str:
    rows = [
        [
            one.data, f"{spans[one.data]:.2f}", one.form, one.metric,
            *(f"{value:.3g}" for value in one.scores.values()), str(one.after),
            {None: "-", True: "yes", False: "no"}[one.agrees("untrained MSE")],
        ]
        for one in comparisons
        if one.nfe == 2
    ]  # fmt: skip
    if not rows:
        return ""
    columns = [
        "data", "decades of t, l from 0.9 to 0.1", "form", "metric, 2 NFE", *comparisons[0].scores,
        "second half of the training", "untrained MSE right?",
    ]  # fmt: skip
    return markdown_table(columns, rows)


def _tally(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for form in dict.fromkeys(one.form for one in comparisons):
        for name, alignment in ((ALIGNMENT, True), ("distance", False)):
            mine = [one for one in comparisons if one.form == form and one.nfe > 1]
            told = [one.after for one in mine if (one.metric == ALIGNMENT) == alignment]
            better, worse = sum(one.high < 1 for one in told), sum(one.low > 1 for one in told)
            rows.append([form, name, str(better), str(worse), str(len(told) - better - worse)])
    if not rows:
        return ""
    text = "Over CTM in the second half of the training, over the same comparisons:"
    return text + "\n\n" + markdown_table(["form", "metric", "better", "worse", "cannot be told"], rows)


def _predictions(predictions: Sequence[Prediction]) -> str:
    rows = [[one.score, one.metric, f"{one.agree} of {one.decided}", f"{one.correlation:.2f}"] for one in predictions]
    text = "Over all data sets, forms and numbers of calls from 2 on, which are not independent of each other:"
    return text + "\n\n" + markdown_table(["score before", "metric after", "right", "rank correlation"], rows)
