"""The study of what exact targets save: what is trained, how work is counted, what comes out."""

import json
from dataclasses import replace

import pytest

from cdistill.cli.app import run
from cdistill.errors import RecipeError
from cdistill.workflows.reproduce import cheaper
from cdistill.workflows.reproduce.cheaper import FORMS, KINDS, STEPS, STUDIES, read_courses, tables, work_ratio
from cdistill.workflows.reproduce.experiments import ALIGNMENT, ARMS, Trial, choose_data
from cdistill.workflows.reproduce.jobs import Request
from cdistill.workflows.reproduce.outcomes import Outcome

ALL = [(kind, data) for kind, known in STUDIES.items() for data in known.values()]


@pytest.mark.parametrize(("kind", "data"), ALL, ids=lambda value: getattr(value, "name", value))
def test_every_arm_is_a_recipe_with_one_thing_more_than_the_one_before(kind, data):
    recipes = {arm: Trial(data, arm, 1).load() for arm in data.arms}
    for arm, recipe in recipes.items():
        section = recipe.objective
        assert recipe.teacher == data.name
        assert recipe.preconditioning.name == ARMS[arm].preconditioning
        assert section.name == ("ctm" if arm in ("published", "published-rate", "store") else "regression")
        assert section.dsm == (arm in ("published", "published-rate", "store", "regression"))
        assert (getattr(section, "targets", "") == "store") == (arm == "store")
        assert section.pairs == ("ctm" if arm in STEPS[:5] else "mixed" if arm == "cheap-mixed" else "uniform")
        assert recipe.training.iterations % recipe.evaluation.every == 0
    assert recipes["published"].seed == 1
    assert set(data.arms) <= {*STEPS, *FORMS}


def test_work_to_ctms_final_value_counts_the_store_where_it_is_read(tmp_path):
    data = STUDIES["cheaper"]["patches"]
    metric = data.metric
    courses = read_courses(data, Request([], "cheaper", [data], 1, 1, tmp_path))
    assert courses == {}
    slow = [(0, 64.0), (100, 32.0), (200, 16.0), (300, 8 * (1 - 1e-9)), (400, 8.0), (500, 8.0)]
    fast = [(0, 64.0), (10, 8 * (1 - 1e-9)), (20, 2.0)]
    both = {"published": (slow, 30.0, 3.0, 0.0), "cheap": (fast, 6.0, 0.5, 40.0)}
    for arm, (curve, forwards, seconds, store) in both.items():
        curves = {(2, metric): curve, (2, ALIGNMENT): curve}
        work = (forwards, 0.0), (forwards, store), (seconds, store / 8)
        courses[arm, 0] = Outcome(Trial(data, arm, 0), curves, {}), dict(zip(KINDS, work, strict=True))
    found = {kind: work_ratio(courses, "cheap", 2, metric, kind)[0].value for kind in KINDS}
    assert found["forwards"] == pytest.approx(300 * 30 / (10 * 6))
    assert found["forwards + store"] == pytest.approx(300 * 30 / (10 * 6 + 40))
    assert found["seconds + store"] == pytest.approx(300 * 3 / (10 * 0.5 + 5))
    outcome, work = courses["cheap", 0]
    better = replace(outcome, curves={(2, metric): [(0, 1.0), (10, 0.5)]})
    courses["cheap", 0] = better, work  # there before the training: it counts as if it was at the first evaluation
    assert work_ratio(courses, "cheap", 2, metric, "forwards")[0].value == pytest.approx(300 * 30 / (10 * 6))
    worse = replace(better, curves={(2, metric): [(0, 64.0), (10, 60.0)]})
    courses["cheap", 0] = worse, work
    assert work_ratio(courses, "cheap", 2, metric, "forwards") == (None, 0, 1)


def test_a_small_study_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    data = STUDIES["cheaper-quick"]["mixture-broad"]
    small = {
        "training.iterations": "6", "evaluation.every": "2", "checkpoint.every": "2", "training.batch_size": "16",
    }  # fmt: skip
    changes = {
        **data.changes, "trajectories.count": "256", "estimation.samples": "32", "estimation.timesteps": "16",
        "estimation.fit_trajectories": "32", "evaluation.nfe": "[1, 2]",
    }  # fmt: skip
    arms = ("published", "cheap", "cheap-least-squares")
    tiny = replace(data, arms=arms, samples=64, changes=changes, own={k: {**data.own[k], **small} for k in arms})
    monkeypatch.setattr(cheaper, "STUDIES", {"cheaper-quick": {"mixture-broad": tiny}})
    assert run(["reproduce", "cheaper", "--quick", "--seeds", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    found = record["data"]["mixture-broad"]
    assert set(found) == set(arms)
    assert found["cheap"]["forwards_an_image"] == 3
    assert found["published"]["store_forwards"] == 0
    assert found["cheap"]["store_forwards"] == 256 * 34
    assert found["cheap"]["store_seconds"] > 0
    assert set(found["cheap"]["final"]) == {"frechet-vectors", ALIGNMENT}
    folder = tmp_path / "reproduction-cheaper-quick"
    assert {path.name for path in (folder / "figures").iterdir()} == {"forwards.png", "seconds.png"}
    assert "| all together, least squares |" in (folder / "cheaper.md").read_text()
    assert len(tables(record)) == 4
    assert json.loads((folder / "cheaper.json").read_text())["data"] == record["data"]
    assert run(["reproduce", "cheaper", "--experiments", "table-2"]) == 2
    assert "--experiments: goes with the paper's claims" in capsys.readouterr().err


def test_unknown_data_are_refused():
    assert [data.name for data in choose_data("cheaper-quick", "digits,digits", STUDIES)] == ["digits"]
    with pytest.raises(RecipeError, match=r"--data: got 'digit'; .*did you mean 'digits'"):
        choose_data("cheaper", "digit", STUDIES)
