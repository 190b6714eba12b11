"""What a preconditioning is.

A third party writes a subclass, names it in the entry-point group ``cdistill.preconditionings`` and has it in
every command::

    class Mine(Preconditioning):
        def f_and_g(self, t, s):
            return s / t, 1 - s / t
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cdistill.errors import CdistillError, RecipeError
from cdistill.networks.denoiser import edm_coefficients
from cdistill.preconditionings.coefficients import Coefficients
from cdistill.schedule import EPS, SIGMA_DATA


class Preconditioning(ABC):
    """f(t,s) and g(t,s) in float64, with f(t,t) = 1 and g(t,t) = 0 exactly.

    Args:
        sigma_data: Standard deviation of the data.
        eps: Smallest noise level.
        table: l_t and s_t of the teacher, and a fit of f and g, for those that need them.

    Attributes:
        multiplies: What g multiplies, "denoiser" (D) or "network" (the free network F).
        needs_coefficients: Whether `table` must be given.
        needs_fit: Whether `table` must have a fit of f and g, too.
        to_eps_only: Whether s must be eps: for the whole class, or for an instance whose student is trained so, as a
            consistency model is.
        provenance: Header of the coefficient file, {} without one.
    """

    multiplies: ClassVar[Literal["denoiser", "network"]] = "denoiser"
    needs_coefficients: ClassVar[bool] = False
    needs_fit: ClassVar[bool] = False
    to_eps_only: bool = False
    provenance: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        if "coefficients" in vars(cls) and "f_and_g" not in vars(cls):
            raise CdistillError(
                f"{cls.__qualname__}: defines coefficients(t, s); since version 0.2 it is f_and_g(t, s)"
            )

    def __init__(self, sigma_data: float = SIGMA_DATA, eps: float = EPS, table: Coefficients | None = None) -> None:
        if self.needs_coefficients and table is None:
            raise RecipeError(f"{type(self).__name__}: needs coefficients; make some with cdistill estimate-coeffs")
        self.sigma_data = sigma_data
        self.eps = eps

    @abstractmethod
    def f_and_g(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Computes f and g as the paper prints them, with respect to what `multiplies` says.

        Args:
            t: Noise levels that jumps start from, float64, any shape.
            s: Noise levels that they end at, like `t`, 0 < s <= t.

        Returns:
            f and g, float64, like `t`.
        """

    def __call__(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Computes f and g with respect to the denoiser D, whatever `multiplies` says.

        What is printed for F is the same function of D: with D = c_skip x + c_out F, f_D = f - g c_skip/c_out and
        g_D = g/c_out.

        Args:
            t: Noise levels that jumps start from, any shape; computed in float64.
            s: Noise levels that they end at, like `t`, 0 < s <= t.

        Returns:
            f and g, float64, like `t`.

        Raises:
            CdistillError: A pair is not 0 < s <= t, or there is no jump to s, or f and g are not finite or violate
                the boundary condition; the message names the pair.
        """
        t, s = torch.broadcast_tensors(t.double(), s.double())
        self._check(t, s, (s <= 0) | (s > t), "needs 0 < s <= t")
        if self.to_eps_only:
            self._check(t, s, (s != self.eps) & (s != t), f"jumps to eps = {self.eps} only")
        f, g = self.f_and_g(t, s)
        if f.shape != t.shape or g.shape != t.shape:
            raise CdistillError(f"{type(self).__name__}: f, g have shapes {f.shape}, {g.shape}; needs {t.shape}")
        f, g = f.double(), g.double()
        self._check(t, s, ~(f.isfinite() & g.isfinite()), "f or g is not finite there: estimate better coefficients")
        self._check(t, s, (t == s) & ((f != 1) | (g != 0)), "f(t,t) = 1 and g(t,t) = 0 must hold exactly")
        if self.multiplies == "network":
            c_skip, c_out, _ = edm_coefficients(t, self.sigma_data)
            f, g = f - g * c_skip / c_out, g / c_out
        return f, g

    def _check(self, t: Tensor, s: Tensor, wrong: Tensor, message: str) -> None:
        if bool(wrong.any()):
            pair = f"t = {float(t[wrong].flatten()[0]):.6g}, s = {float(s[wrong].flatten()[0]):.6g}"
            raise CdistillError(f"{type(self).__name__}: got {pair}; {message}")
