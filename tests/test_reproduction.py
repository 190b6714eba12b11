"""The paper's claims: experiments, figures, verdicts; and the command as a whole, on small budgets."""

import doctest
import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cdistill import stopping
from cdistill.cli import run
from cdistill.errors import CdistillError, RecipeError, StoppedError
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.recipe import DistillRecipe, differences
from cdistill.registry import METRICS, PRECONDITIONINGS
from cdistill.reproduction import claims, experiments, outcomes
from cdistill.reproduction.claims import (
    CLAIMS,
    NOT_RUN,
    REFUTED,
    REPRODUCED,
    UNDECIDED,
    Finding,
    arms_of,
    choose_claims,
    comparable,
    faster,
    judge,
    no_gain,
    overall,
    superior,
    verdicts,
)
from cdistill.reproduction.experiments import ARMS, EXPERIMENTS, NFE, DataSet, Trial, choose_data, trials
from cdistill.reproduction.figures import Mark, panel, plot_panels, plot_study
from cdistill.reproduction.outcomes import Outcome, Outcomes, Ratio, geometric, read_outcome
from cdistill.reproduction.page import markdown_table, write_page
from cdistill.reproduction.running import Job, log_of, run_jobs
from cdistill.reproduction.study import Comparison, compare, decades, predict
from cdistill.runs import RunFolder

ALL = [data for kind in EXPERIMENTS.values() for data in kind.values()]
STEPS = range(0, 81, 10)
DATA = DataSet("toy", "mixture", {}, "fid", ("ctm", "analytic", "analytic-forward", "bcm", "cm", "cm-analytic"), 10)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(outcomes).failed == 0


@pytest.mark.parametrize("data", ALL, ids=lambda data: data.name)
def test_arms_differ_in_what_they_are_named_after_and_in_nothing_else(data):
    base = Trial(data, data.arms[0], 1).load()
    assert isinstance(base, DistillRecipe)
    assert base.training.iterations >= 100
    for arm in data.arms:
        found = Trial(data, arm, 1).load()
        assert found.preconditioning.name == ARMS[arm].form in PRECONDITIONINGS.names()
        free = ["preconditioning.name"]
        free += ["training.method", "training.dsm", "training.target_rate"] if arm.startswith("cm") else []
        free += ["gan"] if ARMS[arm].gan else []
        assert differences(base, found, free) == []
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
    assert arms_of(["c"]) == {"ctm", "bcm"}
    assert arms_of(["f"]) == set()
    assert "analytic-forward" in arms_of(["d"])


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
    assert ratio.value == pytest.approx((10 / 4 * 10 / 5 * 10 / 6) ** (1 / 3))
    assert ratio.seeds == 3
    assert not ratio.limit


def test_an_arm_that_never_arrives_is_at_most_as_fast():
    found = make_outcomes({("ctm", 0, 2, "fid"): falling(), ("analytic", 0, 2, "fid"): falling(half=20.0)})
    ratio = found.speed("analytic", "ctm", 2, "fid")
    assert ratio.limit
    assert ratio.value == pytest.approx(1.0)
    assert str(ratio).startswith("<= ")


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
    ("rule", "low", "high", "verdict"),
    [
        (superior, 0.5, 0.9, REPRODUCED),
        (superior, 0.9, 1.1, UNDECIDED),
        (superior, 1.02, 1.1, REFUTED),
        (superior, 0.995, 0.999, UNDECIDED),  # surely smaller, and nothing
        (superior, 0.0, math.inf, UNDECIDED),
        (comparable, 0.95, 1.05, REPRODUCED),
        (comparable, 0.95, 1.2, UNDECIDED),
        (comparable, 0.8, 0.9, REFUTED),
        (comparable, 1.2, 1.5, REFUTED),
        (comparable, 1.01, 1.05, REPRODUCED),
        (no_gain, 0.95, 3.0, REPRODUCED),
        (no_gain, 0.8, 1.2, UNDECIDED),
        (no_gain, 0.7, 0.8, REFUTED),
        (faster, 1.5, 2.5, REPRODUCED),
        (faster, 2.5, 4.0, REPRODUCED),
        (faster, 0.5, 3.0, UNDECIDED),
        (faster, 1.2, 1.5, REFUTED),  # faster, not twice as fast
        (faster, 0.9, 1.1, REFUTED),
    ],
)
def test_verdicts_follow_from_the_interval(rule, low, high, verdict):
    assert rule(Ratio(math.sqrt(low * min(high, 1e9)), low, high, 3)) == verdict


def test_a_claim_needs_all_its_figures():
    def findings(*found):
        return [Finding("a", "toy", "x", None, verdict) for verdict in found]

    assert overall(findings(REPRODUCED, REPRODUCED)) == REPRODUCED
    assert overall(findings(REPRODUCED, UNDECIDED)) == UNDECIDED
    assert overall(findings(REPRODUCED, UNDECIDED, REFUTED)) == REFUTED
    assert overall(findings(REPRODUCED, NOT_RUN)) == UNDECIDED
    assert overall(findings(NOT_RUN)) == overall([]) == NOT_RUN


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
    assert verdicts(findings) == dict.fromkeys("abcd", REPRODUCED)


def test_a_world_without_a_difference_is_recognised():
    findings = judge([toy(analytic_half=10.0, alignment=1.05, bcm=0.8)], list("abcd"))
    assert verdicts(findings) == {"a": REFUTED, "b": REPRODUCED, "c": REFUTED, "d": REFUTED}
    speed = next(one for one in findings if one.quantity.startswith("iterations"))
    assert speed.ratio.value == pytest.approx(1.05, abs=0.05)


def test_data_without_the_arms_of_a_claim_are_left_out():
    found = make_outcomes({("ctm", 0, 1, "fid"): falling()}, replace(DATA, arms=("ctm", "analytic")))
    assert {finding.claim for finding in judge([found], list(CLAIMS))} == {"a", "d"}
    assert {finding.verdict for finding in judge([found], list(CLAIMS))} == {NOT_RUN}


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
    assert {(one.agree, one.decided) for one in found} == {(len(NFE) - 1, 2 * (len(NFE) - 1))}
    assert all(one.correlation == pytest.approx(1.0) for one in found)


def test_what_cannot_be_told_does_not_count():
    one = Comparison("toy", "analytic", 2, "fid", {"gap": 0.5}, Ratio(1.0, 0.9, 1.1, 3))
    assert one.agrees("gap") is None


def test_decades_are_those_between_two_levels_of_l():
    t = torch.logspace(2, -3, 501, dtype=torch.float64)
    table = Coefficients(t, t**2 / (t**2 + 0.25), torch.zeros_like(t))
    assert decades(table) == pytest.approx(math.log10(9), abs=1e-3)
    assert decades(Coefficients(t, torch.full_like(t, 0.5), torch.zeros_like(t))) == pytest.approx(5)


def test_a_curve_that_ends_in_nothing_counts_nowhere_and_is_told(tmp_path):
    data = DataSet("toy", "mixture", {"training.iterations": "20"}, "wasserstein", ("ctm", "analytic"), 10)
    for arm, last in (("ctm", 1.0), ("analytic", None)):
        run = RunFolder(tmp_path / arm)
        run.write_status(state="finished")
        for step, value in ((0, 4.0), (10, 2.0), (20, last)):
            rows = [
                {"sampler": "student", "nfe": nfe, "values": {"wasserstein": value if nfe == 2 else 1.0}}
                for nfe in (1, 2)
            ]
            run.log({"step": step, "event": "evaluation", "rows": rows})
    found = {(arm, 0): read_outcome(Trial(data, arm, 0), tmp_path / arm) for arm in data.arms}
    assert found["ctm", 0].lost == []
    assert found["analytic", 0].lost == [(2, "wasserstein")]
    outcomes_ = Outcomes(data, found)
    assert outcomes_.late("analytic", "ctm", 1, "wasserstein").value == 1
    assert (
        outcomes_.late("analytic", "ctm", 2, "wasserstein")
        is outcomes_.speed("analytic", "ctm", 2, "wasserstein")
        is None
    )
    text = write_page("title", [outcomes_], [], {}, [], [], [])
    assert "Diverged, and left out: toy-analytic-0 at 2 NFE." in text


def test_the_page_shows_the_figures_and_what_is_missing():
    found = toy(analytic_half=4.5, alignment=0.9)
    findings = judge([found], list("abcd"))
    comparisons = compare(found, laboratory())
    text = write_page("title", [found], findings, {"toy": 1.5}, comparisons, predict(comparisons), ["figure-3"])
    assert "| a | Analytic starts better" in text
    assert "**reproduced**" in text
    assert "![Two steps: training curves (Fig. 3)](figures/figure-3.png)" in text
    assert "| toy | 1.50 | analytic | fid |" in text
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_panels_are_drawn_with_arms_that_were_not_run(tmp_path):
    found = toy(analytic_half=4.5, alignment=0.9)
    one, none = panel(found, ("ctm", "analytic"), 2), panel(found, ("gan-ctm",), 2)
    assert list(one.arms) == ["ctm", "analytic"]
    assert len(one.arms["ctm"]) == 3
    assert none.arms == {}
    plot_panels(tmp_path / "a.png", "title", [[one, none]])
    plot_study(tmp_path / "b.png", {"x": [Mark("toy", "analytic", 0.9, Ratio(0.8, 0.7, 0.9, 3))]})
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.png").stat().st_size > 5000


def job(name, *arguments, done=lambda: 0.0):
    return Job(name, arguments, 1.0, 1, done)


def test_jobs_run_once_and_leave_their_words(tmp_path):
    finished = tmp_path / "logs" / "one.log"
    jobs = [
        job("one", "ls", "teachers", done=lambda: float(finished.exists() and "digits" in finished.read_text())),
        job("two", "nonsense", done=lambda: 1.0),
    ]
    run_jobs(jobs, 2, tmp_path / "logs", "jobs")
    assert "mixture-1d" in log_of(tmp_path / "logs", "one").read_text()
    assert not log_of(tmp_path / "logs", "two").exists()
    before = finished.stat().st_mtime_ns
    run_jobs(jobs, 2, tmp_path / "logs", "jobs")
    assert finished.stat().st_mtime_ns == before


def test_a_job_that_fails_says_why_with_its_code(tmp_path):
    with pytest.raises(CdistillError, match=r"bad: ended with code 3: .*no-such.toml") as told:
        run_jobs([job("bad", "show", "no-such.toml")], 1, tmp_path, "jobs")
    assert told.value.exit_code == 3


def test_jobs_are_told_to_save_when_a_signal_comes(tmp_path, monkeypatch):
    """The second look finds the signal: a training has begun then, and it must be stopped and have saved."""
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
    """Two arms of the 1-D mixture, eight steps each."""
    changes = {
        "teacher": "mixture-1d", "training.iterations": "8", "training.batch_size": "16", "evaluation.every": "4",
        "checkpoint.every": "4", "estimation.samples": "16", "estimation.timesteps": "24",
    }  # fmt: skip
    data = DataSet("mixture-1d", "mixture", changes, "wasserstein", ("ctm", "analytic", "analytic-forward"), 32)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"embedded": {"mixture-1d": data}})
    return data


def test_the_command_trains_judges_and_does_not_train_twice(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", "d", "mixture", "--seeds", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["verdicts"]) == {"d", "f"}
    assert record["verdicts"]["f"] == REPRODUCED
    folder = tmp_path / "reproduction"
    assert {path.name for path in (folder / "runs").iterdir()} == set(record["trials"])
    assert len(record["trials"]) == 6
    assert {one["state"] for one in record["trials"].values()} == {"finished"}
    outcome = read_outcome(Trial(small, "analytic", 1), folder / "runs" / "mixture-1d-analytic-1")
    assert [step for step, _ in outcome.curves[2, "teacher-mse"]] == [0, 4, 8]
    three = [one for one in record["findings"] if one["quantity"] == "3 NFE: teacher-mse"]
    assert three[0]["ratio"]["seeds"] == 2
    assert three[0]["ratio"]["value"] < 1
    assert {path.stem for path in (folder / "figures").glob("figure-?.png")} >= {"figure-3", "figure-4", "figure-7"}
    assert "not run" not in (folder / "reproduction.md").read_text()
    same = [
        (folder / "runs" / f"mixture-1d-analytic-{seed}" / "coefficients.safetensors").read_bytes() for seed in (0, 1)
    ]
    assert same[0] == same[1]

    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    assert run(["reproduce", "d", "mixture", "--seeds", "2", "--json"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")} == before
    assert json.loads(capsys.readouterr().out) == record

    assert run(["reproduce", "d", "--seeds", "2", "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["trials"]
    assert len(listed) == 6
    assert listed[0]["results"].keys() == {str(nfe) for nfe in NFE}
    assert listed[0]["command"][:2] == ["cdistill", "distill"]
    assert listed[0]["sustained"] > 0

    changed = {**small.changes, "training.batch_size": "24"}
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"embedded": {"mixture-1d": replace(small, changes=changed)}})
    assert run(["reproduce", "d", "--seeds", "2"]) == 2
    assert "holds another run (training.batch_size" in capsys.readouterr().err


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
    assert all(set(claim.arms) <= set(ARMS) for claim in CLAIMS.values())
