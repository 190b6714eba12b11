"""The teachers that ship with the package, made by ``cdistill train-teacher`` from ``recipes/teacher-*.toml``."""

from dataclasses import replace
from pathlib import Path

from cdistill.teachers.base import Teacher, read_teacher

ASSETS = Path(__file__).parent / "assets"
_OURS = "Apache-2.0 (cdistill's own weights)"
DIGITS_LICENCE = f"{_OURS}; trained on handwritten digits of the UCI Machine Learning Repository (CC BY 4.0)"
PATCHES_LICENCE = f"{_OURS}; trained on the two sample photographs of scikit-learn (CC BY)"


def load_digits() -> Teacher:
    """Class-conditional DDPM++ for 8x8 handwritten digits."""
    return replace(_read("digits"), licence=DIGITS_LICENCE)


def load_patches() -> Teacher:
    """Unconditional DDPM++ for grey 12x12 patches of photographs."""
    return replace(
        read_teacher(ASSETS / "patches.safetensors", "patches"), licence=PATCHES_LICENCE, estimator="forward"
    )


def _read(name: str) -> Teacher:
    return replace(read_teacher(ASSETS / f"{name}.safetensors", name), estimator="forward")
