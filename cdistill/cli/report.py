"""The commands that show results: the page, the figures, the paper's claims."""

import math
import shlex
from pathlib import Path
from typing import Annotated

import typer

from cdistill.cli.distill import TFLOPS
from cdistill.cli.execution import finish, start
from cdistill.cli.options import (
    JsonOption,
    ProcessesOption,
    calls,
    preconditionings_of,
    refuse,
    refuse_estimation,
    section_options,
    with_suffix,
)
from cdistill.errors import RecipeError
from cdistill.estimation.settings import EstimationSection
from cdistill.runtime import console
from cdistill.storage.run_folder import latest_run

_MOST_POINTS = 10**6  # jumps of all trajectories that are drawn


def report(
    *,
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders; the latest run by default.")] = None,
    comparison: Annotated[
        Path | None, typer.Option(help="What cdistill evaluate RUN_A RUN_B --out FILE wrote: differences of runs.")
    ] = None,
    out: Annotated[Path, typer.Option(help="HTML.")] = Path("report.html"),
    as_json: JsonOption = False,
) -> None:
    """Write one page about runs, finished or not: results, samples, curves, coefficients, recipe, provenance.

    Example:  cdistill report runs/digits runs/digits-ctm --out digits.html
    """
    page = with_suffix(out, ".html")
    from cdistill.workflows.inspection import report as run_report

    record = run_report(runs or [latest_run().path], page, comparison)
    finish(as_json, record, f"report: {page}")


def reproduce(
    *,
    context: typer.Context,
    claims: Annotated[
        list[str] | None,
        typer.Argument(
            help="acceleration, one-step, bcm, alignment, gan, mixture, or letters a to f; all by default. Or cheaper: "
            "what exact targets save, beyond the paper."
        ),
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
    jobs: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Trainings at once; as many as cores by default.")
    ] = None,
    processes: ProcessesOption = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the trainings, their cost and commands, and stop.")
    ] = False,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="TFLOP/s of a device, for --dry-run; 42 for table-2.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; reproduction, or reproduction-EXPERIMENTS, by default.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Test the paper's claims on data that ship with the package: train, measure, draw its figures, judge.

    The same command resumes where it was stopped.

    Example:  cdistill reproduce --quick
    """
    from cdistill.workflows.reproduce.claims import choose_claims
    from cdistill.workflows.reproduce.experiments import choose_data

    if quick:
        refuse(context, "--quick is an experiment of its own; leave it out", "experiments")
    refuse(context, "--dry-run trains nothing" if dry_run else "goes with --dry-run", "jobs" if dry_run else "tflops")
    if claims == ["cheaper"]:
        return _cheaper(context, quick, data, seeds, jobs, processes, out, as_json)
    kind = "quick" if quick else experiments or "embedded"
    letters, chosen = choose_claims(claims or []), choose_data(kind, data)
    folder = out or Path("reproduction" if kind == "embedded" else f"reproduction-{kind}")
    start()
    from cdistill.workflows.reproduce import run as workflow
    from cdistill.workflows.reproduce.jobs import Request
    from cdistill.workflows.reproduce.page import trials_table, verdict_tables

    request = Request(letters, kind, chosen, seeds, processes, folder)
    with console.json_only(as_json):
        rate = tflops or (TFLOPS if kind == "table-2" else None)
        record = workflow.list_trials(request, rate) if dry_run else workflow.reproduce(request, jobs)
        for table in [trials_table(record)] if dry_run else verdict_tables(record):
            console.table(*table)
    written = f"results: {folder / 'reproduction.md'}   numbers: {folder / 'reproduction.json'}"
    commands = [shlex.join(trial["command"]) for trial in record["trials"]] if dry_run else [written]
    return finish(as_json, record, "\n".join(commands))


def _cheaper(
    context: typer.Context,
    quick: bool,
    data: str | None,
    seeds: int,
    jobs: int | None,
    processes: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Runs the study of what exact targets save, and prints its tables."""
    from cdistill.workflows.reproduce.cheaper import STUDIES, study, tables
    from cdistill.workflows.reproduce.experiments import choose_data
    from cdistill.workflows.reproduce.jobs import Request

    refuse(context, "goes with the paper's claims; leave it out", "experiments", "dry_run", "tflops")
    kind = "cheaper-quick" if quick else "cheaper"
    chosen, folder = choose_data(kind, data, STUDIES), out or Path(f"reproduction-{kind}")
    start()
    with console.json_only(as_json):
        record = study(Request([], kind, chosen, seeds, processes, folder), jobs)
        for table in tables(record):
            console.table(*table)
    finish(as_json, record, f"results: {folder / 'cheaper.md'}   numbers: {folder / 'cheaper.json'}")


@section_options("section", EstimationSection, "samples", "seed")
def plot_trajectories(
    *,
    context: typer.Context,
    preconditionings: Annotated[str, typer.Option(help="Names with commas.")] = "ctm,analytic",
    nfe: Annotated[int, typer.Option(min=1, max=1000, help="Jumps of the students.")] = 3,
    count: Annotated[int, typer.Option(min=2, max=10**6, help="Trajectories that are measured.")] = 4096,
    section: EstimationSection,
    out: Annotated[Path, typer.Option(help="PNG.")] = Path("plots/trajectories.png"),
    as_json: JsonOption = False,
) -> None:
    """Fig. 7: the 1-D mixture's trajectories, teacher against few-step students with the optimal denoiser.

    Example:  cdistill plot trajectories --preconditionings ctm,analytic --nfe 3
    """
    names, picture = preconditionings_of(preconditionings), with_suffix(out, ".png")
    refuse_estimation(context, names, "samples")
    if nfe * count > _MOST_POINTS:
        raise RecipeError(f"--nfe, --count: {nfe} jumps of {count:,} trajectories; at most {_MOST_POINTS:,} together")
    start()
    from cdistill.workflows.reproduce.figures import draw_trajectories, trajectory_table

    results = draw_trajectories(names, nfe, count, section.seed, section.samples, picture)
    if not as_json:
        console.table(*trajectory_table(results))
    finish(as_json, {"plot": str(out), "results": results}, str(out))


def plot_curves(
    *,
    context: typer.Context,
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
    if losses:
        refuse(context, "goes without --losses, which draws what the training logged", "metric", "nfe", "reach")
    if not math.isfinite(reach or 0):
        raise RecipeError(f"--reach: got {reach}; needs a number")
    counts, picture = calls(nfe) if nfe else None, with_suffix(out, ".png")
    from cdistill.workflows.curves import arrivals_table, draw_evaluations, draw_losses, read_runs

    with console.json_only(as_json):
        chosen = read_runs(runs)
        if losses:
            record = draw_losses(chosen, images, picture)
        else:
            record = draw_evaluations(chosen, metric, counts, reach, images, picture)
            console.table(*arrivals_table(record))
        for note in record["notes"]:
            console.say(note)
    finish(as_json, record, f"plot: {record['plot']}   numbers: {record['csv']}")


def plot_coefficients(
    *,
    file: Annotated[Path, typer.Argument(help="A coefficient file.")],
    out: Annotated[Path | None, typer.Option(help="PNG; beside the file by default.")] = None,
) -> None:
    """Figs. 2c and 4: l, s, f and g of a coefficient file, next to CTM's.

    Example:  cdistill plot coefficients coefficients-digits.safetensors
    """
    from cdistill.estimation.estimate import load_estimate
    from cdistill.workflows.estimate import draw_coefficients

    picture = with_suffix(out or file.with_suffix(".png"), ".png")
    draw_coefficients(picture, load_estimate(file))
    console.say(str(picture))
