"""What the READMEs show works as typed."""

import re
import shlex
from pathlib import Path

import pytest

from cdistill.cli.app import run
from cdistill.registry import REGISTRIES
from cdistill.workflows import estimate
from tests.conftest import FAST

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
READMES = {path.relative_to(ROOT): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("*/**/README.md")]}
BLOCKS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALLER = {
    "distill": [part for value in [*FAST, "training.iterations=2"] for part in ("--set", value)],
    "estimate-coeffs": ["--samples", "64", "--timesteps", "8"],
    "compare": ["--samples", "64", "--timesteps", "8", "--trajectories", "8", "--points", "4", "--nfe", "1,2"],
    "sample": ["--seeds", "0-3"],
    "evaluate": ["--samples", "16"],
}


def test_the_check_runs_the_readmes_test_command():
    test_command = BLOCKS[1].strip()
    assert test_command.startswith("pip install -e '.[dev]'")
    assert test_command in (ROOT / ".ci" / "run").read_text()


def test_the_first_command_installs_and_distils():
    assert BLOCKS[0].strip() == "pip install . && cdistill distill --recipe digits"


@pytest.mark.slow
def test_the_pipeline_runs_in_its_order_in_an_empty_folder(tmp_path, monkeypatch):
    """Every command of the pipeline as typed, followed by options that make it small."""
    monkeypatch.chdir(tmp_path)
    fit, few = estimate._fit, {"fit_trajectories": 64}  # which `compare` has no option for
    monkeypatch.setattr(
        estimate,
        "_fit",
        lambda teacher, source, settings, accelerator: fit(
            teacher, source, settings.model_copy(update=few), accelerator
        ),
    )
    lines = BLOCKS[2].strip().splitlines()
    assert len(lines) == 8
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "cdistill"
        smaller = next((more for name, more in SMALLER.items() if line.startswith(f"cdistill {name}")), [])
        assert run([*arguments, *smaller]) == 0, line


@pytest.mark.slow
def test_the_same_in_python(tmp_path, monkeypatch, capsys):
    """As printed, with a smaller training and fewer samples."""
    monkeypatch.chdir(tmp_path)
    smaller = [*FAST, "training.iterations=4", "evaluation.nfe=[1,2,3]"]
    code = PYTHON[0].replace('["preconditioning.', f'[*{smaller}, "preconditioning.')
    scope: dict[str, object] = {}
    exec(code.replace("samples=256, timesteps=48", "samples=64, timesteps=12"), scope)
    assert scope["images"].shape == (16, 1, 8, 8)
    assert "student" in capsys.readouterr().out


def test_a_sampler_of_ones_own_gets_f_and_g(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    arguments = ["--teacher", "digits", "--samples", "64", "--timesteps", "12", "--out", "l-and-s.safetensors"]
    assert run(["estimate-coeffs", *arguments]) == 0
    scope = {"t": torch.tensor([80.0, 1.0]), "s": torch.tensor([1.0, 1.0]), "x_t": 0, "D": lambda x, t, s: 1}
    exec("import cdistill\n" + PYTHON[1], scope)
    assert 0 < float(scope["g"][0]) < 1
    assert (float(scope["f"][1]), float(scope["g"][1])) == (1, 0)


def test_the_example_preconditioning_passes_the_boundary_condition():
    import torch

    scope: dict[str, type] = {}
    exec(PYTHON[2], scope)
    f, g = scope["Squared"]()(torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.5]))
    assert (f.tolist(), g.tolist()) == ([1.0, 0.25], [0.0, 0.75])


def test_every_registered_name_is_named():
    text = "".join(READMES.values())
    registries = REGISTRIES.values()
    assert not [name for registry in registries for name in registry.names() if f"`{name}`" not in text]
    assert not [registry.group for registry in registries if f"`{registry.group}`" not in README]


def test_every_file_and_module_that_is_named_exists():
    for place, text in READMES.items():
        files = re.findall(r"`((?:cdistill|tests|recipes)/[\w./-]+)`", text)
        links = [(ROOT / place).parent / link for link in re.findall(r"\]\((?!http)([\w./-]+)\)", text)]
        modules = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (tests[\w.]+)", text)]
        missing = [name for name in [*files, *links, *modules] if not (ROOT / name).exists()]
        assert not missing, place


def test_nothing_is_left_to_be_filled_in():
    for text in [*READMES.values(), (ROOT / "CHANGELOG.md").read_text()]:
        assert not re.search(r"@[A-Z]+@", text)
