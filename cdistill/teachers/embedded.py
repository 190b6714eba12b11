"""The teachers that ship with the package, made by ``cdistill train-teacher`` from ``recipes/teacher-*.toml``."""

from dataclasses import replace
from pathlib import Path

from cdistill.teachers.base import Teacher, read_teacher

ASSETS = Path(__file__).parent / "assets"


def load_digits() -> Teacher:
    """Class-conditional DDPM++ for 8x8 handwritten digits."""
    return replace(read_teacher(ASSETS / "digits.safetensors", "digits"), estimator="forward")


def load_patches() -> Teacher:
    """Unconditional DDPM++ for grey 12x12 patches of photographs."""
    return replace(read_teacher(ASSETS / "patches.safetensors", "patches"), estimator="forward")
