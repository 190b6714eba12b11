from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdistill.data import load_source
from cdistill.errors import MissingAssetError, RecipeError
from cdistill.recipe.files import check_recipe, differences, load_recipe, shipped_recipes, to_toml
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.teachers import load_teacher

GOOD = """
teacher = "digits"
[training]
iterations = 10
batch_size = 8
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(GOOD)
    return path


def test_defaults_are_the_papers(recipe):
    loaded = load_recipe(recipe, DistillRecipe)
    training, objective = loaded.training, loaded.objective
    assert (training.learning_rate, objective.target_rate, training.ema_rate) == (4e-4, 0.999, 0.999)
    assert (objective.points, objective.max_ode_steps, objective.distance) == (18, 17, "lpips")


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_is_sound_and_survives_being_written(name):
    model = TeacherRecipe if name.startswith("teacher-") else DistillRecipe
    found = load_recipe(shipped_recipes()[name], model)
    import tomllib

    assert check_recipe(tomllib.loads(to_toml(found)), model, "again") == found


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_shipped_recipe_says_how_to_run_it_and_what_it_costs(name):
    header = shipped_recipes()[name].read_text().split("\n\n")[0]
    assert "cdistill " in header
    assert "Hardware:" in header


def test_all_errors_are_told_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(
        'teacher = "digit"\nsede = 1\n[preconditioning]\nname = "analitic"\n'
        '[training]\niterations = "10"\nbatch_size = 0\n'
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, DistillRecipe)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"{path}: ") for line in lines)
    text = str(caught.value)
    assert "teacher: unknown teacher 'digit'; known: digits, edm-afhqv2-64, " in text
    assert "(did you mean 'digits'?)" in text
    assert "(did you mean 'analytic'?)" in text
    assert "sede: unknown key;" in text
    assert "(did you mean 'seed'?)" in text
    assert "training.iterations: got '10'; input should be a valid integer" in text
    assert "training.batch_size: got 0; input should be greater than or equal to 1" in text


BAD = {
    "": "teacher: missing",
    'teacher = "digits"': "training: missing",
    "teacher = digits": "not TOML",
    GOOD + "iterations = 3": "not TOML",
    GOOD + "learning_rate = nan": "training.learning_rate",
    GOOD + "learning_rate = inf": "training.learning_rate",
    GOOD + "learning_rate = 0": "training.learning_rate",
    GOOD + "learning_rate = true": "training.learning_rate",
    GOOD + "ema_rate = 1": "training.ema_rate",
    GOOD + "[objective]\npoints = 1": "objective.points",
    GOOD + "[objective]\npoints = 18.0": "objective.points",
    GOOD + "[objective]\nmax_ode_steps = 18": "18 points allow 17",
    GOOD + "[objective]\npoint = 18": "objective.point: unknown key; known: distance, dsm, max_ode_steps, name, pairs",
    GOOD + '[objective]\nname = "cm"\nmax_ode_steps = 3': "objective.max_ode_steps: unknown key; known: distance",
    "objective = 3\n" + GOOD: "objective: got 3",
    GOOD + "[objective]\nname = 3": "objective.name: got 3",
    GOOD + 'points = 9\n[objective]\nname = "ctm"': "training.points: unknown key; it is objective.points now",
    GOOD + "accumulation = 3": "does not divide",
    GOOD + '[objective]\nname = "lcm"\npoints = 3': "objective.name: unknown objective 'lcm'; known: cm, ctm",
    GOOD + '[objective]\ndistance = "l1"': "unknown distance 'l1'",
    GOOD + 'precision = "fp8"': "training.precision",
    GOOD + "lr = 1e-3": "training.lr: unknown key",
    GOOD + "[evaluation]\nnfe = []": "evaluation.nfe",
    GOOD + "[evaluation]\nnfe = [0]": "evaluation.nfe.0",
    GOOD + '[evaluation]\nnfe = "2,3"': "evaluation.nfe",
    GOOD + '[evaluation]\nmetrics = ["FID"]': "unknown metric 'FID'",
    GOOD + '[evaluation]\nsplit = "test"': "evaluation.split",
    GOOD + "[checkpoint]\nkeep = 0": "checkpoint.keep",
    GOOD + "[checkpoint]\nevery = -5": "checkpoint.every",
    GOOD + '[preconditioning]\nname = "cm"': "choose from objectives to eps: cm",
    GOOD + "[estimation]\nsamples = 1": "estimation.samples",
    GOOD + "[estimation]\ntimesteps = 2": "estimation.timesteps",
    GOOD + '[estimation]\ngrid = "linear"': "estimation.grid",
    GOOD + '[gan]\ndiscriminator = "big"': "unknown discriminator 'big'; known: small, vgg16",
    GOOD + '[gan]\naugment = ["colour"]': "gan.augment.0",
    GOOD + "[gan]\nstart = 10": "gan.start: got 10; training.iterations is 10",
    GOOD
    + "[gan]\nlearnin_rate = 1": "gan.learnin_rate: unknown key; known: augment, discriminator, learning_rate, start",
    GOOD + '[objective]\nname = "cm"\ndsm = false\n[gan]': "takes no GAN loss; these do: ctm",
    "seed = -1\n" + GOOD: "seed",
    'data = "cifar"\n' + GOOD: "unknown data source 'cifar'",
    'data = "x.safetensors"\n' + GOOD: "unknown data source 'x.safetensors'",
    "training = 5\n" + 'teacher = "digits"': "training: got 5",
    "\udcff": "not TOML",
}


@pytest.mark.parametrize("text", list(BAD), ids=range(len(BAD)))
def test_bad_recipes_are_refused_with_the_reason(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, DistillRecipe)
    assert BAD[text] in str(caught.value)
    assert str(path) in str(caught.value)


def test_overrides_are_toml_or_text(recipe):
    sets = ["training.batch_size=16", "preconditioning.name=ctm", "evaluation.nfe=[2, 3]", "seed=3"]
    found = load_recipe(recipe, DistillRecipe, sets)
    assert found.training.batch_size == 16
    assert found.preconditioning.name == "ctm"
    assert found.evaluation.nfe == [2, 3]
    assert found.seed == 3


@pytest.mark.parametrize("override", ["seed", "=3", "a b=3", "teacher.name=3"])
def test_overrides_without_a_key_or_value_are_refused(recipe, override):
    with pytest.raises(RecipeError, match=r"--set|teacher: got"):
        load_recipe(recipe, DistillRecipe, [override])


def test_a_missing_recipe_names_the_shipped_ones():
    with pytest.raises(MissingAssetError, match=r"did you mean 'digits'"):
        load_recipe(Path("digit.toml"), DistillRecipe)


def test_shipped_recipes_are_found_by_name():
    assert load_recipe(Path("digits"), DistillRecipe).teacher == "digits"
    assert load_recipe(Path("recipes/digits.toml"), DistillRecipe).teacher == "digits"


def test_differences_name_the_keys(recipe):
    old = load_recipe(recipe, DistillRecipe)
    new = load_recipe(recipe, DistillRecipe, ["training.learning_rate=1e-3", "evaluation.samples=5"])
    assert differences(old, new, ["evaluation"]) == ["training.learning_rate: 0.0004 -> 0.001"]


@given(st.floats(min_value=1e-300, max_value=1e300), st.integers(0, 2**62), st.sampled_from(["ctm", "bcm", "analytic"]))
def test_every_value_survives_being_written(rate, seed, name):
    import tomllib

    values = {
        "teacher": "digits", "seed": seed, "preconditioning": {"name": name, "coefficients": 'a"b\\c\n'},
        "training": {"iterations": 1, "batch_size": 1, "learning_rate": rate},
    }  # fmt: skip
    found = check_recipe(values, DistillRecipe, "test")
    assert check_recipe(tomllib.loads(to_toml(found)), DistillRecipe, "again") == found


def test_another_objective_inherits_the_settings_that_both_have(recipe):
    sets = ["objective.points=9", "objective.max_ode_steps=8", "objective.distance=l2", "objective.name=cm"]
    assert load_recipe(recipe, DistillRecipe, sets).objective.model_dump() == {
        "name": "cm", "distance": "l2", "dsm": True, "points": 9, "targets": "rollout", "target_rate": 0.999,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"objective.max_ode_steps: unknown key"):
        load_recipe(recipe, DistillRecipe, [*sets, "objective.max_ode_steps=8"])


@pytest.mark.parametrize("method", ["ctm", "cm"])
def test_recipes_of_version_0_1_are_read(recipe, method):
    """They had the objective's settings in [training], CTM's for CM too."""
    recipe.write_text(GOOD + f'method = "{method}"\npoints = 9\nmax_ode_steps = 8\ndistance = "l2"\ntarget = "ema"\n')
    loaded = load_recipe(recipe, DistillRecipe)
    assert (loaded.objective.name, loaded.objective.points, loaded.objective.distance) == (method, 9, "l2")
    assert (loaded.training.iterations, loaded.training.batch_size) == (10, 8)
    with pytest.raises(RecipeError, match=r"training.points: unknown key; it is objective.points now"):
        load_recipe(recipe, DistillRecipe, ["training.points=5"])


def test_a_recipe_extends_another(recipe, tmp_path):
    child = tmp_path / "child.toml"
    child.write_text('extends = "r.toml"\nseed = 4\n[training]\nbatch_size = 16\n')
    found = load_recipe(child, DistillRecipe)
    assert (found.teacher, found.seed) == ("digits", 4)
    assert (found.training.iterations, found.training.batch_size) == (10, 16)
    child.write_text('extends = "digits-paper"\n[preconditioning]\nname = "ctm"\n')
    assert differences(load_recipe(Path("digits-paper"), DistillRecipe), load_recipe(child, DistillRecipe)) == [
        "preconditioning.name: 'analytic' -> 'ctm'"
    ]


@pytest.mark.parametrize("base", ['"child.toml"', "3"])
def test_a_recipe_cannot_extend_itself(tmp_path, base):
    child = tmp_path / "child.toml"
    child.write_text(f"extends = {base}\n")
    with pytest.raises(RecipeError, match="extends: got"):
        load_recipe(child, DistillRecipe)


def test_a_circle_through_other_names_is_noticed(tmp_path):
    child = tmp_path / "child.toml"
    child.write_text(f'extends = "../{tmp_path.name}/child.toml"\n')
    with pytest.raises(RecipeError, match="no cycle"):
        load_recipe(child, DistillRecipe)


def test_a_mistyped_path_does_not_run_a_shipped_recipe():
    for path in ("/nowhere/recipes/digits.toml", "digits.tmol", "other/digits"):
        with pytest.raises(MissingAssetError):
            load_recipe(Path(path), DistillRecipe)


@pytest.mark.parametrize("text", ["\U0001f600.safetensors", "a\x7fb", "tab\there"])
def test_unusual_characters_survive(recipe, text):
    import tomllib

    values = {"teacher": "digits", "training": {"iterations": 1, "batch_size": 1}}
    found = check_recipe({**values, "preconditioning": {"coefficients": text}}, DistillRecipe, "test")
    assert tomllib.loads(to_toml(found))["preconditioning"]["coefficients"] == text


@pytest.mark.parametrize(
    "change",
    [
        "network.model_channels=132",
        "network.channel_mult=[1,2,2,2,2]",
        "network.attn_resolutions=[7]",
        "data=mixture-1d",
    ],
)
def test_networks_that_do_not_fit_are_refused(change, tmp_path):
    from cdistill.workflows.distill import train_teacher

    with pytest.raises(RecipeError):
        train_teacher(load_recipe(Path("teacher-digits"), TeacherRecipe, [change]), tmp_path / "run", "auto")
    assert not (tmp_path / "run").exists()


def test_networks_take_square_images_only(tmp_path):
    from cdistill.workflows.distill import train_teacher

    images = np.zeros((4, 8, 12, 1), np.uint8)
    np.savez(tmp_path / "wide.npz", images=images)
    for changes in ([], ["network.channel_mult=[1]", "network.attn_resolutions=[]"]):
        recipe = load_recipe(Path("teacher-digits"), TeacherRecipe, [f'data="{tmp_path / "wide.npz"}"', *changes])
        with pytest.raises(RecipeError, match="has images of 12x8 pixels; the networks take square ones"):
            train_teacher(recipe, tmp_path / "run", "auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["digits", "patches"])
def test_the_twins_differ_in_the_preconditioning_only(name):
    first, second = (load_recipe(Path(n), DistillRecipe) for n in (f"{name}-paper", f"{name}-ctm"))
    assert differences(first, second) == ["preconditioning.name: 'analytic' -> 'ctm'"]


# Table 3 and Appendix B: lr, target EMA, EMA, N, max ODE steps, iterations, batch, timesteps, samples, grid.
TABLE_3 = {
    "cifar10": (4e-4, 0.999, 0.999, 18, 17, 200_000, 256, 120, 4096, "log-uniform"),
    "cifar10-cond": (4e-4, 0.999, 0.999, 18, 17, 150_000, 512, 120, 4096, "log-uniform"),
    "ffhq64": (4e-4, 0.999, 0.999, 18, 17, 150_000, 256, 120, 4096, "log-uniform"),
    "imagenet64": (4e-4, 0.999, 0.999, 40, 20, 60_000, 2048, 160, 1024, "rho"),
}


@pytest.mark.parametrize("twin", ["", "-ctm"])
@pytest.mark.parametrize("name", list(TABLE_3))
def test_recipes_are_those_of_table_3(name, twin):
    recipe = load_recipe(shipped_recipes()[f"{name}{twin}"], DistillRecipe)
    t, o, e = recipe.training, recipe.objective, recipe.estimation
    rates = (t.learning_rate, o.target_rate, t.ema_rate)
    sizes = (o.points, o.max_ode_steps, t.iterations, t.batch_size)
    assert (*rates, *sizes, e.timesteps, e.samples, e.grid) == TABLE_3[name]
    assert (o.name, o.distance, o.dsm, t.precision, t.flips) == ("ctm", "lpips", True, "fp16", True)
    assert recipe.preconditioning.name == ("ctm" if twin else "analytic")
    assert recipe.teacher == f"edm-{name}"


def test_recipes_of_cm_change_nothing_but_the_objective():
    ctm, cm, analytic = (
        load_recipe(shipped_recipes()[f"cifar10-cond{kind}"], DistillRecipe) for kind in ("-ctm", "-cm", "-cm-analytic")
    )
    assert differences(cm, analytic) == ["preconditioning.name: 'cm' -> 'analytic'"]
    changed = {line.split(":")[0] for line in differences(ctm, cm)}
    ctms_alone = {"objective.max_ode_steps", "objective.target", "objective.pairs"}
    own = {"preconditioning.name", "objective.name", "objective.dsm", "objective.target_rate"}
    assert changed == own | ctms_alone
    assert (cm.objective.name, cm.objective.dsm, cm.objective.target_rate) == ("cm", False, 0.0)


def test_paths_may_begin_at_home_and_an_unknown_name_says_where_paths_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(RecipeError, match=rf"'plain'; known: .*; or the path of a file or folder, from {tmp_path}"):
        load_recipe(Path("digits"), DistillRecipe, ["data=plain"])
    (tmp_path / "plain").mkdir()
    assert load_recipe(Path("digits"), DistillRecipe, ["data=plain"]).data == "plain"
    changes = [
        "data=~/images", "teacher=~/t.pkl", "weights=~/w.pkl", "preconditioning.coefficients=~/c.safetensors",
        "evaluation.reference=~/r.npz", "evaluation.features=~/f.pt",
    ]  # fmt: skip
    recipe = load_recipe(Path("digits"), DistillRecipe, changes)
    found = (
        recipe.data, recipe.teacher, recipe.weights, recipe.preconditioning.coefficients, recipe.evaluation.reference,
        recipe.evaluation.features,
    )  # fmt: skip
    assert all(path.startswith(str(tmp_path / "home")) for path in found)
    for load, name in ((load_source, "~/images.zip"), (load_teacher, "~/t.safetensors")):
        with pytest.raises(MissingAssetError, match=str(tmp_path / "home")):
            load(name)
