"""The commands about files: someone else's weights converted, any file of ours described."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cdistill.cli.execution import finish, start
from cdistill.cli.options import JsonOption, with_suffix
from cdistill.errors import RecipeError
from cdistill.runtime import console


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
        _print_conversion(file, record)
    finish(as_json, record, "")


def _print_conversion(file: Path, record: dict[str, Any]) -> None:
    classes = f"{record['num_classes']} classes" if record["num_classes"] else "unconditional"
    rows = [
        ["what", f"{record['what']} ({record['kind']})"],
        ["images", f"{' x '.join(map(str, record['shape']))}, {classes}"],
        ["parameters", f"{record['parameters']:,}"],
        ["licence", record["licence"]],
        ["sha256 of the file", record["source"]["file_sha256"]],
        ["written", record["file"]],
    ]
    console.facts(file.name, rows)
    if record["source"].get("entry") == "net":
        console.say(
            "a training state without the average 'ema': these weights are those of the last step, not averaged"
        )
    use = "sample --run" if record["kind"] == "student" else "estimate-coeffs --teacher"
    console.say(f"use it: cdistill {use} {record['file']}")


def inspect(
    file: Annotated[Path, typer.Argument(help="A file that cdistill made, the folder of a checkpoint or of a run.")],
    full: Annotated[bool, typer.Option("--full", help="Every tensor and noise level, and the whole recipe.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a file is and where it comes from, and verify its checksum.

    Example:  cdistill inspect coefficients-digits.safetensors
    """
    from cdistill.reporting.inspect_view import print_record
    from cdistill.workflows.inspection import inspect as run_inspect
    from cdistill.workflows.inspection import to_json

    record = run_inspect(file)
    if as_json:
        finish(as_json, to_json(record), "")
    else:
        print_record(record, full)
