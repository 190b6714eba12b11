"""The command that estimates the coefficients of a teacher."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cdistill.cli.execution import finish, start
from cdistill.cli.options import (
    DataOption,
    JsonOption,
    ProcessesOption,
    TeacherOption,
    WeightsOption,
    refuse,
    section_options,
    with_suffix,
)
from cdistill.estimation.settings import EstimationSection
from cdistill.runtime import console
from cdistill.runtime.processes import is_main_process


@section_options("section", EstimationSection)
def estimate_coeffs(
    *,
    context: typer.Context,
    teacher: TeacherOption,
    weights: WeightsOption = None,
    data: DataOption = None,
    section: EstimationSection,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run every estimator on the same samples and print how far they differ.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File; coefficients-TEACHER.safetensors by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG; beside the file by default.")] = None,
    processes: ProcessesOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Estimate l and s of a teacher, the coefficients of the analytic preconditioning, with their standard errors.

    Example:  cdistill estimate-coeffs --teacher digits --target-error 0.01
    """
    from cdistill.teachers.official import find_weights

    if compare:
        reason = "--compare runs every estimator, in fp32, on all of the same samples; leave it out"
        refuse(context, reason, "estimator", "target_error", "precision")
    file = with_suffix(out or Path(f"coefficients-{Path(teacher).stem}.safetensors"), ".safetensors")
    picture = with_suffix(plot or file.with_suffix(".png"), ".png")
    find_weights(teacher, weights)
    start(processes)
    command = _compare if compare else _estimate
    with console.json_only(as_json):
        record = command(teacher, weights, data, section, file, picture)
    finish(as_json, record, "   ".join(f"{key}: {record[key]}" for key in ("file", "files", "plot") if key in record))


def _estimate(
    teacher: str, weights: Path | None, data: str | None, section: EstimationSection, file: Path, picture: Path
) -> dict[str, Any]:
    from cdistill.workflows.estimate import draw_coefficients, estimate_coefficients

    estimate = estimate_coefficients(teacher, data, section, weights=weights, out=file)
    console.table(*estimate.table())
    for note in filter(None, (estimate.samples_note(), estimate.fit_note())):
        console.say(note)
    if is_main_process():
        draw_coefficients(picture, estimate)
    return {"file": str(file), "plot": str(picture), **estimate.to_dict()}


def _compare(
    teacher: str, weights: Path | None, data: str | None, section: EstimationSection, file: Path, picture: Path
) -> dict[str, Any]:
    from cdistill.workflows.estimate import compare_estimators, draw_comparison, file_of

    comparison = compare_estimators(teacher, data, section, weights=weights, out=file)
    console.table(*comparison.table())
    if is_main_process():
        draw_comparison(picture, comparison)
    files = " ".join(str(file_of(file, name)) for name in comparison.estimates)
    return {"files": files, "plot": str(picture), **comparison.to_dict()}
