"""Recipes: TOML files checked whole before anything runs.

Every name is looked up, unknown keys are refused, and all errors are reported at once. Nothing here imports torch.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from cdistill.errors import MissingAssetError, RecipeError, suggest
from cdistill.estimation.settings import EstimationSection
from cdistill.evaluation.settings import EvaluationSection
from cdistill.networks.settings import NetworkSection
from cdistill.preconditionings.settings import PreconditioningSection
from cdistill.registry import SOURCES, TEACHERS, is_data_path, is_teacher_data, teacher_data_count
from cdistill.settings import AnySection, Section, check_section, known
from cdistill.teachers.official import WEIGHT_SUFFIXES
from cdistill.training.settings import (
    CheckpointSection,
    DenoisingSection,
    DistillSection,
    GanSection,
    LoggingSection,
    StudentCheckpointSection,
)


def _known_teacher(name: str) -> str:
    """Checks the name of a teacher; the path of a file of weights passes."""
    return name if name.endswith(WEIGHT_SUFFIXES) else known(TEACHERS)(name)


def _known_data(name: str) -> str:
    """Checks the name of a data source; a path passes."""
    return name if is_data_path(name) else known(SOURCES)(name)


def _known_data_or_teacher(name: str) -> str:
    """Checks the name of a data source; a path passes, and so do samples of the teacher."""
    try:
        return f"teacher:{teacher_data_count(name)}" if is_teacher_data(name) else _known_data(name)
    except RecipeError as error:
        raise ValueError(str(error).removeprefix("data: ")) from error


class TeacherRecipe(Section):
    """Everything that `cdistill train-teacher` needs."""

    data: Annotated[str, AfterValidator(_known_data)]
    seed: Annotated[int, Field(ge=0)] = 0
    network: NetworkSection
    training: DenoisingSection
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()

    def architecture(self, shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
        """Returns the description of the network for images of `shape`, see `cdistill.networks.architecture`."""
        fitted = {"resolution": shape[-1], "channels": shape[0], "num_classes": num_classes}
        return {"network": "song", **fitted, **self.network.model_dump()}


class DistillRecipe(Section):
    """Everything that `cdistill distill` needs; `weights` is the teacher's file where it is in no usual place."""

    teacher: Annotated[str, AfterValidator(_known_teacher)]
    weights: str | None = None
    data: Annotated[str, AfterValidator(_known_data_or_teacher)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    preconditioning: PreconditioningSection = PreconditioningSection()
    estimation: EstimationSection = EstimationSection()
    training: DistillSection
    gan: GanSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: StudentCheckpointSection = StudentCheckpointSection()
    logging: LoggingSection = LoggingSection()

    @property
    def weights_path(self) -> Path | None:
        """`weights` as a path."""
        return None if self.weights is None else Path(self.weights)

    @model_validator(mode="after")
    def _consistent(self) -> "DistillRecipe":
        if self.preconditioning.name == "cm" and self.training.method != "cm":
            raise ValueError("preconditioning.name: 'cm' jumps to eps only; it needs training.method = 'cm'")
        if self.gan is not None and self.training.method != "ctm":
            raise ValueError("gan: the GAN loss is CTM's; it needs training.method = 'ctm'")
        if self.gan is not None and self.gan.start >= self.training.iterations:
            raise ValueError(f"gan.start: got {self.gan.start}; training.iterations is {self.training.iterations}")
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> "DistillRecipe":
        metric, _, calls = (self.checkpoint.best or "").rpartition("@")
        measured = self.evaluation
        if metric and (int(calls) not in measured.nfe or metric not in (measured.metrics or [metric])):
            raise ValueError(
                f"checkpoint.best: got {self.checkpoint.best!r}; evaluation measures "
                f"{', '.join(measured.metrics) or 'every metric that applies'} at NFE {measured.nfe}"
            )
        return self


def load_recipe(path: Path, model: type[AnySection], overrides: Sequence[str] = ()) -> AnySection:
    """Reads and checks a recipe.

    Args:
        path: A TOML file, or the name of a recipe that ships with the package ("digits"). Its key ``extends`` names
            another recipe, beside it or shipped, whose values it takes over and changes.
        model: What the recipe must be.
        overrides: ``a.b=c`` each; the value is TOML, or text if it is not.

    Raises:
        MissingAssetError: No such file.
        RecipeError: It is no TOML, or wrong; all errors are listed, a line each.
    """
    path = find_recipe(path)
    values = _read(path)
    for override in overrides:
        _override(values, override)
    return check_section(values, model, str(path))


def load_any_recipe(path: Path, overrides: Sequence[str] = ()) -> "DistillRecipe | TeacherRecipe":
    """Reads and checks a recipe of either kind, see `load_recipe`; one with a section `network` trains a teacher."""
    if "network" in _read(find_recipe(path)):
        return load_recipe(path, TeacherRecipe, overrides)
    return load_recipe(path, DistillRecipe, overrides)


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that ship with the package: name -> path."""
    here = Path(__file__).resolve().parents[1]
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


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
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from error
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or path.resolve() in outer:
        raise RecipeError(f"{path}: extends: got {base!r}; needs the name of another recipe, and no circle")
    beside = path.parent / base
    return _merge(_read(beside if beside.is_file() else find_recipe(Path(base)), [*outer, path.resolve()]), values)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns `old` with the values of `new` in it, section by section."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _merge(old[key], value) if both else value
    return merged


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one ``a.b=c`` in `values`."""
    match = re.fullmatch(r"([\w-]+(?:\.[\w-]+)*)=(.*)", override, re.DOTALL)
    if match is None:
        raise RecipeError(f"--set {override!r}: needs the form section.key=value, training.iterations=100 say")
    *parents, key = match[1].split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is a value, not a section")
    try:
        values[key] = tomllib.loads(f"value = {match[2]}")["value"]
    except tomllib.TOMLDecodeError:
        values[key] = match[2]
