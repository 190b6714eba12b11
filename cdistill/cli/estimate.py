"""The command that estimates the coefficients of a teacher."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cdistill.cli.execution import finish, start
from cdistill.cli.options import (
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


@section_options("section", EstimationSection)
def estimate_coeffs(
    *,
    context: typer.Context,
    teacher: TeacherOption,
    weights: WeightsOption = None,
    data: Annotated[
        str | None, typer.Option(help="Data source, the path of one, or 'teacher'; the teacher's own by default.")
    ] = None,
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
    from cdistill.runtime.processes import is_main_process
    from cdistill.workflows import estimate as work

    with console.json_only(as_json):
        if compare:
            comparison = work.compare_estimators(teacher, data, section, weights=weights, out=file)
            console.table(*comparison.table())
            files = " ".join(str(work.file_of(file, name)) for name in comparison.estimates)
            record = {"files": files, "plot": str(picture), **comparison.to_dict()}
            draw = partial(work.draw_comparison, picture, comparison)
        else:
            estimate = work.estimate_coefficients(teacher, data, section, weights=weights, out=file)
            console.table(*estimate.table())
            if note := estimate.samples_note():
                console.say(note)
            record = {"file": str(file), "plot": str(picture), **estimate.to_dict()}
            draw = partial(work.draw_coefficients, picture, estimate)
        if is_main_process():
            draw()
    finish(as_json, record, "   ".join(f"{key}: {record[key]}" for key in ("file", "files", "plot") if key in record))
