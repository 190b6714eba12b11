"""What is trained to test the paper's claims: data sets, arms, seeds. Nothing here imports torch.

An arm is a way to train: a loss and a preconditioning. All arms of a data set have the same budget, and trials of the
same seed the same batches, the same noise and the same image seeds, so that arms are compared seed by seed. Trials of
different seeds share none of these, so that their spread holds both the training's noise and that of the samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cdistill.errors import RecipeError, suggest
from cdistill.recipe.files import load_recipe
from cdistill.recipe.schema import DistillRecipe

NFE = (1, 2, 3, 5, 8, 10)
ALIGNMENT = "teacher-mse"  # the metric of how closely a student follows its teacher
_OF_OBJECTIVE = {"distance", "dsm", "max_ode_steps", "points", "target", "target_rate"}  # of what data sets change
_ROLLOUT = {"objective.targets": '"rollout"'}
_REGRESSION = {"objective.name": '"regression"', "objective.pairs": '"ctm"'}
_UNIFORM = {**_REGRESSION, "objective.pairs": '"uniform"'}
_CM = {"objective.name": "cm", "objective.dsm": "false", "objective.target_rate": "0.0"}  # as cifar10-cond-cm


@dataclass(frozen=True)
class Arm:
    """A way to train a student."""

    title: str
    preconditioning: str
    changes: Mapping[str, str] = field(default_factory=dict)  # of other values of the recipe, key -> TOML
    gan: bool = False  # adds the GAN loss, from a third of the training on


ARMS = {
    "ctm": Arm("CTM", "ctm"),
    "analytic": Arm("Analytic", "analytic"),
    "analytic-forward": Arm("Analytic, forward", "analytic-forward"),
    "analytic-bounded": Arm("Analytic, bounded (ours)", "analytic-bounded"),
    "bcm": Arm("BCM", "bcm"),
    "cm": Arm("CM", "cm", _CM),
    "cm-analytic": Arm("CM + Analytic", "analytic", _CM),
    "gan-ctm": Arm("CTM + GAN", "ctm", gan=True),
    "gan-analytic": Arm("Analytic + GAN", "analytic", gan=True),
    # Of `reproduce cheaper`: each has what the one before it has, up to "forms".
    "published": Arm("CTM as published", "ctm", _ROLLOUT),
    "published-rate": Arm("CTM as published, higher rate", "ctm", _ROLLOUT),
    "store": Arm("+ targets from the store", "ctm", {"objective.targets": '"store"'}),
    "regression": Arm("+ regression", "ctm", {**_REGRESSION, "objective.dsm": "true"}),
    "no-dsm": Arm("+ no DSM", "ctm", _REGRESSION),
    "uniform": Arm("+ uniform pairs", "ctm", _UNIFORM),
    "cheap": Arm("+ rate and batch: all together", "ctm", _UNIFORM),
    "cheap-mixed": Arm("all together, mixed pairs", "ctm", {**_UNIFORM, "objective.pairs": '"mixed"'}),
    "cheap-forward": Arm("all together, Analytic forward", "analytic-forward", _UNIFORM),
    "cheap-least-squares": Arm("all together, least squares", "least-squares", _UNIFORM),
}
TRAJECTORY = ("ctm", "analytic", "analytic-forward", "analytic-bounded", "bcm")
CONSISTENCY = ("cm", "cm-analytic")
GAN = ("gan-ctm", "gan-analytic")


@dataclass(frozen=True)
class DataSet:
    """A teacher with its data, and the budget of every arm."""

    name: str
    recipe: str  # the shipped one whose values are changed
    changes: Mapping[str, str]  # key -> TOML
    metric: str  # what stands for FID here
    arms: Sequence[str]  # names in `ARMS`
    samples: int  # images of an evaluation; each seed of the training has its own
    cost: float = 1.0  # of a training step, in steps of the digits; for the time left
    threads: int = 1  # of a training, so that results do not depend on how many run at once; 0 for all that there are
    own: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # arm -> what it changes on these data alone

    @property
    def teacher(self) -> str:
        """Name of the teacher."""
        return str(Trial(self, self.arms[0], 0).load().teacher)


@dataclass(frozen=True)
class Trial:
    """One training: a data set, an arm and a seed."""

    data: DataSet
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its run folder."""
        return f"{self.data.name}-{self.arm}-{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """The recipe's changed values, as ``--set`` takes them."""
        arm = ARMS[self.arm]
        own = {
            "evaluation.nfe": str(list(NFE)),
            **self.data.changes,
            "seed": str(self.seed),
            "preconditioning.name": arm.preconditioning,
            "evaluation.samples": str(self.data.samples),
            "evaluation.first_seed": str(self.seed * self.data.samples),
            **arm.changes,
            **self.data.own.get(self.arm, {}),
        }
        if arm.gan:
            begin = int(own["training.iterations"]) // 3
            own |= {
                "gan.discriminator": "small", "gan.learning_rate": "5e-4", "gan.augment": '["translation"]',
                "gan.start": str(begin),
            }  # fmt: skip
        return [f"{key}={value}" for key, value in own.items()]

    def load(self) -> DistillRecipe:
        """Returns the recipe."""
        return load_recipe(Path(self.data.recipe), DistillRecipe, self.overrides)


def _budget(iterations: int, batch_size: int, **more: str) -> dict[str, str]:
    """Returns a training with nine evaluations, the first before it."""
    named = {"iterations": str(iterations), "batch_size": str(batch_size), **more}
    every = str(iterations // 8)
    return {
        **{f"{'objective' if key in _OF_OBJECTIVE else 'training'}.{key}": value for key, value in named.items()},
        "evaluation.every": every,
        "checkpoint.every": every,
    }


def _mixture(name: str, arms: Sequence[str], iterations: int = 1600, batch_size: int = 128, **more: str) -> DataSet:
    values = {"learning_rate": "3e-3", "target_rate": "0.98", "ema_rate": "0.98", **more}
    metric = "wasserstein" if name == "mixture-1d" else "frechet-vectors"
    changes = {"teacher": name, **_budget(iterations, batch_size, **values)}
    return DataSet(name, "mixture", changes, metric, arms, 2000, cost=0.02)


def _images(name: str, arms: Sequence[str], iterations: int = 240, batch_size: int = 64, **more: str) -> DataSet:
    cost = {"digits": 1.0, "patches": 1.9}[name] * batch_size / 64
    return DataSet(name, f"{name}-paper", _budget(iterations, batch_size, **more), "frechet-pixels", arms, 500, cost)


def _real(name: str) -> DataSet:
    """Returns a row of Table 2: the recipe as it is."""
    return DataSet(name, name, {}, "fid", _PAIR, 50_000, threads=0)


def named(*data: DataSet) -> dict[str, DataSet]:
    """Returns data sets by their names."""
    return {one.name: one for one in data}


_STUDY = ("ctm", "analytic", "analytic-forward", "analytic-bounded")
_FEWER = ("ctm", "analytic", "analytic-forward", "bcm", *CONSISTENCY)
_ALL = (*_STUDY, "bcm", *CONSISTENCY)
_PAIR = ("ctm", "analytic")


def _settings() -> list[DataSet]:
    """Returns short trainings, each with one setting changed: does a verdict hang on it?"""
    images = partial(_images, "patches", _PAIR, 120)
    mixture = partial(_mixture, "mixture-narrow", _PAIR, 800)
    changed = {
        "patches-usual": images(32),
        "patches-rate-third": images(32, learning_rate="3.3e-4"),
        "patches-rate-triple": images(32, learning_rate="3e-3"),
        "patches-pseudo-huber": images(32, distance="pseudo-huber"),
        "patches-batch-quadruple": images(128),
        "mixture-narrow-usual": mixture(),
        "mixture-narrow-rate-third": mixture(learning_rate="1e-3"),
        "mixture-narrow-rate-triple": mixture(learning_rate="9e-3"),
        "mixture-narrow-pseudo-huber": mixture(distance="pseudo-huber"),
        "mixture-narrow-batch-quadruple": mixture(batch_size=512),
        "mixture-narrow-live-target": mixture(target="live"),
        "mixture-narrow-no-dsm": mixture(dsm="false"),
        "mixture-narrow-points-10": mixture(points="10", max_ode_steps="9"),
    }
    return [replace(one, name=name) for name, one in changed.items()]


EXPERIMENTS: Mapping[str, Mapping[str, DataSet]] = {
    "embedded": named(
        _images("digits", (*_FEWER, *GAN)), _images("patches", _FEWER),
        *(_mixture(name, _ALL) for name in ("mixture-1d", "mixture-narrow", "mixture-broad")),
        *(_mixture(name, _STUDY) for name in ("mixture-narrow-cond", "mixture-broad-cond")),
    ),
    "quick": named(
        _mixture("mixture-1d", _FEWER, 480), _mixture("mixture-narrow", _STUDY[:3], 480),
        _mixture("mixture-broad", _STUDY[:3], 480),
        replace(_images("digits", ("ctm", "analytic", *GAN), 96, 32), samples=256),
    ),
    "settings": named(*_settings()),
    "table-2": named(*map(_real, ("cifar10", "cifar10-cond", "ffhq64", "imagenet64"))),
}  # fmt: skip


def choose_data(
    experiments: str, names: str | None, every: Mapping[str, Mapping[str, DataSet]] = EXPERIMENTS
) -> list[DataSet]:
    """Returns the data sets of `experiments`, or those called `names`, with commas between them.

    Raises:
        RecipeError: There are no such.
    """
    if experiments not in every:
        raise RecipeError(f"--experiments: got {experiments!r}; {suggest(experiments, every)}")
    known = every[experiments]
    wanted = list(known) if names is None else list(dict.fromkeys(name.strip() for name in names.split(",")))
    if unknown := [name for name in wanted if name not in known]:
        raise RecipeError(f"--data: got {unknown[0]!r}; {suggest(unknown[0], known)}")
    return [known[name] for name in wanted]


def trials(data: Sequence[DataSet], seeds: int) -> list[Trial]:
    """Returns all trials, seed by seed: what is done first is a whole comparison of one seed."""
    return [Trial(one, arm, seed) for seed in range(seeds) for one in data for arm in one.arms]
