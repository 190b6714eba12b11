"""Preconditionings: the coefficients f, g of the consistency function x_s = f x_t + g D(x_t,t,s), Table 1."""

from cdistill.preconditionings.base import Preconditioning, make_preconditioning
from cdistill.preconditionings.sharing import preconditioning_from_file

__all__ = ["Preconditioning", "make_preconditioning", "preconditioning_from_file"]
