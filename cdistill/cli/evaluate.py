"""The commands that measure: students, statistics of real data, preconditionings before training."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cdistill.cli.execution import finish, start
from cdistill.cli.options import (
    LARGEST,
    MOST,
    DataOption,
    GammaOption,
    JsonOption,
    ProcessesOption,
    RunOption,
    SamplerOption,
    StepOption,
    TeacherOption,
    TimesOption,
    WeightsOption,
    calls,
    preconditionings_of,
    refuse,
    refuse_estimation,
    refuse_others,
    section_options,
    short_name,
    with_suffix,
)
from cdistill.errors import RecipeError
from cdistill.estimation.settings import EstimationSection
from cdistill.evaluation.records import Comparisons, Evaluation
from cdistill.evaluation.settings import EvaluationSection
from cdistill.runtime import console
from cdistill.storage.run_folder import latest_run

OVERRIDES = ("nfe", "samples", "first_seed", "classes", "metrics", "features", "reference", "split", "baselines")


@section_options("changes", EvaluationSection, *OVERRIDES, overrides=True)
def evaluate(
    *,
    context: typer.Context,
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, converted students, or images; the latest run by default.")
    ] = None,
    run: RunOption = None,
    weights: WeightsOption = None,
    step: StepOption = "last",
    teacher: Annotated[
        str | None,
        typer.Option(help="The teacher, for targets that do not name one; alone, it is measured itself."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Real data, where the run does not say: a name or a file.")] = None,
    changes: dict[str, Any],
    sampler: SamplerOption = None,
    times: TimesOption = None,
    gamma: GammaOption = None,
    check: Annotated[
        Path | None, typer.Option(help="Repeat what this record describes, and compare every figure with it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File of the record, or of the comparison of several (.json); beside the run by default."),
    ] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure students at several numbers of network calls; compare several on the same seeds.

    Examples:  cdistill evaluate --nfe 2,3,5

    cdistill evaluate runs/digits-ctm runs/digits --nfe 2,3,5
    """
    paths = [*(runs or []), *([run] if run else [])]
    if check is not None:
        words = ("check", "features", "reference", "data", "teacher", "weights")
        refuse_others(context, "--check repeats what the record says; leave it out", *words)
    if out is not None:
        with_suffix(out, ".json")
    if not paths and teacher is None and check is None:
        paths = [latest_run().path]
    start(processes)
    from cdistill.sampling.samplers import SamplerChoice
    from cdistill.workflows.evaluate import evaluate as run_evaluate
    from cdistill.workflows.evaluate import evaluate_together
    from cdistill.workflows.targets import Target

    where = None if weights is None else str(weights)
    if check is not None:
        return repeat(check, Target(None, teacher, data, where, changes=changes), as_json)
    chosen: list[str | None] = [*map(str, paths)] or [None]
    targets = [Target(path, teacher, data, where, step, changes) for path in chosen]
    choice = SamplerChoice(sampler, None, times, gamma)
    with console.json_only(as_json):
        several = len(targets) > 1
        result = evaluate_together(targets, choice, out) if several else run_evaluate(targets[0], choice, out)
        show(result)
    return finish(as_json, result.to_dict(), "")


def show(result: Evaluation | Comparisons) -> None:
    """Prints the tables of an evaluation or of several, and where they are written."""
    for evaluation in result.records if isinstance(result, Comparisons) else []:
        show(evaluation)
    console.table(*result.table())
    samples = "" if isinstance(result, Comparisons) or result.picture is None else f"   samples: {result.picture}"
    console.say(f"{'comparison' if isinstance(result, Comparisons) else 'results'}: {result.path}{samples}")


def repeat(path: Path, given: Any, as_json: bool) -> None:
    """Measures again what a record describes; fails if a figure came out differently."""
    from cdistill.workflows.evaluate import check_record

    with console.json_only(as_json):
        repetition = check_record(path, given)
        console.table(*repetition.table())
        for change in repetition.changes:
            console.say(f"not as it was: {change}")
        repetition.check()
        console.say(f"{path}: {repetition.summary()}")
    finish(as_json, repetition.to_dict(), "")


@section_options("section", EvaluationSection, "split", "features")
def reference_stats(
    *,
    data: Annotated[str, typer.Option(help="Data source, or the path of one.")],
    section: EvaluationSection,
    keep: Annotated[
        int, typer.Option(min=0, max=MOST, help="Feature vectors to write too, for KID, precision and recall.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="File; reference-DATA-FEATURES.npz by default.")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Write the statistics that samples are compared with: mean and covariance of the features of real data.

    Example:  cdistill reference-stats --data digits --features pixels --keep 1000
    """
    file = with_suffix(out or Path(f"reference-{short_name(data)}-{short_name(section.features)}.npz"), ".npz")
    start(processes)
    from cdistill.workflows.evaluate import write_reference

    record = write_reference(data, section.split, section.features, keep, file)
    finish(as_json, record, "{file}: {data[count]:,} images, {features[dimensions]:,} dimensions".format(**record))


@section_options("section", EstimationSection, "timesteps", "samples", "seed")
def compare(
    *,
    context: typer.Context,
    teacher: TeacherOption,
    weights: WeightsOption = None,
    data: DataOption = None,
    nfe: Annotated[str, typer.Option(help="Network calls of the untrained students.")] = "1,2,3,5",
    preconditionings: Annotated[str | None, typer.Option(help="Names with commas; all by default.")] = None,
    coefficients: Annotated[Path | None, typer.Option(help="A coefficient file; estimated by default.")] = None,
    section: EstimationSection,
    points: Annotated[int, typer.Option(min=2, max=1000, help="Noise levels whose pairs are judged.")] = 18,
    trajectories: Annotated[int, typer.Option(min=2, max=MOST, help="Trajectories that are averaged over.")] = 256,
    substeps: Annotated[int, typer.Option(min=1, max=1000, help="Heun's steps from one level to the next.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder; compare-TEACHER by default.")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Judge preconditionings before training, on the teacher's own trajectories.

    Example:  cdistill compare --teacher digits --nfe 1,2,3,5
    """
    from cdistill.teachers.official import find_weights

    names, counts = preconditionings_of(preconditionings), list(dict.fromkeys(calls(nfe)))
    refuse_estimation(context, names, "coefficients", "data", "timesteps", "samples")
    if coefficients is not None:
        refuse(context, "--coefficients replaces the estimation; leave it out", "data", "timesteps", "samples")
    if (section.seed + 1) * trajectories > LARGEST:
        most = LARGEST // trajectories - 1
        raise RecipeError(f"--seed: got {section.seed}; with {trajectories} trajectories each at most {most}")
    find_weights(teacher, weights)
    start(processes)
    from cdistill.workflows.compare import compare as run_compare

    folder = out or Path(f"compare-{Path(teacher).stem}")
    with console.json_only(as_json):
        comparison = run_compare(
            teacher, names, counts, coefficients=coefficients, data=data, settings=section, points=points,
            trajectories=trajectories, substeps=substeps, seed=section.seed, weights=weights, out=folder,
        )  # fmt: skip
        console.table(*comparison.table())
        console.table(*comparison.pair_table())
        if comparison.left_out:
            console.facts("left out", list(comparison.left_out.items()))
    text = f"results: {folder / 'compare.json'}   heat maps: {folder / 'compare.png'}"
    finish(as_json, comparison.to_dict(), text)
