"""What several commands take: their shared options, and the parsing of what a person types."""

import re
from pathlib import Path
from typing import Annotated

import typer

from cdistill.errors import RecipeError
from cdistill.registry import (
    PRECONDITIONINGS,
    SAMPLERS,
    Registry,
)
from cdistill.storage.run_folder import RunFolder, latest_run

MOST = 10_000_000  # numbers in a list that a person types
LARGEST = 2**32  # torch's generator on a CPU keeps 32 bits of a seed
TFLOPS = 42.0  # what an A800 of the paper sustained on CIFAR-10, by its hours and our count


def micro_batch_size(text: str | None) -> str | None:
    """Checks a number of images, or "auto"."""
    if text is None or text == "auto" or (text.isdecimal() and int(text)):
        return text
    raise RecipeError(f"--micro-batch: got {text!r}; needs a number of images, or auto")


RecipeOption = Annotated[Path, typer.Option("--recipe", "-r", help="A TOML file, or the name of a shipped recipe.")]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Override, as in --set training.iterations=100; repeatable.")
]
ResumeOption = Annotated[
    str,
    typer.Option(help="auto: go on where the run stopped; never: refuse a folder with a run; or a run folder."),
]
ProcessesOption = Annotated[int, typer.Option("--nproc", min=1, help="Processes to start on this machine.")]
MicroBatchOption = Annotated[
    str | None,
    typer.Option(
        callback=micro_batch_size,
        metavar="N|auto",
        help="Images that a device works on at once; auto: as many as fit. The recipe's accumulation by default.",
    ),
]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder; the latest one by default.")]
WeightsOption = Annotated[
    Path | None, typer.Option(help="File of the teacher's weights; looked for and downloaded by default.")
]
StepOption = Annotated[str, typer.Option("--step", help="Of the run: last, best or the number of a step.")]
TflopsOption = Annotated[
    float, typer.Option(min=1e-6, help="TFLOP/s that a device sustains; the paper's A800s did 33 to 44.")
]
SamplerOption = Annotated[
    str | None, typer.Option("--sampler", help="A name, see cdistill ls samplers; ctm or cm, and heun from a teacher.")
]
TimesOption = Annotated[
    str | None, typer.Option("--times", help="Noise levels in place of --nfe: 80,2.5,0.002, or 2.5 without the ends.")
]
GammaOption = Annotated[
    float | None, typer.Option("--gamma", help="Fresh noise of the sampler gamma: 0 none, as ctm, to 1 all, as cm.")
]
FEATURES_OPTION = typer.Option(
    help="Feature network (cdistill ls features), a TorchScript file, or module:callable, uint8 (B,3,H,W) -> (B,d); "
    "the last two run code that you name."
)
FeaturesOption = Annotated[str, FEATURES_OPTION]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]


def numbers(text: str) -> list[int]:
    """Parses ``2,3,5`` and ``0-63``, mixed too.

    Raises:
        RecipeError: It is neither.
    """
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            stretch = range(int(first), int(last if dash else first) + 1)
            if stretch.stop > LARGEST or len(stretch) > MOST:
                raise RecipeError(f"got {text!r}; at most {MOST:,} numbers below 2^32")
            found += stretch
    except ValueError as error:
        raise RecipeError(f"got {text!r}; needs numbers and ranges, as in 2,3,5 or 0-63") from error
    if not found:
        raise RecipeError(f"got {text!r}; an empty range")
    return found


def calls(text: str) -> list[int]:
    """Parses numbers of network calls.

    Raises:
        RecipeError: One is less than 1.
    """
    found = numbers(text)
    if min(found) < 1:
        raise RecipeError(f"--nfe: got {min(found)}; the number of network calls must be 1 or more")
    return found


def known_sampler(name: str | None) -> str | None:
    """Returns the name of a sampler, None for the default.

    Raises:
        UnknownNameError: It is not registered.
    """
    return None if name is None else SAMPLERS.check(name)


def known_step(text: str) -> str:
    """Returns which checkpoint of a run is meant: "last", "best" or a number.

    Raises:
        RecipeError: None of them.
    """
    if text not in ("last", "best") and not re.fullmatch("[0-9]{1,18}", text):
        raise RecipeError(f"--step: got {text!r}; needs last, best or the number of a step")
    return text


def known_forms(text: str) -> list[str]:
    """Parses names of preconditionings with commas between them; one that is named twice counts once.

    Raises:
        UnknownNameError: One is not registered.
    """
    return list(dict.fromkeys(PRECONDITIONINGS.check(name.strip()) for name in text.split(",")))


def known_names(text: str | None, registry: Registry) -> list[str] | None:
    """Returns the names in a list with commas, which a registry knows; None for None."""
    return None if text is None else [registry.check(name.strip()) for name in text.split(",")]


def distinct(seeds: list[int]) -> list[int]:
    """Returns `seeds` if none occurs twice; a seed has one image.

    Raises:
        RecipeError: One does.
    """
    if len(set(seeds)) < len(seeds):
        raise RecipeError("--seeds: a seed is named twice; each seed is one image")
    return seeds


def short_name(text: str) -> str:
    """Returns a name, or that of the file at a path, fit for the name of another file."""
    return re.sub(r"[^\w-]+", "-", Path(text).stem if "/" in text or "." in text else text)


def with_suffix(path: Path, suffix: str) -> Path:
    """Returns `path` if it ends in `suffix`.

    Raises:
        RecipeError: It does not.
    """
    if path.suffix != suffix:
        raise RecipeError(f"{path}: needs a name that ends in {suffix}")
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
