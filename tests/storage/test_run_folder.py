"""What a run folder says of its checkpoints, from small files alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cdistill.cli.app import run
from cdistill.errors import CdistillError, CorruptFileError, MissingAssetError, RecipeError, RunLockedError
from cdistill.recipe.files import load_recipe, to_toml
from cdistill.recipe.schema import DistillRecipe
from cdistill.runtime.processes import let_main
from cdistill.storage.checkpoints import save_checkpoint
from cdistill.storage.run_folder import RunFolder, held, read_run


@pytest.fixture
def folder(tmp_path):
    """A run with checkpoints of the steps 10 to 50, not yet measured."""
    for step in (10, 20, 30, 40, 50):
        save_checkpoint(tmp_path / "run" / "checkpoints", step, {}, {}, keep=5)
    return RunFolder(tmp_path / "run")


def measure(folder, step, *values, nfe=(1, 2), metrics=("fid", "teacher-mse")):
    """Logs an evaluation; the values by NFE, then by metric."""
    numbers = iter(values)
    rows = [{"sampler": "student", "nfe": k, "values": {name: next(numbers) for name in metrics}} for k in nfe]
    folder.log({"step": step, "event": "evaluation", "rows": rows})


def test_nothing_is_best_before_an_evaluation(folder):
    folder.log({"step": 10, "event": "train", "consistency": 1.0})
    assert folder.best_step() is None
    assert folder.best_step("fid@2") is None
    with pytest.raises(MissingAssetError, match=r"no evaluated checkpoint; there are steps 10, 20, 30, 40, 50; choose"):
        folder.find_checkpoint("best")


@pytest.mark.parametrize(
    ("goal", "best"), [(None, 20), ("fid@1", 20), ("teacher-mse@1", 30), ("fid@2", 10), ("teacher-mse@2", 40)]
)
def test_the_lowest_value_is_the_best_by_default_of_the_first_metric_at_the_first_nfe(folder, goal, best):
    measure(folder, 0, 0.0, 0.0, 0.0, 0.0)  # the untrained student has no checkpoint
    measure(folder, 10, 5.0, 5.0, 1.0, 5.0)
    measure(folder, 20, 1.0, 5.0, 5.0, 5.0)
    measure(folder, 30, 5.0, 1.0, 5.0, 5.0)
    measure(folder, 40, 5.0, 5.0, 5.0, 1.0)
    measure(folder, 60, 0.0, 0.0, 0.0, 0.0)  # killed before it was saved
    assert folder.best_step(goal) == best
    assert folder.find_checkpoint("best", goal).name == f"step-000000{best}"


def test_the_earliest_of_equals_is_the_best_and_what_is_not_finite_never_is(folder):
    for step, value in ((10, float("nan")), (20, float("-inf")), (30, 2.0), (40, 2.0), (50, float("inf"))):
        measure(folder, step, value, nfe=(1,), metrics=("fid",))
    assert folder.best_step("fid@1") == 30


def test_when_other_things_are_measured_the_newest_evaluation_says_which_by_default(folder):
    measure(folder, 10, 1.0, nfe=(1,), metrics=("fid",))
    measure(folder, 20, 3.0, nfe=(2,), metrics=("wasserstein",))
    measure(folder, 30, 2.0, nfe=(2,), metrics=("wasserstein",))
    assert folder.best_step() == 30
    assert folder.best_step("fid@1") == 10


def test_records_behind_a_step_and_half_lines_do_not_count(folder):
    measure(folder, 10, 2.0, nfe=(1,), metrics=("fid",))
    measure(folder, 20, 1.0, nfe=(1,), metrics=("fid",))
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "event": "evaluation", "rows": [{"nfe": 1, "val')
    assert folder.best_step() == 20
    folder.truncate_metrics(15)
    assert folder.best_step() == 10


def test_a_run_is_read_as_far_as_it_got(folder):
    with pytest.raises(MissingAssetError, match=r"no run here, recipe\.resolved\.toml is missing"):
        read_run(folder)
    folder.recipe.write_text('teacher = "digits"\n[training]\npoints = 18\n')
    record = read_run(folder)
    assert record.values == {"teacher": "digits", "training.points": 18}
    assert (record.status, record.environment, record.training, record.evaluations, record.results) == (
        {},
        {},
        [],
        [],
        {},
    )
    assert list(record.checkpoints) == [10, 20, 30, 40, 50]


def test_a_finished_run_is_read_whole(folder):
    folder.recipe.write_text("seed = 3")
    measure(folder, 20, 1.0, nfe=(1,), metrics=("fid",))
    folder.log({"step": 20, "event": "train", "dsm": 0.5})
    measure(folder, 10, 2.0, nfe=(1,), metrics=("fid",))
    measure(folder, 20, 3.0, nfe=(1,), metrics=("fid",))
    folder.write_status(state="finished", step=50)
    for name in ("evaluation-b", "evaluation", "evaluation-a"):
        (folder.path / f"{name}.json").write_text(json.dumps({"name": name}))
    record = read_run(folder)
    assert record.recipe == "seed = 3"
    assert [(found["step"], found["rows"][0]["values"]["fid"]) for found in record.evaluations] == [
        (10, 2.0),
        (20, 3.0),
    ]
    assert record.training == [{"step": 20, "event": "train", "dsm": 0.5}]
    assert (record.status["state"], record.status["step"]) == ("finished", 50)
    assert list(record.results) == ["evaluation.json", "evaluation-a.json", "evaluation-b.json"]


@pytest.mark.parametrize(
    "name", ["status.json", "env.json", "evaluation.json", "recipe.resolved.toml", "metrics.jsonl"]
)
@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 200_000, b"[1]"], ids=["half", "no text", "deep", "a list"])
def test_a_damaged_file_of_a_run_is_named(folder, name, content):
    folder.recipe.write_text("seed = 3")
    (folder.path / name).write_bytes(content)
    if name == "metrics.jsonl" and content != b"\xff":  # lines that are no records are left out, as a half-written one
        assert read_run(folder).training == []
    elif name != "recipe.resolved.toml" or content != b"[1]":  # a table called 1
        with pytest.raises(CorruptFileError, match=rf"{name}: damaged \(.*\); restore it, or make it again"):
            read_run(folder)


def test_a_file_of_a_run_that_is_too_large_is_not_read(folder):
    folder.recipe.write_text("seed = 3")
    with (folder.path / "status.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(CorruptFileError, match="more than 16,777,216 bytes"):
        read_run(folder)


def test_a_checkpoint_is_found_by_its_step(folder):
    assert folder.find_checkpoint("last").name == "step-00000050"
    assert folder.find_checkpoint("30").name == "step-00000030"
    with pytest.raises(MissingAssetError, match=r"no checkpoint of step 31; there are steps 10, 20, 30, 40, 50;"):
        folder.find_checkpoint("31")
    with pytest.raises(MissingAssetError, match="train first"):
        RunFolder(folder.path / "none").find_checkpoint("31")


def test_a_lock_is_held_once_and_given_back(tmp_path):
    lock, text = tmp_path / "new" / ".lock", r"^it: taken; wait, or choose another --out$"
    with held(lock, "it: taken"), pytest.raises(RunLockedError, match=text), held(lock, "it: taken"):
        pass
    with held(lock, "it: taken"):
        pass


def test_a_process_that_is_told_of_a_refusal_ends_with_the_same_code():
    """Whichever process ends first, the launcher returns the code of the refusal."""
    told = SimpleNamespace(is_main_process=False, device="cpu", reduce=lambda own, how: own + RunLockedError.exit_code)
    with pytest.raises(CdistillError, match="here: the main process refused it") as caught:
        let_main(lambda: pytest.fail("not its work"), Path("here"), told)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize("step", ["first", "-1", "1.5", "", "²"])
def test_a_step_is_last_best_or_a_number(command, step, folder, capsys):
    assert run([command, "--run", str(folder.path), "--step", step]) == 2
    assert f"--step: got {step!r}; needs last, best or the number of a step" in capsys.readouterr().err


def test_only_a_run_has_steps_to_choose_from(capsys):
    refusals = {("--teacher", "mixture-1d"): "without --teacher", ("--run", "student.safetensors"): "with a run folder"}
    for more, words in refusals.items():
        assert run(["sample", *more, "--step", "10"]) == 2
        assert f"--step: goes {words}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ("fid", r"checkpoint\.best: got 'fid'; needs METRIC@NFE, as in frechet-pixels@2"),
        ("fid@0", r"needs METRIC@NFE"),
        ("@2", r"needs METRIC@NFE"),
        ("fid@two", r"needs METRIC@NFE"),
        ("fdi@2", r"unknown metric 'fdi'.*did you mean 'fid'"),
        ("wasserstein@4", r"got 'wasserstein@4'; evaluation measures every metric that applies at NFE \[1, 2\]"),
        ("fid@2", r"got 'fid@2'; evaluation measures wasserstein at NFE \[1, 2\]"),
    ],
)
def test_what_is_best_must_be_measured(goal, message):
    metrics = "[]" if goal == "wasserstein@4" else '["wasserstein"]'
    sets = [f"checkpoint.best={json.dumps(goal)}", "evaluation.nfe=[1,2]", f"evaluation.metrics={metrics}"]
    with pytest.raises(RecipeError, match=message):
        load_recipe(Path("mixture"), DistillRecipe, sets)


def test_what_is_best_is_written_with_the_recipe(tmp_path):
    found = load_recipe(Path("mixture"), DistillRecipe, ["checkpoint.best=wasserstein@2", "evaluation.nfe=[1,2]"])
    (tmp_path / "again.toml").write_text(to_toml(found))
    assert load_recipe(tmp_path / "again.toml", DistillRecipe).checkpoint.best == "wasserstein@2"
