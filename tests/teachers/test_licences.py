"""The licences that teachers carry."""

import pytest
import torch

from cdistill.cli.app import run
from cdistill.registry import TEACHERS
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.teachers import Teacher, load_teacher, named, official, save_teacher
from cdistill.teachers.foreign import _UNKNOWN_LICENCE
from cdistill.teachers.official import LICENCE, OFFICIAL
from tests.edm_teacher import random_denoiser, write_teacher
from tests.workflows.test_edm_path import SMALL

OURS = "Apache-2.0 (cdistill's own weights); trained on "


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("digits", f"{OURS}handwritten digits of the UCI Machine Learning Repository (CC BY 4.0)"),
        ("patches", f"{OURS}the two sample photographs of scikit-learn (CC BY)"),
        ("mixture-1d", "none needed: an exact formula, without trained weights or data"),
    ],
)
def test_teachers_that_ship_say_their_licence(name, licence):
    assert load_teacher(name).licence == licence


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Miniature networks under EDM's names, in EDM's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    small = {name: official.Official(entry.file, entry.data, SMALL) for name, entry in OFFICIAL.items()}
    for module in (official, named):
        monkeypatch.setattr(module, "OFFICIAL", small)
    return tmp_path


def test_every_official_teacher_is_nvidias(world):
    rest = {name for name in TEACHERS.names() if not name.startswith("mixture-")} - {"digits", "patches"}
    assert rest == set(OFFICIAL)
    for name, entry in OFFICIAL.items():
        write_teacher(world / entry.file, random_denoiser(SMALL), SMALL)
        assert load_teacher(name).licence == LICENCE == "CC BY-NC-SA 4.0 (NVIDIA, EDM weights): no commercial use"


def test_a_file_says_its_licence_converted_or_not(world):
    write_teacher(world / "mine.pkl", random_denoiser(SMALL), SMALL)
    assert run(["convert", "mine.pkl"]) == 0
    assert load_tensors(world / "mine.safetensors", "teacher")[1]["licence"] == LICENCE
    assert load_teacher("mine.safetensors").licence == load_teacher("mine.pkl").licence == LICENCE
    assert load_teacher("edm-cifar10", world / "mine.safetensors").licence == LICENCE


def test_a_state_dict_is_of_unknown_licence_except_under_an_official_name(world):
    torch.save(random_denoiser(SMALL).state_dict(), world / "state.pt")  # noqa: TID251
    assert load_teacher("state.pt").licence == _UNKNOWN_LICENCE
    assert _UNKNOWN_LICENCE.startswith("unknown; ")
    assert load_teacher("edm-cifar10", world / "state.pt").licence == LICENCE


@pytest.mark.parametrize(("stated", "licence"), [("MIT", "MIT"), (None, "unknown"), (3, "unknown"), ("", "unknown")])
def test_an_own_teacher_has_the_licence_of_its_header_or_none(world, stated, licence):
    header = {"architecture": SMALL, "sigma_data": 0.5, "data": ""}
    header |= {} if stated is None else {"licence": stated}
    save_tensors(world / "own.safetensors", random_denoiser(SMALL).state_dict(), "teacher", header)
    assert load_teacher("own.safetensors").licence == licence
    assert load_teacher("edm-cifar10", world / "own.safetensors").licence == licence


def test_a_saved_teacher_keeps_its_licence(world):
    for licence, header, expected in (
        ("CC0", {}, "CC0"),
        ("unknown", {"licence": "MIT"}, "MIT"),
        ("unknown", {}, "unknown"),
    ):
        teacher = Teacher("own", random_denoiser(SMALL), "digits", licence)
        save_teacher(world / "own.safetensors", teacher, SMALL, header)
        assert load_teacher("own.safetensors").licence == expected
    assert "licence" not in load_tensors(world / "own.safetensors", "teacher")[1]


def test_a_teacher_of_a_plug_in_is_of_unknown_licence():
    assert Teacher("mine", load_teacher("mixture-1d").denoiser, "").licence == "unknown"
