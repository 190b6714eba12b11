"""Other people's weights as safetensors: ``cdistill convert``."""

import json
from pathlib import Path
from typing import Any

from cdistill.errors import CorruptFileError, RecipeError, brief
from cdistill.networks.architecture import load_denoiser
from cdistill.networks.denoiser import count_parameters
from cdistill.runtime.processes import versions
from cdistill.storage.assets import digest
from cdistill.storage.checkpoints import save_tensors
from cdistill.teachers.foreign import official_data, read_foreign


def convert(file: Path, flavour: str | None, out: Path) -> dict[str, Any]:
    """Reads someone else's file and writes it as safetensors.

    Args:
        file: Weights of EDM, CTM or OpenAI.
        flavour: Of OpenAI's ImageNet-64 files, which look alike: "edm", "cd" or "ct".
        out: The file to write.

    Returns:
        What it is, as JSON: the header of the new file, "file", "kind", "parameters", "shape" and "num_classes".

    Raises:
        RecipeError: `out` exists.
        CorruptFileError: The file is damaged, unsafe, or its tensors do not fit the network that it describes.
    """
    if out.exists():
        raise RecipeError(f"{out}: exists already; choose another --out")
    weights = read_foreign(file, flavour)
    try:
        denoiser = load_denoiser(weights.architecture, weights.sigma_data, weights.tensors)
    except (RuntimeError, ValueError) as error:
        raise CorruptFileError(f"{file}: its tensors do not fit its architecture ({brief(error)})") from error
    kind = "teacher" if weights.preconditioning is None else "student"
    facts_of_file = {**weights.facts, "file_sha256": digest(file)}
    header = {
        "what": weights.what,
        "architecture": weights.architecture,
        "sigma_data": weights.sigma_data,
        "data": official_data(weights.architecture, file.name),
        "licence": weights.licence,
        "preconditioning": weights.preconditioning,
        "source": json.loads(json.dumps(facts_of_file), parse_constant=str),  # an infinite sigma_max is not JSON
        "versions": versions(),
    }
    save_tensors(out, denoiser.state_dict(), kind, header)
    shape, num_classes = list(denoiser.sample_shape), denoiser.num_classes
    facts = {"file": str(out), "kind": kind, "parameters": count_parameters(denoiser)}
    return {**facts, "shape": shape, "num_classes": num_classes, **header}
