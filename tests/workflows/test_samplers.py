"""``cdistill sample`` with every kind of sampler, from a tiny run and from a teacher."""

import json

import numpy as np
import pytest
import torch

from cdistill.cli.app import run
from cdistill.data.source import from_uint8
from cdistill.preconditionings import make_preconditioning
from cdistill.sampling.drawing import generate
from cdistill.sampling.samplers import make_sampler
from cdistill.schedule import EPS, T, sampling_grid
from cdistill.storage.run_folder import RunFolder
from cdistill.teachers import load_teacher
from cdistill.workflows.students import load_student
from tests.conftest import fast_distill

SMALL = ["training.iterations=4", "evaluation.samples=64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny run of CTM on the mixture, and one of a consistency model with another form."""
    path = tmp_path_factory.mktemp("runs")
    assert run(fast_distill(path / "ctm", *SMALL)) == 0
    cm = ["objective.name=cm", "objective.dsm=false", "preconditioning.name=analytic"]
    assert run(fast_distill(path / "cm", *SMALL, *cm)) == 0
    return path


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def arrays(path: str) -> np.ndarray:
    with np.load(path) as found:
        return found["arr_0"].transpose(0, 3, 1, 2) if "arr_0" in found else found["samples"]


def draw(*arguments: str) -> None:
    assert run(["sample", "--seeds", "0-4", "--format", "npz", *arguments]) == 0


def test_a_student_by_each_sampler(folder, tmp_path):
    student = ["--run", str(folder / "ctm"), "--nfe", "2"]
    draw(*student)
    draw(*student, "--sampler", "gamma", "--gamma", "0")
    draw(*student, "--sampler", "gamma", "--gamma", "0.5")
    draw(*student, "--sampler", "gamma", "--gamma", "1")
    draw(*student, "--sampler", "cm")
    draw("--run", str(folder / "ctm"), "--times", f"{T},{float(sampling_grid(2)[1])!r},{EPS}")
    names = ["nfe2", "nfe2-gamma-0", "nfe2-gamma-0.5", "nfe2-gamma-1", "nfe2-cm", "nfe2-times"]
    assert sorted(path.stem for path in (tmp_path / "samples").iterdir() if path.suffix != ".json") == sorted(names)
    usual, none, half, whole, cm, times = (arrays(f"samples/{name}.npz") for name in names)
    assert (usual == none).all()
    assert (usual == times).all()
    assert (whole == cm).all()
    assert (half != usual).any()
    assert (half != cm).any()


def test_a_teacher_by_each_sampler(tmp_path):
    draw("--teacher", "digits")
    draw("--teacher", "digits", "--nfe", "34")
    draw("--teacher", "digits", "--sampler", "dpmpp-2m", "--nfe", "10")
    draw("--teacher", "digits", "--sampler", "euler", "--times", "10,1,0.1")
    names = ["teacher", "teacher-nfe34", "teacher-nfe10-dpmpp-2m", "teacher-nfe4-euler-times"]
    assert sorted(path.stem for path in (tmp_path / "samples").iterdir() if path.suffix != ".json") == sorted(names)
    heun, named, dpm, euler = (arrays(f"samples/{name}.npz").astype(float) for name in names)
    assert (heun == named).all()
    assert ((dpm - heun) ** 2).mean() < 0.5 * ((euler - heun) ** 2).mean()


def test_a_file_holds_what_the_sampler_draws():
    draw("--teacher", "mixture-1d", "--sampler", "dpmpp-2m", "--nfe", "10", "--out", "x")
    sampler = make_sampler(load_teacher("mixture-1d").denoiser, None, "dpmpp-2m", 10)
    assert (arrays("x/teacher-nfe10-dpmpp-2m.npz") == generate(sampler, (1,), range(5))[0].numpy()).all()


def test_a_student_trained_as_a_consistency_model_jumps_to_eps_only(folder, capsys):
    """Also with a form that could jump anywhere: the network has learnt s = eps alone."""
    student = load_student(RunFolder(folder / "cm"))
    assert student.preconditioning.to_eps_only
    assert not make_preconditioning("ctm").to_eps_only
    draw("--run", str(folder / "cm"), "--nfe", "3", "--out", "a")
    draw("--run", str(folder / "cm"), "--nfe", "3", "--sampler", "cm", "--out", "b")
    assert (arrays("a/nfe3.npz") == arrays("b/nfe3.npz")).all()
    assert run(["sample", "--run", str(folder / "cm"), "--sampler", "ctm"]) == 2
    assert "use 'cm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sampler", "gamma"], "needs a number from 0 to 1"),
        (["--gamma", "0.5"], "goes with the sampler 'gamma'"),
        (["--sampler", "heun"], "for a student: cm, ctm, gamma"),
    ],
)
def test_mistakes(folder, capsys, arguments, words):
    capsys.readouterr()
    assert run(["sample", "--run", str(folder / "ctm"), *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


def test_images_are_inverted_and_lead_back(tmp_path, capsys):
    """Quantised to bytes, they are a little off the teacher's own; the latents are noise of the right size."""
    draw("--teacher", "digits", "--nfe", "64")
    capsys.readouterr()
    assert run(["invert", "samples/teacher-nfe64.npz", "--teacher", "digits", "--nfe", "64", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["images"], record["converged"]) == (5, 5)
    assert record["round_trip_rms"] < 0.05
    assert record["latent_rms"] == pytest.approx(1, abs=0.15)
    with np.load("latents.npz") as found:
        assert found["latents"].shape == (5, 1, 8, 8)
        x, labels = torch.from_numpy(found["latents"]), torch.from_numpy(found["labels"])
    with torch.inference_mode():
        again = make_sampler(load_teacher("digits").denoiser, None, "heun", 64)(x, labels, x.clone)
    difference = again - from_uint8(torch.from_numpy(arrays("samples/teacher-nfe64.npz")))
    assert float(difference.square().mean().sqrt()) == pytest.approx(record["round_trip_rms"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.npz", "--teacher", "digits"], 3, "no such file"),
        (["other.npz", "--teacher", "digits"], 4, "must be in the file"),
        (["other.npz", "--teacher", "digits", "--run", "x"], 2, "--run: goes without --teacher"),
        (["other.npz", "--teacher", "digits", "--nfe", "2,4"], 2, "got 2 numbers"),
        (["other.npz", "--teacher", "digits", "--out", "x.png"], 2, "ends in .npz"),
    ],
)
def test_mistakes_in_invert(arguments, code, words, capsys):
    np.savez("other.npz", samples=np.zeros((2, 1, 8, 8), np.uint8))
    assert run(["invert", *arguments]) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
