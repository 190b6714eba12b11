"""The commands that measure: students, statistics of real data, preconditionings before training."""

from pathlib import Path
from typing import Annotated

import typer

from cdistill.cli.execution import finish, start, start_processes
from cdistill.cli.options import (
    FEATURES_OPTION,
    LARGEST,
    MOST,
    FeaturesOption,
    GammaOption,
    JsonOption,
    ProcessesOption,
    RunOption,
    SamplerOption,
    StepOption,
    TimesOption,
    WeightsOption,
    calls,
    known_forms,
    known_names,
    known_step,
    short_name,
    with_suffix,
)
from cdistill.errors import RecipeError
from cdistill.evaluation.records import Comparisons, Evaluation
from cdistill.registry import (
    METRICS,
    PRECONDITIONINGS,
    SAMPLERS,
    check_features,
)
from cdistill.runtime import console
from cdistill.storage.run_folder import latest_run


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
    features: Annotated[str | None, FEATURES_OPTION] = None,
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
    if check is not None and (paths or changes or any((sampler, times, gamma, teacher, data, out))):
        raise RecipeError("--check: repeats what the record says; leave the other options out")
    if out is not None and len(paths) < 2:
        raise RecipeError("--out: goes with several runs, for their comparison; a record lies beside its run")
    if not paths and teacher is None and check is None:
        paths = [latest_run().path]
    start_processes(processes)
    start()
    from cdistill.sampling.samplers import SamplerChoice
    from cdistill.workflows.evaluate import evaluate as run_evaluate
    from cdistill.workflows.evaluate import evaluate_together
    from cdistill.workflows.targets import Target

    if check is not None:
        return repeat(check, as_json)
    where = None if weights is None else str(weights)
    chosen: list[str | None] = [*map(str, paths)] or [None]
    targets = [Target(path, teacher, data, where, step, changes) for path in chosen]
    choice = SamplerChoice(sampler, None, times, gamma)
    with console.json_only(as_json):
        if len(targets) == 1:
            result: Evaluation | Comparisons = run_evaluate(targets[0], choice)
        else:
            result = evaluate_together(targets, choice, out)
        show(result)
    return finish(as_json, result.to_dict(), "")


def show(result: Evaluation | Comparisons) -> None:
    """Prints the tables of an evaluation or of several, and where they are written."""
    for evaluation in result.records if isinstance(result, Comparisons) else []:
        show(evaluation)
    console.table(*result.table())
    samples = "" if isinstance(result, Comparisons) or result.picture is None else f"   samples: {result.picture}"
    console.say(f"{'comparison' if isinstance(result, Comparisons) else 'results'}: {result.path}{samples}")


def repeat(path: Path, as_json: bool) -> None:
    """Measures again what a record describes; fails if a figure came out differently."""
    from cdistill.workflows.evaluate import check_record

    with console.json_only(as_json):
        repetition = check_record(path)
        console.table(*repetition.table())
        for change in repetition.changes:
            console.say(f"not as it was: {change}")
        repetition.check()
        console.say(f"{path}: {repetition.summary()}")
    finish(as_json, repetition.to_dict(), "")


def reference_stats(
    data: Annotated[str, typer.Option(help="Data source, or the path of one.")],
    split: Annotated[str, typer.Option(help="train, or heldout where the data have such a part.")] = "train",
    features: FeaturesOption = "legacy_tensorflow",
    keep: Annotated[int, typer.Option(min=0, help="Feature vectors to write too, for kid, precision and recall.")] = 0,
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
    from cdistill.workflows.evaluate import write_reference

    record = write_reference(data, split, features, keep, file)
    finish(as_json, record, "{file}: {data[count]:,} images, {features[dimensions]:,} dimensions".format(**record))


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
    samples: Annotated[int, typer.Option(help="Samples of the coefficient estimation.")] = 4096,
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
    from cdistill.workflows.compare import compare as run_compare

    folder = out or Path(f"compare-{Path(teacher).stem}")
    with console.json_only(as_json):
        comparison = run_compare(
            teacher, names, wanted, coefficients=coefficients, data=data, settings=section, points=points,
            trajectories=trajectories, substeps=substeps, seed=seed, weights=weights, out=folder,
        )  # fmt: skip
        console.table(*comparison.table())
        console.table(*comparison.pair_table())
        if comparison.left_out:
            console.facts("left out", list(comparison.left_out.items()))
    text = f"results: {folder / 'compare.json'}   heat maps: {folder / 'compare.png'}"
    finish(as_json, comparison.to_dict(), text)
