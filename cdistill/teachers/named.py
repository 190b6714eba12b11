"""The teachers that go by a name: ours, in ``assets/``, and the published ones of EDM (Karras et al. 2022).

Ours were made by ``cdistill train-teacher`` from ``recipes/teacher-*.toml``. The table of EDM's files is in
`cdistill.teachers.official`.
"""

from dataclasses import replace
from pathlib import Path

from cdistill.errors import MismatchError
from cdistill.teachers.base import Teacher, read_teacher
from cdistill.teachers.foreign import disagreements
from cdistill.teachers.official import LICENCE, OFFICIAL, find_weights

ASSETS = Path(__file__).parent / "assets"
_OURS = "Apache-2.0 (cdistill's own weights)"
DIGITS_LICENCE = f"{_OURS}; trained on handwritten digits of the UCI Machine Learning Repository (CC BY 4.0)"
PATCHES_LICENCE = f"{_OURS}; trained on the two sample photographs of scikit-learn (CC BY)"


def load_digits() -> Teacher:
    """Class-conditional DDPM++ for 8x8 handwritten digits."""
    return _load_asset("digits", DIGITS_LICENCE)


def load_patches() -> Teacher:
    """Unconditional DDPM++ for grey 12x12 patches of photographs."""
    return _load_asset("patches", PATCHES_LICENCE)


def load_official(name: str, weights: Path | None = None) -> Teacher:
    """Loads one of EDM's published teachers from the asset folder or from `weights`; errors as `load_teacher`."""
    official = OFFICIAL[name]
    path = find_weights(name, weights)
    assert path is not None
    teacher, architecture = read_teacher(path, name)
    if wrong := disagreements(official.architecture, architecture):
        raise MismatchError(f"{path}: holds another network than {name!r} ({'; '.join(wrong)})")
    if teacher.data not in ("", official.data):
        raise MismatchError(f"{path}: was trained on {teacher.data}; {name!r} was trained on {official.data}")
    # A plain state dict names no licence but may be NVIDIA's; under NVIDIA's name it is taken to be so.
    licence = LICENCE if LICENCE in teacher.licence else teacher.licence
    return replace(teacher, data=official.data, licence=licence)


def _load_asset(name: str, licence: str) -> Teacher:
    """Reads one of our own; on both, the estimator "forward" was shown to agree with "autodiff"."""
    teacher, _ = read_teacher(ASSETS / f"{name}.safetensors", name)
    return replace(teacher, licence=licence, estimator="forward")
