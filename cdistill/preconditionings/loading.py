"""From a name, and a coefficient file where it needs one, to a preconditioning."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdistill.errors import CdistillError
from cdistill.preconditionings.base import Preconditioning
from cdistill.preconditionings.coefficients import Coefficients, check_teacher, load_coefficients
from cdistill.registry import PRECONDITIONINGS
from cdistill.schedule import EPS, SIGMA_DATA

if TYPE_CHECKING:
    from cdistill.teachers import Teacher


def make_preconditioning(
    name: str, sigma_data: float = SIGMA_DATA, eps: float = EPS, table: Coefficients | None = None
) -> Preconditioning:
    """Builds the registered preconditioning `name`.

    Raises:
        UnknownNameError: No such name.
        RecipeError: It needs coefficients and got none.
    """
    kind = PRECONDITIONINGS.get(name)
    if not (isinstance(kind, type) and issubclass(kind, Preconditioning)):
        raise CdistillError(f"preconditioning {name!r}: {kind!r} is no subclass of cdistill's Preconditioning")
    return kind(sigma_data=sigma_data, eps=eps, table=table)


def load_preconditioning(
    name: str = "analytic",
    teacher: "Teacher | None" = None,
    coefficients: str | PathLike[str] | Coefficients | None = None,
    *,
    sigma_data: float | None = None,
    eps: float = EPS,
    allow_other_teacher: bool = False,
) -> Preconditioning:
    """Builds the registered preconditioning `name`, with coefficients where it needs some.

    All that a sampler of one's own needs, without the rest of cdistill::

        preconditioning = cdistill.load_preconditioning("analytic", coefficients="coefficients-digits.safetensors")
        f, g = preconditioning(t, s)  # tensors of noise levels, 0 < s <= t; float64 tensors

    Args:
        name: A name in the registry; see ``cdistill ls preconditionings``.
        teacher: The teacher in use, whose digest the coefficients must bear. Without one the caller checks it:
            ``provenance`` of the result says which teacher and data the coefficients were estimated from.
        coefficients: A file that ``cdistill estimate-coeffs`` made, whose checksum is verified, or l and s
            themselves. They are read only where the preconditioning needs coefficients.
        sigma_data: Standard deviation of the data; the teacher's by default, 0.5 without a teacher.
        eps: Smallest noise level.
        allow_other_teacher: Whether coefficients of another teacher are accepted.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged or of another kind.
        MismatchError: The coefficients were made for another teacher.
        UnknownNameError: No such preconditioning.
        RecipeError: It needs coefficients and got no file.

    >>> import torch
    >>> f, g = load_preconditioning("ctm")(torch.tensor(2.0), torch.tensor(0.5))
    >>> float(f), float(g)
    (0.25, 0.75)
    """
    table: Coefficients | None = None
    header: dict[str, Any] = {}
    if isinstance(coefficients, Coefficients):
        table = coefficients
    elif coefficients is not None and getattr(PRECONDITIONINGS.get(name), "needs_coefficients", False):
        path = Path(coefficients)
        table, _, header = load_coefficients(path)
        if teacher is not None and not allow_other_teacher:
            remedy = ", or set preconditioning.allow_other_teacher=true"
            check_teacher(path, header, teacher.name, teacher.digest, remedy)
    own = SIGMA_DATA if teacher is None else teacher.denoiser.sigma_data
    preconditioning = make_preconditioning(name, own if sigma_data is None else sigma_data, eps, table)
    preconditioning.provenance = header
    return preconditioning
