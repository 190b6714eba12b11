"""Coefficient files for other people's code: f and g in three lines, without the teacher.

::

    from cdistill.preconditionings import preconditioning_from_file

    form = preconditioning_from_file("coefficients-digits.safetensors")
    f, g = form(t, s)  # tensors of noise levels, 0 < s <= t; float64 tensors

Whether the coefficients are those of the teacher in use, must be checked by the caller: ``form.provenance`` says which
teacher and data they were estimated from. Inside cdistill `load_preconditioning` compares the teacher.
"""

from os import PathLike
from pathlib import Path

from cdistill.errors import RecipeError
from cdistill.preconditionings.base import Preconditioning, make_preconditioning
from cdistill.preconditionings.coefficients import load_coefficients
from cdistill.registry import PRECONDITIONINGS
from cdistill.schedule import EPS, SIGMA_DATA


def preconditioning_from_file(
    path: str | PathLike[str], name: str = "analytic", sigma_data: float = SIGMA_DATA, eps: float = EPS
) -> Preconditioning:
    """Builds f and g from a coefficient file alone.

    Args:
        path: A file that ``cdistill estimate-coeffs`` made; its checksum is verified.
        name: A registered preconditioning that needs coefficients: "analytic", "analytic-forward", or a plug-in's.
        sigma_data: Standard deviation of the data; the two built-in ones do not use it.
        eps: Smallest noise level; the two built-in ones do not use it.

    Returns:
        The preconditioning. ``form(t, s)`` computes f and g in float64; ``form.provenance`` is the header of the file:
        "teacher", "teacher_sha256", "data", "samples", "seed", "versions", ...

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged or of another kind.
        UnknownNameError: No such preconditioning.
        RecipeError: One that takes no coefficients.
    """
    if not getattr(PRECONDITIONINGS.get(name), "needs_coefficients", False):
        raise RecipeError(f"preconditioning {name!r}: takes no coefficients; make_preconditioning({name!r}) is enough")
    table, _, header = load_coefficients(Path(path))
    form = make_preconditioning(name, sigma_data, eps, table)
    form.provenance = header
    return form
