"""The teachers that ship with the package, made by ``cdistill train-teacher`` from ``recipes/teacher-*.toml``."""

from pathlib import Path

from cdistill.teachers.base import Teacher, read_teacher

ASSETS = Path(__file__).parent / "assets"


def load_digits() -> Teacher:
    """Class-conditional DDPM++ for 8x8 handwritten digits."""
    return read_teacher(ASSETS / "digits.safetensors", "digits")


def load_patches() -> Teacher:
    """Unconditional DDPM++ for grey 12x12 patches of photographs."""
    return read_teacher(ASSETS / "patches.safetensors", "patches")
