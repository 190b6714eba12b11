"""Recipes: TOML files checked whole before anything runs.

Every name is looked up, unknown keys are refused, and all errors are told at once. Nothing here imports torch.
"""

import json
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cdistill.errors import MissingAssetError, RecipeError, suggest
from cdistill.registry import (
    DISCRIMINATORS,
    DISTANCES,
    ESTIMATORS,
    METRICS,
    PRECONDITIONINGS,
    SAMPLERS,
    SOURCES,
    TEACHERS,
    Registry,
    check_features,
    is_data_path,
    is_teacher_data,
    teacher_data_count,
)
from cdistill.teachers.official import WEIGHT_SUFFIXES

SMOOTHED = 5  # points that a smoothing spline needs
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "fp16", "bf16"]


def _known(registry: Registry, files: bool = False) -> Callable[[str], str]:
    """Returns a check of names; with `files`, the path of a file of weights passes too."""

    def check(name: str) -> str:
        try:
            return name if files and name.endswith(WEIGHT_SUFFIXES) else registry.check(name)
        except RecipeError as error:
            raise ValueError(str(error)) from error

    return check


def _known_features(name: str) -> str:
    """Checks the name of a feature network; a TorchScript file's and ``module:callable`` pass."""
    try:
        return check_features(name)
    except RecipeError as error:
        raise ValueError(str(error)) from error


def _known_data(name: str) -> str:
    """Checks the name of a data source; a path passes."""
    return name if is_data_path(name) else _known(SOURCES)(name)


def _known_data_or_teacher(name: str) -> str:
    """Checks the name of a data source; a path passes, and so do samples of the teacher."""
    try:
        return f"teacher:{teacher_data_count(name)}" if is_teacher_data(name) else _known_data(name)
    except RecipeError as error:
        raise ValueError(str(error).removeprefix("data: ")) from error


def _known_estimator(name: str) -> str:
    """Checks the name of an estimator; "auto" passes."""
    return name if name == "auto" else _known(ESTIMATORS)(name)


def _known_goal(goal: str) -> str:
    """Checks METRIC@NFE, "fid@2" say."""
    metric, _, calls = goal.rpartition("@")
    if not (metric and re.fullmatch(r"[1-9][0-9]{0,9}", calls)):
        raise ValueError(f"got {goal!r}; needs METRIC@NFE, as in frechet-pixels@2")
    return f"{_known(METRICS)(metric)}@{calls}"


class Section(BaseModel):
    """A part of a recipe: strict types, no unknown keys, no change afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class CheckpointSection(Section):
    """When the state is saved."""

    every: Count = 200
    keep: Count = 2


class LoggingSection(Section):
    """Training steps between lines of metrics.jsonl, and accelerate's trackers that get the same numbers."""

    every: Count = 10
    trackers: list[Literal["tensorboard", "wandb"]] = []

    @model_validator(mode="after")
    def _consistent(self) -> "LoggingSection":
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: got {self.trackers}; name each once")
        return self


class StudentCheckpointSection(CheckpointSection):
    """`best`, METRIC@NFE, says by which measurement of the run one checkpoint more is kept, the best.

    By default it is the first metric of the evaluation at the first number of its network calls.
    """

    best: Annotated[str, AfterValidator(_known_goal)] | None = None


class NetworkSection(Section):
    """A small DDPM++ (arguments of SongUNet)."""

    model_channels: Annotated[int, Field(ge=16, multiple_of=4)]
    channel_mult: Annotated[list[Count], Field(min_length=1)]
    num_blocks: Count
    attn_resolutions: list[Count]
    dropout: Rate = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> "NetworkSection":
        for width in (self.model_channels, *[self.model_channels * factor for factor in self.channel_mult]):
            if width % min(32, width // 4):
                raise ValueError(f"model_channels: {width} channels make no {min(32, width // 4)} equal groups")
        return self

    def check_side(self, side: int) -> None:
        """Raises RecipeError unless images of `side` pixels can be halved as often, and attention has its place."""
        levels = len(self.channel_mult)
        sides = [side >> level for level in range(levels)]
        if side % 2 ** (levels - 1):
            raise RecipeError(
                f"network.channel_mult: {levels} levels; images of {side} pixels cannot be halved so often"
            )
        if wrong := [place for place in self.attn_resolutions if place not in sides]:
            raise RecipeError(f"network.attn_resolutions: got {wrong}; the network has {sides}")


class DenoisingSection(Section):
    """EDM's training of a teacher (Karras et al. 2022, Table 1)."""

    iterations: Count
    batch_size: Count
    learning_rate: Positive
    ema_rate: Rate
    p_mean: Annotated[float, Field(ge=-20, le=20)] = -1.2
    p_std: Annotated[float, Field(gt=0, le=10)] = 1.2
    sigma_data: Positive = 0.5
    flips: bool = True
    precision: Precision = "fp32"
    patience: Count = 20


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


class PreconditioningSection(Section):
    """f and g; `coefficients` is a file for those that need one, estimated first when it is not given."""

    name: Annotated[str, AfterValidator(_known(PRECONDITIONINGS))] = "analytic"
    coefficients: str | None = None
    allow_other_teacher: bool = False


class EstimationSection(Section):
    """How l and s are estimated (Zheng et al. 2025, Appendix B.1); "auto" is what suits the teacher or the device.

    With `target_error`, a noise level stops as soon as the standard errors of l and s are that small, and `samples` is
    the most that it may take.
    """

    estimator: Annotated[str, AfterValidator(_known_estimator)] = "auto"
    grid: Literal["log-uniform", "rho"] = "log-uniform"
    timesteps: Annotated[int, Field(ge=3)] = 120
    samples: Annotated[int, Field(ge=4, multiple_of=2)] = 4096
    seed: Annotated[int, Field(ge=0)] = 0
    target_error: Positive | None = None
    smoothing: Literal["none", "spline"] = "none"
    precision: Literal["auto", "fp32", "fp16"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> "EstimationSection":
        if self.smoothing != "none" and self.timesteps < SMOOTHED:
            raise ValueError(f"smoothing: needs {SMOOTHED} timesteps or more, got {self.timesteps}")
        return self


class DistillSection(Section):
    """Eq. 7 with DSM (method "ctm") or Eq. 5 (method "cm"), and Table 3's numbers."""

    method: Literal["ctm", "cm"] = "ctm"
    iterations: Count
    batch_size: Count
    learning_rate: Positive = 4e-4
    points: Annotated[int, Field(ge=2)] = 18
    max_ode_steps: Count = 17
    distance: Annotated[str, AfterValidator(_known(DISTANCES))] = "lpips"
    dsm: bool = True
    target: Literal["ema", "live"] = "ema"
    target_rate: Rate = 0.999
    ema_rate: Rate = 0.999
    dropout: Rate = 0.0
    flips: bool = True
    precision: Precision = "fp32"
    teacher_precision: Literal["same", "fp32", "fp16", "bf16"] = "same"
    compile: bool | Literal["auto"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    accumulation: Count = 1
    patience: Count = 20

    @model_validator(mode="after")
    def _consistent(self) -> "DistillSection":
        if self.method == "ctm" and self.max_ode_steps > self.points - 1:
            raise ValueError(f"max_ode_steps: got {self.max_ode_steps}; {self.points} points allow {self.points - 1}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation: {self.accumulation} does not divide batch_size {self.batch_size}")
        return self


def precision_of_teacher(section: DistillSection) -> Precision:
    """Returns the precision that a recipe asks for its teacher."""
    return section.precision if section.teacher_precision == "same" else section.teacher_precision


class GanSection(Section):
    """CTM's GAN loss, on from step `start`: then every other step trains the discriminator instead of the student."""

    discriminator: Annotated[str, AfterValidator(_known(DISCRIMINATORS))] = "small"
    start: Annotated[int, Field(ge=0)] = 0
    learning_rate: Positive = 2e-3
    augment: list[Literal["color", "translation", "cutout"]] = ["color", "translation", "cutout"]


class EvaluationSection(Section):
    """What is measured, when, and on how many images; `every` = 0 means at the end only.

    `features` is what FID and its kin look at, `reference` a file of its statistics of the real data, `baselines` are
    solvers by which the teacher is measured at the same numbers of calls.
    """

    nfe: Annotated[list[Count], Field(min_length=1)] = [1, 2, 3, 5]
    every: Annotated[int, Field(ge=0)] = 0
    samples: Annotated[int, Field(ge=2)] = 2000
    metrics: list[Annotated[str, AfterValidator(_known(METRICS))]] = []
    split: Literal["train", "heldout"] = "train"
    first_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    features: Annotated[str, AfterValidator(_known_features)] = "legacy_tensorflow"
    reference: str | None = None
    baselines: list[Annotated[str, AfterValidator(_known(SAMPLERS))]] = []
    grid_images: Count = 64


class DistillRecipe(Section):
    """Everything that `cdistill distill` needs; `weights` is the teacher's file where it is in no usual place."""

    teacher: Annotated[str, AfterValidator(_known(TEACHERS, files=True))]
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


AnySection = TypeVar("AnySection", bound=Section)


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


def check_section(values: dict[str, Any], model: type[AnySection], where: str) -> AnySection:
    """Turns parsed TOML into a recipe or a section of one; `where` begins every message.

    Raises:
        RecipeError: It is wrong; all errors are listed, a line each.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{where}: {_explain(item, model)}" for item in error.errors())) from error


def shipped_recipes() -> dict[str, Path]:
    """Returns the recipes that ship with the package: name -> path."""
    here = Path(__file__).resolve().parent
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


def _explain(item: Any, model: type[BaseModel]) -> str:
    """Makes one line of one of pydantic's errors."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key; {suggest(str(item['loc'][-1]), _fields(model, item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{key}: missing; it has no default"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: got {item['input']!r}; {message[0].lower()}{message[1:]}"


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Returns the keys that the section at `path` may have."""
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        choices = [annotation, *get_args(annotation)]  # a section, or one that may be left out
        sections = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
