"""The rules of the house: imports point one way, names shadow nothing, everything public is typed and documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cdistill"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# From the top to the bottom; a room imports from rooms below it and from its own. Siblings share a line and never meet.
ROOMS = [
    ["__main__"],
    ["cli"],
    ["workflows"],
    ["reporting"],
    ["analysis"],
    ["recipe"],
    ["training"],
    ["objectives"],
    ["evaluation"],
    ["sampling"],
    ["estimation"],
    ["preconditionings", "teachers"],
    ["data"],
    ["networks"],
    ["formats"],
    ["storage"],
    ["runtime"],
    ["settings"],
    ["schedule", "registry"],
    ["errors"],
    ["__init__"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FORBIDDEN = {*sys.stdlib_module_names, "datasets", "evaluate", "wandb", "utils"} - {"__main__", "__future__"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, lazily too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "cdistill":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            found |= {name if name in LEVEL else "__init__" for name in names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = room_of(path)
    if path == PACKAGE / "__init__.py":
        return  # the public API, from every room, lazily
    for other in imports_of(path) - {own}:
        assert LEVEL[other] > LEVEL[own], f"{own} must not import {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_shadow_nothing(path):
    """A module of the package named like one of the standard library breaks `accelerate launch cdistill`."""
    if path.parent == PACKAGE:
        assert path.stem not in FORBIDDEN or path.stem in ("__init__", "__main__")
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert path.parent.name not in FORBIDDEN


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_are_typed_and_documented(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")]
            overrides = any(isinstance(mark, ast.Name) and mark.id == "override" for mark in node.decorator_list)
            if node.col_offset <= 4 and not overrides and not _is_nested(path, node):
                assert ast.get_docstring(node), f"{node.name} has no docstring"
            assert all(a.annotation for a in arguments), f"{node.name} has an argument without a type"
            assert node.returns, f"{node.name} has no return type"


def _is_nested(path: Path, node: ast.FunctionDef) -> bool:
    tree = ast.parse(path.read_text())
    inner = {
        child.lineno
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef)
        for child in ast.walk(outer)
        if child is not outer and isinstance(child, ast.FunctionDef)
    }
    private = {
        child.lineno
        for outer in ast.walk(tree)
        if isinstance(outer, ast.ClassDef) and outer.name.startswith("_")
        for child in ast.walk(outer)
        if isinstance(child, ast.FunctionDef)
    }
    return node.lineno in inner | private


def test_the_command_line_starts_without_torch():
    code = "import sys, cdistill.cli.app; cdistill.cli.app.run(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_no_file_of_the_package_reads_or_writes_pickles():
    for path in MODULES:
        text = path.read_text()
        assert "import pickle" not in text
        assert "torch.save" not in text
        assert "weights_only=False" not in text


def test_every_built_in_name_can_be_imported():
    from cdistill import registry as registries

    for registry in (found for found in vars(registries).values() if isinstance(found, registries.Registry)):
        for name in registry.names():
            assert callable(registry.get(name))


def test_doctests():
    import doctest
    import importlib

    flags = doctest.ELLIPSIS
    names = ["cdistill.errors", "cdistill.schedule", "cdistill.training.gan", "cdistill.objectives.ctm"]
    results = [doctest.testmod(importlib.import_module(name), optionflags=flags) for name in names]
    assert sum(result.attempted for result in results) >= 3
    assert sum(result.failed for result in results) == 0
