"""`cdistill report`: what a page says, what it escapes, what it says of missing and of damaged files."""

import base64
import doctest
import io
import json
import math
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdistill.cli.app import run
from cdistill.evaluation.records import Row
from cdistill.reporting import charts, curves, page, panels, summary, tables
from cdistill.reporting.panels import Line, Panel
from cdistill.reporting.reading import read_run
from cdistill.reporting.tables import BEST, FIRST, best
from cdistill.storage.bounded import LARGEST
from cdistill.storage.run_folder import RunFolder
from cdistill.workflows.inspection import inspect_file
from tests.conftest import PACKAGE
from tests.report_runs import SEEDS, change_json, evaluation, images, make_run, recipe, write, write_images

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\u202e"
VOID = {"meta", "link", "img", "br"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Reader(HTMLParser):
    """Reads a page, refusing tags that do not nest; keeps tags, attributes, texts and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += ("|" if self.open[-1] == "small" else "") + data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def reported(*paths: Path | str) -> Reader:
    assert run(["report", *map(str, paths), "--out", "page.html"]) == 0
    return Reader(Path("page.html").read_text(encoding="utf-8"))


def failed(capsys, *paths: Path | str) -> tuple[int, str]:
    code = run(["report", *map(str, paths), "--out", "page.html"])
    assert not Path("page.html").exists()
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    return code, message


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


@pytest.mark.parametrize("module", [page, curves, summary, tables], ids=lambda m: m.__name__)
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.failed == 0
    assert found.attempted > 0


def test_a_page_says_everything_about_a_run():
    found = reported(make_run(Path("runs/a")))
    assert found.all("html") == [{"lang": "en"}]
    headings = [found.text.find(word) for word in ("Results", "Samples", "Training", "Coefficients", "Recipe")]
    assert -1 not in headings
    for words in (
        "a , a student of digits", "preconditioning analytic", "steps 60 of 60", "state finished",
        "hardware cpu, 1 process, 2 threads, fp32", "seed 7", "ab" * 32, "torch 2.15.0", 'name = "analytic"',
        "cdistill distill --out 'my runs/a'", "cdistill evaluate --run runs/a --step 60 --nfe 1,2 --samples 200",
        "200 samples of seeds 0..199, against the train data, below each value its 95 % interval",
    ):  # fmt: skip
        assert words in found.text
    assert "What is missing" not in found.text
    charts = [attributes["aria-label"] for attributes in found.all("svg") if attributes.get("role") == "img"]
    assert [text.split(" against ")[0] for text in charts] == [
        "Frechet (pixels)", "Precision", "Frechet (pixels)", "Precision", "consistency", "jumps", "l(t)", "s(t)",
        "f(t, s)", "g(t, s)",
    ]  # fmt: skip
    assert "student: 4 at 1, 2 at 2; teacher (Heun), 34 NFE: 0.25" in charts[0]


@pytest.mark.parametrize("jumps", [None, 3, [], {"levels": [1.0]}, {"levels": ["x"], "starts": [1.0], "ends": [1.0]}])
def test_which_jumps_are_trained_is_drawn_where_it_is_known(jumps):
    path = make_run(Path("run"))
    assert "Which jumps are trained" in reported(path).text
    change_json(path / "env.json", jumps=jumps)
    assert "Which jumps are trained" not in reported(path).text


def test_values_stand_above_their_intervals():
    rows = reported(make_run(Path("a"))).rows
    head = ["sampler", "NFE", "Frechet (pixels)|lower is better", "Precision|higher is better"]
    assert rows[0] == head
    assert rows[1] == ["teacher (Heun)", "34", "0.250|0.200 to 0.300", "0.025|-0.025 to 0.075"]
    assert rows[5] == ["student", "2", "2.000|1.950 to 2.050", "0.200|0.150 to 0.250"]


def test_runs_stand_side_by_side_and_the_best_is_marked():
    make_run(Path("a"))
    make_run(Path("b"), form="ctm", shift=-0.2)
    found = reported("a", "b")
    assert ["student", "1", "4.000|3.950 to 4.050", "★ 3.800|3.750 to 3.850"] in found.rows
    assert ["student", "1", "☆ 0.400|0.350 to 0.450", "0.380|0.330 to 0.430"] in found.rows  # higher is better
    assert ["untrained student", "1", "8.000|7.950 to 8.050", "8.000|7.950 to 8.050"] in found.rows
    assert ["preconditioning.name", "analytic", "ctm"] in found.rows
    assert "b: trained without coefficients: ctm is a closed form." in found.text
    assert found.text.index("Differences") < found.text.index("Recipe of a")


@pytest.mark.parametrize(("key", "value"), [("samples", 100), ("split", "heldout"), ("data_sha256", "ee" * 32)])
def test_nothing_is_marked_where_values_do_not_compare(key, value):
    make_run(Path("a"))
    change_json(make_run(Path("b"), shift=-0.2) / "evaluation.json", **{key: value})
    found = reported("a", "b")
    assert f"The runs differ in {key}" in found.text
    assert "★" not in found.text
    assert "☆" not in found.text


def test_what_only_one_record_states_does_not_forbid_to_compare():
    make_run(Path("a"))
    change_json(make_run(Path("b"), shift=-0.2) / "evaluation.json", features_sha256="ab" * 32, teacher_sha256=None)
    assert "★ 3.800" in reported("a", "b").text


def contest(path: Path, **changes) -> Path:
    found = {
        "metric": "precision", "sampler": "student", "nfe": 2, "first": 0.2, "second": 0.25, "difference": 0.05,
        "error": 0.01, "interval": [0.03, 0.07], "verdict": "better",
    }  # fmt: skip
    pair = {"first": "a", "second": "b", "differences": [{**found, **changes}]}
    write(path, json.dumps({"comparisons": [pair], "records": []}))
    return path


def test_differences_are_shown_as_the_comparison_says(capsys):
    make_run(Path("a"))
    make_run(Path("b"), shift=0.5)
    assert "on the same seeds" not in reported("a", "b").text
    found = reported("a", "b", "--comparison", contest(Path("c.json")))
    assert ["sampler", "NFE", "metric", "a", "b", "difference", "b is"] in found.rows
    assert ["student", "2", "Precision", "0.2", "0.25", "0.050|0.030 to 0.070", "better"] in found.rows
    Path("page.html").unlink()
    assert failed(capsys, "a", "--comparison", "none.json")[0] == 3
    assert failed(capsys, "a", "--comparison", contest(Path("c.json"), interval=[1]))[0] == 4


def measured(value, low=None, high=None) -> Row:
    intervals = {} if low is None else {"m": (low, high)}
    return Row(sampler="student", nfe=1, values={"m": value}, intervals=intervals)


@pytest.mark.parametrize(
    ("rows", "better", "expected"),
    [
        ({"a": measured(1, 0, 2), "b": measured(5, 4, 6)}, "lower", {"a": BEST}),
        ({"a": measured(1, 0, 2), "b": measured(5, 4, 6)}, "higher", {"b": BEST}),
        ({"a": measured(1, 0, 2), "b": measured(5, 2, 8)}, "lower", {"a": FIRST}),
        ({"a": measured(1, 0, 2), "b": measured(5, 4, 6), "c": measured(3, 1, 5)}, "lower", {"a": FIRST}),
        ({"a": measured(1), "b": measured(5)}, "lower", {"a": FIRST}),
        ({"a": measured(1, 1, 1), "b": measured(1, 1, 1)}, "lower", {}),
        ({"a": measured(1, 0, 2), "b": None}, "lower", {}),
        ({"a": measured(1, 0, 2), "b": measured(None)}, "lower", {}),
        ({"a": measured(math.nan), "b": measured(1, 0, 2), "c": measured(4, 3, 5)}, "lower", {"b": BEST}),
        ({"a": measured(1, 0, 2), "b": measured(5, 4, 6)}, "", {}),
    ],
)
def test_the_best_is_the_best_of_finite_values(rows, better, expected):
    assert best("m", rows, better) == expected


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 32, 64])
def test_the_same_place_has_the_same_seed_in_every_sheet(channels, side):
    path = make_run(Path("a"))
    write_images(path / "samples" / "step-00000060.npz", (1, 2), channels, side)
    found = reported(path)
    shown = found.all("img")
    assert [one["alt"].split(", seeds 3-9, 20-22,")[0] for one in shown] == [
        "10 samples of the teacher", "10 samples of student with 1 NFE", "10 samples of the teacher",
        "10 samples of student with 2 NFE",
    ]  # fmt: skip
    factor = max(1, 32 // side)
    cell = factor * side + 4
    for one, index in zip(shown, (0, 1, 0, 2), strict=True):
        sheet = pixels(one["src"]).reshape(2 * cell, 6 * cell, channels)
        for place, image in enumerate(images(index, channels, side)):
            top, left = place // 6 * cell + 2, place % 6 * cell + 2
            tile = sheet[top : top + factor * side : factor, left : left + factor * side : factor]
            np.testing.assert_array_equal(tile, image.transpose(1, 2, 0))
    seeds = [one["title"] for one in found.all("span") if "title" in one]
    assert seeds == [f"seed {seed}" for seed in SEEDS] * 4


def test_runs_share_a_teachers_pictures_where_seeds_and_teacher_are_equal():
    make_run(Path("a"))
    make_run(Path("b"))
    assert len(reported("a", "b").all("img")) == 2 * 3
    arrays = dict(np.load("b/samples/step-00000060.npz"))
    np.savez("b/samples/step-00000060.npz", **{**arrays, "seeds": arrays["seeds"] + 1})
    assert len(reported("a", "b").all("img")) == 2 * 2 * 2
    np.savez("b/samples/step-00000060.npz", **{key: part for key, part in arrays.items() if key != "teacher"})
    assert len(reported("b").all("img")) == 2


def test_what_files_say_is_escaped():
    path = make_run(Path("<b onclick=x>&'"))
    write(path / "recipe.resolved.toml", f"# {HOSTILE[:-2]}\n{recipe('analytic')}note = {json.dumps(HOSTILE[:-2])}\n")
    record = evaluation()
    for one in record["rows"]:
        one["sampler"] += HOSTILE
        one["values"][HOSTILE] = 1.0
    metrics = {**record["metrics"], HOSTILE: {"title": HOSTILE, "better": "lower"}}
    change_json(
        path / "evaluation.json", rows=record["rows"], metrics=metrics, split=HOSTILE, versions={HOSTILE: HOSTILE}
    )
    change_json(path / "env.json", device=HOSTILE, command=["distill", HOSTILE])
    change_json(path / "status.json", state=HOSTILE, error=HOSTILE)
    log = {"step": 70, "event": "train", HOSTILE: 1.0}
    write(path / "metrics.jsonl", (path / "metrics.jsonl").read_text() + json.dumps(log) + "\n")
    found = reported(path)
    assert {"script", "b"}.isdisjoint(tag for tag, _ in found.tags)
    assert all(one["src"].startswith("data:image/png;base64,") for one in found.all("img"))
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in found.text
    text = Path("page.html").read_text(encoding="utf-8")
    assert "\x00" not in text
    assert "\u202e" not in text


def test_a_page_is_one_file_that_asks_for_nothing():
    found = reported(make_run(Path("a")))
    policy = next(one["content"] for one in found.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert [one["href"] for one in found.all("link")] == ["data:,"]
    assert all(one["href"].startswith("#") for one in found.all("a"))
    text = Path("page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import|@font-face", text)


def test_headings_descend_and_tables_have_heads():
    found = reported(make_run(Path("a")), make_run(Path("b"), form="ctm"))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(one["scope"] in ("row", "col") for one in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table"))
    names = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(set(names)) == len(names)
    assert {one["href"][1:] for one in found.all("a")} <= set(names)


def test_the_same_files_give_the_same_page():
    make_run(Path("a"))
    reported("a")
    first = Path("page.html").read_bytes()
    reported("a")
    assert Path("page.html").read_bytes() == first


def test_an_unfinished_run_says_what_is_missing():
    path = Path("a")
    path.mkdir()
    write(path / "recipe.resolved.toml", recipe("analytic"))
    text = reported(path).text
    for words in (
        "The run is not finished", "No training log yet", "No evaluation in the folder: cdistill evaluate --run a",
        "No coefficients yet", "No env.json", "Nothing was measured yet", "Nothing was logged yet", "state not known",
    ):  # fmt: skip
        assert words in text


def test_a_run_without_results_shows_its_last_logged_evaluation():
    path = make_run(Path("a"))
    (path / "evaluation.json").unlink()
    found = reported(path)
    assert "metrics.jsonl, the last evaluation while training" in found.text
    assert found.rows[1] == ["student", "1", "3.500|3.450 to 3.550", "0.350|0.300 to 0.400"]


def test_a_run_of_an_older_version_shows_values_and_the_old_picture():
    path = make_run(Path("a"))
    record = json.loads((path / "evaluation.json").read_text())
    rows = [{key: one[key] for key in ("sampler", "nfe", "values")} for one in record["rows"]]
    old = {key: record[key] for key in ("run", "step", "samples", "seeds", "split")}
    write(path / "evaluation.json", json.dumps({**old, "rows": rows}))
    (path / "samples" / "step-00000060.npz").unlink()
    Image.new("RGB", (30, 20), "red").save(path / "samples" / "step-00000060.png")
    found = reported(path)
    assert found.rows[5] == ["student", "2", "2", "0.2"]
    assert "No intervals: an older version measured this" in found.text
    assert "Samples as one picture only" in found.text
    assert pixels(found.all("img")[0]["src"]).shape == (20, 30, 3)


def test_the_run_of_a_teacher_has_a_page():
    path = Path("t")
    path.mkdir()
    write(path / "recipe.resolved.toml", 'data = "digits"\nseed = 0\n[training]\niterations = 9\n')
    write(path / "status.json", json.dumps({"state": "finished", "kind": "teacher", "step": 9}))
    text = reported(path).text
    assert "t , a teacher of digits" in text
    assert "A teacher's training has neither evaluations nor samples." in text


def test_values_that_are_not_finite_are_said_and_not_drawn():
    path = make_run(Path("a"))
    record = evaluation()
    record["rows"][-1]["values"]["frechet-pixels"] = math.nan
    record["rows"][-2]["values"]["precision"] = None
    change_json(path / "evaluation.json", rows=record["rows"])
    found = reported(path)
    assert found.rows[5][2] == "not finite"
    assert found.rows[4][3] == "not finite"
    assert not re.search("nan|inf", " ".join(one.get("d") or "" for one in found.all("path")))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluation.json", "{"),
        ("evaluation.json", "[1]"),
        ("evaluation.json", '{"rows": [{"sampler": "student"}]}'),
        ("evaluation.json", '{"rows": ' + 5000 * "[" + 5000 * "]" + "}"),
        ("evaluation-more.json", '{"rows": 3}'),
        ("status.json", "\x00"),
        ("env.json", "3"),
        ("recipe.resolved.toml", "a = = 1"),
        ("recipe.resolved.toml", b"\xff"),
        ("recipe.resolved.toml", "a = " + 5000 * "["),
        ("metrics.jsonl", b"\xff\xff"),
        ("metrics.jsonl", '{"step": 1, "event": "evaluation", "rows": [{}]}'),
        ("coefficients.safetensors", "nothing"),
        ("samples/step-00000060.npz", "nothing"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(capsys, file, content):
    path = make_run(Path("a"))
    (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, message = failed(capsys, path)
    assert code == 4
    assert f"a/{file}: " in message


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": images(0).astype(np.float32)},
        {"nfe1": images(1)[:5]},
        {"seeds": np.arange(3)},
        {"seeds": np.array(["x"] * 10)},
        {"teacher": np.array([{}] * 10, dtype=object)},
        {"teacher": images(0)[:, :, 0], "nfe1": images(0)[:, :, 0], "nfe2": images(0)[:, :, 0]},
        {"nfe2": np.zeros((10, 2, 8, 8), np.uint8)},
    ],
)
def test_arrays_that_are_no_samples_are_refused(capsys, change):
    path = make_run(Path("a")) / "samples" / "step-00000060.npz"
    np.savez(path, **{**dict(np.load(path)), **change})
    assert failed(capsys, "a")[0] == 4


def test_arrays_that_unpack_to_too_much_are_refused_before_they_are_unpacked(capsys, monkeypatch):
    path = make_run(Path("a")) / "samples" / "step-00000060.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("seeds.npy", bytes(LARGEST + 1))
    monkeypatch.setattr(np, "load", None)
    code, message = failed(capsys, "a")
    assert code == 4
    assert "unpacks to more than" in message


def test_pictures_outside_of_the_run_are_refused(capsys):
    change_json(make_run(Path("a")) / "evaluation.json", images="../b/samples/x.npz")
    code, message = failed(capsys, "a")
    assert code == 4
    assert "outside of the run" in message


@pytest.mark.parametrize(("paths", "code"), [(["none"], 3), (["a", "a/../a"], 2)])
def test_no_run_and_a_run_named_twice_are_refused(capsys, paths, code):
    make_run(Path("a"))
    assert failed(capsys, *paths)[0] == code


def test_runs_of_the_same_name_go_by_their_paths():
    make_run(Path("x/a"))
    make_run(Path("y/a"))
    assert "x/a, y/a" in reported("x/a", "y/a").text


def test_the_latest_run_is_the_default_and_json_names_the_page(capsys):
    path = make_run(Path("runs/a"))
    (path / "checkpoints" / "step-00000060").mkdir(parents=True)
    assert run(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "report.html"}
    assert "a student of digits" in Reader(Path("report.html").read_text(encoding="utf-8")).text
    assert run(["report", "--out", "report.txt"]) == 2


def test_a_page_that_cannot_be_made_leaves_the_old_one():
    path = make_run(Path("a"))
    reported(path)
    before = Path("page.html").read_bytes()
    write(path / "status.json", "{")
    assert run(["report", "a", "--out", "page.html"]) == 4
    assert Path("page.html").read_bytes() == before
    assert [one.name for one in Path().iterdir() if one.name.startswith(".tmp")] == []


def test_a_report_needs_no_torch():
    make_run(Path("a"))
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); from cdistill.cli.app import run; "
    code += "assert run(['report', 'a']) == 0; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_preconditioning_of_another_package_is_taken_for_what_it_is():
    make_run(Path("a"), form="mine")
    text = reported("a").text
    assert "a: trained without coefficients: mine is a closed form." in text
    assert "What is missing" not in text


def numbers(path: str) -> list[tuple[float, float]]:
    """Returns the points of a path of straight lines."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def drawn(panel: Panel) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Returns the points of the first line of a panel's SVG, and text -> height of its ticks."""
    body = str(panels.svg(panel, "salt"))
    first = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--c0\)', body)
    texts = re.findall(
        r'transform="translate\(([\d.]+) ([\d.]+)\)">([^<]+)<|x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', body
    )
    return numbers(first[1]), {one[2] or one[5]: float(one[1] or one[4]) for one in texts}


def test_a_panel_puts_values_where_its_axes_say():
    points, ticks = drawn(Panel("y", "x", [Line("a", [(1, 1.0), (10, 10.0), (100, 100.0)])], x_log=True, y_log=True))
    (x, y), (x_middle, y_middle), (x_last, y_last) = points
    assert x_middle == pytest.approx((x + x_last) / 2, abs=1e-3)
    assert y_middle == pytest.approx((y + y_last) / 2, abs=1e-3)
    assert x < x_last < panels.WIDTH
    assert panels.HEIGHT > y > y_last
    assert ticks["100"] - ticks["10"] == pytest.approx(y_last - y_middle, abs=1e-2)


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1.0, 1.0]])
def test_any_values_can_be_drawn(values):
    body = panels.svg(Panel("y", "x", [Line("a", [(float(k), y) for k, y in enumerate(values)])]), "salt")
    assert "nan" not in body
    assert "var(--c0)" in body


def test_no_text_of_a_file_gets_into_a_drawing():
    body = panels.svg(Panel("$x$", "x", [Line(HOSTILE, [(0, 1.0), (1, 2.0)])], levels=[(HOSTILE, 1.5)]), "salt")
    assert "alert" not in body
    assert "$" not in body


def test_names_in_a_drawing_differ_from_those_of_the_next():
    panel = Panel("y", "x", [Line("a", [(0, 1.0), (1, 2.0)])])
    first, second = (set(re.findall(r'id="([^"]+)"', panels.svg(panel, salt))) for salt in "ab")
    assert first
    assert first.isdisjoint(second)
    assert panels.svg(panel, "a") == panels.svg(panel, "a")


def test_the_styles_of_thirty_lines_differ():
    looks = {re.sub(r"#?m[0-9a-f]{10}", "", panels.swatch(style, "salt")) for style in range(30)}
    assert len(looks) == 30


def test_coefficients_are_drawn_with_two_standard_errors():
    run_of = read_run(RunFolder(make_run(Path("a"))), "a", inspect_file)
    (_, _, tables), (_, _, jumps) = charts.coefficients([run_of])
    assert [label for label, _ in panels.legend(jumps)] == ["s = 0.0086", "s = 0.332"]
    assert len(tables[0].lines[0].ends) == 30
    line = charts._with_errors("a", {"t": [2.0, 1.0], "l": [0.5, 0.25], "e": [0.125, 0.0625]}, "l", "e", 0)
    assert line.points == [(1.0, 0.25), (2.0, 0.5)]
    assert line.ends == [(0.125, 0.375), (0.25, 0.75)]
