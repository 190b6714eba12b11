"""What came out, as a page of Markdown, and as tables for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cdistill.runtime.console import Table
from cdistill.workflows.plan import duration, scaled
from cdistill.workflows.reproduce.claims import CLAIMS, MARGIN, Finding, by_data, conclusions
from cdistill.workflows.reproduce.experiments import ALIGNMENT, ARMS, NFE, TRAJECTORY
from cdistill.workflows.reproduce.outcomes import Comparison, Outcomes, Ratio, predict

_CAPTIONS = {
    "figure-2": "One step: training curves of CM and CTM, and f and g of jumps to eps (Fig. 2)",
    "figure-3": "Two steps: training curves (Fig. 3)",
    "figure-4": "g(t, s) of CTM and of Analytic on each data set (Fig. 4)",
    "figure-5": "BCM's preconditioning (Fig. 5)",
    "figure-6": "With the GAN loss (Fig. 6)",
    "figure-7": "The 1-D mixture: the teacher's trajectories and those of untrained 3-step students (Fig. 7)",
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
    outcomes: Sequence[Outcomes],
    findings: Sequence[Finding],
    spans: Mapping[str, float],
    comparisons: Sequence[Comparison],
    figures: Iterable[str],
) -> str:
    """Returns the page.

    Args:
        title: How it was made.
        outcomes: Of each data set.
        findings: The figures that the verdicts follow from.
        spans: Data set -> decades of t over which l falls.
        comparisons: Preconditionings before and after the training.
        figures: Names of the pictures in the folder ``figures``.
    """
    parts = [
        "# The paper's claims, tested", title, _METHOD,
        "## Verdicts", _verdicts(findings), _verdicts_by_data(findings), _findings(findings), _lost(outcomes),
        "## Table 2", *map(_table_2, outcomes),
        "## Analytic over CTM, in the second half of the training", _ratios(outcomes),
        "## Iterations until CTM's final value at 2 NFE", _speeds(outcomes),
        "## On which data do they differ, and does the score before training predict it?",
        _study(spans, comparisons), _predictions(comparisons),
        "## Figures", *[f"{_CAPTIONS[name]}:\n\n![{_CAPTIONS[name]}](figures/{name}.png)" for name in figures],
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _verdicts(findings: Sequence[Finding]) -> str:
    rows = [[letter, CLAIMS[letter].statement, f"**{text}**"] for letter, text in conclusions(findings).items()]
    return markdown_table(["claim", "of the paper", "verdict"], rows)


def _verdicts_by_data(findings: Sequence[Finding]) -> str:
    verdicts = {letter: by_data(findings, letter) for letter in dict.fromkeys(one.claim for one in findings)}
    names = dict.fromkeys(one.data for one in findings)
    rows = [[name, *(of_data.get(name, "") for of_data in verdicts.values())] for name in names]
    return markdown_table(["data", *verdicts], rows)


def _findings(findings: Sequence[Finding]) -> str:
    rows = [
        [one.claim, one.data, one.quantity, _text(one.ratio), str(one.ratio.seeds if one.ratio else 0), one.verdict]
        for one in findings
    ]
    return markdown_table(["claim", "data", "figure", "ratio", "seeds", "verdict"], rows)


def _text(ratio: Ratio | None) -> str:
    return "-" if ratio is None else str(ratio)


def _lost(outcomes: Sequence[Outcomes]) -> str:
    lost = [outcome for one in outcomes for outcome in one.by_trial.values() if outcome.lost]
    if not lost:
        return ""
    return "Diverged, and left out: " + "; ".join(f"{one.trial.name} ({', '.join(one.lost)})" for one in lost) + "."


def _table_2(outcomes: Outcomes) -> str:
    blocks = []
    for metric in (outcomes.data.metric, ALIGNMENT):
        rows = []
        for arm in outcomes.data.arms:
            values = [outcomes.final(arm, nfe, metric) for nfe in NFE]
            if any(values):
                rows.append([ARMS[arm].title, *map(_text, values)])
        teacher = outcomes.teacher(metric)
        heading = f"### {outcomes.data.name}: {metric}" + (f", the teacher's {teacher}" if teacher else "")
        blocks.append(heading + "\n\n" + markdown_table(["NFE", *map(str, NFE)], rows))
    return "\n\n".join(blocks)


def _ratios(outcomes: Sequence[Outcomes]) -> str:
    rows = []
    for one in outcomes:
        for metric in (one.data.metric, ALIGNMENT):
            ratios = [one.late("analytic", "ctm", nfe, metric) for nfe in NFE]
            if any(ratios):
                rows.append([one.data.name, metric, *map(_text, ratios)])
    return markdown_table(["data", "metric", *(f"{nfe} NFE" for nfe in NFE)], rows) if rows else ""


def _speeds(outcomes: Sequence[Outcomes]) -> str:
    present = {arm for one in outcomes for arm, _ in one.by_trial}
    arms = [arm for arm in TRAJECTORY if arm in present - {"ctm"}]
    rows = [[one.data.name, *(_text(one.speed(arm, "ctm", 2, one.data.metric)) for arm in arms)] for one in outcomes]
    return markdown_table(["data", *(ARMS[arm].title for arm in arms)], rows)


def _study(spans: Mapping[str, float], comparisons: Sequence[Comparison]) -> str:
    rows = [
        [
            one.data, f"{spans[one.data]:.2f}", one.preconditioning, one.metric,
            *(f"{value:.3g}" for value in one.scores.values()), str(one.after),
            {None: "-", True: "yes", False: "no"}[one.agrees("untrained MSE")],
        ]
        for one in comparisons
        if one.nfe == 2
    ]  # fmt: skip
    if not rows:
        return ""
    columns = [
        "data", "decades of t, l from 0.9 to 0.1", "preconditioning", "metric, 2 NFE", *comparisons[0].scores,
        "second half of the training", "untrained MSE right?",
    ]  # fmt: skip
    return markdown_table(columns, rows)


def _predictions(comparisons: Sequence[Comparison]) -> str:
    rows = [
        [one["score"], one["metric"], f"{one['agree']} of {one['decided']}", f"{one['correlation']:.2f}"]
        for one in predict(comparisons)
    ]
    text = "Over all data sets, preconditionings and numbers of calls from 2 on, which are not independent:"
    return text + "\n\n" + markdown_table(["score before", "metric after", "right", "rank correlation"], rows)


def verdict_tables(record: Mapping[str, Any]) -> list[Table]:
    """Returns the figures, the verdict of each data set, and the conclusions, from reproduction.json."""
    figures = []
    for one in record["findings"]:
        known = {key: value for key, value in (one["ratio"] or {}).items() if key not in ("low", "high")}
        ratio = Ratio(**known) if known else None
        figures.append([f"{one['claim']} {one['data']}", one["quantity"], _text(ratio), one["verdict"]])
    claims = [[f"{letter} {one['statement']}", one["conclusion"]] for letter, one in record["claims"].items()]
    caption = "ratio of the arm to its baseline, with its 95 % interval over the seeds"
    return [
        Table("What came out", ["claim, data", "figure", "ratio", "verdict"], figures, caption),
        Table("The paper's claims", ["claim", "verdict"], claims),
    ]


def trials_table(record: Mapping[str, Any]) -> Table:
    """Returns what the trainings cost and what came out so far, from `list_trials`."""
    rows = [
        [
            one["name"], f"{one['iterations']:,} x {one['batch_size']:,}", scaled(one["training_flop"], "FLOP"),
            "-" if one["hours"] is None else duration(one["hours"]),
            "-" if one["sustained"] is None else scaled(one["sustained"], "FLOP/s"),
            ", ".join("-" if value is None else f"{value:.3g}" for value in one["results"].values()) or one["state"],
        ]
        for one in record["trials"]
    ]  # fmt: skip
    rate = record["tflops"]
    time = f"on {record['devices']} device(s)" + ("" if rate is None else f" at {rate:g} TFLOP/s")
    result = f"result at {', '.join(map(str, NFE))} NFE"
    return Table("Trainings", ["training", "steps x images", "work", time, "sustained here", result], rows)
