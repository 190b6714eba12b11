"""Preconditionings: f and g of the consistency function x_s = f(t,s) x_t + g(t,s) D(x_t,t,s) (Table 1).

Read `base` (what a preconditioning is), `handcrafted` (CM, BCM, CTM), `analytic` (f and g from a teacher's l and s),
`coefficients` (the file of l and s), `loading` (from a name to a preconditioning).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdistill.preconditionings.base import Preconditioning
    from cdistill.preconditionings.loading import load_preconditioning, make_preconditioning

__all__ = ["Preconditioning", "load_preconditioning", "make_preconditioning"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: the room's settings need no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'base' if name == 'Preconditioning' else 'loading'}"), name)
