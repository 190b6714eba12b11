"""``cdistill convert``."""

import json
from pathlib import Path
from typing import Any

from cdistill.errors import CorruptFileError, RecipeError, brief
from cdistill.networks.architecture import load_denoiser
from cdistill.networks.denoiser import count_parameters
from cdistill.runtime.console import facts, say
from cdistill.runtime.processes import versions
from cdistill.storage.assets import digest
from cdistill.storage.checkpoints import save_tensors
from cdistill.teachers.foreign import official_data, read_foreign


def convert(file: Path, flavour: str | None, out: Path) -> dict[str, Any]:
    """Reads someone else's file, writes it as safetensors and prints what it is; returns the same as JSON.

    Raises:
        RecipeError: `out` exists.
        CorruptFileError: The file is damaged, unsafe, or its tensors do not fit the network that it describes.
    """
    if out.exists():
        raise RecipeError(f"{out}: exists already; choose another --out")
    found = read_foreign(file, flavour)
    try:
        denoiser = load_denoiser(found.architecture, found.sigma_data, found.tensors)
    except (RuntimeError, ValueError) as error:
        raise CorruptFileError(f"{file}: its tensors do not fit its architecture ({brief(error)})") from error
    kind = "teacher" if found.preconditioning is None else "student"
    facts_of_file = {**found.facts, "file_sha256": digest(file)}
    header = {
        "what": found.what,
        "architecture": found.architecture,
        "sigma_data": found.sigma_data,
        "data": official_data(found.architecture, file.name),
        "licence": found.licence,
        "preconditioning": found.preconditioning,
        "source": json.loads(json.dumps(facts_of_file), parse_constant=str),  # an infinite sigma_max is not JSON
        "versions": versions(),
    }
    save_tensors(out, denoiser.state_dict(), kind, header)
    parameters = count_parameters(denoiser)
    side, classes = denoiser.sample_shape, denoiser.num_classes
    rows = [
        ["what", f"{found.what} ({kind})"],
        ["images", f"{' x '.join(map(str, side))}, {f'{classes} classes' if classes else 'unconditional'}"],
        ["parameters", f"{parameters:,}"],
        ["licence", found.licence],
        ["sha256 of the file", facts_of_file["file_sha256"]],
        ["written", str(out)],
    ]
    facts(file.name, rows)
    if found.facts.get("entry") == "net":
        say("a training state without the average 'ema': these weights are those of the last step, not averaged")
    use = f"cdistill sample --run {out}" if kind == "student" else f"cdistill estimate-coeffs --teacher {out}"
    say(f"use it: {use}")
    return {"file": str(out), "kind": kind, "parameters": parameters, **header}
