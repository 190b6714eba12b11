"""The paper's claims: experiments, figures, verdicts; and the command as a whole, on small budgets."""

import doctest
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cdistill.cli.app import run
from cdistill.errors import CdistillError, RecipeError, StoppedError
from cdistill.evaluation.estimates import quantile
from cdistill.objectives.settings import SolverSection
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.recipe.files import differences
from cdistill.recipe.schema import DistillRecipe
from cdistill.registry import METRICS, PRECONDITIONINGS
from cdistill.reporting.panels import draw_panels, save_figure
from cdistill.runtime import signals as stopping
from cdistill.storage.run_folder import RunFolder, held
from cdistill.workflows.reproduce import claims, outcomes
from cdistill.workflows.reproduce.claims import (
    CLAIMS,
    NOT_RUN,
    REFUTED,
    REPRODUCED,
    UNDECIDED,
    Finding,
    arms_of,
    choose_claims,
    comparable,
    conclusions,
    faster,
    judge,
    no_gain,
    superior,
    verdict,
    with_figures,
)
from cdistill.workflows.reproduce.experiments import ARMS, EXPERIMENTS, NFE, DataSet, Trial, choose_data, trials
from cdistill.workflows.reproduce.figures import draw_trajectories, panel
from cdistill.workflows.reproduce.jobs import Job, Request, run_jobs
from cdistill.workflows.reproduce.outcomes import (
    Comparison,
    Outcome,
    Outcomes,
    Ratio,
    compare,
    decades,
    geometric,
    predict,
    read_outcome,
)
from cdistill.workflows.reproduce.page import markdown_table, write_page
from tests.runner import finish_here

ALL = [data for kind in EXPERIMENTS.values() for data in kind.values()]
STEPS = range(0, 81, 10)
DATA = DataSet(
    "toy",
    "mixture",
    {"training.ema_rate": "0.0"},
    "fid",
    ("ctm", "analytic", "analytic-forward", "bcm", "cm", "cm-analytic"),
    10,
)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(outcomes).failed == 0


@pytest.mark.parametrize("data", ALL, ids=lambda data: data.name)
def test_arms_differ_in_what_they_are_named_after_and_in_nothing_else(data):
    base = Trial(data, data.arms[0], 1).load()
    assert isinstance(base, DistillRecipe)
    assert base.training.iterations == 8 * base.evaluation.every or data.threads == 0
    for arm in data.arms:
        found = Trial(data, arm, 1).load()
        assert found.preconditioning.name == ARMS[arm].preconditioning in PRECONDITIONINGS.names()
        free = ["preconditioning.name"]
        free += ["objective"] if arm.startswith("cm") else []
        free += ["gan"] if ARMS[arm].gan else []
        assert differences(base, found, free) == []
        if arm.startswith("cm"):
            assert found.objective.model_dump() == {
                **SolverSection().model_dump(), "name": "cm", "dsm": False, "target_rate": 0.0,
                "points": base.objective.points, "distance": base.objective.distance,
            }  # fmt: skip
    assert data.metric in METRICS.names()


@pytest.mark.parametrize("data", ALL, ids=lambda data: data.name)
def test_seeds_share_neither_batches_nor_images(data):
    first, second = (Trial(data, data.arms[0], seed).load() for seed in (0, 1))
    assert (first.seed, second.seed) == (0, 1)
    assert first.evaluation.first_seed + first.evaluation.samples == second.evaluation.first_seed
    assert differences(first, second, ["seed", "evaluation.first_seed"]) == []


def test_trials_have_their_own_names_and_come_seed_by_seed():
    found = trials(choose_data("embedded", None), 3)
    assert len({trial.name for trial in found}) == len(found)
    assert [trial.seed for trial in found] == sorted(trial.seed for trial in found)
    assert trials(choose_data("embedded", "patches, digits"), 1)[0].data.name == "patches"


@pytest.mark.parametrize(("kind", "names"), [("quik", None), ("embedded", "digit"), ("quick", "digits,")])
def test_an_unknown_experiment_is_told(kind, names):
    with pytest.raises(RecipeError, match="got"):
        choose_data(kind, names)


def test_claims_are_named_by_letter_or_name():
    assert choose_claims([]) == list("abcdef")
    assert choose_claims(["gan", "a", "e"]) == ["a", "e"]
    with pytest.raises(RecipeError, match="acceleration"):
        choose_claims(["aceleration"])


def test_only_what_can_be_judged_is_trained():
    assert arms_of(["c"], ["ctm", "bcm", "cm"]) == {"ctm", "bcm"}
    assert arms_of(["c", "e"], ["ctm", "analytic"]) == arms_of(["f"], ["ctm", "bcm"]) == set()
    assert arms_of(["d"], ["ctm", "analytic", "analytic-forward"]) == {"ctm", "analytic", "analytic-forward"}
    request = Request(["c"], "embedded", choose_data("embedded", None), 1, 1, Path())
    assert {trial.data.name for trial in request.trials if trial.arm == "ctm"} == {
        trial.data.name for trial in request.trials if trial.arm == "bcm"
    }


def make_outcomes(curves, data=DATA, teacher=1.0) -> Outcomes:
    """Outcomes from (arm, seed, NFE, metric) -> values at STEPS."""
    found = {}
    for (arm, seed, nfe, metric), values in curves.items():
        old = found.get((arm, seed), Outcome(Trial(data, arm, seed), {}, {"fid": teacher}))
        points = list(zip(map(float, STEPS), values, strict=True))
        found[arm, seed] = replace(old, curves={**old.curves, (nfe, metric): points})
    return Outcomes(data, found)


def falling(start=100.0, half=10.0, noise=0.0, seed=0) -> list[float]:
    draw = np.random.default_rng(seed)
    return [start * 0.5 ** (step / half) * math.exp(noise * draw.normal()) for step in STEPS]


def test_a_ratio_is_the_geometric_mean_with_students_interval():
    found = geometric([1.0, 4.0, 16.0])
    width = 4.302653 * math.log(4) / math.sqrt(3)
    assert found.value == pytest.approx(4)
    assert found.seeds == 3
    assert math.log(found.high) == pytest.approx(math.log(4) + width, rel=1e-6)
    assert found.low * found.high == pytest.approx(16)


def test_intervals_hold_the_truth_as_often_as_they_say():
    draw = np.random.default_rng(0)
    held = [
        one.low < 2 < one.high for one in (geometric(np.exp(row)) for row in draw.normal(math.log(2), 1, (2000, 3)))
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_speed_is_the_ratio_of_the_iterations_to_the_baselines_last_value():
    found = make_outcomes(
        {("ctm", seed, 2, "fid"): falling() for seed in range(3)}
        | {("analytic", seed, 2, "fid"): falling(half=4.0 + seed) for seed in range(3)}
    )
    ratio = found.speed("analytic", "ctm", 2, "fid")
    assert ratio.value == pytest.approx((10 / 4 * 10 / 5 * 10 / 6) ** (1 / 3))  # at CTM's value of step 70
    assert ratio.seeds == 3
    assert ratio.bound == ""


def test_an_arm_that_never_arrives_is_compared_where_it_ends():
    found = make_outcomes({("ctm", 0, 2, "fid"): falling(), ("analytic", 0, 2, "fid"): falling(half=20.0)})
    assert str(found.speed("analytic", "ctm", 2, "fid")) == "0.5"


def test_an_arm_that_is_there_before_the_training_is_at_least_as_fast():
    found = make_outcomes({("ctm", 0, 2, "fid"): falling(), ("analytic", 0, 2, "fid"): [1e-3] * 9})
    assert str(found.speed("analytic", "ctm", 2, "fid")) == ">= 7"


def test_one_bad_evaluation_moves_the_final_value_little():
    worse = [*falling()[:-1], 2 * falling()[-1]]
    curves = {("ctm", 0, 2, "fid"): worse, ("analytic", 0, 2, "fid"): falling(half=5.0)}
    assert make_outcomes(curves).speed("analytic", "ctm", 2, "fid").value == pytest.approx(2.0)


def test_the_delay_of_the_average_is_taken_off():
    """Of two arms whose weights move steadily, one twice as fast: the averages show less, unless they are corrected."""
    rate, curves = 0.95, {}
    for arm, pace in (("ctm", 1.0), ("analytic", 2.0)):
        average, values = 0.0, {0: 0.0}
        for step in range(1, 81):
            average = rate * average + (1 - rate) * pace * step
            values[step] = average
        curves[arm, 0, 2, "fid"] = [math.exp(-values[step] / 10) for step in STEPS]
    data = replace(DATA, changes={"training.ema_rate": str(rate)})
    found = make_outcomes(curves, data).speed("analytic", "ctm", 2, "fid")
    assert found.value == pytest.approx(2.0, rel=0.06)
    assert make_outcomes(curves).speed("analytic", "ctm", 2, "fid").value < 1.7


def test_arms_are_compared_within_a_seed_and_only_where_both_were_run():
    curves = {("ctm", seed, 2, "fid"): falling(start=10.0 ** (seed + 1)) for seed in range(3)}
    curves |= {("analytic", seed, 2, "fid"): falling(start=0.5 * 10.0 ** (seed + 1)) for seed in (1, 2)}
    found = make_outcomes(curves)
    for ratio in (found.late("analytic", "ctm", 2, "fid"), found.before("analytic", "ctm", 2, "fid")):
        assert ratio.value == pytest.approx(0.5)
        assert ratio.seeds == 2
        assert ratio.high - ratio.low < 1e-6  # the seeds differ, the pairs do not
    assert found.late("bcm", "ctm", 2, "fid") is None
    assert found.final("ctm", 2, "fid").value == pytest.approx(100 * 0.5**8)


def test_a_late_value_is_of_the_second_half():
    values = [9.0, 9.0, 9.0, 9.0, 9.0, 2.0, 2.0, 8.0, 8.0]
    found = make_outcomes({("ctm", 0, 1, "fid"): [1.0] * 9, ("analytic", 0, 1, "fid"): values})
    assert found.late("analytic", "ctm", 1, "fid").value == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("rule", "low", "high", "expected"),
    [
        (superior, 0.5, 0.9, REPRODUCED),
        (superior, 0.9, 1.1, UNDECIDED),
        (superior, 1.02, 1.1, REFUTED),
        (superior, 0.98, 0.999, UNDECIDED),  # surely smaller, perhaps by nothing
        (superior, 0.0, math.inf, UNDECIDED),
        (comparable, 0.95, 1.05, REPRODUCED),
        (comparable, 0.95, 1.2, UNDECIDED),
        (comparable, 0.8, 0.9, REFUTED),
        (comparable, 0.8, 0.95, UNDECIDED),  # surely smaller, perhaps by little
        (comparable, 1.2, 1.5, REFUTED),
        (no_gain, 0.95, 3.0, REPRODUCED),
        (no_gain, 0.8, 1.2, UNDECIDED),
        (no_gain, 0.8, 0.95, UNDECIDED),
        (no_gain, 0.7, 0.8, REFUTED),
        (faster, 1.5, 2.5, REPRODUCED),
        (faster, 2.5, 4.0, REPRODUCED),
        (faster, 1.01, 1.95, REFUTED),  # faster, not twice as fast
        (faster, 1.1, 1.7, REFUTED),
        (faster, 0.9, 2.1, UNDECIDED),
        (faster, 0.99, 2.01, UNDECIDED),
        (faster, 0.5, 3.0, UNDECIDED),
    ],
)
def test_verdicts_follow_from_the_interval(rule, low, high, expected):
    assert rule(low, high) == expected


def ratio_of(low, high, seeds=3, **more) -> Ratio:
    """A ratio whose 95 % interval is this."""
    width = math.log(high / low) / 2
    return Ratio(math.sqrt(low * high), width / quantile(0.95, seeds - 1), seeds, **more)


def test_one_of_several_figures_contradicts_only_with_an_interval_for_all():
    ratio = ratio_of(1.05, 1.2)
    assert (ratio.low, ratio.high) == pytest.approx((1.05, 1.2))
    assert ratio.interval(2) == pytest.approx(
        tuple(math.sqrt(1.26) * math.exp(s * ratio.spread * quantile(0.975, 2)) for s in (-1, 1))
    )
    assert [verdict(superior, ratio, count) for count in (1, 5)] == [REFUTED, UNDECIDED]
    better = ratio_of(0.8, 0.95)
    assert [verdict(superior, better, count) for count in (1, 5)] == [REPRODUCED] * 2


def test_what_diverged_with_a_seed_is_never_called_reproduced():
    assert verdict(faster, ratio_of(1.7, 2.9, lost=True), 1) == UNDECIDED
    assert verdict(faster, ratio_of(1.7, 2.9, bound=">="), 1) == REPRODUCED
    assert verdict(faster, ratio_of(0.5, 0.9, lost=True), 1) == REFUTED
    assert verdict(faster, None, 1) == NOT_RUN


def test_with_one_seed_nothing_follows():
    for rule in (superior, comparable, no_gain, faster):
        assert verdict(rule, geometric([1.0]), 1) == UNDECIDED


def findings_of(**verdicts):
    """Findings of claim (a): data set -> verdicts of its figures."""
    return [Finding("a", data, "x", None, word) for data, found in verdicts.items() for word in found]


@pytest.mark.parametrize(
    ("found", "conclusion"),
    [
        ({"x": [REPRODUCED, REPRODUCED], "y": [REPRODUCED]}, REPRODUCED),
        ({"x": [REPRODUCED, UNDECIDED]}, UNDECIDED),
        ({"x": [REPRODUCED, REFUTED], "y": [UNDECIDED]}, REFUTED),
        ({"x": [REPRODUCED, NOT_RUN], "y": [NOT_RUN]}, NOT_RUN),
        ({"x": [REPRODUCED], "y": [NOT_RUN]}, REPRODUCED),
        ({"x": [REPRODUCED], "y": [UNDECIDED]}, "reproduced on x (1 of 2)"),
        ({"x": [REPRODUCED], "y": [REFUTED], "z": [REFUTED]}, "reproduced on x (1 of 3), not reproduced on y, z"),
    ],
)
def test_conclusions_tell_on_which_data(found, conclusion):
    assert conclusions(findings_of(**found)) == {"a": conclusion}


def toy(analytic_half, alignment, bcm=1.0):
    """Three seeds of everything; Analytic's half life, its error over CTM's, BCM's value over CTM's."""
    curves = {}
    for seed in range(3):
        for nfe in NFE:
            common = falling(noise=0.003, seed=seed)
            for arm in ("ctm", "cm", "cm-analytic"):
                curves[arm, seed, nfe, "fid"] = common
            curves["bcm", seed, nfe, "fid"] = [bcm * value for value in common]
            curves["ctm", seed, nfe, "teacher-mse"] = common
            curves["analytic", seed, nfe, "teacher-mse"] = [alignment * value for value in common]
            better = falling(start=80.0, half=analytic_half, noise=0.003, seed=seed)
            curves["analytic", seed, nfe, "fid"] = common if nfe == 1 else better
    return make_outcomes(curves)


def test_a_world_as_the_paper_has_it_is_recognised():
    findings = judge([toy(analytic_half=4.5, alignment=0.9)], list("abcd"))
    assert conclusions(findings) == dict.fromkeys("abcd", REPRODUCED)


def test_a_world_without_a_difference_is_recognised():
    findings = judge([toy(analytic_half=10.0, alignment=1.05, bcm=0.8)], list("abcd"))
    assert conclusions(findings) == {"a": REFUTED, "b": REPRODUCED, "c": REFUTED, "d": REFUTED}
    speed = next(one for one in findings if one.quantity.startswith("iterations"))
    assert speed.ratio.value == pytest.approx(1.05, abs=0.05)


def test_data_without_the_arms_of_a_claim_are_left_out():
    found = make_outcomes({("ctm", 0, 1, "fid"): falling()}, replace(DATA, arms=("ctm", "analytic")))
    assert {finding.claim for finding in judge([found], list(CLAIMS))} == {"a", "d"}
    assert {finding.verdict for finding in judge([found], list(CLAIMS))} == {NOT_RUN}


def test_a_claim_with_a_figure_that_is_missing_is_not_called_reproduced():
    findings = [
        Finding("b", "toy", "CTM", ratio_of(0.99, 1.01), REPRODUCED),
        Finding("b", "toy", "CM", None, NOT_RUN),
        Finding("b", "other", "CTM", None, NOT_RUN),
        Finding("c", "toy", "BCM", None, NOT_RUN),
    ]
    assert with_figures(findings, ["c"], ["toy"]) == [*findings[:2], findings[3]]
    assert conclusions(with_figures(findings, [], [])) == {"b": NOT_RUN}


def laboratory(forward=0.5):
    def form(value):
        number = {"value": value, "standard_error": 0.0}
        return {"ends": {str(nfe): number for nfe in NFE}, "mean_gap": number, "mean_jump_error": number}

    return {"forms": {"ctm": form(1.0), "analytic": form(1.1), "analytic-forward": form(forward)}}


def test_the_study_says_whether_the_score_was_right():
    curves = {}
    for seed in range(3):
        for nfe in NFE:
            for metric in ("fid", "teacher-mse"):
                curves["ctm", seed, nfe, metric] = [1.0] * 9
                curves["analytic", seed, nfe, metric] = [0.9 + 0.001 * seed] * 9  # better, against the score
                curves["analytic-forward", seed, nfe, metric] = [0.7 + 0.001 * seed] * 9
    comparisons = compare(make_outcomes(curves), laboratory())
    assert len(comparisons) == 2 * 2 * len(NFE)
    analytic, forward = comparisons[0], comparisons[-1]
    assert analytic.scores["untrained MSE"] == pytest.approx(1.21)
    assert analytic.agrees("untrained MSE") is False
    assert forward.scores["jump error"] == pytest.approx(0.25)
    assert forward.agrees("jump error") is True
    found = predict(comparisons)
    assert {(one["agree"], one["decided"]) for one in found} == {(len(NFE) - 1, 2 * (len(NFE) - 1))}
    assert all(one["correlation"] == pytest.approx(1.0) for one in found)


def test_what_cannot_be_told_does_not_count():
    one = Comparison("toy", "analytic", 2, "fid", {"gap": 0.5}, Ratio(1.0, 0.9, 1.1, 3))
    assert one.agrees("gap") is None


def test_decades_are_those_between_two_levels_of_l():
    t = torch.logspace(2, -3, 501, dtype=torch.float64)
    table = Coefficients(t, t**2 / (t**2 + 0.25), torch.zeros_like(t))
    assert decades(table) == pytest.approx(math.log10(9), abs=1e-3)
    assert decades(Coefficients(t, torch.full_like(t, 0.5), torch.zeros_like(t))) == pytest.approx(5)


def test_what_diverged_is_left_out_and_told(tmp_path):
    changes = {"training.iterations": "20", "evaluation.nfe": "[1, 2]"}
    data = DataSet("toy", "mixture", changes, "wasserstein", ("ctm", "analytic"), 10)
    for arm, last in (("ctm", 1.0), ("analytic", None)):
        run = RunFolder(tmp_path / arm)
        run.write_status(state="finished")
        for step, value in ((0, 4.0), (10, 2.0), (20, last)):
            values = {1: 1.0, 2: value, 3: 1.0, 5: 1.0, 8: 1.0, 10: 1.0}
            rows = [{"sampler": "student", "nfe": nfe, "values": {"wasserstein": one}} for nfe, one in values.items()]
            run.log({"step": step, "event": "evaluation", "rows": rows})
    RunFolder(tmp_path / "gone").write_status(state="failed", exit_code=5)
    found = {(arm, 0): read_outcome(Trial(data, arm, 0), tmp_path / arm) for arm in data.arms}
    found["analytic", 1] = read_outcome(Trial(data, "analytic", 1), tmp_path / "gone")
    assert [one.lost for one in found.values()] == [[], ["2 NFE"], ["the training"]]
    both = Outcomes(data, found)
    one_step = both.late("analytic", "ctm", 1, "wasserstein")
    assert (one_step.value, one_step.seeds, one_step.lost) == (1.0, 1, True)
    assert both.late("analytic", "ctm", 2, "wasserstein") is None
    assert both.speed("analytic", "ctm", 2, "wasserstein") is None
    text = write_page("title", [both], [], {}, [], [])
    assert "Diverged, and left out: toy-analytic-0 (2 NFE); toy-analytic-1 (the training)." in text


def test_a_score_that_is_not_finite_is_no_score():
    broken = laboratory()
    broken["forms"]["analytic"]["mean_gap"]["value"] = None
    curves = {(arm, 0, 2, "fid"): [1.0] * 9 for arm in ("ctm", "analytic", "analytic-forward")}
    assert {one.preconditioning for one in compare(make_outcomes(curves), broken)} == {"analytic-forward"}


def test_the_page_shows_the_figures_and_what_is_missing():
    found = toy(analytic_half=4.5, alignment=0.9)
    findings = judge([found], list("abcd"))
    comparisons = compare(found, laboratory())
    text = write_page("title", [found], findings, {"toy": 1.5}, comparisons, ["figure-3"])
    assert "| a | Analytic starts better" in text
    assert "**reproduced**" in text
    assert "![Two steps: training curves (Fig. 3)](figures/figure-3.png)" in text
    assert "| toy | 1.50 | analytic | fid |" in text
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_panels_are_drawn_with_arms_that_were_not_run(tmp_path):
    found = toy(analytic_half=4.5, alignment=0.9)
    one, none = panel(found, ("ctm", "analytic"), 2), panel(found, ("gan-ctm",), 2)
    assert [line.label for line in one.lines] == ["CTM", "Analytic"]
    middle, (low, high) = one.lines[0].points[3][1], one.lines[0].ends[3]
    assert low < middle < high
    assert none.lines == []
    save_figure(draw_panels("title", [[one, none]]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def job(name, *arguments, done=lambda: 0.0):
    return Job(name, arguments, 1.0, 1, done)


def test_jobs_run_once_and_leave_their_words(tmp_path):
    finished = tmp_path / "logs" / "one.log"
    jobs = [
        job("one", "ls", "teachers", done=lambda: float(finished.exists() and "digits" in finished.read_text())),
        job("two", "nonsense", done=lambda: 1.0),
    ]
    run_jobs(jobs, 2, tmp_path / "logs", "jobs")
    assert "mixture-1d" in (tmp_path / "logs" / "one.log").read_text()
    assert not (tmp_path / "logs" / "two.log").exists()
    before = finished.stat().st_mtime_ns
    run_jobs(jobs, 2, tmp_path / "logs", "jobs")
    assert finished.stat().st_mtime_ns == before


def test_a_job_that_fails_says_why_with_its_code(tmp_path):
    jobs = [job("bad", "show", "no-such.toml"), job("good", "ls")]
    with pytest.raises(CdistillError, match=r"bad: ended with code 3: .*no-such.toml") as told:
        run_jobs(jobs, 1, tmp_path, "jobs")
    assert told.value.exit_code == 3
    assert "digits" in (tmp_path / "good.log").read_text()  # the others are done


def test_jobs_are_told_to_save_when_a_signal_comes(tmp_path, monkeypatch):
    arguments = [
        "distill", "--recipe", "mixture", "--out", str(tmp_path / "run"), "--set", "training.iterations=100000",
        "--set", "preconditioning.name=ctm", "--set", "evaluation.samples=16",
    ]  # fmt: skip
    training = RunFolder(tmp_path / "run")
    begun = time.monotonic()

    def check(where):
        if len(training.metrics()) > 2 or time.monotonic() - begun > 100:
            raise StoppedError("reproduce: stopped", 75)

    monkeypatch.setattr(stopping, "check", check)
    with pytest.raises(StoppedError):
        run_jobs([job("long", *arguments)], 1, tmp_path / "logs", "jobs")
    assert training.status()["state"] == "stopped"
    assert training.status()["exit_code"] == 75
    assert training.latest_checkpoint().is_dir()


@pytest.fixture
def small(monkeypatch):
    """Three arms of the 1-D mixture, eight steps each."""
    changes = {
        "teacher": "mixture-1d", "training.iterations": "8", "training.batch_size": "16", "evaluation.every": "4",
        "checkpoint.every": "4",
    }  # fmt: skip
    data = DataSet("mixture-1d", "mixture", changes, "wasserstein", ("ctm", "analytic", "analytic-forward"), 32)
    monkeypatch.setitem(EXPERIMENTS, "embedded", {"mixture-1d": data})  # `choose_data` holds the dict itself
    return data


@pytest.fixture
def _mostly_here(monkeypatch):
    """Runs the first training in its process, and the other jobs in this one, which has imported everything."""

    def run_most(jobs, at_once, logs, title):
        others = [job for job in jobs if job.done() < 1]
        if others and title == "trainings":
            run_jobs(others[:1], at_once, logs, title)
            del others[0]
        for one in others:
            one.prepare()
            found = finish_here(one.arguments, Path.cwd())
            assert found.returncode == 0, found.stderr
        run_jobs(jobs, at_once, logs, title)  # would start what is not done

    monkeypatch.setattr("cdistill.workflows.reproduce.run.run_jobs", run_most)
    monkeypatch.setattr("cdistill.workflows.estimate.draw_coefficients", lambda path, estimate: None)


@pytest.fixture(scope="module")
def drawn():
    """Figure 7 as it was drawn with some arguments, and what came with it."""
    return {}


@pytest.fixture(autouse=True)
def _small_mixture(monkeypatch, drawn):
    """Figure 7 from fewer samples and trajectories, and once for each seed."""

    def draw(names, nfe, count, seed, samples, picture):
        asked = (*names, nfe, count, seed, samples)
        if asked not in drawn:
            drawn[asked] = draw_trajectories(names, nfe, count // 8, seed, samples // 4, picture), picture.read_bytes()
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(drawn[asked][1])
        return drawn[asked][0]

    monkeypatch.setattr("cdistill.workflows.reproduce.run.draw_trajectories", draw)


@pytest.mark.slow
@pytest.mark.usefixtures("_mostly_here")
def test_the_command_trains_judges_and_does_not_train_twice(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", "d", "mixture", "--seeds", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["claims"]) >= {"d", "f"}
    assert record["claims"]["f"]["conclusion"] == REPRODUCED
    folder = tmp_path / "reproduction"
    assert {path.name for path in (folder / "runs").iterdir()} == set(record["trials"])
    assert len(record["trials"]) == 6
    outcome = read_outcome(Trial(small, "analytic", 1), folder / "runs" / "mixture-1d-analytic-1")
    assert [step for step, _ in outcome.curves[2, "teacher-mse"]] == [0, 4, 8]
    three = [one for one in record["findings"] if one["quantity"] == "3 NFE: teacher-mse"]
    assert three[0]["ratio"]["seeds"] == 2
    assert three[0]["ratio"]["value"] < 1
    assert {path.stem for path in (folder / "figures").glob("figure-?.png")} >= {"figure-3", "figure-4", "figure-7"}
    runs = [folder / "runs" / f"mixture-1d-analytic-{seed}" / "coefficients.safetensors" for seed in (0, 1)]
    assert runs[0].read_bytes() == runs[1].read_bytes()

    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    assert run(["reproduce", "d", "--seeds", "1", "--json"]) == 0  # asks for less, concludes about all that is there
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")} == before
    assert json.loads(capsys.readouterr().out) == record

    assert run(["reproduce", "d", "--seeds", "2", "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["trials"]
    assert len(listed) == 6
    assert listed[0]["results"].keys() == {str(nfe) for nfe in NFE}
    assert listed[0]["command"][:2] == ["cdistill", "distill"]
    assert listed[0]["sustained"] > 0
    assert listed[0]["hours"] is None

    with held(folder / ".lock", "taken"):
        assert run(["reproduce", "d"]) == 6
    changed = {**small.changes, "training.batch_size": "24"}
    monkeypatch.setitem(EXPERIMENTS, "embedded", {"mixture-1d": replace(small, changes=changed)})
    assert run(["reproduce", "d", "--seeds", "2"]) == 2
    assert "holds another run (training.batch_size" in capsys.readouterr().err


@pytest.mark.slow
def test_without_trainings_the_mixture_alone_is_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", "f", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["claims"]) == ["f"]
    assert record["trials"] == {}
    assert sorted(path.name for path in (tmp_path / "reproduction" / "figures").iterdir())[0] == "figure-7-seed-1.png"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["e", "--data", "patches"], "none of these data sets can judge e"),
        (["--quick", "--experiments", "settings"], "--experiments: --quick is an experiment of its own"),
        (["g"], "claim: got 'g'"),
    ],
)
def test_what_cannot_be_asked_is_told(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_full_size_rows_are_planned_without_their_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["reproduce", "d", "--experiments", "table-2", "--data", "cifar10", "--seeds", "1", "--nproc", "4"]
    assert run([*arguments, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["trials"]] == ["cifar10-ctm-0", "cifar10-analytic-0"]
    assert [one["state"] for one in found["trials"]] == ["not run"] * 2
    assert found["trials"][0]["command"][-2:] == ["--nproc", "4"]
    assert found["trials"][0]["hours"] == pytest.approx(123, rel=0.02)  # 490 A800-hours on four of them at 42 TFLOP/s
    assert not any(tmp_path.iterdir())


def test_every_claim_says_what_it_judges():
    assert list(CLAIMS) == list("abcdef")
    assert len({claim.name for claim in CLAIMS.values()}) == 6
    assert claims.MARGIN > claims.NEGLIGIBLE > 1
    assert all(claim.arms <= set(ARMS) for claim in CLAIMS.values())
