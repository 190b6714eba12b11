"""The EDM path in miniature: a DDPM++ of 100 thousand parameters under an official name, in a pickle, with a zip."""

import dataclasses
import io
import json
import zipfile

import pytest
import torch
from PIL import Image

from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.networks.denoiser import count_parameters
from cdistill.storage.checkpoints import load_tensors
from cdistill.teachers import load_teacher, named, official
from cdistill.teachers.official import OFFICIAL
from cdistill.workflows import distill as training
from cdistill.workflows import estimate as estimation
from tests.edm_teacher import write_teacher
from tests.teachers.test_teachers import random_denoiser

SMALL = {
    **OFFICIAL["edm-cifar10-cond"].architecture,
    "resolution": 8, "channels": 1, "model_channels": 16, "channel_mult": [1, 1], "num_blocks": 2,
    "attn_resolutions": [4], "dropout": 0.1,
}  # fmt: skip
SETS = [
    "training.precision=fp32", "training.iterations=4", "training.batch_size=16", "objective.distance=l2",
    "objective.points=6", "objective.max_ode_steps=5", "estimation.samples=32", "estimation.timesteps=8",
    "evaluation.samples=64", "evaluation.nfe=[1,2]", "evaluation.grid_images=4",
    'evaluation.metrics=["frechet-pixels","teacher-mse"]',
]  # fmt: skip


def write_zip(path, count: int = 256) -> None:
    """The digits as EDM's dataset_tool.py would store them."""
    source = load_source("digits")
    labels = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for index in range(count):
            name = f"{index // 1000:05d}/img{index:08d}.png"
            buffer = io.BytesIO()
            Image.fromarray(source.samples[index, 0].numpy()).save(buffer, "png")
            archive.writestr(name, buffer.getvalue())
            labels.append([name, int(source.labels[index])])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The folders of a user who has put the files where the messages said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setenv("CDISTILL_OFFLINE", "1")
    table = {**OFFICIAL, "edm-cifar10-cond": dataclasses.replace(OFFICIAL["edm-cifar10-cond"], architecture=SMALL)}
    for module in (official, named):
        monkeypatch.setattr(module, "OFFICIAL", table)
    (tmp_path / "assets").mkdir()
    denoiser = random_denoiser(SMALL)
    assert 80_000 < count_parameters(denoiser) < 150_000
    write_teacher(tmp_path / "assets" / OFFICIAL["edm-cifar10-cond"].file, denoiser, SMALL)
    write_zip(tmp_path / "digits.zip")
    return tmp_path


def output(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_from_pickle_and_zip_to_samples_and_results(world, capsys, monkeypatch):
    """Convert, estimate, distil, sample, evaluate; then the same by the official name, by file and by --weights."""
    pickled = world / "assets" / OFFICIAL["edm-cifar10-cond"].file
    assert run(["convert", str(pickled), "--out", "converted.safetensors", "--json"]) == 0
    assert output(capsys)["parameters"] < 200_000

    common = ["--data", "digits.zip", "--samples", "32", "--timesteps", "8", "--json"]
    runs = (["--teacher", "edm-cifar10-cond"], ["--teacher", "converted.safetensors"], ["--teacher", str(pickled)])
    estimates = []
    for number, teacher in enumerate([*runs, ["--teacher", "edm-cifar10-cond", "--weights", str(pickled)]]):
        assert run(["estimate-coeffs", *teacher, *common, "--out", f"{number}.safetensors"]) == 0
        estimates.append(output(capsys))
        monkeypatch.setattr(estimation, "draw_coefficients", lambda path, estimate: None)  # one picture is enough
    assert all(found["l"] == estimates[0]["l"] and found["s"] == estimates[0]["s"] for found in estimates)

    sets = [part for value in [*SETS, 'data="digits.zip"'] for part in ("--set", value)]
    recipe = ["distill", "--recipe", "cifar10-cond", "--out", "runs/mini", "--json"]
    assert run([*recipe, *sets, "--set", "preconditioning.coefficients=1.safetensors"]) == 0
    rows = output(capsys)["rows"]
    assert {row["nfe"] for row in rows if row["sampler"] == "student"} == {1, 2}

    assert run(["sample", "--run", "runs/mini", "--nfe", "1,2", "--seeds", "0-9", "--format", "npz", "--json"]) == 0
    assert len(output(capsys)["files"]) == 2
    assert run(["evaluate", "--run", "runs/mini", "--nfe", "1,3", "--samples", "64", "--json"]) == 0
    assert {row["nfe"] for row in output(capsys)["rows"] if row["sampler"] == "student"} == {1, 3}


@pytest.mark.slow
def test_without_the_data_a_teacher_draws_its_own(world, capsys, monkeypatch):
    """`data = "teacher:64"`: drawn once, the same for every later run."""
    for module in (estimation, training):
        monkeypatch.setattr(module, "draw_coefficients", lambda path, estimate: None)
    sets = [part for value in [*SETS, 'data="teacher:64"'] for part in ("--set", value)]
    assert run(["distill", "--recipe", "cifar10-cond-ctm", "--out", "runs/free", "--json", *sets]) == 0
    capsys.readouterr()
    files = list((world / "assets" / "teacher-samples").rglob("*.safetensors"))  # the data, and the endpoints
    (kept,) = (file for file in files if load_tensors(file, "samples")[0]["samples"].dtype == torch.uint8)
    tensors, header = load_tensors(kept, "samples")
    assert (tuple(tensors["samples"].shape), tensors["samples"].dtype) == ((64, 1, 8, 8), torch.uint8)
    assert header["identity"]["teacher"] == load_teacher("edm-cifar10-cond").digest
    before = kept.stat().st_mtime_ns
    arguments = ["estimate-coeffs", "--teacher", "edm-cifar10-cond", "--data", "teacher:64"]
    assert run([*arguments, "--samples", "32", "--timesteps", "6"]) == 0
    assert kept.stat().st_mtime_ns == before
    assert run(["evaluate", "--run", "runs/free", "--nfe", "1", "--samples", "64", "--split", "heldout"]) == 0
    assert len(list(kept.parent.glob("*.safetensors"))) == 2  # and the endpoints are in a folder of their own
    assert not [file for file in files if file.parent == kept.parent and file != kept]


@pytest.mark.slow
def test_two_processes_distil_a_network_with_a_layer_that_is_never_used(world, run_cli):
    """EDM's augmentation layer gets no gradient, which DDP would not accept of a parameter that is trained."""
    write_teacher(world / "mine.pkl", random_denoiser(SMALL), SMALL)
    values = [*SETS, 'teacher="mine.pkl"', 'data="digits.zip"', "estimation.samples=16", "training.iterations=3"]
    sets = [part for value in values for part in ("--set", value)]
    done = run_cli("distill", "--recipe", "cifar10-cond", "--out", "runs/two", "--nproc", "2", *sets)
    assert done.returncode == 0, done.stderr
    assert "2 x cpu" in done.stderr


def test_a_teacher_that_names_no_data_asks_for_some(world, capsys):
    write_teacher(world / "mine.pkl", random_denoiser(SMALL), SMALL)
    assert run(["estimate-coeffs", "--teacher", "mine.pkl", "--samples", "32", "--timesteps", "6"]) == 2
    assert "give a source, a path or 'teacher'" in capsys.readouterr().err


def test_data_of_another_kind_are_refused(world, capsys):
    """The official data of this name are 3x32x32; these are 1x8x8."""
    (world / "assets" / "data").mkdir()
    (world / "digits.zip").rename(world / "assets" / "data" / "cifar10-32x32.zip")
    assert run(["estimate-coeffs", "--teacher", "edm-cifar10-cond", "--samples", "32", "--timesteps", "6"]) == 4
    assert "cifar10-32x32.zip" in capsys.readouterr().err


def test_missing_data_are_named_with_their_place(world, capsys):
    assert run(["estimate-coeffs", "--teacher", "edm-cifar10-cond", "--samples", "32", "--timesteps", "6"]) == 3
    message = capsys.readouterr().err
    assert "cifar10-32x32.zip" in message
    assert "cs.toronto.edu" in message
    assert str(world / "assets" / "data") in message
