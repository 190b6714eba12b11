"""Preconditionings from coefficient files, in cdistill and in other people's code."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cdistill.errors import (
    CdistillError,
    CorruptFileError,
    MismatchError,
    MissingAssetError,
    RecipeError,
    UnknownNameError,
)
from cdistill.preconditionings import Preconditioning, load_preconditioning, make_preconditioning
from cdistill.preconditionings.coefficients import save_coefficients
from tests.conftest import PACKAGE, environment

HEADER = {"teacher": "mixture-1d", "teacher_sha256": "ab" * 32, "samples": 7}


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
        "heavy = 'accelerate typer rich torchvision sklearn scipy matplotlib PIL'.split()\n"
        "print(f.dtype, [name for name in heavy if name in sys.modules], "
        "sorted(name for name in sys.modules if name.startswith('cdistill.')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("torch.float64 [] "), done.stdout + done.stderr
    assert "cdistill.teachers" not in done.stdout


def test_the_teacher_in_use_must_be_that_of_the_coefficients(file, exact_coefficients):
    own = SimpleNamespace(name="mixture-1d", digest="ab" * 32, denoiser=SimpleNamespace(sigma_data=0.7))
    other = SimpleNamespace(name="other", digest="cd" * 32, denoiser=SimpleNamespace(sigma_data=0.7))
    assert load_preconditioning("analytic", own, file).sigma_data == 0.7
    with pytest.raises(MismatchError, match=r"made for teacher 'mixture-1d'.*not for 'other'"):
        load_preconditioning("analytic", other, file)
    assert load_preconditioning("analytic", other, file, allow_other_teacher=True).provenance["samples"] == 7
    assert load_preconditioning("ctm", other, file).provenance == {}  # which needs none
    table = load_preconditioning("analytic", other, exact_coefficients)
    pair = torch.tensor(3.0), torch.tensor(1.0)
    assert table(*pair) == load_preconditioning(coefficients=file)(*pair)


def test_a_class_of_version_0_1_is_refused_in_one_line():
    with pytest.raises(CdistillError, match=r"Old: defines coefficients\(t, s\); since version 0\.2 it is f_and_g"):
        type("Old", (Preconditioning,), {"coefficients": lambda self, t, s: (t, s), "__qualname__": "Old"})
