"""Sizes are bounded before the work: of every field of a recipe, and of what is typed."""

import time
from pathlib import Path
from typing import Annotated, get_args

import pytest
from pydantic.fields import FieldInfo

from cdistill.cli.app import run
from cdistill.cli.options import calls, numbers
from cdistill.errors import RecipeError
from cdistill.recipe.files import load_recipe
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe, recipe_of_objectives
from cdistill.registry import OBJECTIVES
from cdistill.schedule import time_list
from cdistill.settings import Section


def bounds(annotation, rules=()):
    """Yields every whole number and list in a type, and the names of its bounds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for name, field in annotation.model_fields.items():
            for where, kind, known in bounds(field.annotation, field.metadata):
                yield f"{name}.{where}".strip("."), kind, known
    elif getattr(annotation, "__metadata__", None):
        inner = [rule for item in annotation.__metadata__ for rule in (getattr(item, "metadata", None) or [item])]
        yield from bounds(get_args(annotation)[0], [*rules, *inner])
    elif annotation is int:
        yield "", int, {key for rule in rules for key in ("le", "lt") if hasattr(rule, key)}
    else:
        for part in get_args(annotation):
            if isinstance(part, type) or get_args(part):
                yield from bounds(part, rules)


def fields():
    for model in (TeacherRecipe, *[recipe_of_objectives(name, name) for name in OBJECTIVES.names()]):
        yield from bounds(model)


def test_every_whole_number_of_a_recipe_is_bounded_from_above():
    found = list(fields())
    assert {name for name, _, _ in found} >= {"evaluation.nfe", "objective.points", "training.batch_size", "seed"}
    assert {name for name, _, known in found if not known} == set()


def test_the_walk_sees_a_field_without_a_bound():
    class Loose(Section):
        one: int
        two: list[Annotated[int, FieldInfo(ge=1)]]

    assert [known for _, _, known in bounds(Loose)] == [set(), set()]


@pytest.mark.parametrize(
    "key",
    [
        "objective.points", "evaluation.samples", "evaluation.grid_images", "estimation.timesteps",
        "estimation.samples", "trajectories.count", "trajectories.substeps", "training.batch_size",
        "estimation.fit_trajectories",
    ],
)  # fmt: skip
def test_a_size_without_end_is_refused_at_once(capsys, key):
    begun = time.process_time()
    assert run(["distill", "--recipe", "mixture", "--set", f"{key}=100000000000", "--dry-run"]) == 2
    assert f"{key}: got 100000000000; input should be less than or equal to" in capsys.readouterr().err
    assert time.process_time() - begun < 3


def test_a_plan_of_thousands_of_levels_ends(capsys):
    changes = ["objective.points=4096", "objective.max_ode_steps=17", "preconditioning.name=ctm"]
    assert run(["plan", "--recipe", "mixture", *[word for change in changes for word in ("--set", change)]]) == 2
    assert "points: got 4096; pairs of noise levels are drawn from at most 256" in capsys.readouterr().err
    changes = ["objective.points=4096", "objective.name=cm", "preconditioning.name=cm"]
    assert run(["plan", "--recipe", "mixture", *[word for change in changes for word in ("--set", change)]]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed = " + "1" * 5000, "r.toml: not TOML: Exceeds the limit"),
        ("seed = " + "[" * 5000, "r.toml: not TOML: nested deeper than 50"),
        (".".join(["a"] * 20_000) + " = 1", "r.toml: not TOML: a key of more than 16 parts"),
        ("".join(f"k{k} = 1\n" for k in range(20_000)), "more errors$"),
        ('"a\\n\\u001b[31m" = 1', r"r.toml: a\\n\\x1b\[31m: unknown key"),
        ('teacher = ["' + "x" * 100_000 + '"]', r"xxx\.\.\."),
    ],
    ids=["digits", "depth", "parts", "keys", "controls", "long"],
)
def test_a_recipe_is_refused_in_short_lines(tmp_path, text, words):
    (tmp_path / "r.toml").write_text(text)
    begun = time.process_time()
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(tmp_path / "r.toml", DistillRecipe)
    assert time.process_time() - begun < 5
    assert len(str(caught.value).splitlines()) < 30
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("change", ["a." * 20_000 + "a=1", "seed=" + "1" * 5000, "seed=" + "[" * 5000])
def test_an_override_is_refused_in_a_short_line(change):
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("digits"), DistillRecipe, [change])
    assert len(str(caught.value)) < 500


def test_a_chain_of_recipes_ends(tmp_path):
    for k in range(1500):
        (tmp_path / f"{k}.toml").write_text(f'extends = "{k + 1}.toml"')
    with pytest.raises(RecipeError, match=r"10\.toml: extends: got '11\.toml'; .* no chain of more than 10$"):
        load_recipe(tmp_path / "0.toml", DistillRecipe)


def test_what_is_typed_is_bounded():
    with pytest.raises(RecipeError, match="at most 10,000,000 numbers below"):
        numbers(",".join(["0-9999999"] * 400))
    for text in ("1-5000000", "1000000000", "1-101"):
        with pytest.raises(RecipeError, match="at most 100 numbers of up to 10,000 network calls"):
            calls(text)
    with pytest.raises(RecipeError, match="times: got"):
        time_list([80 - k / 1000 for k in range(1, 20_000)])
    for arguments in (
        ["plan", "--recipe", "mixture", "--devices", "1" + "0" * 400],
        ["plot", "trajectories", "--count", "1000000", "--nfe", "1000"],
        ["trajectories", "--teacher", "digits", "--points", "100000000"],
        ["reference-stats", "--data", "digits", "--features", "pixels", "--keep", "1" + "0" * 30],
    ):
        assert run(arguments) == 2
