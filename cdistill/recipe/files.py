"""Reading and writing recipes: TOML files, what they extend, overrides; checked whole before anything runs.

Every name is looked up, unknown keys are refused, and all errors are reported at once.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from cdistill.errors import CorruptFileError, MissingAssetError, RecipeError, printable, suggest
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe, recipe_of_objectives
from cdistill.registry import OBJECTIVES
from cdistill.settings import AnySection, Section, check_section
from cdistill.storage.bounded import LARGEST_RECIPE, parse_toml, read_bytes
from cdistill.training.settings import MOVED

_LONGEST_CHAIN = 10  # recipes that extend each other
_MOST_PARTS = 16  # of a key


def load_recipe(path: Path, model: type[AnySection], overrides: Sequence[str] = ()) -> AnySection:
    """Reads and checks a recipe.

    Args:
        path: A TOML file, or the name of a recipe that ships with the package ("digits"). Its key ``extends`` names
            another recipe, beside it or shipped, whose values it takes over and changes.
        model: What the recipe must be.
        overrides: ``a.b=c`` each; the value is TOML, or text if it is not.

    Raises:
        MissingAssetError: No such file.
        RecipeError: It is not TOML, or wrong; all errors are listed, a line each.
    """
    path = find_recipe(path)
    values = _read(path)
    for override in overrides:
        values = _merge(values, _parse_override(override))
    return check_recipe(values, model, str(path))


def check_recipe(values: dict[str, Any], model: type[AnySection], where: str) -> AnySection:
    """Checks the values of a recipe, the objective's by its own section; see `check_section`."""
    if not issubclass(model, DistillRecipe):
        return check_section(values, model, where)
    sections: dict[str, Any] = {
        key: values.get(key, {}) for key in ("objective", "warmup") if key == "objective" or key in values
    }
    names = {key: given.get("name", "ctm") if isinstance(given, dict) else None for key, given in sections.items()}
    if unknown := {key: name for key, name in names.items() if name not in OBJECTIVES.names()}:
        only = {key: {"name": name} for key, name in unknown.items() if isinstance(sections[key], dict)}
        return check_section({**values, **only}, model, where)
    return cast(AnySection, check_section(values, recipe_of_objectives(*names.values()), where))


def load_any_recipe(path: str | Path, overrides: Sequence[str] = ()) -> DistillRecipe | TeacherRecipe:
    """Reads and checks a recipe of either kind, see `load_recipe`; one with a section `network` trains a teacher.

    >>> load_any_recipe("digits", ["training.batch_size=32"]).training.batch_size
    32
    """
    path = Path(path)
    if "network" in _read(find_recipe(path)):
        return load_recipe(path, TeacherRecipe, overrides)
    return load_recipe(path, DistillRecipe, overrides)


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that ship with the package: name -> path."""
    here = Path(__file__).resolve().parents[1]
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem)}


def find_recipe(path: Path) -> Path:
    """Returns `path` if it is a file, or the shipped recipe of that name.

    Raises:
        MissingAssetError: Neither.
    """
    if path.is_file():
        return path
    shipped = shipped_recipes()
    name = path.stem if path.suffix == ".toml" else path.name
    if name in shipped and path in (Path(name), Path(f"{name}.toml"), Path("recipes") / f"{name}.toml"):
        return shipped[name]
    raise MissingAssetError(f"{path}: no such recipe; give a TOML file or a shipped one; {suggest(path.stem, shipped)}")


def to_toml(recipe: Section) -> str:
    """Writes a recipe as TOML that reads back as the same recipe."""
    values = recipe.model_dump(exclude_none=True)
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]"] + [f"{key} = {_toml_value(value)}" for key, value in section.items()]
    return "\n".join(lines) + "\n"


def differences(old: Section, new: Section, free: Sequence[str] = ()) -> list[str]:
    """Returns ``key: old -> new`` for every value that differs, except below the keys in `free`."""
    first, second = _flat(old.model_dump()), _flat(new.model_dump())
    changed = [key for key in sorted(first | second) if first.get(key) != second.get(key)]
    return [
        f"{key}: {first.get(key)!r} -> {second.get(key)!r}"
        for key in changed
        if not any(key == name or key.startswith(f"{name}.") for name in free)
    ]


def _read(path: Path, outer: Sequence[Path] = ()) -> dict[str, Any]:
    """Reads a TOML file and those that it extends.

    Raises:
        RecipeError: A file is no TOML, or extends itself.
    """
    try:
        values = parse_toml(read_bytes(path, LARGEST_RECIPE))
    except CorruptFileError as error:
        raise RecipeError(str(error)) from error
    except ValueError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error
    base = values.pop("extends", None)
    values = _upgrade(values)
    if base is None:
        return values
    if not isinstance(base, str) or path.resolve() in outer or len(outer) == _LONGEST_CHAIN:
        shown = printable(repr(base))
        raise RecipeError(
            f"{path}: extends: got {shown}; needs the name of another recipe, in no cycle and no chain of more than "
            f"{_LONGEST_CHAIN}"
        )
    beside = path.parent / base
    return _merge(_read(beside if beside.is_file() else find_recipe(Path(base)), [*outer, path.resolve()]), values)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns `old` with the values of `new` in it, section by section.

    Where `new` names another objective, it inherits the settings that both have.
    """
    name = new["objective"].get("name") if isinstance(new.get("objective"), dict) else None
    if name in OBJECTIVES.names() and isinstance(old.get("objective"), dict):
        fields = OBJECTIVES.get(name).section_type.model_fields
        old = {**old, "objective": {key: value for key, value in old["objective"].items() if key in fields}}
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both else value
    return merged


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _parse_override(override: str) -> dict[str, Any]:
    """Turns ``a.b=c`` into nested sections."""
    match = re.fullmatch(r"([\w-]+(?:\.[\w-]+)*)=(.*)", override, re.DOTALL)
    if match is None:
        raise RecipeError(f"--set {override!r}: needs the form section.key=value, as in training.iterations=100")
    try:
        value = parse_toml(f"value = {match[2]}")["value"]
    except ValueError:
        value = match[2]
    if match[1].count(".") > _MOST_PARTS:
        raise RecipeError(f"--set {printable(override, 40)!r}: a key of more than {_MOST_PARTS} parts")
    for key in reversed(match[1].split(".")):
        value = {key: value}
    return dict(value)


def _upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """Moves what version 0.1 had in [training] to [objective]."""
    training = values.get("training")
    if not isinstance(training, dict) or "objective" in values or not MOVED.keys() & training.keys():
        return values
    objective = {MOVED[key].rpartition(".")[2]: value for key, value in training.items() if key in MOVED}
    if objective.get("name") == "cm":  # which had CTM's settings too, and did not read them
        objective = {key: value for key, value in objective.items() if key not in ("max_ode_steps", "target")}
    kept = {key: value for key, value in training.items() if key not in MOVED}
    return {**values, "objective": objective, "training": kept}
