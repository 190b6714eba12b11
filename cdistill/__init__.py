"""cdistill turns a slow diffusion model into a student that draws an image in one to ten network calls.

It implements consistency distillation with the preconditionings of Zheng et al. (ICLR 2025), among them
Analytic-Precond, whose coefficients are estimated from the teacher. In Python, as on the command line::

    import cdistill

    teacher = cdistill.load_teacher("digits")
    run = cdistill.distill("digits", ["training.iterations=100"], out="runs/digits")
    images = run.student.sample(nfe=2, seeds=range(16))
    print(cdistill.evaluate("runs/digits", nfe=[2, 3]).table())

Everything in ``__all__`` is imported when it is first used; `import cdistill` itself imports no torch. Results have
`table()` for people and `to_dict()` for machines; `cdistill.reporting.figures` draws them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdistill.data.loading import load_source as load_data
    from cdistill.errors import CdistillError
    from cdistill.preconditionings.loading import load_preconditioning
    from cdistill.recipe.files import load_any_recipe as load_recipe
    from cdistill.registry import REGISTRIES
    from cdistill.teachers.base import load_teacher
    from cdistill.workflows.compare import compare
    from cdistill.workflows.distill import distill
    from cdistill.workflows.estimate import estimate_coefficients
    from cdistill.workflows.evaluate import evaluate
    from cdistill.workflows.sample import sample
    from cdistill.workflows.students import load_student

__version__ = "0.2.0"
__all__ = [
    "REGISTRIES",
    "CdistillError",
    "compare",
    "distill",
    "estimate_coefficients",
    "evaluate",
    "load_data",
    "load_preconditioning",
    "load_recipe",
    "load_student",
    "load_teacher",
    "sample",
]
_PLACES = {
    "REGISTRIES": "cdistill.registry:REGISTRIES",
    "CdistillError": "cdistill.errors:CdistillError",
    "compare": "cdistill.workflows.compare:compare",
    "distill": "cdistill.workflows.distill:distill",
    "estimate_coefficients": "cdistill.workflows.estimate:estimate_coefficients",
    "evaluate": "cdistill.workflows.evaluate:evaluate",
    "load_data": "cdistill.data.loading:load_source",
    "load_preconditioning": "cdistill.preconditionings.loading:load_preconditioning",
    "load_recipe": "cdistill.recipe.files:load_any_recipe",
    "load_student": "cdistill.workflows.students:load_student",
    "load_teacher": "cdistill.teachers.base:load_teacher",
    "sample": "cdistill.workflows.sample:sample",
}


def __getattr__(name: str) -> Any:
    """Imports what is public when it is first used (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'cdistill' has no attribute {name!r}")
    module, attribute = _PLACES[name].split(":")
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    """Lists what is public, imported or not."""
    return sorted({*globals(), *__all__})
