"""Classes that are not equally frequent, that do not all occur, or that have names: from the data to the samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.data.source import from_uint8
from cdistill.evaluation.evaluator import Evaluator
from cdistill.evaluation.settings import EvaluationSection
from cdistill.networks.classes import Classes
from cdistill.sampling.drawing import generate
from cdistill.workflows.students import load_student
from tests.archives import encode, members, random_images, write_folder, write_zip

SMALL = [
    "training.iterations=1", "training.batch_size=8", "network.model_channels=16", "network.attn_resolutions=[]",
    "network.channel_mult=[1]",
]  # fmt: skip
SHORT = [
    "training.iterations=1", "training.batch_size=8", "evaluation.samples=64", "evaluation.nfe=[1]",
    "trajectories.count=256", "objective.points=2",
]  # fmt: skip


def sets(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def folder_of(path: Path, counts: dict[str, int]) -> Path:
    """Images in a folder for each class."""
    images = iter(random_images(sum(counts.values()), 8, 1))
    content = {f"{name}/{k:03d}.png": encode(next(images)) for name, count in counts.items() for k in range(count)}
    return write_folder(path, content)


def train_on(path: Path) -> str:
    assert run(["train-teacher", "--recipe", "teacher-digits", *sets([*SMALL, f'data="{path}"']), "--out", "t"]) == 0
    return "t/teacher.safetensors"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))


def labels_of(path: str) -> np.ndarray:
    with np.load(path) as file:
        return file["labels"]


def test_classes_are_drawn_as_the_data_have_them_from_teacher_to_student(capsys, tmp_path):
    teacher = train_on(folder_of(tmp_path / "plain", {"a": 95, "b": 5}))
    assert "classes: a 95, b 5" in capsys.readouterr().err
    many = ["--seeds", "0-639", "--format", "npz"]
    assert run(["sample", "--teacher", teacher, "--nfe", "2", "--sampler", "euler", *many, "--out", "s"]) == 0
    assert "classes: a 95, b 5" in capsys.readouterr().err
    labels = labels_of("s/teacher-nfe2-euler.npz")
    assert 0.02 < labels.mean() < 0.09
    assert json.loads(Path("s/teacher-nfe2-euler.json").read_text())["classes"] == "a 95, b 5"
    uniform = ["sample", "--teacher", teacher, "--nfe", "2", "--sampler", "euler", *many, "--out", "u"]
    assert run([*uniform, "--classes", "uniform"]) == 0
    assert 0.4 < labels_of("u/teacher-nfe2-euler.npz").mean() < 0.6
    changes = sets([*SHORT, f'teacher="{teacher}"', f'data="{tmp_path / "plain"}"'])
    assert run(["distill", "--recipe", "digits", *changes, "--out", "d"]) == 0
    assert load_student("d").denoiser.known_classes == Classes((95, 5), ("a", "b"))
    assert json.loads(Path("d/evaluation.json").read_text())["classes"] == "a 95, b 5"
    assert run(["sample", "--run", "d", "--nfe", "1", *many, "--out", "r"]) == 0
    assert (labels_of("r/nfe1.npz") == labels).all()
    assert run(["evaluate", "d", "--nfe", "1", "--classes", "uniform"]) == 0


def test_a_perfect_generator_of_uneven_classes_is_measured_so(tmp_path):
    source = load_source(str(folder_of(tmp_path / "plain", {"a": 95, "b": 5})))
    of_class = [from_uint8(source.samples[source.labels == k]).double() for k in range(2)]

    def perfect(x, labels, noise):
        return torch.stack(
            [of_class[k][int(state.sum().abs() * 997) % len(of_class[k])] for k, state in zip(labels, x, strict=True)]
        )

    values = {}
    for classes in ("data", "uniform"):
        section = EvaluationSection(samples=600, metrics=["frechet-pixels"], classes=classes)
        evaluator = Evaluator(section, (1, 8, 8), source.classes, None, source, Accelerator(cpu=True))
        row = evaluator.measure("perfect", 1, evaluator.draw(perfect, "perfect"))
        values[classes] = row.estimates["frechet-pixels"].value
    assert values["data"] < values["uniform"] / 5


def test_classes_without_images_are_never_drawn():
    images, table = random_images(20, 8, 1), [0, 5] * 10
    source = load_source(str(write_zip(Path("x.zip"), members(images, table))))
    assert source.classes.counts == (10, 0, 0, 0, 0, 10)
    for classes in (source.classes, source.classes.alike()):
        labels = generate(lambda x, labels, noise: x, (1, 8, 8), range(256), classes.shares)[1]
        assert set(labels.tolist()) == {0, 5}


def test_balanced_classes_are_drawn_as_edm_draws_them():
    for counts in ((7, 7, 7), (178, 182, 177)):
        labels = generate(lambda x, labels, noise: x, (2,), range(64), Classes(counts).shares)[1]
        expected = []
        for seed in range(64):
            draw = torch.Generator().manual_seed(seed)
            torch.randn(2, generator=draw)
            expected.append(int(torch.randint(3, (), generator=draw)))
        assert labels.tolist() == expected


def test_names_of_classes_are_compared_and_accepted(capsys, tmp_path):
    teacher = train_on(folder_of(tmp_path / "plain", {"a": 6, "b": 6, "c": 6}))
    short = sets([*SHORT, f'teacher="{teacher}"'])
    other = folder_of(tmp_path / "other", {"a_new": 6, "b": 6, "z": 6})
    assert run(["distill", "--recipe", "digits", *short, *sets([f'data="{other}"']), "--out", "no"]) == 4
    assert "t/teacher.safetensors' are a, b, c; name the folders alike" in capsys.readouterr().err
    fewer = folder_of(tmp_path / "fewer", {"a": 6, "c": 6})
    assert run(["distill", "--recipe", "digits", *short, *sets([f'data="{fewer}"']), "--out", "yes"]) == 0
    assert load_student("yes").denoiser.known_classes == Classes((6, 0, 6), ("a", "b", "c"))
    arguments = ["sample", "--run", "yes", "--nfe", "1", "--seeds", "0-3", "--format", "npz", "--classes"]
    assert run([*arguments, "c,0", "--out", "s"]) == 0
    assert labels_of("s/nfe1.npz").tolist() == [2, 0, 2, 0]
    assert run([*arguments, "d", "--out", "n"]) == 2
    assert "--classes: got 'd'; known: a, b, c" in capsys.readouterr().err
