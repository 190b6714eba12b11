"""The command line: options and their help; everything heavy is imported inside the commands."""

import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from cdistill import __version__
from cdistill.errors import CdistillError, DiskFullError, RecipeError
from cdistill.registry import (
    DISCRIMINATORS,
    DISTANCES,
    ESTIMATORS,
    FEATURES,
    METRICS,
    PRECONDITIONINGS,
    SAMPLERS,
    SOURCES,
    TEACHERS,
    WRITERS,
    Registry,
    check_features,
)
from cdistill.runtime import console
from cdistill.runtime import processes as launch
from cdistill.storage.files import FULL
from cdistill.storage.run_folder import RUNS, RunFolder, latest_run

app = typer.Typer(
    name="cdistill",
    help="Distil a diffusion model into a student that draws an image in one to ten network calls.\n\n"
    "Start with:  cdistill distill --recipe digits",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
plot_app = typer.Typer(help="Draw the paper's figures.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(plot_app, name="plot")

MOST = 10_000_000  # numbers in a list that a person types
LARGEST = 2**32  # torch's generator on a CPU keeps 32 bits of a seed
TFLOPS = 42.0  # what an A800 of the paper sustained on CIFAR-10, by its hours and our count
_arguments: list[str] = []  # of this run, for the processes that it starts


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
_FEATURES = typer.Option(
    help="Feature network (cdistill ls features), a TorchScript file, or module:callable, uint8 (B,3,H,W) -> (B,d); "
    "the last two run code that you name."
)
FeaturesOption = Annotated[str, _FEATURES]
OptimiseOption = Annotated[
    bool, typer.Option("--optimise-steps", help="Choose the times that end nearest to the teacher; FID may differ.")
]
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


def print_version(wanted: bool) -> None:
    """Prints the version and stops, if it is wanted."""
    if wanted:
        console.out.print(f"cdistill {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors and results only.")] = False,
) -> None:
    """Takes the options that stand in front of the command."""
    console.set_verbosity(-1 if quiet else 0)


@app.command("estimate-coeffs")
def estimate_coeffs(
    teacher: Annotated[str, typer.Option(help="A teacher's name (cdistill ls teachers) or its file.")],
    weights: WeightsOption = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data source, the path of one, or 'teacher'; the teacher's own by default."),
    ] = None,
    grid: Annotated[str, typer.Option(help="Noise levels: log-uniform or rho.")] = "log-uniform",
    timesteps: Annotated[
        int,
        typer.Option(help="Noise levels; with fewer than 24 the grid adds an error that the error bars do not show."),
    ] = 120,
    samples: Annotated[int, typer.Option(help="Samples at each noise level, even; the paper has 4096.")] = 1024,
    target_error: Annotated[
        float | None,
        typer.Option(help="Stop a noise level when the standard errors of l and s are this small; --samples at most."),
    ] = None,
    estimator: Annotated[
        str,
        typer.Option(help="autodiff (the paper's), forward (half its cost for the same errors), or auto: by teacher."),
    ] = "auto",
    smoothing: Annotated[str, typer.Option(help="Of l and s over log t: none or spline.")] = "none",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 (from t = 0.01 on), or auto: fp16 for forward on a GPU, otherwise fp32.")
    ] = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Run every estimator on the same samples and print how far they differ.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="File; coefficients-TEACHER.safetensors by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG; beside the file by default.")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Estimate l and s of a teacher, the coefficients of the analytic preconditioning, with their standard errors.

    Example:  cdistill estimate-coeffs --teacher digits --target-error 0.01
    """
    from cdistill.estimation.settings import EstimationSection
    from cdistill.settings import check_section
    from cdistill.teachers.official import find_weights

    values = {
        "grid": grid, "timesteps": timesteps, "samples": samples, "target_error": target_error, "seed": seed,
        "estimator": estimator, "smoothing": smoothing, "precision": precision,
    }  # fmt: skip
    section = check_section(values, EstimationSection, "estimate-coeffs")
    if compare and (estimator, target_error, precision == "fp16") != ("auto", None, False):
        raise RecipeError(
            "--compare: runs every estimator, in fp32, on the same samples; leave --estimator, --target-error and "
            "--precision fp16 out"
        )
    file = with_suffix(out or Path(f"coefficients-{Path(teacher).stem}.safetensors"), ".safetensors")
    picture = with_suffix(plot or file.with_suffix(".png"), ".png")
    find_weights(teacher, weights)
    start_processes(processes)
    start()
    from cdistill.workflows.estimate import compare_estimators, estimate_coefficients

    command = compare_estimators if compare else estimate_coefficients
    with console.json_only(as_json):
        record = command(teacher, weights, data, section, file, picture)
    finish(as_json, record, "   ".join(f"{key}: {record[key]}" for key in ("file", "files", "plot") if key in record))


@app.command()
def distill(
    recipe: RecipeOption,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/RECIPE by default.")] = None,
    weights: WeightsOption = None,
    override: SetOption = [],  # noqa: B006
    resume: ResumeOption = "auto",
    processes: ProcessesOption = 1,
    micro_batch: MicroBatchOption = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved recipe and its cost, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Distil a teacher into a student; ends in a table of results and a picture of samples.

    Example:  cdistill distill --recipe digits --set preconditioning.name=ctm --out runs/ctm
    """
    from cdistill.recipe.schema import DistillRecipe, load_recipe
    from cdistill.teachers.official import find_weights

    named = [] if weights is None else [f"weights={json.dumps(str(weights))}"]
    found = load_recipe(recipe, DistillRecipe, [*override, *named])
    if dry_run:
        return dry(found, processes, as_json)
    start_processes(processes)
    find_weights(found.teacher, found.weights_path)
    start()
    from cdistill.workflows.distill import distill as run_distill

    with console.json_only(as_json):
        folder = run_folder(recipe, out, resume)
        run_distill(found, folder, resume, micro_batch)
    return finish(as_json, RunFolder(folder).results(), "")


@app.command()
def plan(
    recipe: RecipeOption,
    override: SetOption = [],  # noqa: B006
    devices: Annotated[int, typer.Option(min=1, help="Devices that share the batch.")] = 1,
    tflops: TflopsOption = TFLOPS,
    as_json: JsonOption = False,
) -> None:
    """Count what a recipe will cost before anything runs: forwards, FLOPs, memory, hours.

    Example:  cdistill plan --recipe cifar10 --devices 4
    """
    from cdistill.recipe.schema import load_any_recipe

    if not tflops < math.inf:
        raise RecipeError(f"--tflops: got {tflops}; needs a number")
    found = load_any_recipe(recipe, override)
    start()
    from cdistill.workflows.plan import as_record, plan, print_plan

    cost = plan(found, devices)
    if as_json:
        return finish(True, as_record(cost, devices, tflops), "")
    return print_plan(cost, devices, tflops)


@app.command("train-teacher")
def train_teacher(
    recipe: RecipeOption,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/RECIPE by default.")] = None,
    override: SetOption = [],  # noqa: B006
    resume: ResumeOption = "auto",
    processes: ProcessesOption = 1,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved recipe and its cost, and stop.")] = False,
) -> None:
    """Train a teacher from scratch, as the embedded ones were.

    Example:  cdistill train-teacher --recipe teacher-digits
    """
    from cdistill.recipe.schema import TeacherRecipe, load_recipe

    found = load_recipe(recipe, TeacherRecipe, override)
    if dry_run:
        return dry(found, processes, False)
    start_processes(processes)
    start()
    from cdistill.workflows.distill import train_teacher as run_train

    path = run_train(found, run_folder(recipe, out, resume), resume)
    return console.say(f"teacher: {path}; use it with --teacher {path}")


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A .pkl or .pt of EDM, or a checkpoint of CTM or OpenAI.")],
    out: Annotated[Path | None, typer.Option(help="File; the same name with .safetensors by default.")] = None,
    flavour: Annotated[
        str | None, typer.Option("--as", help="Of OpenAI's ImageNet-64 files, which look alike: edm, cd or ct.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn someone else's weights into safetensors, without executing anything that is in the file.

    Example:  cdistill convert edm-cifar10-32x32-uncond-vp.pkl
    """
    if flavour not in (None, "edm", "cd", "ct"):
        raise RecipeError(f"--as: got {flavour!r}; needs edm, cd or ct")
    target = with_suffix(out or file.with_suffix(".safetensors"), ".safetensors")
    start()
    from cdistill.workflows.convert import convert as run_convert

    with console.json_only(as_json):
        record = run_convert(file, flavour, target)
    finish(as_json, record, "")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A file that cdistill made, the folder of a checkpoint or of a run.")],
    full: Annotated[bool, typer.Option("--full", help="Every tensor and noise level, and the whole recipe.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a file is and where it comes from, and verify its checksum.

    Example:  cdistill inspect coefficients-digits.safetensors
    """
    from cdistill.workflows.inspection import inspect as run_inspect

    with console.json_only(as_json):
        record = run_inspect(file, full)
    finish(as_json, record, "")


@app.command()
def sample(
    run: RunOption = None,
    teacher: Annotated[str | None, typer.Option(help="Draw from this teacher instead.")] = None,
    weights: WeightsOption = None,
    step: StepOption = "last",
    nfe: Annotated[str | None, typer.Option(help="Network calls: 2 or 1,2,5; 2 by default, 34 from a teacher.")] = None,
    sampler: SamplerOption = None,
    times: TimesOption = None,
    gamma: GammaOption = None,
    optimise_steps: OptimiseOption = False,
    seeds: Annotated[str, typer.Option(help="One image for each: 0-63 or 1,5,7.")] = "0-63",
    classes: Annotated[str | None, typer.Option(help="Classes, repeated along the seeds: 3 or 0-9.")] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="grid (one PNG), png (a folder of SEED.png), zip (EDM's data set), npz or tar (WebDataset).",
        ),
    ] = "grid",
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("samples"),
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images of a network call on a GPU, rounded up to whole chunks of 16 or 64; 256 by default. It may "
            "change their last bits. On a CPU a call holds one chunk whatever N is, and nothing depends on it.",
        ),
    ] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Draw images; an image depends on its seed alone. An interrupted command goes on where it was.

    Example:  cdistill sample --nfe 1,2,5 --seeds 0-99 --classes 0-9
    """
    WRITERS.check(form)
    if teacher is not None and run is not None:
        raise RecipeError("--teacher: goes without --run; one of them is drawn from")
    known_sampler(sampler)
    wanted = distinct(numbers(seeds)), None if classes is None else numbers(classes)
    counts = calls(nfe) if nfe else None
    chosen = None if teacher is not None else run_or_file(run)
    if optimise_steps and not isinstance(chosen, RunFolder):
        raise RecipeError("--optimise-steps: needs the folder of a run, whose teacher the student shall follow")
    if known_step(step) != "last" and not isinstance(chosen, RunFolder):
        raise RecipeError(f"--step: got {step!r}; goes with a run folder; a teacher or a file is of one step alone")
    if teacher is not None:
        from cdistill.teachers.official import find_weights

        find_weights(teacher, weights)
    start_processes(processes)
    start()
    from cdistill.sampling import SamplerChoice
    from cdistill.workflows.sample import sample as run_sample
    from cdistill.workflows.samplers import Request

    request = Request(SamplerChoice(sampler, None, times, gamma), counts, optimise_steps)
    console.say(f"sampling from {teacher or run or latest_run().path}")
    record = run_sample(chosen, teacher, weights, step, request, *wanted, form, out, batch_size)
    finish(as_json, record, "\n".join(record["files"]))


@app.command()
def invert(
    images: Annotated[
        Path, typer.Argument(help="A folder, .zip or .npz of images, with classes if the network has any.")
    ],
    run: RunOption = None,
    teacher: Annotated[
        str | None, typer.Option(help="Invert this teacher's solver instead of a student's jumps.")
    ] = None,
    weights: WeightsOption = None,
    nfe: Annotated[str | None, typer.Option(help="Network calls; 2 by default, 34 for a teacher.")] = None,
    times: TimesOption = None,
    out: Annotated[Path, typer.Option(help="An .npz with the latents.")] = Path("latents.npz"),
    as_json: JsonOption = False,
) -> None:
    """Find the noise that images come from, and say how well it leads back to them.

    Example:  cdistill invert samples/teacher.npz --teacher digits --nfe 64
    """
    if teacher is not None and run is not None:
        raise RecipeError("--teacher: goes without --run; one of them is inverted")
    counts, file = calls(nfe) if nfe else None, with_suffix(out, ".npz")
    chosen = None if teacher is not None else run_or_file(run)
    start()
    from cdistill.sampling import SamplerChoice
    from cdistill.workflows.invert import invert_images
    from cdistill.workflows.samplers import Request

    found = invert_images(images, chosen, teacher, weights, Request(SamplerChoice(times=times), counts), file)
    text = "{file}: {converged} of {images} converged, round trip rms {round_trip_rms:.3g}, latents {latent_rms:.3g} T"
    finish(as_json, found, text.format(**found))


@app.command()
def evaluate(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, converted students, or images; the latest run by default.")
    ] = None,
    run: RunOption = None,
    nfe: Annotated[str | None, typer.Option(help="Network calls: 2,3,5; the recipe's by default.")] = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Samples; the recipe's by default.")] = None,
    first_seed: Annotated[int | None, typer.Option(min=0, help="Seeds from here on; 0 by default.")] = None,
    weights: WeightsOption = None,
    step: StepOption = "last",
    metrics: Annotated[str | None, typer.Option(help="Names with commas; all that apply by default.")] = None,
    features: Annotated[str | None, _FEATURES] = None,
    reference: Annotated[
        str | None, typer.Option(help="Statistics of the real data: 'edm', or a file of EDM's or of reference-stats.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Real data, where the run does not say: a name or a file.")] = None,
    split: Annotated[str | None, typer.Option(help="Compare with train or heldout data.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The teacher, where the run does not say; alone, it is measured.")
    ] = None,
    baselines: Annotated[
        str | None, typer.Option(help="Measure the teacher by these solvers too: euler,dpmpp-2m.")
    ] = None,
    sampler: SamplerOption = None,
    times: TimesOption = None,
    gamma: GammaOption = None,
    optimise_steps: OptimiseOption = False,
    check: Annotated[
        Path | None, typer.Option(help="Repeat what this record describes, and compare every figure with it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where the comparison of several runs is written (JSON).")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure students at several numbers of network calls; compare several on the same seeds.

    Examples:  cdistill evaluate --nfe 2,3,5

    cdistill evaluate runs/digits-ctm runs/digits --nfe 2,3,5
    """
    values = {
        "nfe": calls(nfe) if nfe else None, "samples": samples, "split": split, "first_seed": first_seed,
        "reference": reference, "features": features and check_features(features),
        "metrics": known_names(metrics, METRICS),
        "baselines": known_names(baselines, SAMPLERS),
    }  # fmt: skip
    changes = {key: value for key, value in values.items() if value is not None}
    known_step(step)
    paths = [*(runs or []), *([run] if run else [])]
    if check is not None and (paths or changes or any((sampler, times, gamma, optimise_steps, teacher, data, out))):
        raise RecipeError("--check: repeats what the record says; leave the other options out")
    if out is not None and len(paths) < 2:
        raise RecipeError("--out: goes with several runs, for their comparison; a record lies beside its run")
    if not paths and teacher is None and check is None:
        paths = [latest_run().path]
    start_processes(processes)
    start()
    from cdistill.sampling import SamplerChoice
    from cdistill.workflows.evaluate import check as run_check
    from cdistill.workflows.evaluate import evaluate as run_evaluate
    from cdistill.workflows.targets import Target

    where = None if weights is None else str(weights)
    with console.json_only(as_json):
        if check is not None:
            record = run_check(check)
        else:
            chosen: list[str | None] = [*map(str, paths)] or [None]
            targets = [Target(path, teacher, data, where, step, optimise_steps, changes) for path in chosen]
            record = run_evaluate(targets, SamplerChoice(sampler, None, times, gamma), out)
    finish(as_json, record, "")


@app.command("reference-stats")
def reference_stats(
    data: Annotated[str, typer.Option(help="Data source, or the path of one.")],
    split: Annotated[str, typer.Option(help="train, or heldout where the data have such a part.")] = "train",
    features: FeaturesOption = "legacy_tensorflow",
    keep: Annotated[
        int, typer.Option(min=0, help="Feature vectors to write too, for kid, precision, recall, density and coverage.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="File; reference-DATA-FEATURES.npz by default.")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Write the statistics that samples are compared with: mean and covariance of the features of real data.

    Example:  cdistill reference-stats --data digits --features pixels --keep 1000
    """
    file = with_suffix(out or Path(f"reference-{short_name(data)}-{short_name(check_features(features))}.npz"), ".npz")
    start_processes(processes)
    start()
    from cdistill.workflows.reference_stats import write_reference

    with console.json_only(as_json):
        record = write_reference(data, split, features, keep, file)
    finish(as_json, record, "")


@app.command()
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; the latest run by default.")] = None,
    comparison: Annotated[
        Path | None, typer.Option(help="What `cdistill evaluate RUN_A RUN_B --out FILE` wrote: differences of runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML.")] = Path("report.html"),
    as_json: JsonOption = False,
) -> None:
    """Write one page about runs, finished or not: results, samples, curves, coefficients, recipe, provenance.

    Example:  cdistill report runs/digits runs/digits-ctm --out digits.html
    """
    page = with_suffix(out, ".html")
    from cdistill.workflows.report import report as run_report

    record = run_report(runs or [latest_run().path], page, comparison)
    finish(as_json, record, f"report: {page}")


@app.command()
def reproduce(
    claims: Annotated[
        list[str] | None,
        typer.Argument(help="acceleration, one-step, bcm, alignment, gan, mixture, or letters a to f; all by default."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller budgets: under 15 minutes on two cores.")] = False,
    experiments: Annotated[
        str | None,
        typer.Option(
            help="embedded, the default; settings (other learning rates, distances, batches); table-2 (real data)."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data sets with commas; all of the experiments' by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Trainings of each kind.")] = 3,
    jobs: Annotated[int | None, typer.Option(min=1, help="Trainings at once; as many as cores by default.")] = None,
    processes: ProcessesOption = 1,
    dry_run: Annotated[bool, typer.Option(help="List the trainings, their cost and commands, and stop.")] = False,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="TFLOP/s of a device, for --dry-run; 42 for table-2.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; reproduction, or reproduction-EXPERIMENTS, by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Test the paper's claims on data that ship with the package: train, measure, draw its figures, judge.

    The same command goes on where it was stopped.

    Example:  cdistill reproduce --quick
    """
    from cdistill.workflows.reproduce.claims import choose_claims
    from cdistill.workflows.reproduce.experiments import choose_data

    if quick and experiments is not None:
        raise RecipeError("--quick: is an experiment of its own; leave --experiments out")
    kind = "quick" if quick else experiments or "embedded"
    letters, chosen = choose_claims(claims or []), choose_data(kind, data)
    folder = out or Path("reproduction" if kind == "embedded" else f"reproduction-{kind}")
    start()
    from cdistill.workflows.reproduce.request import Request
    from cdistill.workflows.reproduce.run import reproduce as run_reproduce
    from cdistill.workflows.reproduce.trials import list_trials

    request = Request(letters, kind, chosen, seeds, processes, folder)
    rate = tflops or (TFLOPS if kind == "table-2" else None)
    with console.json_only(as_json):
        record = list_trials(request, rate) if dry_run else run_reproduce(request, jobs)
    finish(as_json, record, "")


@app.command()
def compare(
    teacher: Annotated[str, typer.Option(help="A teacher's name (cdistill ls teachers) or its file.")],
    weights: WeightsOption = None,
    data: Annotated[
        str | None, typer.Option(help="Data that coefficients are estimated on; the teacher's own by default.")
    ] = None,
    nfe: Annotated[str, typer.Option(help="Network calls of the untrained students.")] = "1,2,3,5",
    preconditionings: Annotated[str | None, typer.Option(help="Names with commas; all by default.")] = None,
    coefficients: Annotated[Path | None, typer.Option(help="A coefficient file; estimated by default.")] = None,
    points: Annotated[int, typer.Option(min=2, max=1000, help="Noise levels whose pairs are judged.")] = 18,
    trajectories: Annotated[int, typer.Option(min=2, max=MOST)] = 256,
    substeps: Annotated[int, typer.Option(min=1, max=1000, help="Heun's steps from one level to the next.")] = 4,
    timesteps: Annotated[int, typer.Option(help="Noise levels of the coefficient estimation.")] = 120,
    samples: Annotated[int, typer.Option(help="Samples of the coefficient estimation.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, max=MOST)] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; compare-TEACHER by default.")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Judge preconditionings before training, on the teacher's own trajectories.

    Example:  cdistill compare --teacher digits --nfe 1,2,3,5
    """
    from cdistill.estimation.settings import EstimationSection
    from cdistill.settings import check_section
    from cdistill.teachers.official import find_weights

    names = known_forms(preconditionings) if preconditionings else PRECONDITIONINGS.names()
    wanted = list(dict.fromkeys(calls(nfe)))
    section = check_section({"timesteps": timesteps, "samples": samples, "seed": seed}, EstimationSection, "compare")
    if (seed + 1) * trajectories > LARGEST:
        raise RecipeError(
            f"--seed: got {seed}; with {trajectories} trajectories each at most {LARGEST // trajectories - 1}"
        )
    find_weights(teacher, weights)
    start_processes(processes)
    start()
    from cdistill.workflows.compare import Request
    from cdistill.workflows.compare import compare as run_compare

    request = Request(names, wanted, points, trajectories, substeps, seed)
    folder = out or Path(f"compare-{Path(teacher).stem}")
    with console.json_only(as_json):
        record = run_compare(teacher, weights, data, request, coefficients, section, folder)
    finish(as_json, record, f"results: {folder / 'compare.json'}   heat maps: {folder / 'compare.png'}")


@plot_app.command("trajectories")
def plot_trajectories(
    preconditionings: Annotated[str, typer.Option(help="Names with commas.")] = "ctm,analytic",
    nfe: Annotated[int, typer.Option(min=1, max=1000, help="Jumps of the students.")] = 3,
    count: Annotated[int, typer.Option(min=2, help="Trajectories that are measured.")] = 4096,
    samples: Annotated[int, typer.Option(min=2, help="Samples of the coefficient estimation.")] = 4096,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path, typer.Option(help="PNG.")] = Path("plots/trajectories.png"),
    as_json: JsonOption = False,
) -> None:
    """Fig. 7: the 1-D mixture's trajectories, teacher against few-step students with the optimal denoiser."""
    names = known_forms(preconditionings)
    start()
    from cdistill.workflows.plot import draw_trajectories, print_trajectories

    results = draw_trajectories(names, nfe, count, seed, samples, with_suffix(out, ".png"))
    if not as_json:
        print_trajectories(results)
    finish(as_json, {"plot": str(out), "results": [vars(result) for result in results]}, str(out))


@plot_app.command("curves")
def plot_curves(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the first is what the others are compared with.")],
    metric: Annotated[str | None, typer.Option(help="A metric; the first that the runs share by default.")] = None,
    nfe: Annotated[str | None, typer.Option(help="Network calls: 2,3,5; all that the runs share by default.")] = None,
    reach: Annotated[float | None, typer.Option(help="Value to reach; the first run's best by default.")] = None,
    images: Annotated[bool, typer.Option("--images", help="Count images seen, not iterations.")] = False,
    losses: Annotated[bool, typer.Option("--losses", help="Draw what the training logged instead.")] = False,
    out: Annotated[Path, typer.Option(help="PNG; a CSV of the same name goes beside it.")] = Path("plots/curves.png"),
    as_json: JsonOption = False,
) -> None:
    """Figs. 2 and 3: training curves of runs, finished or not, and how much sooner each reaches a value.

    Example:  cdistill plot curves runs/digits-ctm runs/digits --nfe 2
    """
    if losses and (metric, nfe, reach) != (None, None, None):
        raise RecipeError("--losses: goes with none of --metric, --nfe and --reach")
    if not math.isfinite(reach or 0):
        raise RecipeError(f"--reach: got {reach}; needs a number")
    wanted = calls(nfe) if nfe else None
    from cdistill.workflows.curves import draw_evaluations, draw_losses, read_runs

    picture = with_suffix(out, ".png")
    with console.json_only(as_json):
        found = read_runs(runs)
        if losses:
            record = draw_losses(found, images, picture)
        else:
            record = draw_evaluations(found, metric, wanted, reach, images, picture)
    finish(as_json, record, f"plot: {record['plot']}   numbers: {record['csv']}")


@plot_app.command("coefficients")
def plot_coefficients(
    file: Annotated[Path, typer.Argument(help="A coefficient file.")],
    out: Annotated[Path | None, typer.Option(help="PNG; beside the file by default.")] = None,
) -> None:
    """Figs. 2c and 4: l, s, f and g of a coefficient file, next to CTM's."""
    from cdistill.workflows.plot import redraw_coefficients

    picture = with_suffix(out or file.with_suffix(".png"), ".png")
    redraw_coefficients(file, picture)
    console.say(str(picture))


@app.command("ls")
def list_names(
    kind: Annotated[
        str,
        typer.Argument(
            help="teachers, recipes, preconditionings, estimators, data, distances, discriminators, samplers, metrics, "
            "features or formats."
        ),
    ] = "recipes",
    as_json: JsonOption = False,
) -> None:
    """List what can be chosen."""
    from cdistill.recipe.schema import shipped_recipes

    registries = {
        "teachers": TEACHERS, "preconditionings": PRECONDITIONINGS, "estimators": ESTIMATORS, "data": SOURCES,
        "distances": DISTANCES, "discriminators": DISCRIMINATORS, "samplers": SAMPLERS, "metrics": METRICS,
        "features": FEATURES, "formats": WRITERS,
    }  # fmt: skip
    if kind not in {*registries, "recipes"}:
        raise RecipeError(f"ls: unknown {kind!r}; known: {', '.join([*registries, 'recipes'])}")
    names = list(shipped_recipes()) if kind == "recipes" else registries[kind].names()
    finish(as_json, {kind: names}, "\n".join(names))


@app.command("show")
def show_recipe(recipe: Annotated[Path, typer.Argument(help="A recipe's file or name.")]) -> None:
    """Print a recipe with its comments."""
    from cdistill.recipe.schema import find_recipe

    console.out.print(find_recipe(recipe).read_text(), end="", highlight=False, markup=False, soft_wrap=True)


@app.command("cp")
def copy_recipe(
    recipe: Annotated[Path, typer.Argument(help="A shipped recipe's name.")],
    target: Annotated[Path, typer.Argument(help="Where to.")],
) -> None:
    """Copy a shipped recipe, to change it."""
    from cdistill.recipe.schema import find_recipe

    text = find_recipe(recipe).read_text()
    if target.exists():
        raise RecipeError(f"{target}: exists already; choose another name")
    target.write_text(text)


@app.command()
def doctor() -> None:
    """Check this installation: versions, processors, threads, disk, weights that are present."""
    from cdistill.workflows.doctor import print_doctor

    print_doctor()


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


def dry(recipe: Any, devices: int, as_json: bool) -> None:
    """Prints a resolved recipe and what it costs."""
    from cdistill.recipe.schema import to_toml
    from cdistill.workflows.plan import as_record, plan, print_plan

    cost = plan(recipe, devices)
    if as_json:
        return finish(True, {**recipe.model_dump(), "plan": as_record(cost, devices, TFLOPS)}, "")
    console.out.print(to_toml(recipe), highlight=False, markup=False, soft_wrap=True)
    return print_plan(cost, devices, TFLOPS)


def start_processes(processes: int) -> None:
    """Runs this command in several processes in place of this one, if more than one are asked for."""
    if processes > 1:
        raise typer.Exit(launch.launch(processes, without_nproc(_arguments)))


def start() -> None:
    """Prepares a command that computes: threads, and signals that are answered where it can save."""
    from cdistill.runtime import signals as stopping

    stopping.install_handlers()
    launch.keep_memory()
    launch.set_threads()


def run_folder(recipe: Path, out: Path | None, resume: str) -> Path:
    """Returns the folder of a run: `out`, the one to resume, or runs/NAME-OF-RECIPE.

    Raises:
        RecipeError: `resume` is neither auto, never nor a run folder.
    """
    if resume in ("auto", "never"):
        return out or RUNS / recipe.stem
    if out is not None:
        raise RecipeError("--out: goes with --resume auto or never; --resume PATH names the folder itself")
    if not RunFolder(Path(resume)).recipe.is_file():
        raise RecipeError(f"--resume: got {resume!r}; needs auto, never or the folder of a run")
    return Path(resume)


def without_nproc(arguments: Sequence[str]) -> list[str]:
    """Returns the command line with ``--nproc N`` left out."""
    kept = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--nproc" and not argument.startswith("--nproc="):
            kept.append(argument)
        skip = argument == "--nproc"
    return kept


def finish(as_json: bool, record: Any, text: str) -> None:
    """Prints the result: JSON alone, or a line of text."""
    if not launch.is_main_process():
        return
    if as_json:
        sys.stdout.write(json.dumps(record, indent=1) + "\n")
    elif text:
        console.out.print(text, highlight=False, markup=False, soft_wrap=True)


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code; prints one line for every error that a person can mend."""
    _arguments[:] = arguments
    try:
        return guard(lambda: app(list(arguments), standalone_mode=False) or 0)
    finally:
        launch.leave_group()


def _advice(error: OSError) -> str:
    """Returns what the system said about a file, and what to do."""
    if isinstance(error, IsADirectoryError):
        return "is a folder; a file is needed"
    if isinstance(error, PermissionError) and isinstance(error.filename, str) and os.path.exists(error.filename):
        return f"{error.strerror}; check its permissions"
    return f"{error.strerror}; choose another place, or make room"


def guard(command: Callable[[], int]) -> int:
    """Runs `command` and turns the errors that a person can mend into a message and an exit code."""
    try:
        return command()
    except CdistillError as error:
        console.fail(str(error))
        return error.exit_code
    except TyperException as error:
        error.show()  # type: ignore[attr-defined]
        return int(getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, typer.Abort):
        console.fail("interrupted")
        return 130
    except BrokenPipeError:
        sys.stdout = None  # the reader, `head` say, has gone: nothing is left to flush
        return 0
    except OSError as error:
        console.fail(f"{error.filename or 'writing'}: {_advice(error)}")
        return DiskFullError.exit_code if error.errno in FULL else 2
    except Exception as error:
        if launch.is_main_process():
            raise
        # The main process explains; another one dies of its death, say, and its traceback would only hide that.
        sys.stderr.write(f"process {launch.rank()}: {type(error).__name__}: {str(error).splitlines()[0]}\n")
        return 1
