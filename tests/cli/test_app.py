"""What a person types and sees: results, one-line errors with what to do, exit codes."""

import json

import pytest
from PIL import Image

from cdistill.cli.app import run
from cdistill.cli.execution import without_nproc
from cdistill.cli.options import calls, numbers
from cdistill.errors import RecipeError
from tests.conftest import FAST

ESTIMATE = ["estimate-coeffs", "--teacher", "mixture-1d", "--samples", "100", "--timesteps", "8"]


def size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail: returns its exit code and its error, which has no traceback."""

    def check(*arguments: str) -> tuple[int, str]:
        code = run(arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert captured.err.strip()
        return code, captured.err

    return check


def test_numbers_and_ranges():
    assert numbers("2,3,5") == [2, 3, 5]
    assert numbers("0-3, 7") == [0, 1, 2, 3, 7]
    for wrong in ("", "a", "3-1", "1,,2", "-4"):
        with pytest.raises(RecipeError, match=r"needs numbers|empty range"):
            numbers(wrong)
    with pytest.raises(RecipeError, match="1 or more"):
        calls("2,0")


def test_nproc_is_left_out_for_the_processes():
    assert without_nproc(["distill", "--nproc", "2", "--recipe", "r"]) == ["distill", "--recipe", "r"]
    assert without_nproc(["distill", "--recipe", "r", "--nproc=2"]) == ["distill", "--recipe", "r"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["distill", "--recipe", "none.toml"], 3, ["none.toml", "no such recipe", "known: cifar10"]),
        (["distill", "--recipe", "digit"], 3, ["did you mean 'digits'?"]),
        (["distill", "--recipe", "digits", "--set", "training.iteration=3"], 2, ["did you mean 'iterations'?"]),
        (["distill", "--recipe", "teacher-digits"], 2, ["teacher: missing"]),
        (["train-teacher", "--recipe", "digits"], 2, ["network: missing"]),
        (["distill", "--recipe", "digits", "--resume", "perhaps"], 2, ["auto, never or the folder of a run"]),
        (["distill"], 2, ["--recipe"]),
        (["estimate-coeffs", "--teacher", "digit"], 2, ["unknown teacher 'digit'", "did you mean 'digits'?"]),
        (["estimate-coeffs", "--teacher", "digits", "--timesteps", "2"], 2, ["timesteps: got 2"]),
        (["estimate-coeffs", "--teacher", "digits", "--grid", "linear"], 2, ["grid: got 'linear'"]),
        (["estimate-coeffs", "--teacher", "none.safetensors"], 3, ["none.safetensors: no such file"]),
        (["estimate-coeffs", "--teacher", "digits", "--data", "patches"], 4, ["shape (1, 12, 12)", "(1, 8, 8)"]),
        (["sample", "--nfe", "0"], 2, ["--nfe: got 0", "1 or more"]),
        (["sample", "--nfe", "two"], 2, ["got 'two'"]),
        (["sample", "--format", "gif"], 2, ["unknown format 'gif'", "known: grid, npz, png, tar, zip"]),
        (["sample"], 3, ["no run here", "cdistill distill --recipe digits"]),
        (["sample", "--run", "nowhere"], 3, ["nowhere: no checkpoint"]),
        (["sample", "--teacher", "digits", "--classes", "10"], 2, ["0 to 9"]),
        (["sample", "--teacher", "patches", "--classes", "1"], 2, ["unconditional"]),
        (["sample", "--teacher", "mixture-1d"], 2, ["--format npz"]),
        (["evaluate"], 3, ["no run here"]),
        (["evaluate", "--nfe", "2,0"], 2, ["1 or more"]),
        (["evaluate", "--metrics", "FID"], 2, ["unknown metric 'FID'", "did you mean 'fid'?"]),
        (["plot", "trajectories", "--preconditionings", "ctm,analitic"], 2, ["did you mean 'analytic'?"]),
        (["plot", "coefficients", "none.safetensors"], 3, ["none.safetensors: no such file"]),
        (["show", "nothing"], 3, ["no such recipe"]),
        (["ls", "things"], 2, ["unknown 'things'", "teachers"]),
        (["evalute"], 2, ["evalute"]),
        (["sample", "--teacher", "digits", "--run", "x"], 2, ["--run: goes without --teacher"]),
        (["sample", "--teacher", "digits", "--step", "last"], 2, ["--step: goes without --teacher"]),
        (["sample", "--run", "s.safetensors", "--weights", "w.pkl"], 2, ["--weights: goes with a run folder"]),
        (["invert", "i.npz", "--teacher", "digits", "--run", "x"], 2, ["--run: goes without --teacher"]),
        (["invert", "i.npz", "--teacher", "digits", "--step", "3"], 2, ["No such option", "--step"]),
        (["evaluate", "r", "--check", "e.json", "--weights", "w.pkl"], 2, ["RUNS: --check repeats"]),
        (["evaluate", "--check", "e.json", "--gamma", "0"], 2, ["--gamma: --check repeats"]),
        (["evaluate", "--check", "e.json", "--step", "last", "--nfe", "2"], 2, ["--step, --nfe: --check repeats"]),
        (["evaluate", "r", "--out", "c.txt"], 2, ["c.txt: needs a name that ends in .json"]),
        (["evaluate", "r", "--out", "/proc/c.json"], 2, ["/proc/c.json: cannot be written", "with --out"]),
        (["compare", "--teacher", "mixture-1d", "--out", "/proc/c"], 2, ["/proc/c/compare.json: cannot be written"]),
        (["invert", "x", "--teacher", "digits", "--out", "/proc/c.npz"], 2, ["/proc/c.npz: cannot be written"]),
        (["compare", "--teacher", "digits", "--coefficients", "c", "--samples", "64"], 2, ["--samples: --coeff"]),
        (["estimate-coeffs", "--teacher", "digits", "--compare", "--precision", "auto"], 2, ["--precision: --comp"]),
        (["distill", "--recipe", "mixture", "--dry-run", "--micro-batch", "8"], 2, ["--micro-batch: --dry-run"]),
        (["distill", "--recipe", "mixture", "--dry-run", "--resume", "never", "--out", "x"], 2, ["--out, --resume"]),
        (["train-teacher", "--recipe", "teacher-digits", "--dry-run", "--out", "x"], 2, ["--out: --dry-run"]),
        (["reproduce", "--tflops", "42"], 2, ["--tflops: goes with --dry-run"]),
        (["reproduce", "--dry-run", "--jobs", "2"], 2, ["--jobs: --dry-run trains nothing"]),
        (["reproduce", "--quick", "--experiments", "settings"], 2, ["--experiments: --quick"]),
        (["plot", "curves", "r", "--losses", "--nfe", "2", "--reach", "1"], 2, ["--nfe, --reach: goes without"]),
        (["sample", "--teacher", "digits", "--nfe", "3"], 2, ["nfe: got 3 for Heun", "a multiple of 2"]),
        (["sample", "--teacher", "digits", "--sampler", "ctm"], 2, ["for a teacher: dpmpp-2m, euler, heun"]),
        (["sample", "--teacher", "digits", "--sampler", "huen"], 2, ["did you mean 'heun'?"]),
        (["sample", "--teacher", "digits", "--times", "1,2"], 2, ["times: got '1,2'", "80,2.5,0.002"]),
        (["sample", "--teacher", "digits", "--times", "1", "--nfe", "2"], 2, ["leave --nfe out"]),
        (["sample", "--teacher", "digits", "--gamma", "0.5"], 2, ["adds no noise"]),
        (["sample", "--teacher", "digits", "--seeds", "1,1"], 2, ["named twice"]),
        (["sample", "--teacher", "digits", "--seeds", "99999999999999999999"], 2, ["below 2^32"]),
        (["sample", "--teacher", "digits", "--seeds", "0-99999999999"], 2, ["at most"]),
        (["sample", "--teacher", "digits", "--seeds", "0", "--out", "/proc/x"], 2, ["/proc/x"]),
        (["estimate-coeffs", "--teacher", "mixture-1d", "--out", "c.png"], 2, ["ends in .safetensors"]),
        (["plot", "coefficients", "c.safetensors", "--out", "c.txt"], 2, ["ends in .png"]),
        (["cp", "digits", "no/such/folder.toml"], 2, ["no/such/folder.toml"]),
        (["distill", "--recipe", "mixture", "--out", "/proc/x"], 2, ["/proc/x"]),
        (["distill", "--recipe", "digits", "--set", "evaluation.split=heldout"], 2, ["only 'train'"]),
        (["evaluate", "--nfee", "2"], 2, ["--nfee"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_a_short_answer_and_the_exit_code(fails, arguments, code, words):
    found, text = fails(*arguments)
    flat = " ".join(text.split())
    assert found == code
    assert all(word in flat for word in words), text


def test_a_recipe_with_three_errors_shows_all_three(fails, tmp_path):
    (tmp_path / "bad.toml").write_text(
        'teacher = "digits"\n[preconditioning]\nname = "analitic"\n[training]\niterations = 0\nbatch_size = 4\nlr = 1\n'
    )
    code, text = fails("distill", "--recipe", "bad.toml")
    assert code == 2
    assert len(text.strip().splitlines()) == 3
    assert all(key in text for key in ("preconditioning.name", "training.iterations", "training.lr"))


def test_coefficients_of_another_teacher_are_refused_by_hash(fails):
    sets = [part for value in FAST for part in ("--set", value)]
    assert run([*ESTIMATE, "--out", "m.safetensors"]) == 0
    arguments = ["distill", "--recipe", "digits-paper", *sets, "--set", "preconditioning.coefficients=m.safetensors"]
    code, text = fails(*arguments)
    assert code == 4
    assert "made for teacher 'mixture-1d'" in text
    assert "allow_other_teacher" in text
    assert run([*arguments, "--set", "preconditioning.allow_other_teacher=true", "--set", "training.iterations=1"]) == 0


def test_damaged_and_foreign_coefficient_files_are_refused(fails, tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    assert run([*ESTIMATE, "--out", "c.safetensors"]) == 0
    data = (tmp_path / "c.safetensors").read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 2
    for name, content in (("short", data[:-9]), ("flipped", bytes(flipped)), ("text", b"hello")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        assert fails("plot", "coefficients", f"{name}.safetensors")[0] == 4
    save_file({"w": np.ones(3)}, tmp_path / "foreign.safetensors")
    code, text = fails("plot", "coefficients", "foreign.safetensors")
    assert (code, "not made by cdistill" in text) == (4, True)
    code, text = fails("estimate-coeffs", "--teacher", "c.safetensors")
    assert (code, "is a coefficients file; a teacher file is needed" in text) == (4, True)


def test_lpips_without_its_backbone_says_what_to_put_where(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    code, text = fails("distill", "--recipe", "digits-paper", "--set", "objective.distance=lpips")
    assert code == 3
    assert str(tmp_path / "assets" / "vgg16-397923af.pth") in text


def test_a_folder_that_is_no_run_is_left_alone(fails, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".tmp-precious").mkdir()
    code, text = fails("distill", "--recipe", "mixture", "--out", "mine")
    assert (code, "is no run" in text) == (2, True)
    assert (tmp_path / "mine" / ".tmp-precious").is_dir()


def test_environment_variables_that_are_no_numbers(fails, monkeypatch):
    monkeypatch.setenv("CDISTILL_THREADS", "many")
    code, text = fails("sample", "--teacher", "digits", "--seeds", "0")
    assert (code, "$CDISTILL_THREADS" in text) == (2, True)


def test_version_and_help(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cdistill 0.")
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("estimate-coeffs", "distill", "sample", "evaluate", "train-teacher", "plot"))


def test_ls_show_and_cp(capsys, tmp_path):
    assert run(["ls", "preconditionings", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "preconditionings": ["analytic", "analytic-bounded", "analytic-forward", "bcm", "cm", "ctm", "least-squares"]
    }
    assert run(["show", "digits"]) == 0
    assert "cdistill distill --recipe digits" in capsys.readouterr().out
    assert run(["cp", "digits", "mine.toml"]) == 0
    assert (tmp_path / "mine.toml").read_text().startswith("#")
    assert run(["cp", "digits", "mine.toml"]) == 2


def test_doctor_names_missing_weights(capsys):
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "vgg16-397923af.pth" in text
    assert "torch" in text


def test_dry_run_prints_recipe_and_forwards(capsys):
    assert run(["distill", "--recipe", "mixture", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "max_ode_steps = 17" in text
    assert "23.33" in text


def test_estimate_coeffs_as_json_writes_file_and_plot(capsys, tmp_path):
    assert run([*ESTIMATE, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["t"]) == 8
    assert record["t"][0] == 80
    assert 0 < record["l"][4] < 1
    assert (tmp_path / "coefficients-mixture-1d.safetensors").is_file()
    assert size("coefficients-mixture-1d.png") > (1000, 500)


def test_the_same_estimation_gives_the_same_file(tmp_path):
    assert run([*ESTIMATE, "--out", "a.safetensors"]) == run([*ESTIMATE, "--out", "b.safetensors"]) == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.fixture
def digits_run(capsys):
    """A tiny run on the digits, trained in this process."""
    sets = [part for value in [*FAST, "training.iterations=4", "evaluation.every=2"] for part in ("--set", value)]
    assert run(["distill", "--recipe", "digits-paper", *sets]) == 0
    return capsys.readouterr()


@pytest.mark.slow
def test_distill_evaluate_and_sample_in_a_row(digits_run, capsys, tmp_path):
    assert "untrained student" in digits_run.out
    folder = tmp_path / "runs" / "digits-paper"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [r["step"] for r in records if r["event"] == "evaluation"]
    assert measured == [0, 2, 4]
    assert {path.name for path in (folder / "samples").iterdir()} == {
        f"step-{k:08d}{suffix}" for k in measured for suffix in (".png", ".npz")
    }
    assert (folder / "plots" / "coefficients.png").is_file()

    assert run(["evaluate", "--nfe", "2,3", "--samples", "64", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert "runs/digits-paper" in captured.err
    assert [(row["sampler"], row["nfe"]) for row in record["rows"]] == [
        ("teacher (Heun)", 34), ("untrained student", 2), ("untrained student", 3), ("student", 2), ("student", 3),
    ]  # fmt: skip
    assert record["rows"][0]["values"]["teacher-mse"] == 0
    assert record["samples"] == 64
    assert len(json.loads((folder / "evaluation.json").read_text())["rows"]) == 5  # the run's own stays

    assert run(["sample", "--nfe", "1,2", "--seeds", "0-11", "--classes", "0-9"]) == 0
    assert size("samples/nfe1.png") == size("samples/nfe2.png")
    assert run(["sample", "--nfe", "2", "--seeds", "3,1", "--format", "png", "--out", "single"]) == 0
    assert sorted(path.name for path in (tmp_path / "single" / "nfe2").iterdir()) == ["000001.png", "000003.png"]
    assert run(["sample", "--nfe", "2", "--seeds", "0-4", "--format", "npz", "--out", "arrays"]) == 0

    import numpy as np

    with np.load(tmp_path / "arrays" / "nfe2.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 1)
        assert arrays["arr_0"].dtype == np.uint8
        with Image.open(tmp_path / "single" / "nfe2" / "000003.png") as single:
            assert (arrays["arr_0"][3, ..., 0] == np.asarray(single)).all()


def test_cm_distils_and_samples(capsys):
    sets = [*FAST, "training.iterations=4", "objective.name=cm", "preconditioning.name=cm", "objective.dsm=false"]
    arguments = [part for value in sets for part in ("--set", value)]
    assert run(["distill", "--recipe", "mixture", *arguments]) == 0
    assert (
        run(["distill", "--recipe", "mixture", *arguments, "--set", "preconditioning.name=analytic", "--out", "b"]) == 0
    )


@pytest.mark.slow
def test_train_teacher_makes_a_teacher_that_every_command_takes(capsys, tmp_path):
    sets = ["training.iterations=6", "training.batch_size=16", "checkpoint.every=3"]
    arguments = [part for value in sets for part in ("--set", value)]
    assert run(["train-teacher", "--recipe", "teacher-digits", *arguments]) == 0
    teacher = "runs/teacher-digits/teacher.safetensors"
    assert run(["sample", "--teacher", teacher, "--seeds", "0-3"]) == 0
    short = [part for value in [*FAST, "training.iterations=2", f"teacher={teacher}"] for part in ("--set", value)]
    assert run(["distill", "--recipe", "digits-paper", *short]) == 0


@pytest.mark.slow
def test_figure_7_analytic_follows_the_teacher_better_than_ctm(capsys, tmp_path):
    assert run(["plot", "trajectories", "--samples", "512", "--count", "2048", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    ctm, analytic = record["results"]
    assert (ctm["preconditioning"], analytic["preconditioning"]) == ("ctm", "analytic")
    assert analytic["mse_end"] < ctm["mse_end"]
    assert analytic["wasserstein"] < ctm["wasserstein"]
    assert size("plots/trajectories.png") > (1000, 500)


def test_a_process_leaves_its_group_before_it_ends():
    """Else it may abort with code 134 in place of its own: threads of the group outlive Python's lock."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert run(["ls", "nothing"]) == 2
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--teacher", "mixture-1d", "--preconditionings", "ctm,bcm", "--samples", "64"],
        ["compare", "--teacher", "mixture-1d", "--preconditionings", "ctm", "--coefficients", "x.safetensors"],
        ["plot", "trajectories", "--preconditionings", "ctm", "--samples", "64"],
    ],
)
def test_options_of_an_estimation_that_nothing_needs_are_refused(arguments, capsys):
    assert run(arguments) == 2
    assert "none of these preconditionings needs coefficients; leave it out" in capsys.readouterr().err
