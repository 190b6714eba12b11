"""`import cdistill`: fast, without torch, and everything that is public is there, typed and documented."""

import inspect
import subprocess
import sys
from pathlib import Path

import cdistill

ROOT = Path(__file__).resolve().parents[1]


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, cdistill; sys.exit(bool({'torch', 'pydantic', 'rich', 'numpy'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_everything_public_can_be_imported_and_says_what_it_takes():
    assert set(cdistill.__all__) <= set(dir(cdistill))
    for name in cdistill.__all__:
        value = getattr(cdistill, name)
        if inspect.isfunction(value):
            assert inspect.getdoc(value), name
            assert ">>> " in inspect.getdoc(value), f"{name}: no executed example"
            signature = inspect.signature(value)
            assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values()), name


def test_other_names_are_refused():
    assert not hasattr(cdistill, "estimate")
