"""The rules of the house: imports point one way, in no circle; names shadow nothing; what is public is documented."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

from cdistill.registry import REGISTRIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cdistill"

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
    ["preconditionings"],
    ["teachers"],
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


def name_of(path: Path) -> str:
    """The dotted name of a module, that of its folder for an ``__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(name: str) -> frozenset[str]:
    """Modules of the package that a module imports anywhere, lazily too; the public API holds all, and imports none."""
    if name == "cdistill":
        return frozenset()
    imported = set()
    for node in ast.walk(parse(MODULES[name])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cdistill":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {full if full in MODULES else str(node.module) for full in names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name in MODULES}
    return frozenset(imported - {name})


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def reachable(name: str) -> set[str]:
    """Modules that a module imports, directly or through others."""
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        new = imports_of(waiting.pop()) - reached
        reached |= new
        waiting += new
    return reached


def test_imports_point_down():
    arrows = {(name, other) for name in MODULES for other in imports_of(name) if room_of(name) != room_of(other)}
    upwards = {(name, other) for name, other in arrows if LEVEL[room_of(other)] <= LEVEL[room_of(name)]}
    assert upwards - {("cdistill.__main__", "cdistill.cli.app")} == set()


def test_no_module_imports_itself_through_others():
    """No circle between rooms, and none between the modules of a room, imports inside functions included."""
    assert [name for name in MODULES if name in reachable(name)] == []


def test_names_shadow_nothing():
    """A module or room named like one of the standard library breaks `accelerate launch cdistill`."""
    names = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert (names - {"__init__", "__main__"}) & FORBIDDEN == set()


def test_the_root_holds_few_files():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert (PACKAGE / "py.typed").is_file()


def test_there_are_few_classes():
    """200 when the rooms were laid out, 17 of them in that of the objectives, where each new one takes two."""
    counted = [path for name, path in MODULES.items() if not name.startswith("cdistill.objectives.")]
    classes = [node.name for path in counted for node in ast.walk(parse(path)) if isinstance(node, ast.ClassDef)]
    assert len(classes) <= 183


def test_no_short_module_serves_one_other():
    """A module under 40 lines with one importer belongs into it; settings are imported by every recipe."""
    alone = []
    for name, path in MODULES.items():
        importers = [other for other in MODULES if name in imports_of(other)]
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if path.stem not in ("__init__", "__main__", "settings") and lines < 40 and len(importers) == 1:
            alone.append(f"{name}: {lines} lines, for {importers[0]}")
    assert alone == []


def test_pages_are_short():
    pages = {ROOT / "README.md": 200, **dict.fromkeys(PACKAGE.rglob("README.md"), 150)}
    long = [path.relative_to(ROOT) for path, most in pages.items() if len(path.read_text().splitlines()) > most]
    assert long == []


def test_public_functions_are_typed_and_documented():
    """Every public function has types; those of modules and public classes have a docstring unless they override."""
    wrong = []
    for name, path in MODULES.items():
        tree = parse(path)
        private = {inner for node in tree.body if node_name(node).startswith("_") for inner in ast.walk(node)}
        owned = {inner for node in tree.body if isinstance(node, ast.ClassDef) for inner in node.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")]
                overrides = any(isinstance(d, ast.Name) and d.id == "override" for d in node.decorator_list)
                outer = (node in tree.body or node in owned) and node not in private
                if not all(a.annotation for a in arguments) or not node.returns:
                    wrong.append(f"{name}.{node.name}: types")
                if outer and not overrides and not ast.get_docstring(node):
                    wrong.append(f"{name}.{node.name}: docstring")
    assert wrong == []


def node_name(node: ast.AST) -> str:
    return getattr(node, "name", "")


def in_a_process(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_the_command_line_starts_without_torch():
    """Neither the help nor the modules of the commands need it."""
    names = [name for name in MODULES if name.startswith("cdistill.cli.")]
    in_a_process(
        f"import sys, {', '.join(names)}\n"
        "cdistill.cli.app.run(['--help']), cdistill.cli.app.run(['evaluate', '--help']), cdistill.cli.app.run(['ls'])\n"
        "sys.exit('torch' in sys.modules)"
    )


def test_no_file_of_the_package_reads_or_writes_pickles():
    forbidden = ("import pickle", "torch.save", "weights_only=False")
    assert [name for name, path in MODULES.items() if any(text in path.read_text() for text in forbidden)] == []


def test_every_built_in_name_can_be_imported_and_says_what_it_is():
    for kind, registry in REGISTRIES.items():
        assert registry.about, kind
        for name in registry.names():
            assert callable(registry.get(name))
            assert registry.summary(name).strip(), f"{kind} {name}"


def test_every_registry_is_listed():
    from cdistill import registry as module

    every = [value for value in vars(module).values() if isinstance(value, module.Registry)]
    assert {id(value) for value in every} == {id(value) for value in REGISTRIES.values()}
    assert len({registry.group for registry in REGISTRIES.values()}) == len(REGISTRIES)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [registry.group for registry in REGISTRIES.values() if f"`{registry.group}`" not in page] == []
