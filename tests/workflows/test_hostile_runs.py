"""Folders of runs that somebody sends, or that are damaged: every file is checked at its door, in one line."""

import json
import os
import shutil
import sys
from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from cdistill.cli.app import run
from cdistill.data.memory import free_memory
from cdistill.storage.files import file_digest
from cdistill.storage.own_words import is_own, write_own

SMALL = [
    "training.iterations=4", "training.batch_size=16", "evaluation.samples=16", "evaluation.nfe=[1,2]",
    "preconditioning.name=ctm", "checkpoint.every=2", "evaluation.every=2",
]  # fmt: skip
LAST = Path("checkpoints/step-00000004")


def distil(out, *changes):
    sets = [word for change in [*SMALL, *changes] for word in ("--set", change)]
    return run(["-q", "distill", "--recipe", "mixture", "--out", str(out), *sets])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CDISTILL_ASSETS", str(folder / "assets"))
        assert distil("run") == 0
    return folder


@pytest.fixture
def sent(made, tmp_path, monkeypatch, capsys):
    """A copy of a run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDISTILL_ASSETS", str(made / "assets"))
    shutil.copytree(made / "run", "run")
    capsys.readouterr()
    return Path("run")


def refused(capsys, code, *arguments):
    """Runs a command that must end in one line, and returns that."""
    assert run(arguments) == code
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert len(lines[0]) < 600
    return lines[0]


def change_state(folder, text):
    (folder / LAST / "state.json").write_text(text)
    names = json.loads((folder / LAST / "manifest.json").read_text())
    (folder / LAST / "manifest.json").write_text(json.dumps({n: file_digest(folder / LAST / n) for n in names}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("[1]", "no JSON object"),
        ("7", "no JSON object"),
        ("[" * 100_000, "nested deeper than 50"),
        ({"step": None}, "step: Input should be a valid integer"),
        ({"step": "x"}, "step: Input should be a valid integer"),
        ({"step": -5}, "step: Input should be greater than or equal to 0"),
        ({"step": 4.5}, "step: "),
        ({"step": True}, "step: "),
        ({"step": 3}, "it is of step 3, the folder of step 4"),
        ({"identity": [1]}, "identity: "),
        ({"due": "x"}, "due: "),
        ({"scaler": [1]}, "scaler: "),
    ],
    ids=str,
)
def test_a_state_that_is_none_is_refused(sent, capsys, change, words):
    before = json.loads((sent / LAST / "state.json").read_text())
    change_state(sent, change if isinstance(change, str) else json.dumps({**before, **change}))
    for arguments in (["sample", "--run", "run", "--seeds", "0"], ["inspect", "run"]):
        message = refused(capsys, 4, *arguments)
        assert f"{LAST / 'state.json'}: damaged ({words}" in message


@pytest.mark.parametrize("counters", [5, {"in_a_row": 5}, {"attempt": "x"}, {"latest": {"a": "x"}}], ids=str)
def test_counters_that_are_none_are_refused(sent, capsys, counters):
    before = json.loads((sent / LAST / "state.json").read_text())
    change_state(sent, json.dumps({**before, "counters": counters}))
    assert distil("run", "training.iterations=6") == 4
    assert "state.json: damaged (counters: " in capsys.readouterr().err


def test_a_checkpoint_under_another_name_is_refused(sent, capsys):
    (sent / LAST).rename(sent / "checkpoints/step-00000006")
    assert distil("run", "training.iterations=8") == 4
    assert "it is of step 4, the folder of step 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        {"event": "evaluation", "rows": 5},
        {"event": "evaluation", "rows": [5]},
        {"event": "evaluation", "rows": [{"sampler": "student", "nfe": 1, "values": 5}]},
        {"event": "evaluation", "rows": [{"sampler": "student", "nfe": 1, "values": {"teacher-mse": "x"}}]},
        {"event": "evaluation", "rows": [{"sampler": {}, "nfe": 1, "values": {}}]},
        {"event": "evaluation", "rows": [{"sampler": "student", "nfe": [1], "values": {}}]},
        {"event": "evaluation", "metrics": 5},
        {"event": "evaluation", "metrics": {"teacher-mse": 5}},
        {"event": [1]},
        {"event": "train", "step": -5},
        {"event": "train", "step": True},
        {"event": "train", "step": "x"},
        {},
    ],
    ids=str,
)
def test_a_line_of_the_log_that_is_oddly_typed_is_named(sent, capsys, line):
    count = len((sent / "metrics.jsonl").read_text().splitlines())
    with (sent / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, **line}) + "\n")
    words = f"run/metrics.jsonl: line {count + 1}: damaged ("
    for arguments in (["report", "run"], ["plot", "curves", "run"], ["sample", "--run", "run", "--step", "best"]):
        assert words in refused(capsys, 4, *arguments)
    shutil.rmtree(sent / LAST)
    assert distil("run") == 4
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": 1, "eve', "[1, 2]", '{"step": 1' + "0" * 5000 + "}"])
def test_a_line_that_is_no_record_is_left_out(sent, line):
    with (sent / "metrics.jsonl").open("a") as file:
        file.write(line)
    shutil.rmtree(sent / LAST)
    assert distil("run") == 0


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "evaluation.json", "recipe.resolved.toml", f"{LAST}/state.json", f"{LAST}/manifest.json",
     f"{LAST}/ema.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.timeout(60)
def test_pipes_and_devices_are_not_waited_for(sent, capsys, name, kind):
    (sent / name).unlink()
    os.mkfifo(sent / name) if kind == "pipe" else (sent / name).symlink_to("/dev/zero")
    for arguments in (["report", "run"], ["sample", "--run", "run", "--step", "best", "--seeds", "0"]):
        run(arguments)
    run(["inspect", "run"])
    distil("run", "training.iterations=6")
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_whose_figures_are_not_finite_goes_on_and_is_repeated(sent, capsys):
    """best_step took None for a number."""
    changes = ["evaluation.every=1", "checkpoint.every=1", "training.learning_rate=1e30", "evaluation.nfe=[2]"]
    assert distil("lost", *changes) == 0
    logged = [json.loads(line) for line in Path("lost/metrics.jsonl").read_text().splitlines()]
    values = [row["values"]["teacher-mse"] for one in logged for row in one.get("rows", [])]
    assert None in values
    assert distil("lost", *changes) == 0
    assert distil("lost", *changes, "training.iterations=5") == 0
    assert run(["-q", "evaluate", "--check", "lost/evaluation.json"]) == 0


def change_record(sent, path, value):
    record = json.loads((sent / "evaluation.json").read_text())
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (sent / "evaluation.json").write_text(json.dumps(record))


ODD = [None, 5, "x", [], [1], {"a": 1}, True, 10**30, "y" * 100_000]
PLACES = [
    ("rows",), ("rows", 0), ("rows", 0, "values"), ("rows", 0, "values", "teacher-mse"), ("rows", 0, "nfe"),
    ("rows", 0, "intervals"), ("metrics",), ("metrics", "teacher-mse"), ("step",), ("images",), ("request",),
    ("request", "target"), ("request", "choice"), ("request", "target", "step"), ("request", "target", "teacher"),
    ("request", "target", "changes"), ("request", "choice", "times"), ("request", "choice", "gamma"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", PLACES, ids=str)
def test_no_record_however_odd_ends_in_a_traceback(sent, capsys, path, monkeypatch):
    """What is well-formed is measured again, which is what --check is for; nothing raises anything else."""
    monkeypatch.setattr("cdistill.workflows.evaluate._measure", lambda *_, **__: pytest.skip("sound"))
    savefig = Figure.savefig

    def save(figure: Figure, target: Path | BytesIO, **options: object) -> None:
        """Leaves out the pixels of pictures, which take most of the time."""
        target.write_bytes(b"") if isinstance(target, Path) else savefig(figure, target, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    for value in ODD:
        shutil.copy(sent / "evaluation.json", "whole.json")
        change_record(sent, path, value)
        shown = [] if path[0] == "request" else [["plot", "curves", "run"], ["report", "run"]]
        for arguments in (["evaluate", "--check", "run/evaluation.json"], *shown):
            try:
                assert run(arguments) in (0, 2, 3, 4)
            except pytest.skip.Exception:
                continue
        shutil.move("whole.json", sent / "evaluation.json")
    assert "Traceback" not in capsys.readouterr().err


def test_a_record_without_figures_is_not_reproduced(sent, capsys):
    change_record(sent, ("rows",), [])
    message = refused(capsys, 4, "evaluate", "--check", "run/evaluation.json")
    assert "run/evaluation.json: damaged (it holds no figures)" in message


def test_a_record_of_too_many_samples_is_refused(sent, capsys):
    change_record(sent, ("request", "target", "changes"), {"samples": 10**12})
    change_record(sent, ("request", "target", "path"), "run")
    message = refused(capsys, 2, "evaluate", "--check", "run/evaluation.json")
    assert "samples: got 1000000000000; input should be less than or equal to 10000000" in message


def test_what_does_not_fit_in_memory_is_refused_before_the_training(sent, capsys, monkeypatch):
    monkeypatch.setattr("cdistill.data.memory.free_memory", lambda: 1 << 20)
    assert free_memory() > 1 << 20
    assert distil("new", "evaluation.samples=1000000") == 2
    assert "evaluation.samples: 1,000,000 of shape (1,): needs 0.0 GiB of memory" in capsys.readouterr().err
    assert not Path("new").exists()


def state_in_recipe(sent, old, new):
    """Alters a run's recipe, as somebody who sends it could."""
    text = (sent / "recipe.resolved.toml").read_text()
    assert old in text
    (sent / "recipe.resolved.toml").write_text(text.replace(old, new, 1))


FEATURES, TEACHER = 'features = "legacy_tensorflow"', 'teacher = "mixture-1d"'
STATED = {
    "a callable": (FEATURES, 'features = "evil:f"', "names code", "--features evil:f"),
    "a script": (FEATURES, 'features = "evil.pt"', "names code", "--features evil.pt"),
    "a script inside": (FEATURES, 'features = "run/evil.pt"', "names code", "--features run/evil.pt"),
    "data": ("seed = 0", 'seed = 0\ndata = "/etc/x.npz"', "names a file outside", "--data /etc/x.npz"),
    "a link": ("seed = 0", 'seed = 0\ndata = "run/away.npz"', "names a file outside", "--data run/away.npz"),
    "statistics": ("[evaluation]", '[evaluation]\nreference = "/etc/x.npz"', "names a file", "--reference /etc/x.npz"),
    "a teacher": (TEACHER, 'teacher = "/etc/x.pkl"', "names a file outside", "--weights /etc/x.pkl"),
    "weights": ("seed = 0", 'seed = 0\nweights = "../x.pkl"', "names a file outside", "--weights ../x.pkl"),
}


@pytest.fixture
def evil(sent, monkeypatch):
    """A module that says when it is imported, and a link out of the run."""
    Path("evil.py").write_text("open('hacked', 'w').close()\ndef f(images): return images.flatten(1).float()\n")
    monkeypatch.syspath_prepend(".")
    (sent / "away.npz").symlink_to("/etc/x.npz")
    yield sent
    sys.modules.pop("evil", None)


@pytest.mark.parametrize(("old", "new", "words", "option"), STATED.values(), ids=STATED)
def test_a_run_that_is_sent_names_neither_code_nor_files_elsewhere(evil, capsys, old, new, words, option):
    state_in_recipe(evil, old, new)
    message = refused(capsys, 2, "evaluate", "run")
    assert message.startswith(f"error: run/recipe.resolved.toml: {words}")
    assert message.endswith(f"and was not written here; if you trust it, name it yourself: {option}")
    assert not Path("hacked").exists()


def test_what_a_person_names_is_used(evil, capsys):
    """The mixture has no images, which is said by the network that was named."""
    state_in_recipe(evil, FEATURES, 'features = "evil:f"')
    assert "features 'evil:f': needs grey or RGB images" in refused(
        capsys, 2, "evaluate", "run", "--features", "evil:f"
    )
    assert Path("hacked").exists()


def test_data_that_a_person_names_replace_those_of_a_run(sent, capsys):
    state_in_recipe(sent, "seed = 0", 'seed = 0\ndata = "/etc/x.npz"')
    message = refused(capsys, 3, "evaluate", "run", "--data", "here.npz")
    assert message.endswith("here.npz: no such file or folder; check the path")


def test_a_run_that_is_sent_can_be_shown_and_sampled(evil):
    state_in_recipe(evil, FEATURES, 'features = "evil:f"')
    for arguments in (["report", "run"], ["inspect", "run"], ["sample", "--run", "run", "--format", "npz"]):
        assert run(arguments) == 0
    assert not Path("hacked").exists()


def test_a_run_of_ones_own_keeps_its_words(sent, capsys, monkeypatch):
    """Also when it has moved; no more once the asset folder is another."""
    assert all(is_own((sent / name).read_bytes()) for name in ("recipe.resolved.toml", "evaluation.json"))
    text = (sent / "recipe.resolved.toml").read_text()
    write_own(sent / "recipe.resolved.toml", text.replace("seed = 0", 'seed = 0\ndata = "/etc/x.npz"', 1))
    Path("run").rename("moved")
    assert "/etc/x.npz: no such file or folder" in refused(capsys, 3, "evaluate", "moved")
    monkeypatch.setenv("CDISTILL_ASSETS", "other")
    assert "names a file outside of its folder" in refused(capsys, 2, "evaluate", "moved")


def test_a_record_that_is_sent_names_neither_code_nor_files_elsewhere(evil, capsys):
    whole = (evil / "evaluation.json").read_text()
    for key, value, option in [
        ("changes", {"features": "evil:f"}, "--features evil:f"),
        ("changes", {"reference": "/etc/x.npz"}, "--reference /etc/x.npz"),
        ("data", "/etc/x.npz", "--data /etc/x.npz"),
        ("teacher", "/etc/x.pkl", "--teacher /etc/x.pkl"),
        ("weights", "/etc/x.pkl", "--weights /etc/x.pkl"),
    ]:
        (evil / "evaluation.json").write_text(whole)
        change_record(evil, ("request", "target", key), value)
        message = refused(capsys, 2, "evaluate", "--check", "run/evaluation.json")
        assert message.endswith(f"if you trust it, name it yourself: {option}")
    assert not Path("hacked").exists()


def test_a_record_that_is_sent_is_about_the_run_that_it_lies_in(sent, capsys):
    """Not about another run of the person that it names."""
    shutil.copytree("run", "mine")
    shutil.rmtree("mine/checkpoints")
    change_record(sent, ("request", "target", "path"), "mine")
    assert run(["-q", "evaluate", "--check", "run/evaluation.json"]) == 0


def test_a_person_names_code_for_a_record(evil, capsys):
    change_record(evil, ("request", "target", "changes"), {"features": "evil:f"})
    arguments = ["evaluate", "--check", "run/evaluation.json", "--features", "evil:f"]
    assert "features 'evil:f': needs grey or RGB images" in refused(capsys, 2, *arguments)


def test_a_list_of_trajectories_does_not_say_what_is_removed(tmp_path, monkeypatch):
    """`trajectories --prune` removed the folder that about.json named."""
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "trajectories/x").mkdir(parents=True)
    (tmp_path / "trajectories/x/about.json").write_text(json.dumps({"folder": str(tmp_path / "mine"), "levels": 5}))
    assert run(["trajectories", "--list"]) == 0
    assert run(["trajectories", "--prune"]) == 0
    assert [path.name for path in (tmp_path / "trajectories").iterdir()] == []
    assert (tmp_path / "mine").is_dir()
