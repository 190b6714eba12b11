"""The commands that draw images, and find the noise that images come from."""

from pathlib import Path
from typing import Annotated

import typer

from cdistill.cli.execution import finish, start, start_processes
from cdistill.cli.options import (
    GammaOption,
    JsonOption,
    ProcessesOption,
    RunOption,
    SamplerOption,
    StepOption,
    TimesOption,
    WeightsOption,
    calls,
    distinct,
    known_sampler,
    known_step,
    numbers,
    run_or_file,
    with_suffix,
)
from cdistill.errors import RecipeError
from cdistill.registry import (
    WRITERS,
)
from cdistill.runtime import console
from cdistill.storage.run_folder import RunFolder, latest_run


def sample(
    run: RunOption = None,
    teacher: Annotated[str | None, typer.Option(help="Draw from this teacher instead.")] = None,
    weights: WeightsOption = None,
    step: StepOption = "last",
    nfe: Annotated[str | None, typer.Option(help="Network calls: 2 or 1,2,5; 2 by default, 34 from a teacher.")] = None,
    sampler: SamplerOption = None,
    times: TimesOption = None,
    gamma: GammaOption = None,
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
    if known_step(step) != "last" and not isinstance(chosen, RunFolder):
        raise RecipeError(f"--step: got {step!r}; goes with a run folder; a teacher or a file is of one step alone")
    if teacher is not None:
        from cdistill.teachers.official import find_weights

        find_weights(teacher, weights)
    start_processes(processes)
    start()
    from cdistill.sampling.samplers import SamplerChoice
    from cdistill.workflows.sample import sample as run_sample

    choice = SamplerChoice(sampler, None, times, gamma)
    console.say(f"sampling from {teacher or run or latest_run().path}")
    record = run_sample(chosen, teacher, weights, step, choice, counts, *wanted, form, out, batch_size)
    finish(as_json, record, "\n".join(record["files"]))


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
    from cdistill.sampling.samplers import SamplerChoice
    from cdistill.workflows.invert import invert_images

    found = invert_images(images, chosen, teacher, weights, SamplerChoice(times=times), counts, file)
    text = "{file}: {converged} of {images} converged, round trip rms {round_trip_rms:.3g}, latents {latent_rms:.3g} T"
    finish(as_json, found, text.format(**found))
