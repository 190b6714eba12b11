"""Records of metrics.jsonl on their way to TensorBoard and Weights & Biases, which are played by stand-ins here."""

import doctest
import sys
import types
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from cdistill.cli.app import run
from cdistill.errors import CdistillError, RecipeError
from cdistill.recipe.schema import DistillRecipe, TeacherRecipe
from cdistill.settings import check_section
from cdistill.storage.run_folder import RunFolder
from cdistill.training import trackers
from cdistill.training.loop import make_accelerator
from cdistill.training.settings import LoggingSection
from cdistill.training.trackers import log_record, scalars, tracking
from tests.conftest import fast_distill

BOTH = 'logging.trackers=["tensorboard","wandb"]'
CONFIG = {"teacher": "digits", "training": {"batch_size": 1}}
TRAIN = {"step": 10, "event": "train", "consistency": 0.5, "skipped": 2, "note": "text"}
EVALUATION = {
    "step": 20,
    "event": "evaluation",
    "rows": [
        {"sampler": "student", "nfe": 1, "values": {"frechet-pixels": 3.0, "teacher-mse": 0.5}},
        {"sampler": "student", "nfe": 2, "values": {"frechet-pixels": 2.0}},
    ],
}


class Recorder:
    """What both packages are told."""

    def __init__(self):
        self.begun, self.scalars, self.closed, self.settings = [], [], [], []
        self.fails_at = None


class Writer:
    """TensorBoard's writer."""

    def __init__(self, recorder, folder, purge_step=None):
        self.recorder = recorder
        recorder.begun.append(("tensorboard", str(folder), purge_step))

    def add_scalar(self, name, value, global_step):
        self.recorder.scalars.append(("tensorboard", global_step, name, value))

    def flush(self):
        pass

    def close(self):
        self.recorder.closed.append("tensorboard")


class WandbRun:
    """What `wandb.init` returns."""

    def __init__(self, recorder, **settings):
        self.recorder = recorder
        recorder.begun.append(("wandb", settings))

    def log(self, values, step):
        if step == self.recorder.fails_at:
            raise BrokenPipeError("the service\nhas gone")
        self.recorder.scalars.extend(("wandb", step, name, value) for name, value in values.items())

    def finish(self):
        self.recorder.closed.append("wandb")


@pytest.fixture
def heard(monkeypatch, tmp_path):
    """Stand-ins for `torch.utils.tensorboard` and `wandb`, below accelerate's own trackers."""
    recorder = Recorder()
    board = types.SimpleNamespace(SummaryWriter=partial(Writer, recorder))
    config = types.SimpleNamespace(update=lambda values, allow_val_change: recorder.settings.append(values))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("torch.utils.tensorboard", board, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=partial(WandbRun, recorder), config=config))
    monkeypatch.setattr(trackers, "_INSTALLED", {"tensorboard": lambda: True, "wandb": lambda: True})
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return recorder


@contextmanager
def started(folder: Path, *names: str):
    """A function that logs a record of a run with trackers."""
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator("fp32")
    with tracking(LoggingSection(trackers=list(names)), RunFolder(folder), CONFIG, accelerator):
        yield lambda record: log_record(RunFolder(folder), record, accelerator)


def test_doctests():
    assert doctest.testmod(trackers) == (0, 3)


def test_a_record_becomes_its_numbers_under_names_that_group():
    assert scalars(TRAIN) == {"train/consistency": 0.5, "train/skipped": 2}
    assert scalars(EVALUATION) == {
        "evaluation/student/nfe1/frechet-pixels": 3.0,
        "evaluation/student/nfe1/teacher-mse": 0.5,
        "evaluation/student/nfe2/frechet-pixels": 2.0,
    }


def test_both_trackers_get_the_numbers_at_their_steps(heard, tmp_path):
    with started(tmp_path / "run", "tensorboard", "wandb") as log:
        log(TRAIN)
        log(EVALUATION)
        assert heard.closed == []
    for name in ("tensorboard", "wandb"):
        assert [told[1:] for told in heard.scalars if told[0] == name] == [
            (10, "train/consistency", 0.5),
            (10, "train/skipped", 2),
            (20, "evaluation/student/nfe1/frechet-pixels", 3.0),
            (20, "evaluation/student/nfe1/teacher-mse", 0.5),
            (20, "evaluation/student/nfe2/frechet-pixels", 2.0),
        ]
    assert sorted(heard.closed) == ["tensorboard", "wandb"]
    assert RunFolder(tmp_path / "run").metrics() == [TRAIN, EVALUATION]


@pytest.mark.parametrize("error", [CdistillError("stopped"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_trackers_are_closed_on_errors(heard, tmp_path, error):
    with pytest.raises(type(error)), started(tmp_path / "run", "tensorboard", "wandb"):
        raise error
    assert sorted(heard.closed) == ["tensorboard", "wandb"]


def test_a_tracker_that_fails_is_left_out_and_the_run_continues(heard, tmp_path, capsys):
    heard.fails_at = 20
    with started(tmp_path / "run", "tensorboard", "wandb") as log:
        for step in (10, 20, 30):
            log({"step": step, "event": "train", "dsm": 1.0})
    assert [told[1] for told in heard.scalars if told[0] == "wandb"] == [10]
    assert [told[1] for told in heard.scalars if told[0] == "tensorboard"] == [10, 20, 30]
    assert [record["step"] for record in RunFolder(tmp_path / "run").metrics()] == [10, 20, 30]
    assert capsys.readouterr().err == (
        "wandb: left out from here on, metrics.jsonl continues: BrokenPipeError: the service has gone\n"
    )


def test_a_tracker_that_does_not_start_is_one_line_and_the_other_is_closed(heard, tmp_path, monkeypatch):
    def refuse(**settings):
        raise ValueError("nobody is\nlogged in")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(CdistillError) as caught, started(tmp_path / "run", "tensorboard", "wandb"):
        pytest.fail("must not begin")
    assert str(caught.value) == (
        "logging.trackers: wandb does not start: ValueError: nobody is logged in; fix that, "
        "or leave it out: --set logging.trackers=[]"
    )
    assert heard.closed == ["tensorboard"]


def test_only_the_main_process_tracks(heard, tmp_path):
    accelerator = types.SimpleNamespace(is_main_process=False, device="cpu", trackers=[], reduce=lambda code, _: code)
    section = LoggingSection(trackers=["tensorboard", "wandb"])
    with tracking(section, RunFolder(tmp_path), CONFIG, accelerator):
        assert accelerator.trackers == []
    assert heard.begun == []


def test_wandb_takes_the_users_variables_first(heard, tmp_path, monkeypatch):
    with started(tmp_path / "runs" / "mine", "wandb"):
        pass
    name, own = heard.begun[-1]
    tracking_folder = tmp_path / "runs" / "mine" / "tracking"
    identity = (tracking_folder / "wandb-id.txt").read_text()
    assert (name, own) == (
        "wandb",
        {"project": "cdistill", "name": "mine", "id": identity, "dir": str(tracking_folder), "resume": "allow"},
    )
    assert heard.settings[-1] == CONFIG
    for key in ("PROJECT", "NAME", "DIR", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{key}", f"my {key}")
    with started(tmp_path / "runs" / "mine", "wandb"):
        pass
    assert heard.begun[-1][1] == {
        "project": "my PROJECT", "name": "my NAME", "id": "my RUN_ID", "dir": "my DIR", "resume": "allow",
    }  # fmt: skip


def test_a_resumed_run_hides_what_tensorboard_had_after_the_checkpoint_and_continues_in_wandb(heard, tmp_path):
    for step in (None, 20, 130):
        if step is not None:
            (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        with started(tmp_path / "run", "tensorboard", "wandb"):
            pass
    place = str(tmp_path / "run" / "tracking")
    assert [told for told in heard.begun if told[0] == "tensorboard"] == [
        ("tensorboard", place, 1),
        ("tensorboard", place, 21),
        ("tensorboard", place, 131),
    ]
    assert len({told[1]["id"] for told in heard.begun if told[0] == "wandb"}) == 1


@pytest.mark.slow
def test_a_training_tells_the_trackers_what_metrics_jsonl_says(heard, tmp_path):
    assert run(fast_distill(Path("run"), "evaluation.every=10", BOTH)) == 0
    expected = [
        (record["step"], name, value)
        for record in RunFolder(Path("run")).metrics()
        for name, value in scalars(record).items()
    ]
    assert {name.split("/")[0] for _, name, _ in expected} == {"train", "evaluation"}
    for tracker in ("tensorboard", "wandb"):
        assert [told[1:] for told in heard.scalars if told[0] == tracker] == expected
    assert sorted(heard.closed) == ["tensorboard", "wandb"]
    changed = ["logging.trackers=[]", "logging.every=5", "training.iterations=40"]
    assert run(fast_distill(Path("run"), "evaluation.every=10", *changed)) == 0  # logging may change on resume
    assert len(heard.closed) == 2


def test_a_teachers_training_is_tracked_too(heard, tmp_path):
    sets = ["training.iterations=2", "training.batch_size=4", 'logging.trackers=["tensorboard"]']
    arguments = [part for value in sets for part in ("--set", value)]
    assert run(["train-teacher", "--recipe", "teacher-digits", "--out", "run", *arguments]) == 0
    assert {told[2].split("/")[0] for told in heard.scalars} == {"train"}
    assert heard.closed == ["tensorboard"]


@pytest.mark.parametrize("command", ["distill", "train-teacher"])
def test_a_missing_package_is_told_before_anything_runs(monkeypatch, tmp_path, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "_INSTALLED", {"tensorboard": lambda: False, "wandb": lambda: True})
    name = {"distill": "mixture", "train-teacher": "teacher-digits"}[command]
    assert run([command, "--recipe", name, "--set", BOTH]) == 2
    assert capsys.readouterr().err == (
        "error: logging.trackers: tensorboard not installed; pip install tensorboard, or --set logging.trackers=[]\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [({"trackers": ["mlflow"]}, "'tensorboard' or 'wandb'"), ({"trackers": ["wandb", "wandb"]}, "name each once"),
     ({"every": 0}, "greater than or equal to 1"), ({"evry": 5}, "(did you mean 'every'?)")],
)  # fmt: skip
def test_a_wrong_section_is_refused(text, words):
    with pytest.raises(RecipeError, match="logging") as caught:
        check_section({"teacher": "digits", "training": {"iterations": 1, "batch_size": 1}, "logging": text},
                      DistillRecipe, "here")  # fmt: skip
    assert words in str(caught.value)


def test_both_recipes_log_every_tenth_step_without_trackers_by_default():
    assert LoggingSection() == LoggingSection(every=10, trackers=[])
    for model in (DistillRecipe, TeacherRecipe):
        assert model.model_fields["logging"].default == LoggingSection()
