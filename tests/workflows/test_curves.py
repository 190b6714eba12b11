"""Training curves of runs, and when each run reaches a value."""

import csv
import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdistill.cli.app import run
from cdistill.errors import CorruptFileError, MissingAssetError, RecipeError
from cdistill.reporting import curves as points_of_curves
from cdistill.reporting import panels
from cdistill.reporting.curves import averaged
from cdistill.reporting.panels import Line, Panel
from cdistill.workflows import curves
from cdistill.workflows.curves import arrivals, choose_calls, choose_metric, crossing, read_runs

STEPS = (0, 100, 200, 300, 400)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(
    path, form="ctm", rate=100.0, nfe=(1, 2), metrics=("fid",), steps=STEPS, teacher=1.5, batch=32, samples=500
) -> Path:
    """A run whose metric falls e-fold in `rate` steps, from 64 / NFE at step 0."""
    folder = Path(path)
    folder.mkdir(parents=True)
    (folder / "recipe.resolved.toml").write_text(
        f'teacher = "digits"\n[preconditioning]\nname = "{form}"\n[training]\nbatch_size = {batch}\n'
        f'[evaluation]\nsamples = {samples}\nsplit = "train"\n'
    )
    lines = []
    for step in steps:
        lines.append({"step": step, "event": "train", "dsm": 1 + 1 / (1 + step), "skipped": 0, "note": "text"})
        values = {k: {name: 64 / k * math.exp(-step / rate) for name in metrics} for k in nfe}
        rows = [{"sampler": "student", "nfe": k, "values": values[k]} for k in nfe]
        lines.append({"step": step, "event": "evaluation", "rows": rows})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if teacher is not None:
        rows = [
            {"sampler": "teacher (Heun)", "nfe": 34, "values": dict.fromkeys(metrics, teacher)},
            {"sampler": "untrained student", "nfe": 1, "values": dict.fromkeys(metrics, 99.0)},
        ]
        (folder / "evaluation.json").write_text(json.dumps({"step": steps[-1], "rows": rows}))
    return folder


def called(capsys, *arguments: str) -> tuple[int, str, str]:
    code = run(["plot", "curves", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def test_doctests():
    assert doctest.testmod(points_of_curves) == (0, 3)


@pytest.mark.parametrize("rate", [50.0, 100.0, 173.0])
@pytest.mark.parametrize("value", [32.0, 5.0, 1.0])
def test_an_exponential_curve_is_crossed_exactly_where_its_formula_says(rate, value):
    points = [(float(x), 64 * math.exp(-x / rate)) for x in range(0, 1001, 70)]
    assert crossing(points, value, logarithmic=True) == pytest.approx(rate * math.log(64 / value), rel=1e-12)


def test_a_straight_curve_is_crossed_exactly_on_a_linear_axis():
    points = [(0.0, 4.0), (10.0, 0.0), (20.0, -4.0)]
    assert crossing(points, 1.0, logarithmic=False) == 7.5
    assert crossing(points, -3.0, logarithmic=False) == 17.5


def test_the_first_crossing_counts_and_nothing_is_extrapolated():
    points = [(100.0, 8.0), (200.0, 2.0), (300.0, 6.0), (400.0, 1.0)]
    assert crossing(points, 4.0, logarithmic=True) == pytest.approx(150)
    assert crossing(points, 2.0, logarithmic=True) == 200
    assert crossing(points, 1.0, logarithmic=True) == 400
    assert crossing(points, 0.999, logarithmic=True) is None
    assert crossing(points, 9.0, logarithmic=True) == 100  # reached no later than there


def test_ratios_compare_with_the_first_run_and_only_what_is_known():
    lines = {
        "first": [(0.0, 64.0), (100.0, 4.0), (200.0, 4.0)],
        "twice": [(0.0, 64.0), (50.0, 4.0)],
        "never": [(0.0, 64.0), (700.0, 5.0)],
        "at once": [(0.0, 3.0), (100.0, 1.0)],
        "unseen": [(30.0, 3.0), (100.0, 1.0)],
    }
    found = {one["run"]: tuple(one.values())[2:] for one in arrivals(2, lines, 4.0, logarithmic=True)}
    assert found["first"] == ("first", 100, False, 200, 1)
    assert found["twice"] == ("twice", 50, False, 50, 2)
    assert found["never"] == ("never", None, False, 700, None)
    assert found["at once"] == ("at once", 0, False, 100, None)
    assert found["unseen"] == ("unseen", 30, True, 100, None)
    behind_unseen = arrivals(2, {name: lines[name] for name in ("unseen", "twice")}, 4.0, logarithmic=True)
    assert [one["ratio"] for one in behind_unseen] == [None, None]


def test_twice_as_fast_is_a_ratio_of_two(capsys):
    make_run("runs/ctm", rate=100)
    make_run("runs/analytic", "analytic", rate=50)
    code, out, err = called(capsys, "runs/ctm", "runs/analytic", "--json")
    assert (code, err) == (0, err)
    record = json.loads(out)
    assert (record["metric"], record["nfe"], record["unit"]) == ("fid", [1, 2], "iterations")
    assert record["runs"] == ["ctm", "analytic"]
    assert [one["ratio"] for one in record["reached"]] == pytest.approx([1, 2, 1, 2])
    assert [one["at"] for one in record["reached"]] == pytest.approx([400, 200, 400, 200])
    assert record["reached"][2]["value"] == pytest.approx(32 * math.exp(-4))  # the first run's best at 2 NFE


def test_the_printed_table_says_what_was_not_reached(capsys):
    make_run("runs/ctm", rate=100)
    make_run("runs/slow", "bcm", rate=300)
    make_run("runs/late", "analytic", rate=50, steps=(100, 200))
    code, out, _ = called(capsys, "runs/ctm", "runs/slow", "runs/late", "--nfe", "2", "--reach", "8")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert code == 0
    assert rows == [
        ["ctm", "2", "8", "139", "1.00"],
        ["slow (bcm)", "2", "8", "not by 400", "-"],
        ["late (analytic)", "2", "8", "<= 100", "-"],
    ]


def test_images_count_the_batch(capsys):
    make_run("a", batch=32)
    make_run("b", batch=64, rate=50)
    record = json.loads(called(capsys, "a", "b", "--images", "--nfe", "1", "--json")[1])
    assert record["unit"] == "images"
    assert [one["at"] for one in record["reached"]] == pytest.approx([400 * 32, 200 * 64])
    assert [one["ratio"] for one in record["reached"]] == pytest.approx([1, 1])


def test_the_csv_holds_what_is_drawn(capsys):
    make_run("runs/ctm", nfe=(1, 2, 5), metrics=("fid", "teacher-mse"), steps=(0, 10))
    assert called(capsys, "runs/ctm", "--nfe", "5,2", "--metric", "teacher-mse", "--out", "p/c.png")[0] == 0
    with open("p/c.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["run", "step", "sampler", "nfe", "metric", "value"]
    assert [row[:5] for row in rows] == [
        ["ctm", "0", "student", "2", "teacher-mse"],
        ["ctm", "10", "student", "2", "teacher-mse"],
        ["ctm", "0", "student", "5", "teacher-mse"],
        ["ctm", "10", "student", "5", "teacher-mse"],
        ["ctm", "", "teacher (Heun)", "34", "teacher-mse"],
    ]
    assert [float(row[5]) for row in rows] == [32, 32 * math.exp(-0.1), 12.8, 12.8 * math.exp(-0.1), 1.5]


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as picture:
        return {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3)}


def test_the_picture_shows_a_line_for_every_run(capsys):
    first, second, third = (tuple(bytes.fromhex(colour[1:])) for colour in panels.COLOURS[:3])
    make_run("a", rate=100)
    make_run("b", rate=200)
    assert called(capsys, "a", "b")[0] == 0
    assert colours(Path("plots/curves.png")) >= {first, second}
    assert third not in colours(Path("plots/curves.png"))


def test_every_number_of_panels_can_be_drawn(tmp_path):
    for count in range(1, 8):
        lines = [Line("run", [(0, 2.0), (1, 0.0)])]
        shown = [
            Panel(f"{k} NFE", "iterations", lines, levels=[("teacher", 0.0)], reached=[(0.5, 1)]) for k in range(count)
        ]
        panels.save_figure(panels.draw_panels("", panels.in_rows(shown)), tmp_path / f"{count}.png")
        with Image.open(tmp_path / f"{count}.png") as picture:
            assert picture.size >= (640, 340)


@pytest.mark.parametrize("said", [True, False])
def test_higher_is_better_where_the_metric_says_so(capsys, said):
    """Recall rises from 0 to 1; that of the second run twice as fast."""
    for name, rate in (("a", 100), ("b", 50)):
        folder = make_run(name, metrics=("recall",), nfe=(2,), rate=rate, teacher=None)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            for row in record.get("rows", []):
                row["values"] = {"recall": 1 - row["values"]["recall"] / 32}
                record |= {"metrics": {"recall": {"title": "Recall", "better": "higher"}}} if said else {}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    record = json.loads(called(capsys, "a", "b", "--json")[1])
    assert record["better"] == "higher"
    assert record["reached"][0]["value"] == pytest.approx(1 - math.exp(-4))
    assert [one["at"] for one in record["reached"]] == [400, pytest.approx(200)]
    assert record["reached"][1]["ratio"] == pytest.approx(2)


def test_an_unfinished_run_with_a_half_written_line_is_read_up_to_there(capsys):
    folder = make_run("a", teacher=None)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: -len(text.splitlines()[-1]) // 2])
    record = json.loads(called(capsys, "a", "--json")[1])
    assert [one["last"] for one in record["reached"]] == [300, 300]


def test_a_value_that_is_logged_again_replaces_the_first_and_nan_is_left_out():
    def record(step: int, value: float) -> dict[str, object]:
        rows = [{"sampler": "student", "nfe": 1, "values": {"fid": value}}]
        return {"step": step, "event": "evaluation", "rows": rows}

    records = [record(0, 3.0), record(10, 2.0), record(20, math.nan), record(10, 1.0)]
    assert curves.evaluation_curves(records) == {(1, "fid"): [(0, 3.0), (10, 1.0)]}


def test_runs_of_one_name_are_told_apart_by_their_paths():
    make_run("a/digits")
    make_run("b/digits")
    make_run("b/other")
    found = read_runs([Path("a/digits"), Path("b/digits"), Path("b/other")])
    assert curves.labels(found) == ["a/digits (ctm)", "b/digits (ctm)", "other (ctm)"]


def test_what_does_not_compare_is_said(capsys):
    make_run("a")
    make_run("b", samples=100, batch=64)
    _, _, err = called(capsys, "a", "b")
    assert "the runs differ in evaluation.samples (500, 100)" in err
    assert "the runs differ in training.batch_size (32, 64); --images" in err
    assert "batch_size" not in called(capsys, "a", "b", "--images")[2]


def test_a_run_that_was_measured_only_once_is_drawn_and_named(capsys):
    make_run("a")
    make_run("b", steps=(400,))
    code, _, err = called(capsys, "a", "b")
    assert code == 0
    assert "b has one evaluation so far; a curve needs --set evaluation.every=N" in err
    assert "a has one" not in err


def test_the_default_is_what_all_runs_share():
    make_run("a", metrics=("own", "fid", "mse"), nfe=(1, 2, 3))
    make_run("b", metrics=("mse", "fid"), nfe=(3, 2, 5))
    found = read_runs([Path("a"), Path("b")])
    assert choose_metric(found) == "fid"
    assert choose_metric(found, "mse") == "mse"
    assert choose_calls(found, "fid") == [2, 3]
    assert choose_calls(found, "fid", [3, 3]) == [3]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 3, "nowhere: no run here, recipe.resolved.toml is missing"),
        (["a", "new"], 2, "new: no evaluations in its metrics.jsonl yet; they come with --set evaluation.every=N"),
        (["a", "./a/"], 2, "a is named twice"),
        (["a", "c"], 2, "no metric that all runs have (a: fid; c: mse); set evaluation.metrics alike"),
        (["a", "b"], 2, "no NFE at which all runs measured fid (a: 1, 2; b: 3)"),
        (["a", "--nfe", "2,5"], 2, "not every run measured fid at 5 (a: 1, 2)"),
        (["a", "--metric", "fit"], 2, "--metric: a has no 'fit'; known: fid (did you mean 'fid'?)"),
        (["a", "--reach", "nan"], 2, "--reach: got nan"),
        (["a", "--losses", "--nfe", "2"], 2, "--nfe: goes without --losses"),
        (["new", "--losses"], 2, "new: no losses in its metrics.jsonl yet"),
        (["a", "--out", "a.pdf"], 2, "ends in .png"),
        (["broken"], 4, "broken/recipe.resolved.toml: damaged (Invalid value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line_that_says_what_to_do(capsys, arguments, code, words):
    make_run("a")
    make_run("b", nfe=(3,))
    make_run("c", metrics=("mse",))
    (make_run("new") / "metrics.jsonl").unlink()
    (make_run("broken") / "recipe.resolved.toml").write_text("teacher = ")
    assert run(["plot", "curves", *arguments]) == code
    text = capsys.readouterr().err
    assert words in text
    assert text.count("\n") == 1
    assert text.startswith("error: ")
    assert not Path("plots").exists()


def test_errors_have_their_class():
    with pytest.raises(MissingAssetError):
        read_runs([Path("nowhere")])
    make_run("a")
    Path("a/recipe.resolved.toml").write_bytes(b"\xff")
    with pytest.raises(CorruptFileError):
        read_runs([Path("a")])
    with pytest.raises(RecipeError):
        read_runs([Path("b"), Path("b")])


def test_losses_are_drawn_as_logged(capsys):
    make_run("a", steps=range(0, 2000, 10))
    make_run("b", steps=range(0, 100, 10))
    record = json.loads(called(capsys, "a", "b", "--losses", "--json")[1])
    assert record["losses"] == ["dsm", "skipped"]
    with open("plots/curves.csv") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if (row["run"], row["metric"]) == ("a", "dsm")]
    assert [int(row["step"]) for row in own] == list(range(0, 2000, 10))
    assert float(own[1]["value"]) == 1 + 1 / 11
    assert Path(record["plot"]).is_file()


def test_averages_keep_the_mean_and_bound_the_number():
    points = [(float(k), float(k * k)) for k in range(1200)]
    found = averaged(points, most=150)
    assert len(found) == 150
    assert sum(y for _, y in found) / 150 == pytest.approx(sum(y for _, y in points) / 1200)
    assert found[0] == (3.5, 17.5)
    assert averaged(points[:150], most=150) == points[:150]


def test_reading_runs_needs_no_torch(run_python):
    assert run_python("import sys, cdistill.workflows.curves; print('torch' in sys.modules)") == "False\n"
