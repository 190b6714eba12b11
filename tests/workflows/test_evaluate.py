"""`cdistill evaluate`: runs, converted students, teachers and images; comparisons; records measured again."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.errors import RecipeError
from cdistill.storage.checkpoints import save_tensors
from tests.conftest import FAST
from tests.edm_teacher import random_denoiser
from tests.workflows.test_sample import TINY

MORE = ["training.iterations=4", "evaluation.samples=64", "evaluation.nfe=[1,2]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two short runs of the digits, analytic and ctm."""
    path = tmp_path_factory.mktemp("evaluate")
    patch = pytest.MonkeyPatch()
    patch.chdir(path)
    patch.setenv("CDISTILL_ASSETS", str(path / "assets"))
    for name in ("digits-paper", "digits-ctm"):
        sets = [part for value in [*FAST, *MORE] for part in ("--set", value)]
        assert run(["-q", "distill", "--recipe", name, "--out", f"runs/{name.removesuffix('-paper')}", *sets]) == 0
    yield path
    patch.undo()


def evaluate(capsys, *arguments: str) -> dict:
    capsys.readouterr()
    code = run(["evaluate", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def refused(capsys, *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    code = run(["evaluate", *arguments])
    return code, capsys.readouterr().err


def test_a_run_is_measured_beside_its_teacher_with_intervals(folder, capsys):
    record = evaluate(capsys, "runs/digits", "--nfe", "2", "--baselines", "euler,dpmpp-2m,heun")
    named = [(row["sampler"], row["nfe"]) for row in record["rows"]]
    assert named == [
        ("teacher (Heun)", 34), ("teacher (euler)", 2), ("teacher (dpmpp-2m)", 2), ("teacher (heun)", 2),
        ("untrained student", 2), ("student", 2),
    ]  # fmt: skip
    for row in record["rows"]:
        for name, value in row["values"].items():
            low, high = row["intervals"][name]
            assert low <= value <= high
            assert high - low == pytest.approx(2 * 1.998341 * row["errors"][name], rel=1e-5)  # t, 63 degrees
    assert record["samplers"]["2"]["times"] == pytest.approx([80, 2.5152, 0.002], rel=1e-4)
    with np.load(folder / "runs/digits" / record["images"]) as images:
        assert images["nfe2"].shape == images["teacher"].shape == (24, 1, 8, 8)
        assert images["seeds"].tolist() == list(range(24))


def test_the_seeds_can_be_others(folder, capsys):
    first, other = (evaluate(capsys, "runs/digits", "--first-seed", seed) for seed in ("0", "64"))
    assert (first["seeds"], other["seeds"]) == ("0..63", "64..127")
    assert first["rows"][-1]["values"] != other["rows"][-1]["values"]


def test_two_runs_are_compared_on_the_same_seeds(folder, capsys):
    record = evaluate(capsys, "runs/digits-ctm", "runs/digits", "--nfe", "1,2", "--out", "c.json")
    (compared,) = record["comparisons"]
    assert (compared["first"], compared["second"]) == ("runs/digits-ctm, step 4", "runs/digits, step 4")
    students = [[row for row in part["rows"] if row["sampler"] == "student"] for part in record["records"]]
    values = [{(row["nfe"], name): row["values"][name] for row in rows for name in row["values"]} for rows in students]
    for part in compared["differences"]:
        key = part["nfe"], part["metric"]
        assert part["difference"] == pytest.approx(values[1][key] - values[0][key], abs=1e-12)
        low, high = part["interval"]
        expected = "not distinguishable" if low <= 0 <= high else "better" if part["difference"] < 0 else "worse"
        assert part["verdict"] == expected
    assert len(compared["differences"]) == 4
    assert json.loads((folder / "c.json").read_text()) == record
    same = evaluate(capsys, "runs/digits", "runs/digits", "--nfe", "1")["comparisons"][0]["differences"]
    assert {(part["difference"], part["error"], part["verdict"]) for part in same} == {(0, 0, "not distinguishable")}


def test_what_was_not_measured_alike_is_not_compared(folder, capsys):
    sets = [part for value in [*FAST, *MORE, "evaluation.samples=32"] for part in ("--set", value)]
    assert run(["-q", "distill", "--recipe", "digits-paper", "--out", "runs/few", *sets]) == 0
    code, text = refused(capsys, "runs/digits", "runs/few")
    assert (code, "runs/few, step 4: samples is 32, that of runs/digits, step 4 64" in text) == (2, True)


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation-"])
def test_a_record_is_measured_again(folder, capsys, name):
    """The one that `distill` writes too."""
    if name == "evaluation-":
        evaluate(capsys, "runs/digits", "--nfe", "2", "--sampler", "gamma", "--gamma", "0.5", "--first-seed", "7")
    records = (folder / "runs/digits").glob(f"{name}*")
    path = max(records, key=lambda path: path.stat().st_mtime_ns)
    before = path.read_bytes()
    found = evaluate(capsys, "--check", str(path))
    assert found["reproduced"]
    assert all(part["before"] == part["now"] for part in found["figures"])
    assert len(found["figures"]) > 5
    assert path.read_bytes() == before


def test_a_record_that_does_not_come_out_again_is_told(folder, capsys):
    record = json.loads((folder / "runs/digits/evaluation.json").read_text())
    record["rows"][-1]["values"]["teacher-mse"] *= 1.1
    record["threads"] = 99
    Path("moved.json").write_text(json.dumps(record))
    code, text = refused(capsys, "--check", "moved.json")
    assert (code, "1 of 10 figures came out differently, first teacher-mse of student at 2 NFE" in text) == (4, True)
    assert "not as it was: threads: 99 -> " in text


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [(None, 3, "no such record"), ("{}", 4, "not a record"), ('{"request": {"target": {"x": 1}}}', 4, "not a record")],
)
def test_what_is_no_record_is_told(folder, capsys, content, code, text):
    path = folder / "no.json"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    found = refused(capsys, "--check", str(path))
    assert (found[0], text in found[1]) == (code, True)


def test_images_from_elsewhere_are_measured(folder, capsys):
    """The digits themselves, as a folder: the distance to the digits is that of the whole to a part."""
    (folder / "some").mkdir()
    for number, image in enumerate(load_source("digits").samples[:200, 0].numpy()):
        Image.fromarray(image).save(folder / "some" / f"{number:04d}.png")
    record = evaluate(
        capsys, "some", "--data", "digits", "--features", "pixels", "--metrics", "frechet-pixels,precision"
    )
    (row,) = record["rows"]
    assert (row["sampler"], row["nfe"], record["samples"], record["seeds"]) == ("images", 0, 200, None)
    assert row["values"]["precision"] == 1
    assert 0 < row["values"]["frechet-pixels"] < 2
    code, text = refused(capsys, "some")
    assert (code, "does not say what to compare with; name --data" in text) == (2, True)


def test_a_converted_student_is_measured_with_and_without_a_teacher(folder, capsys):
    header = {"architecture": TINY, "sigma_data": 0.5, "preconditioning": "ctm"}
    save_tensors(folder / "s.safetensors", random_denoiser(TINY).state_dict(), "student", header)
    asked = "s.safetensors", "--samples", "64", "--nfe", "1"
    alone, beside = (evaluate(capsys, *asked, *more) for more in (("--data", "digits"), ("--teacher", "digits")))
    assert [row["sampler"] for row in alone["rows"]] == ["student"]
    assert [row["sampler"] for row in beside["rows"]] == ["teacher (Heun)", "student"]
    assert alone["rows"][0]["values"].keys() == {"frechet-pixels"}
    assert beside["rows"][1]["values"].keys() == {"frechet-pixels", "teacher-mse"}
    assert beside["rows"][1]["values"]["frechet-pixels"] == alone["rows"][0]["values"]["frechet-pixels"]


def test_a_teacher_alone_is_measured(folder, capsys):
    record = evaluate(capsys, "--teacher", "mixture-1d", "--samples", "128", "--baselines", "dpmpp-2m", "--nfe", "6")
    assert [row["sampler"] for row in record["rows"]] == ["teacher (Heun)", "teacher (dpmpp-2m)"]
    assert record["rows"][1]["values"]["teacher-mse"] < 0.2


def test_a_record_of_version_0_1_is_repeated_unless_it_asks_for_what_is_gone(folder, capsys):
    record = json.loads((folder / "runs/digits/evaluation.json").read_text())
    for optimise, code, text in (
        (False, 0, "figures identical"),
        (True, 2, "made by cdistill 0.1 with --optimise"),
    ):
        record["request"]["target"]["optimise"] = optimise
        Path("old.json").write_text(json.dumps(record))
        found = refused(capsys, "--check", "old.json")
        assert (found[0], text in found[1]) == (code, True), found


def test_a_record_with_a_figure_that_is_not_finite_is_measured_again(folder, capsys):
    record = json.loads((folder / "runs/digits/evaluation.json").read_text())
    record["rows"][-1]["values"]["teacher-mse"] = None
    Path("null.json").write_text(json.dumps(record))
    code, text = refused(capsys, "--check", "null.json")
    assert (code, "1 of 10 figures came out differently, first teacher-mse" in text) == (4, True)


def test_a_student_is_evaluated_from_python(folder):
    """As the command does; options of the section are keywords."""
    from cdistill.workflows.evaluate import evaluate

    found = evaluate("runs/digits", nfe=[1], samples=64, metrics=["teacher-mse"])
    assert found.names == ["teacher-mse"]
    assert json.loads(found.path.read_text()) == found.to_dict()
    assert found.table()[1] == ["sampler", "NFE", "MSE to teacher"]
    with pytest.raises(RecipeError, match="evaluate: nfes: unknown key"):
        evaluate("runs/digits", nfes=[1])


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["runs/digits", "--data", "digits"], 2, "a run knows its teacher and its data"),
        (["runs/none"], 3, "runs/none: no such run, file or folder"),
        (["runs/digits", "--reference", "edm"], 2, "EDM has no statistics of 'digits'"),
        (["runs/digits", "--reference", "no.npz"], 3, "no.npz"),
        (["runs/digits", "--features", "no.pt"], 3, "no.pt"),
        (["runs/digits", "--nfe", "2", "--times", "3"], 2, "leave --nfe out"),
        (["--check", "x.json", "--nfe", "2"], 2, "--nfe: --check repeats"),
        (["s.safetensors", "--data", "digits", "--weights", "w.pt"], 2, "--weights: are a teacher's"),
        (["s.safetensors", "--data", "digits", "--baselines", "euler"], 2, "--baselines: are a teacher's solvers"),
        (["runs/digits", "runs/digits-ctm", "--data", "digits"], 2, "a run knows its teacher and its data"),
        (["--teacher", "mixture-1d", "--sampler", "euler"], 2, "--sampler: goes with a student"),
        (["--teacher", "mixture-1d", "--nfe", "5"], 2, "--nfe: goes with a student, or with --baselines"),
        (["runs/digits", "runs/digits-ctm", "--step", "9"], 3, "no checkpoint of step 9"),
        (["runs/digits", "--features", "pixel"], 2, "did you mean 'pixels'?"),
        (["runs/digits", "--baselines", "ctm"], 2, "draws from a student"),
        (["runs/digits", "--sampler", "heun"], 2, "draws from a teacher"),
        (["runs/digits", "--times", "1,2"], 2, "times"),
    ],
)
def test_mistakes_are_told(folder, capsys, arguments, code, text):
    found = refused(capsys, *arguments)
    assert (found[0], text in found[1]) == (code, True), found


def test_images_with_losses_are_told_from_data_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = load_source("digits")
    for suffix in ("jpg", "png"):
        Path(suffix).mkdir()
        for k in range(80):
            Image.fromarray(source.samples[k, 0].numpy()).save(f"{suffix}/{k}.{suffix}")
    options = ["--data", "png", "--metrics", "frechet-pixels"]
    for images, differs in (("jpg", True), ("png", False)):
        assert run(["evaluate", images, *options]) == 0
        assert ("stored with losses (JPEG or the like)" in capsys.readouterr().err) == differs


def test_figures_that_cannot_be_written_are_shown(tmp_path, monkeypatch, capsys):
    from cdistill.errors import DiskFullError
    from cdistill.evaluation import pipeline

    def full(path: Path, text: str) -> None:
        raise DiskFullError(f"{path}: the disk is full")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "write_own", full)
    assert run(["evaluate", "--teacher", "mixture-1d", "--samples", "64", "--out", "x.json"]) == 7
    found = capsys.readouterr()
    assert "teacher (Heun)" in found.err
    assert "Wasserstein" in found.err
    assert "error: x.json: the disk is full" in found.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(["evaluate", "--teacher", "mixture-1d", "--samples", "64", "--out", "x.json"]) == 0
    assert json.loads(Path("x.json").read_text())["rows"]
