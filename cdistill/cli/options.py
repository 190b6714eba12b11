"""What several commands take: options of a recipe's section, shared options, and the parsing of what is typed."""

import inspect
import re
import types
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from cdistill.errors import RecipeError, printable
from cdistill.registry import PRECONDITIONINGS, SAMPLERS
from cdistill.settings import MOST_CALLS, Section, check_section
from cdistill.storage.files import check_place
from cdistill.storage.run_folder import RunFolder, latest_run

MOST = 10_000_000  # numbers in a list that a person types
_RANGE = re.compile(r"\d+(-\d+)?")
LARGEST = 2**32  # torch's generator on a CPU keeps 32 bits of a seed

Command = Callable[..., None]


def numbers(text: str) -> list[int]:
    """Parses ``2,3,5`` and ``0-63``, mixed too.

    Raises:
        RecipeError: It is neither.
    """
    parsed: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            stretch = range(int(first), int(last if dash else first) + 1)
            if stretch.stop > LARGEST or len(stretch) + len(parsed) > MOST:
                raise RecipeError(f"got {printable(text)!r}; at most {MOST:,} numbers below 2^32")
            parsed += stretch
    except ValueError as error:
        raise RecipeError(f"got {printable(text)!r}; needs numbers and ranges, as in 2,3,5 or 0-63") from error
    if not parsed:
        raise RecipeError(f"got {printable(text)!r}; an empty range")
    return parsed


def class_names(text: str | None) -> list[str] | Literal["uniform"] | None:
    """Parses classes by number, range or name, as in ``0-3,dog``; "uniform" and None stay."""
    if text is None:
        return None
    if text == "uniform":
        return "uniform"
    parts = [part.strip() for part in text.split(",")]
    return [name for part in parts for name in (map(str, numbers(part)) if _RANGE.fullmatch(part) else [part])]


def calls(text: str) -> list[int]:
    """Parses numbers of network calls.

    Raises:
        RecipeError: One is less than 1 or more than 10,000, or there are more than 100.
    """
    parsed = numbers(text)
    if min(parsed) < 1:
        raise RecipeError(f"--nfe: got {min(parsed)}; the number of network calls must be 1 or more")
    if max(parsed) > MOST_CALLS or len(parsed) > 100:
        raise RecipeError(f"--nfe: got {printable(text)!r}; at most 100 numbers of up to {MOST_CALLS:,} network calls")
    return parsed


def names_of(text: str) -> list[str]:
    """Parses names with commas between them; one that is named twice counts once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def preconditionings_of(text: str | None) -> list[str]:
    """Parses names of preconditionings; all of them for None.

    Raises:
        UnknownNameError: One is not registered.
    """
    return PRECONDITIONINGS.names() if text is None else [PRECONDITIONINGS.check(name) for name in names_of(text)]


def short_name(text: str) -> str:
    """Returns a name, or that of the file at a path, fit for the name of another file."""
    return re.sub(r"[^\w-]+", "-", Path(text).stem if "/" in text or "." in text else text)


def with_suffix(path: Path, suffix: str) -> Path:
    """Returns `path` if it ends in `suffix` and can be written.

    Raises:
        RecipeError: It does not.
        CdistillError: It cannot.
    """
    if path.suffix != suffix:
        raise RecipeError(f"{path}: needs a name that ends in {suffix}")
    check_place(path)
    return path


def run_or_file(run: Path | None) -> RunFolder | Path:
    """Returns a run, the latest one by default, or the file of a converted student.

    Raises:
        RecipeError: A file that is not converted yet.
    """
    from cdistill.teachers.official import WEIGHT_SUFFIXES

    if run is not None and run.suffix == ".safetensors":
        return run
    if run is not None and run.suffix in WEIGHT_SUFFIXES:
        raise RecipeError(f"{run}: a file of weights; cdistill convert makes it one to draw from")
    return RunFolder(run) if run else latest_run()


def typed(context: typer.Context) -> dict[str, str]:
    """Returns the options and arguments that were typed: name of the parameter -> how it is written."""
    parameters = {parameter.name: parameter for parameter in context.command.params}
    return {
        name: parameter.opts[0] if parameter.opts[0].startswith("-") else name.upper()
        for name, parameter in parameters.items()
        if name is not None and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def refuse(context: typer.Context, reason: str, *names: str) -> None:
    """Refuses options that would do nothing, called `names`, for a `reason`.

    Raises:
        RecipeError: One of them was typed.
    """
    if idle := [text for name, text in typed(context).items() if name in names]:
        raise RecipeError(f"{', '.join(idle)}: {reason}")


def refuse_estimation(context: typer.Context, preconditionings: Sequence[str], *names: str) -> None:
    """Refuses options of the estimation of coefficients where no preconditioning needs any, see `refuse`."""
    if not any(getattr(PRECONDITIONINGS.get(name), "needs_coefficients", True) for name in preconditionings):
        refuse(context, "none of these preconditionings needs coefficients; leave it out", *names)


def refuse_others(context: typer.Context, reason: str, *names: str) -> None:
    """Refuses all options but those called `names`, --nproc and --json, see `refuse`."""
    refuse(context, reason, *(set(typed(context)) - {*names, "processes", "as_json"}))


def section_options(into: str, section: type[Section], *names: str, overrides: bool = False) -> Callable[..., Command]:
    """Gives a command options for fields of a recipe's section: name, type, default, limits and help are the field's.

    Args:
        into: The parameter of the command that receives the checked section in their place.
        section: Whose fields they are.
        names: The fields; all by default.
        overrides: Whether the command takes the values of a recipe where nothing is typed. Then it receives a dict of
            what was typed, and no option has a default of its own.
    """
    fields = {name: section.model_fields[name] for name in names or section.model_fields}

    def decorate(command: Command) -> Command:
        @wraps(command)
        def wrapped(**values: Any) -> None:
            given = {name: values.pop(name) for name in fields}
            given = {name: _parsed(name, value, fields[name]) for name, value in given.items() if value is not None}
            checked = check_section(given, section, "", option_name)
            command(**values, **{into: {name: getattr(checked, name) for name in given} if overrides else checked})

        own = inspect.signature(command).parameters.values()  # all of them by keyword: options have no order
        added = [_parameter(name, field, overrides) for name, field in fields.items()]
        parameters = [new for old in own for new in (added if old.name == into else [old])]
        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate


def option_name(key: str) -> str:
    """Returns how the option of a field is written; of one item of its list, too."""
    return f"--{key.partition('.')[0].replace('_', '-')}"


def limits(field: FieldInfo) -> str:
    """Returns what a field allows, in words; empty if its type says it all.

    >>> from pydantic import Field
    >>> limits(Field(ge=4, multiple_of=2))
    'at least 4, a multiple of 2'
    """
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "a multiple of"}
    kind = _bare(field.annotation)
    choices = [", ".join(map(str, get_args(kind)))] if get_origin(kind) is Literal else []
    inner = [item for item in getattr(kind, "__metadata__", ()) if isinstance(item, FieldInfo)]
    rules = [rule for item in [field, *inner] for rule in item.metadata]
    bounds = [f"{word} {getattr(rule, key):,}" for rule in rules for key, word in words.items() if hasattr(rule, key)]
    return ", ".join([*choices, *bounds])


def _bare(annotation: Any) -> Any:
    """Returns a type without its None."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _plain(annotation: Any) -> Any:
    """Returns a type without its None and its annotations: int, float, bool, list or str."""
    kind = _bare(annotation)
    kind = get_args(kind)[0] if hasattr(kind, "__metadata__") else kind
    origin = get_origin(kind) or kind
    return str if origin is Literal else origin


def _parameter(name: str, field: FieldInfo, overrides: bool) -> inspect.Parameter:
    """Returns a command's parameter for a field; lists are typed as text with commas."""
    kind, default = _plain(field.annotation), field.get_default(call_default_factory=True)
    if isinstance(default, list):
        default = ",".join(map(str, default)) or None
    shown: str | bool = default is not None
    if overrides:
        shown = "the run's recipe" if default is None else f"the run's recipe, otherwise {default}"
        default = None
    bounds = limits(field)
    text = escape(" ".join(filter(None, [field.description, f"({bounds})" if bounds else ""])))
    option = typer.Option(default, option_name(name), help=text, show_default=shown, rich_help_panel="Settings")
    annotation = (str if kind is list else kind) | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _parsed(name: str, value: Any, field: FieldInfo) -> Any:
    """Returns what was typed as the value of a field."""
    if _plain(field.annotation) is not list:
        return value
    if name == "nfe":
        return calls(value)
    return numbers(value) if name == "levels" else names_of(value)


def _known_step(text: str) -> str:
    if text not in ("last", "best") and not re.fullmatch("[0-9]{1,18}", text):
        raise RecipeError(f"--step: got {text!r}; needs last, best or the number of a step")
    return text


def _micro_batch_size(text: str | None) -> str | None:
    if text is None or text == "auto" or (text.isdecimal() and int(text)):
        return text
    raise RecipeError(f"--micro-batch: got {text!r}; needs a number of images, or auto")


def _finite(rate: float | None) -> float | None:
    if rate is not None and not rate < float("inf"):
        raise RecipeError(f"--tflops: got {rate}; needs a number")
    return rate


RECIPE, SAMPLER, RUNNING = "Recipe", "Sampler", "Execution"

_recipe, _sampler, _running = (partial(typer.Option, rich_help_panel=panel) for panel in (RECIPE, SAMPLER, RUNNING))
RecipeOption = Annotated[Path, _recipe("--recipe", "-r", help="A TOML file, or the name of a shipped recipe.")]
SetOption = Annotated[list[str], _recipe("--set", help="Override, as in --set training.iterations=100; repeatable.")]
AcceptDataOption = Annotated[
    bool, typer.Option("--accept-data", help="Resume though the data have changed since, as by a repair.")
]
ResumeOption = Annotated[
    str, typer.Option(help="auto: resume a stopped run; never: refuse a folder with a run; or the folder of a run.")
]
MICRO_BATCH = "Images that a device works on at once; auto: as many as fit. The recipe's accumulation by default."
MicroBatchOption = Annotated[str | None, _running(callback=_micro_batch_size, metavar="N|auto", help=MICRO_BATCH)]
TeacherOption = Annotated[str, typer.Option(help="A teacher's name (cdistill ls teachers) or its file.")]
DataOption = Annotated[
    str | None,
    typer.Option(help="Data that coefficients are estimated on, or 'teacher'; the teacher's own by default."),
]
WeightsOption = Annotated[
    Path | None, typer.Option(help="File of the teacher's weights; looked for and downloaded by default.")
]
RunOption = Annotated[
    Path | None, typer.Option("--run", help="Run folder or converted student; the latest run by default.")
]
StepOption = Annotated[
    str, typer.Option("--step", callback=_known_step, help="Checkpoint of the run: last, best, or a step.")
]
SAMPLER_NAME = "A name (cdistill ls samplers); by default the student's own, and heun for a teacher."
SamplerOption = Annotated[
    str | None, _sampler("--sampler", callback=lambda name: name and SAMPLERS.check(name), help=SAMPLER_NAME)
]
TimesOption = Annotated[
    str | None, _sampler("--times", help="Noise levels in place of --nfe: 80,2.5,0.002, or 2.5 without the ends.")
]
GammaOption = Annotated[
    float | None, _sampler("--gamma", help="Fresh noise of the sampler gamma: from 0, none, as ctm, to 1, all, as cm.")
]
TflopsOption = Annotated[
    float,
    typer.Option(min=1e-6, callback=_finite, help="TFLOP/s that a device sustains; the paper's A800s did 33 to 44."),
]
ProcessesOption = Annotated[
    int, typer.Option("--nproc", min=1, max=1024, help="Processes to start on this machine.", rich_help_panel=RUNNING)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.", rich_help_panel=RUNNING)]
