"""The command that estimates the coefficients of a teacher."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cdistill.cli.execution import finish, start, start_processes
from cdistill.cli.options import JsonOption, ProcessesOption, WeightsOption, with_suffix
from cdistill.errors import RecipeError
from cdistill.runtime import console


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
    samples: Annotated[int, typer.Option(help="Samples at each noise level, even; the paper has 4096.")] = 4096,
    target_error: Annotated[
        float | None,
        typer.Option(help="Stop a noise level when the standard errors of l and s are this small; --samples at most."),
    ] = None,
    estimator: Annotated[
        str,
        typer.Option(help="autodiff (the paper's), forward (half its cost for the same errors), or auto: by teacher."),
    ] = "auto",
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
        "estimator": estimator, "precision": precision,
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
