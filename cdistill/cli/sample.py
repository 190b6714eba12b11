"""The commands that draw images, and find the noise that images come from."""

from pathlib import Path
from typing import Annotated

import typer

from cdistill.cli.execution import finish, start
from cdistill.cli.options import (
    SAMPLER,
    GammaOption,
    JsonOption,
    ProcessesOption,
    RunOption,
    SamplerOption,
    StepOption,
    TimesOption,
    WeightsOption,
    calls,
    class_names,
    numbers,
    refuse,
    run_or_file,
    with_suffix,
)
from cdistill.errors import RecipeError
from cdistill.registry import WRITERS
from cdistill.runtime import console
from cdistill.storage.run_folder import RunFolder, latest_run

NfeOption = Annotated[
    str | None,
    typer.Option(help="Network calls: 2 or 1,2,5; 2 by default, 34 from a teacher.", rich_help_panel=SAMPLER),
]
FORMATS = "grid (one PNG), png (a folder of SEED.png), zip (EDM's data set), npz or tar (WebDataset)."
CLASSES = (
    "Classes by number or name, repeated along the seeds: 3, 0-9 or cat,dog; or uniform, which draws all alike. By "
    "default each seed draws its own, as often as in the data."
)
BATCH = (
    "Images of a network call on a GPU, rounded up to whole chunks of 16 or 64; 256 by default. It may change their "
    "last bits. On a CPU a call holds one chunk whatever N is, and nothing depends on it."
)


def sample(
    *,
    context: typer.Context,
    run: RunOption = None,
    teacher: Annotated[str | None, typer.Option(help="Draw from this teacher instead.")] = None,
    weights: WeightsOption = None,
    step: StepOption = "last",
    nfe: NfeOption = None,
    sampler: SamplerOption = None,
    times: TimesOption = None,
    gamma: GammaOption = None,
    seeds: Annotated[str, typer.Option(help="One image for each: 0-63 or 1,5,7.")] = "0-63",
    classes: Annotated[str | None, typer.Option(help=CLASSES)] = None,
    form: Annotated[str, typer.Option("--format", callback=WRITERS.check, help=FORMATS)] = "grid",
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("samples"),
    batch_size: Annotated[int | None, typer.Option(min=1, max=10**6, help=BATCH)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove pictures of other seeds from a folder that --format png fills.")
    ] = False,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Draw images; an image depends on its seed alone. An interrupted command resumes where it stopped.

    Example:  cdistill sample --nfe 1,2,5 --seeds 0-99 --classes 0-9
    """
    wanted, drawn = numbers(seeds), class_names(classes)
    if len(set(wanted)) < len(wanted):
        raise RecipeError("--seeds: a seed is named twice; each seed is one image")
    counts = calls(nfe) if nfe else None
    chosen = _drawn_from(context, run, teacher, weights)
    start(processes)
    from cdistill.sampling.samplers import SamplerChoice
    from cdistill.workflows.sample import sample as run_sample

    console.say(f"sampling from {teacher or run or latest_run().path}")
    written = run_sample(
        chosen, teacher=teacher, weights=weights, step=step, choice=SamplerChoice(sampler, None, times, gamma),
        nfe=counts, seeds=wanted, classes=drawn, output_format=form, out=out, batch_size=batch_size,
        overwrite=overwrite,
    )  # fmt: skip
    finish(as_json, written.to_dict(), "\n".join(map(str, written.files)))


def invert(
    *,
    context: typer.Context,
    images: Annotated[
        Path, typer.Argument(help="A folder, .zip or .npz of images, with classes if the network has any.")
    ],
    run: RunOption = None,
    teacher: Annotated[
        str | None, typer.Option(help="Invert this teacher's solver instead of a student's jumps.")
    ] = None,
    weights: WeightsOption = None,
    nfe: NfeOption = None,
    times: TimesOption = None,
    out: Annotated[Path, typer.Option(help="An .npz with the latents.")] = Path("latents.npz"),
    as_json: JsonOption = False,
) -> None:
    """Find the noise that images come from, and report how well it leads back to them.

    Example:  cdistill invert samples/teacher.npz --teacher digits --nfe 64
    """
    counts, file = calls(nfe) if nfe else None, with_suffix(out, ".npz")
    chosen = _drawn_from(context, run, teacher, weights)
    start()
    from cdistill.sampling.samplers import SamplerChoice
    from cdistill.workflows.sample import invert_images

    inverted = invert_images(
        images, chosen, teacher=teacher, weights=weights, choice=SamplerChoice(times=times), nfe=counts
    )
    inverted.save(file)
    record = {**inverted.to_dict(), "file": str(file)}
    if missed := record["images"] - record["converged"]:
        console.say(
            f"{missed} images are not inverted: jumps too long for the iteration; use more calls, or the teacher"
        )
    text = "{file}: {converged} of {images} converged, round trip rms {round_trip_rms:.3g}, latents {latent_rms:.3g} T"
    finish(as_json, record, text.format(**record))


def _drawn_from(
    context: typer.Context, run: Path | None, teacher: str | None, weights: Path | None
) -> RunFolder | Path | None:
    """Returns a run, the file of a converted student, or None for a teacher, whose weights are looked for.

    Raises:
        RecipeError: Options that say nothing about what is drawn from.
        MissingAssetError: The teacher's weights are missing.
    """
    from cdistill.teachers.official import find_weights

    if teacher is not None:
        refuse(context, f"goes without --teacher; got the teacher {teacher!r}", "run", "step")
        find_weights(teacher, weights)
        return None
    chosen = run_or_file(run)
    if not isinstance(chosen, RunFolder):
        refuse(
            context, f"goes with a run folder; {chosen} holds one student, with all that it needs", "step", "weights"
        )
    return chosen
