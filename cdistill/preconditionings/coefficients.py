"""The coefficient file: l_t and s_t of one teacher, with what they were computed from.

Tensors, float64 unless it says otherwise (n noise levels, R rounds, G groups of samples, k scalars, P jumps):

======================  =============  =====================================================================
``t``                   (n,)           noise levels, strictly descending
``l``                   (n,)           1 - E[tr J]/d (Zheng et al. 2025, Eq. 15), not clipped
``s``                   (n,)           E[g.dg/dlam]/E[|g|^2] (Eq. 17); 0 where g vanishes, as for Gaussian data
``l_error, s_error``    (n,)           their standard errors, by the jackknife over the groups
``pairs``               (P, 2)         jumps (t, s) between 16 of the noise levels
``f, g``                (P,)           the analytic preconditioning (backward) of these jumps
``f_error, g_error``    (P,)           their standard errors
``sums``                (R, G, n, k)   sums of the estimator's scalars in each round and group of samples
``sizes``               (R, G)         how many rows were summed
``stops``               (n,) int64     the last round of each noise level
``samples``             (n,) int64     points of q(x_t) that each noise level took
``fit_t``               (m,)           noise levels of a fit of f and g themselves, descending; where asked for
``fit_f, fit_g``        (m, m)         f and g by least squares from each t (row) to each s < t (column), else NaN
``fit_f_error, ...``    (m, m)         their standard errors
======================  =============  =====================================================================

With ``sums`` alone l, s and all errors can be computed again. The header holds the teacher's name and digest, the
data, the estimator, the seed, sizes and versions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdistill.errors import CorruptFileError, MismatchError
from cdistill.storage.checkpoints import load_tensors, save_tensors

KIND = "coefficients"


class Fit(NamedTuple):
    """f and g that minimise E|x_s - f x_t - g D(x_t,t)|^2 along the teacher's trajectories, at pairs of noise levels.

    Attributes:
        t: Noise levels (m,), float64, strictly descending.
        f: From each t (row) to each s < t (column), (m, m), NaN elsewhere.
        g: Likewise.
        f_error: Standard errors of `f`.
        g_error: Standard errors of `g`.
    """

    t: Tensor
    f: Tensor
    g: Tensor
    f_error: Tensor
    g_error: Tensor


@dataclass(frozen=True)
class Coefficients:
    """l_t and s_t on a grid.

    Attributes:
        t: Noise levels (n,), float64, strictly descending.
        l: The paper's l_t (n,), float64.
        s: The paper's s_t (n,), float64.
        fit: f and g themselves, for the preconditioning that interpolates them.
    """

    t: Tensor
    l: Tensor  # noqa: E741
    s: Tensor
    fit: Fit | None = None


def save_coefficients(path: Path, table: Coefficients, statistics: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes a coefficient file; `statistics` holds what `t`, `l` and `s` were computed from."""
    fit = {} if table.fit is None else {f"fit_{name}": values for name, values in table.fit._asdict().items()}
    save_tensors(path, {"t": table.t, "l": table.l, "s": table.s, **fit, **statistics}, KIND, header)


def load_coefficients(path: Path) -> tuple[Coefficients, dict[str, Tensor], dict[str, Any]]:
    """Reads a coefficient file.

    Returns:
        The table, the tensors that it was computed from, and the header.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged, of another kind, or its numbers make no table.
    """
    tensors, header = load_tensors(path, KIND)
    try:
        fit = Fit(*(tensors.pop(f"fit_{name}") for name in Fit._fields)) if "fit_t" in tensors else None
        table = Coefficients(tensors.pop("t"), tensors.pop("l"), tensors.pop("s"), fit)
        same = table.t.ndim == 1 and table.t.shape == table.l.shape == table.s.shape
        sound = same and table.t.diff().max() < 0 and table.t.min() > 0
        finite = all(bool(values.isfinite().all()) for values in (table.t, table.l, table.s))
    except (KeyError, RuntimeError) as error:
        raise CorruptFileError(
            f"{path}: not a whole coefficient file ({error}); estimate the coefficients again"
        ) from error
    if fit is not None and not _is_whole(fit):
        raise CorruptFileError(f"{path}: its fit of f and g is not whole; estimate the coefficients again")
    if not (sound and finite):
        raise CorruptFileError(
            f"{path}: t must be positive and descend, l and s be finite and as many; estimate the coefficients again"
        )
    return table, tensors, header


def _is_whole(fit: Fit) -> bool:
    """Whether a fit has finite numbers for every pair of its noise levels."""
    t, levels = fit.t, len(fit.t)
    if t.ndim != 1 or levels < 2 or not bool(((t.diff() < 0) & (t[1:] > 0)).all()):
        return False
    down = torch.ones(levels, levels, dtype=torch.bool).triu(1)
    return all(values.shape == (levels, levels) and bool(values[down].isfinite().all()) for values in fit[1:])


def check_teacher(path: Path, header: dict[str, Any], name: str, digest: str, remedy: str = "") -> None:
    """Refuses coefficients that were made for another teacher.

    Args:
        path: The coefficient file, for the message.
        header: Its header.
        name: The teacher in use.
        digest: Its digest.
        remedy: What else can be done, for the message.

    Raises:
        MismatchError: The digests differ.
    """
    if header.get("teacher_sha256") != digest:
        raise MismatchError(
            f"{path}: made for teacher {header.get('teacher')!r} ({str(header.get('teacher_sha256'))[:12]}), not for "
            f"{name!r} ({digest[:12]}); estimate coefficients for this teacher{remedy}"
        )
