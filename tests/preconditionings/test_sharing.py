"""Coefficient files in other people's code, and the licences that teachers carry."""

import subprocess
import sys

import pytest
import torch

from cdistill.cli.app import run
from cdistill.errors import CorruptFileError, MissingAssetError, RecipeError, UnknownNameError
from cdistill.preconditionings import Preconditioning, load_preconditioning, make_preconditioning
from cdistill.preconditionings.coefficients import save_coefficients
from cdistill.registry import TEACHERS
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.teachers import Teacher, base, load_teacher, official, save_teacher
from cdistill.teachers.foreign import _UNKNOWN_LICENCE
from cdistill.teachers.official import LICENCE, OFFICIAL
from tests.conftest import PACKAGE, environment
from tests.edm_teacher import random_denoiser, write_teacher
from tests.workflows.test_edm_path import SMALL

HEADER = {"teacher": "mixture-1d", "teacher_sha256": "ab" * 32, "samples": 7}
OURS = "Apache-2.0 (cdistill's own weights); trained on "


@pytest.fixture
def file(tmp_path, exact_coefficients):
    path = tmp_path / "c.safetensors"
    save_coefficients(path, exact_coefficients, {}, HEADER)
    return path


@pytest.mark.parametrize("name", ["analytic", "analytic-forward"])
def test_three_lines_give_f_and_g_of_the_table(file, exact_coefficients, name):
    t, s = torch.tensor([80.0, 3.0, 0.5]), torch.tensor([2.0, 1.0, 0.5])
    form = load_preconditioning(name, coefficients=str(file))
    assert isinstance(form, Preconditioning)
    f, g = form(t, s)
    expected = make_preconditioning(name, table=exact_coefficients)(t, s)
    assert torch.equal(f, expected[0])
    assert torch.equal(g, expected[1])
    assert f.dtype == g.dtype == torch.float64
    assert (float(f[2]), float(g[2])) == (1, 0)


def test_the_default_is_the_analytic_form_and_knows_its_origin(file):
    form = load_preconditioning(coefficients=file)
    assert type(form).__name__ == "Analytic"
    assert form.provenance == {**HEADER, "kind": "coefficients", "schema": 1}
    assert make_preconditioning("ctm").provenance == {}


def test_what_cannot_be_built_is_refused(file, tmp_path):
    with pytest.raises(RecipeError, match="Analytic: needs coefficients"):
        load_preconditioning()
    with pytest.raises(UnknownNameError, match="did you mean 'analytic'"):
        load_preconditioning("analitic", coefficients=file)
    with pytest.raises(MissingAssetError, match="no such file"):
        load_preconditioning(coefficients=tmp_path / "none.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CorruptFileError, match="checksum"):
        load_preconditioning(coefficients=file)


def test_other_peoples_code_imports_nothing_of_ours_that_is_heavy(file):
    code = (
        "import sys; from cdistill.preconditionings import load_preconditioning\n"
        "import torch\n"
        f"f, g = load_preconditioning(coefficients={str(file)!r})(torch.tensor(2.0), torch.tensor(1.0))\n"
        "heavy = 'accelerate typer rich pydantic torchvision sklearn scipy matplotlib PIL'.split()\n"
        "print(f.dtype, [name for name in heavy if name in sys.modules], "
        "sorted(name for name in sys.modules if name.startswith('cdistill.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("torch.float64 [] "), done.stdout + done.stderr
    assert "cdistill.teachers" not in done.stdout


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
    for module in (official, base):
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
