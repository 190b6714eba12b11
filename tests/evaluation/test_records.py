"""Records: what they hold, what is compared, and records measured again."""

import json
import math

import pytest
import torch

from cdistill.errors import CorruptFileError, MismatchError, MissingAssetError, RecipeError
from cdistill.evaluation.comparison import compare, repetition
from cdistill.evaluation.estimates import mean_estimate
from cdistill.evaluation.records import UNDECIDED, Comparisons, Evaluation, Row, direction, figure, to_json
from cdistill.runtime.randomness import generator


def noise(seed):
    return torch.randn(400, generator=generator(seed, "records"), dtype=torch.float64)


def record(rows, better="lower", **facts):
    """An evaluation of one metric: NFE -> values of the samples."""
    found = [Row.of("student", nfe, {"m": mean_estimate(values)}) for nfe, values in rows.items()]
    facts = {"schema": 2, "run": "runs/a", "step": 4, "samples": 400, "seeds": "0..399", "split": "train", **facts}
    return Evaluation(**facts, data="digits", level=0.95, metrics={"m": {"title": "M", "better": better}}, rows=found)


@pytest.mark.parametrize(
    ("shift", "better", "verdict"),
    [(-0.1, "lower", "better"), (0.1, "lower", "worse"), (0.1, "higher", "better"), (0.001, "lower", UNDECIDED)],
)
def test_the_verdict_is_about_the_second_and_knows_which_way_is_better(shift, better, verdict):
    first = record({2: noise(1), 1: noise(1)}, better)
    second = record({2: noise(1) + 0.1 * noise(2) + shift}, better)
    (found,) = compare(first, second).differences
    assert (found.nfe, found.verdict) == (2, verdict)
    assert found.difference == pytest.approx(found.second - found.first)


def test_what_is_not_finite_is_neither_better_nor_worse_and_shown():
    good, bad = record({2: torch.ones(9)}), record({2: torch.full((9,), math.nan)})
    for pair in (good, bad), (bad, good):
        (found,) = compare(*pair).differences
        assert (found.verdict, found.difference) == (UNDECIDED, None)
        assert "not finite" in Comparisons(comparisons=[compare(*pair)]).table()[2][0]
    assert bad.to_dict()["rows"][0]["values"] == {"m": None}
    assert bad.table()[2] == [["student", "2", "not finite"]]
    assert json.loads(to_json(bad))["rows"][0]["intervals"] == {"m": [None, None]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": "1..400"}, "seeds is 1..400, that of runs/a, step 4 0..399"),
        ({"data_sha256": "b"}, "data_sha256 is b"),
        ({"metrics": {"m": {"title": "M", "better": "lower", "features": "other"}}}, "no metric in common"),
    ],
)
def test_what_was_measured_differently_is_not_compared(change, words):
    first = record({2: noise(1)}, data_sha256="a")
    second = first.model_copy(update=change)
    with pytest.raises(RecipeError, match=words):
        compare(first, second)


def test_the_error_to_different_teachers_is_not_compared():
    rows = [Row.of("student", 2, {name: mean_estimate(noise(1)) for name in ("fid", "teacher-mse")})]
    facts = {"run": "a", "step": 1, "metrics": {"fid": {}, "teacher-mse": {}}, "rows": rows}
    first, second = (Evaluation(**facts, teacher_sha256=digest) for digest in "ab")
    assert [found.metric for found in compare(first, second).differences] == ["fid"]
    assert [found.metric for found in compare(first, first).differences] == ["fid", "teacher-mse"]


def test_a_record_is_read_as_it_was_written(tmp_path):
    written = record({2: noise(1)}, samplers={"2": {"times": [80.0, 0.002]}})
    (tmp_path / "r.json").write_text(to_json(written))
    read = Evaluation.read(tmp_path / "r.json")
    assert read.to_dict() == written.to_dict() == json.loads((tmp_path / "r.json").read_text())
    assert read.table() == written.table()
    assert read.table()[0] == "runs/a, step 4: 400 samples against digits (train)"
    assert set(read.to_dict()) == {
        "schema", "run", "step", "samples", "seeds", "split", "data", "level", "metrics", "rows", "samplers"
    }  # fmt: skip


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(MissingAssetError, match="no such record"):
        Evaluation.read(tmp_path / "r.json")
    (tmp_path / "r.json").write_text('{"rows": 3}')
    with pytest.raises(CorruptFileError, match="not a record"):
        Evaluation.read(tmp_path / "r.json")


def test_records_of_version_0_1_are_read(tmp_path):
    """They have no standard errors, and say nothing about their metrics."""
    rows = [{"sampler": "student", "nfe": 2, "values": {"frechet-pixels": 0.5, "teacher-mse": None}}]
    (tmp_path / "r.json").write_text(json.dumps({"step": 3, "run": "x", "rows": rows}))
    old = Evaluation.read(tmp_path / "r.json")
    _, columns, cells, _ = old.table()
    assert columns == ["sampler", "NFE", "frechet-pixels", "teacher-mse"]
    assert cells == [["student", "2", "0.5", "not finite"]]
    assert [old.better(name) for name in ("frechet-pixels", "recall")] == ["lower", "higher"]
    assert repetition(tmp_path / "r.json", old, old).reproduced


def test_direction_is_what_the_record_says():
    assert direction("mine", {"mine": {"better": "higher"}}) == "higher"
    assert direction("mine", {"mine": {"better": "neither"}}) == ""
    assert direction("precision", {}) == "higher"


def test_a_repetition_tells_what_changed_and_what_came_out(tmp_path):
    before = record({1: noise(1), 2: torch.full((9,), math.nan)}, threads=1)
    same = repetition(tmp_path, before, before)
    assert same.summary().startswith("2 of 2 figures identical in every bit, 2 within")
    assert [row[-1] for row in same.table()[2]] == ["identical", "identical"]
    same.check()
    now = record({1: noise(1) + 0.0004, 2: torch.ones(9)}, threads=2)
    other = repetition(tmp_path, before, now)
    assert [row[-1] for row in other.table()[2]] == ["same", "DIFFERS"]
    assert (other.changes, other.reproduced) == (["threads: 1 -> 2"], False)
    with pytest.raises(MismatchError, match="1 of 2 figures came out differently, first m of student at 2 NFE"):
        other.check()


@pytest.mark.parametrize(
    ("value", "width", "text"), [(0.21387, 0.01096, "0.214 ± 0.011"), (51.3, 2.44, "51.3 ± 2.4"), (0.5, 0.0, "0.5")]
)
def test_figures_are_written_with_two_digits_of_their_interval(value, width, text):
    assert figure(value, (value - width, value + width)) == text
