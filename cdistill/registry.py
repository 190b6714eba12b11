"""Names for things that can be chosen: teachers, preconditionings, estimators, data, distances, metrics and more.

A registry maps a name to ``"module:attribute"``, so that listing and checking names costs no import; of
``"module:attribute(name)"`` the entry is the function with its own name as first argument. Other packages add entries
through a Python entry point of the registry's group, without touching this one::

    [project.entry-points."cdistill.preconditionings"]
    mine = "my_package.precond:Mine"

What the entry must be is said by the class or function that the built-in entries share. A teacher's loader takes no
argument, or ``weights: Path | None`` if it is one that understands ``--weights``.
"""

import ast
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdistill.errors import CdistillError, RecipeError, UnknownNameError, suggest

if TYPE_CHECKING:
    from importlib import metadata


def first_line(target: str) -> str:
    """Returns the first line of the docstring at ``module:attribute`` of this package, without importing it.

    >>> first_line("cdistill.registry:Registry")
    'The entries of one kind, built in and from entry points.'
    """
    module, attribute = target.removesuffix("(name)").split(":")
    path = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


@dataclass(eq=False)
class Registry:
    """The entries of one kind, built in and from entry points.

    `builtin` is name -> ``"module:attribute"``; `kind` what an entry is, in the singular; `about` what it is for, in a
    sentence; `summaries` what entries without a docstring of their own are; `removed` names that version 0.1 had.
    """

    kind: str
    builtin: Mapping[str, str]
    group: str
    removed: Sequence[str] = ()
    about: str = ""
    summaries: Mapping[str, str] = field(default_factory=dict)
    _added: dict[str, Any] = field(default_factory=dict, init=False)

    @cached_property
    def _plugins(self) -> "dict[str, metadata.EntryPoint]":
        from importlib import metadata  # a tenth of the time that --help takes

        return {point.name: point for point in metadata.entry_points(group=self.group)}

    def summary(self, name: str) -> str:
        """Returns in a line what an entry is, importing only what comes from another package; errors as `get`."""
        self.check(name)
        if name in self.summaries:
            return self.summaries[name]
        if name in self.builtin and name not in self._added:
            line = first_line(self.builtin[name])
        else:
            line = (self.get(name).__doc__ or "").strip().partition("\n")[0]
        what = line.removeprefix("Returns ")
        return line if what == line else what[:1].upper() + what[1:]

    def names(self) -> list[str]:
        """Returns every known name, sorted, without importing what it stands for."""
        return sorted({*self.builtin, *self._plugins, *self._added})

    def add(self, name: str, value: Any) -> None:
        """Adds an entry for this process (tests, notebooks); packages use an entry point instead."""
        self._added[name] = value

    def remove(self, name: str) -> None:
        """Takes back what :meth:`add` added."""
        del self._added[name]

    def check(self, name: str) -> str:
        """Returns `name` if it is known; UnknownNameError, which lists the known ones, if not."""
        if name not in self.names():
            if name in self.removed:
                raise UnknownNameError(
                    f"{self.kind} {name!r}: was removed in cdistill 0.2; choose from {', '.join(self.names())}"
                )
            raise UnknownNameError(f"unknown {self.kind} {name!r}; {suggest(name, self.names())}")
        return name

    def get(self, name: str) -> Any:
        """Imports and returns the entry called `name`.

        Raises:
            UnknownNameError: No such entry.
            CdistillError: A plug-in could not be imported.
        """
        self.check(name)
        if name in self._added:
            return self._added[name]
        if name in self.builtin:
            target = self.builtin[name]
            module, attribute = target.removesuffix("(name)").split(":")
            entry = getattr(import_module(module), attribute)
            return partial(entry, name) if target.endswith("(name)") else entry
        point = self._plugins[name]
        try:
            return point.load()
        except Exception as error:  # whatever another package raises while it is imported
            raise CdistillError(f"{self.kind} {name!r}: its plug-in {point.value} does not load: {error}") from error


PRECONDITIONINGS = Registry(
    "preconditioning",
    {
        "analytic": "cdistill.preconditionings.analytic:Analytic",
        "analytic-bounded": "cdistill.preconditionings.analytic:AnalyticBounded",
        "analytic-forward": "cdistill.preconditionings.analytic:AnalyticForward",
        "bcm": "cdistill.preconditionings.handcrafted:BCM",
        "cm": "cdistill.preconditionings.handcrafted:CM",
        "ctm": "cdistill.preconditionings.handcrafted:CTM",
        "least-squares": "cdistill.preconditionings.least_squares:LeastSquares",
    },
    "cdistill.preconditionings",
    about="f and g of a student: how a jump mixes the point and the network, a class with f_and_g(t, s).",
)

OBJECTIVES = Registry(
    "objective",
    {
        "cm": "cdistill.objectives.cm:CM",
        "ctm": "cdistill.objectives.ctm:CTM",
        "ect": "cdistill.objectives.ect:ECT",
        "regression": "cdistill.objectives.regression:Regression",
        "regression-to-eps": "cdistill.objectives.regression:RegressionToEps",
    },
    "cdistill.objectives",
    about="What a student is trained for: the draws of a step, its targets and its loss.",
)

_MIXTURES = {
    "mixture-broad": "16-D mixture with variances over five decades; its exact denoiser, or draws from it.",
    "mixture-broad-cond": "The broad mixture with a class for each component.",
    "mixture-narrow": "16-D mixture with one variance for all; its exact denoiser, or draws from it.",
    "mixture-narrow-cond": "The narrow mixture with a class for each component.",
}
_EDM = {
    "edm-afhqv2-64": "EDM's DDPM++ (VP) for AFHQv2 at 64x64 pixels.",
    "edm-afhqv2-64-ve": "EDM's NCSN++ (VE) for AFHQv2 at 64x64 pixels.",
    "edm-cifar10": "EDM's unconditional DDPM++ (VP) for CIFAR-10.",
    "edm-cifar10-cond": "EDM's class-conditional DDPM++ (VP) for CIFAR-10.",
    "edm-cifar10-cond-ve": "EDM's class-conditional NCSN++ (VE) for CIFAR-10.",
    "edm-cifar10-ve": "EDM's unconditional NCSN++ (VE) for CIFAR-10.",
    "edm-ffhq64": "EDM's DDPM++ (VP) for FFHQ at 64x64 pixels.",
    "edm-ffhq64-ve": "EDM's NCSN++ (VE) for FFHQ at 64x64 pixels.",
    "edm-imagenet64": "EDM's class-conditional ADM for ImageNet at 64x64 pixels.",
}
_PUBLISHED = {
    "afhqv2-64": "The 15,803 animal faces of AFHQv2 at 64x64 pixels.",
    "cifar10": '50,000 photographs of 32x32 pixels in 10 classes ("train"), or 10,000 others ("heldout").',
    "ffhq64": "The 70,000 faces of FFHQ at 64x64 pixels.",
    "imagenet64": "ImageNet's 1,281,167 training photographs at 64x64 pixels in 1,000 classes.",
}

TEACHERS = Registry(
    "teacher",
    {
        "digits": "cdistill.teachers.named:load_digits",
        "mixture-1d": "cdistill.teachers.mixture:load_mixture_1d",
        "patches": "cdistill.teachers.named:load_patches",
        **dict.fromkeys(_EDM, "cdistill.teachers.named:load_official(name)"),
        **dict.fromkeys(_MIXTURES, "cdistill.teachers.mixture:load_spectral(name)"),
    },
    "cdistill.teachers",
    about="Diffusion models to distil: a loader that returns a Teacher.",
    summaries={**_EDM, **_MIXTURES},
)

SOURCES = Registry(
    "data source",
    {
        "digits": "cdistill.data.named:load_digits",
        "mixture-1d": "cdistill.teachers.mixture:draw_mixture_1d",
        "patches": "cdistill.data.named:load_patches",
        **dict.fromkeys(_PUBLISHED, "cdistill.data.named:load_published(name)"),
        **dict.fromkeys(_MIXTURES, "cdistill.teachers.mixture:draw_spectral(name)"),
    },
    "cdistill.sources",
    about="Training data: a loader (split) -> Source; a path of a folder, .zip, .tar or .npz works as a name.",
    summaries={**_PUBLISHED, **_MIXTURES},
)
DATA_SUFFIXES = (".npz", ".tar", ".tar.gz", ".tgz", ".zip")


def is_teacher_data(name: str) -> bool:
    """Whether `name` asks for samples of the teacher: "teacher" or "teacher:COUNT"."""
    return name == "teacher" or name.startswith("teacher:")


def teacher_data_count(name: str | None) -> int:
    """Returns how many samples of the teacher `name` asks for, by default 50,000; RecipeError: under 2, over 2^30."""
    if name is None or not is_teacher_data(name):
        return 0
    text = name.partition(":")[2] if ":" in name else "50000"
    if not re.fullmatch(r"[0-9]{1,10}", text) or not 2 <= int(text) <= 2**30:
        raise RecipeError(f"data: got {name[:40]!r}; needs teacher:COUNT with a COUNT from 2 to {2**30:,}")
    return int(text)


def is_data_path(name: str) -> bool:
    """Whether `name` is the path of a data source, no other name: it has a separator, a suffix, or is there."""
    if is_teacher_data(name) or name in SOURCES.names():
        return False
    return "/" in name or "\\" in name or name.endswith(DATA_SUFFIXES) or os.path.exists(name)


DISTANCES = Registry(
    "distance",
    {
        "l2": "cdistill.objectives.distances:L2",
        "lpips": "cdistill.objectives.lpips:LPIPS",
        "pseudo-huber": "cdistill.objectives.distances:PseudoHuber",
    },
    "cdistill.distances",
    about="What a consistency loss measures between images.",
)

DISCRIMINATORS = Registry(
    "discriminator",
    {
        "small": "cdistill.networks.discriminator:ImageDiscriminator",
        "vgg16": "cdistill.networks.discriminator:VGG16Discriminator",
    },
    "cdistill.discriminators",
    about="Discriminators of the GAN loss.",
)

ESTIMATORS = Registry(
    "estimator",
    {
        "autodiff": "cdistill.estimation.autodiff:Autodiff",
        "forward": "cdistill.estimation.forward:Forward",
    },
    "cdistill.estimators",
    about="How l and s of a teacher are estimated.",
)

SAMPLERS = Registry(
    "sampler",
    {
        "cm": "cdistill.sampling.samplers:Multistep",
        "ctm": "cdistill.sampling.samplers:Jumps",
        "dpmpp-2m": "cdistill.sampling.samplers:DPMSolverPP2M",
        "euler": "cdistill.sampling.samplers:Euler",
        "gamma": "cdistill.sampling.samplers:GammaSampling",
        "heun": "cdistill.sampling.samplers:Heun",
    },
    "cdistill.samplers",
    about="Solvers for teachers (heun, euler, dpmpp-2m) and samplers for students (ctm, cm, gamma).",
)


FEATURES = Registry(
    "feature network",
    {
        "legacy_tensorflow": "cdistill.evaluation.features:Inception",
        "pixels": "cdistill.evaluation.features:Pixels",
    },
    "cdistill.features",
    removed=("clean", "legacy_pytorch"),
    about="Networks whose features FID, KID, precision and recall compare.",
)


def is_script(name: str) -> bool:
    """Whether `name` is the path of a TorchScript file, by its suffix."""
    return name.endswith((".pt", ".ts"))


def is_code(name: str) -> bool:
    """Whether a feature network called `name` is code that no package registers: a TorchScript file, or a callable."""
    return is_script(name) or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def check_features(name: str) -> str:
    """Returns `name` if it can be a feature network: known, a TorchScript file's, or ``module:callable``; or raises."""
    return name if is_code(name) else FEATURES.check(name)


METRICS = Registry(
    "metric",
    {
        "fid": "cdistill.evaluation.metrics:Frechet",
        "frechet-pixels": "cdistill.evaluation.metrics:PixelFrechet",
        "frechet-vectors": "cdistill.evaluation.metrics:VectorFrechet",
        "kid": "cdistill.evaluation.metrics:KernelDistance",
        "precision": "cdistill.evaluation.metrics:Precision",
        "recall": "cdistill.evaluation.metrics:Recall",
        "teacher-mse": "cdistill.evaluation.metrics:TeacherError",
        "wasserstein": "cdistill.evaluation.metrics:Wasserstein",
    },
    "cdistill.metrics",
    removed=("coverage", "density", "inception-score"),
    about="What is measured of samples.",
)

WRITERS = Registry(
    "format",
    {
        "grid": "cdistill.sampling.writers:GridWriter",
        "npz": "cdistill.sampling.writers:ArrayWriter",
        "png": "cdistill.sampling.writers:FolderWriter",
        "tar": "cdistill.sampling.writers:TarWriter",
        "zip": "cdistill.sampling.writers:ZipWriter",
    },
    "cdistill.writers",
    about="Output formats of samples.",
)

# What `cdistill ls` lists, and where other packages add entries.
REGISTRIES: Mapping[str, Registry] = {
    "teachers": TEACHERS,
    "data": SOURCES,
    "preconditionings": PRECONDITIONINGS,
    "objectives": OBJECTIVES,
    "estimators": ESTIMATORS,
    "distances": DISTANCES,
    "discriminators": DISCRIMINATORS,
    "samplers": SAMPLERS,
    "formats": WRITERS,
    "metrics": METRICS,
    "features": FEATURES,
}
