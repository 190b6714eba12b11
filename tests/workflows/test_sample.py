"""`cdistill sample` as a whole: the same files however it is divided, what stops it, how it resumes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cdistill.cli.app import run
from cdistill.data import load_source
from cdistill.data.source import to_uint8
from cdistill.networks.denoiser import EDMDenoiser
from cdistill.registry import WRITERS
from cdistill.runtime import signals as stopping
from cdistill.runtime.processes import _free_port
from cdistill.sampling import sample_store
from cdistill.sampling.drawing import generate
from cdistill.sampling.image_grids import as_ranges
from cdistill.sampling.samplers import make_sampler
from cdistill.storage.checkpoints import load_tensors, save_tensors, tensor_digest
from cdistill.storage.run_folder import held
from cdistill.teachers.official import OFFICIAL
from cdistill.workflows.students import load_converted
from tests.conftest import environment
from tests.edm_teacher import random_denoiser
from tests.sampling.test_writers import contents

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    **OFFICIAL["edm-cifar10-cond"].architecture, "channels": 1, "resolution": 8, "model_channels": 16, "num_blocks": 1,
    "attn_resolutions": [4], "augment_dim": 0, "s_branch": True,
}  # fmt: skip
# One process of several, which writes the samples in every form.
CODE = """
import sys
from pathlib import Path
from cdistill.workflows.sample import sample
from cdistill.runtime.processes import end, leave_group
from cdistill.registry import WRITERS

for form in WRITERS.names():
    sample(Path("s.safetensors"), nfe=[1], seeds=range(400), output_format=form, out=Path(sys.argv[1]))
leave_group()
end(0)
"""


@pytest.fixture(autouse=True)
def calls(tmp_path, monkeypatch):
    """Puts a student of 8x8 pixels and 10 classes with random weights here; lists the sizes of its network's calls."""
    monkeypatch.chdir(tmp_path)
    header = {"architecture": TINY, "sigma_data": 0.5, "preconditioning": "ctm"}
    save_tensors(Path("s.safetensors"), random_denoiser(TINY).state_dict(), "student", header)
    monkeypatch.setattr(sample_store, "_SAVE_EVERY", 0.0)
    made, forward = [], EDMDenoiser.forward

    def counting(self, x, *more):
        made.append(len(x))
        return forward(self, x, *more)

    monkeypatch.setattr(EDMDenoiser, "forward", counting)
    return made


def sample(*more):
    return run(["-q", "sample", "--run", "s.safetensors", "--nfe", "1", *more])


def interrupted(monkeypatch, calls, *more, number=signal.SIGTERM, after=3):
    """Runs the command until a signal comes during the network's call number `after`."""
    forward = EDMDenoiser.forward

    def stopping_forward(self, *arguments):
        if len(calls) == after:
            stopping._received.append(number)
        return forward(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(EDMDenoiser, "forward", stopping_forward)
        code = sample(*more)
    assert code == stopping.EXIT_CODES[number]
    calls.clear()


def written(form, out):
    return contents(Path(str(out)) / f"nfe1{WRITERS.get(form).suffix}")


@pytest.mark.parametrize("form", WRITERS.names())
def test_the_batch_size_changes_no_file(form, calls):
    for size in (1, 7, 64, 1000):
        assert sample("--seeds", "0-199", "--format", form, "--batch-size", str(size), "--out", f"{size}") == 0
        assert written(form, size) == written(form, 1)
        assert {path.name for path in Path(f"{size}").iterdir()} == {f"nfe1{WRITERS.get(form).suffix}", "nfe1.json"}
    assert calls == [64] * 4 * 4  # 200 seeds are four chunks


@pytest.mark.slow
def test_seeds_in_lists_of_any_length_are_the_same_samples():
    """Parts of three chunks."""
    denoiser, form = load_converted(Path("s.safetensors"))
    sampler = make_sampler(denoiser, form, nfe=1)
    draw = lambda seeds: generate(sampler, (1, 8, 8), seeds, denoiser.known_classes.shares)  # noqa: E731
    seeds = range(50, 130)
    whole, labels = draw(seeds)
    for size in (1, 7, 64):
        parts = [draw(seeds[start : start + size]) for start in range(0, len(seeds), size)]
        assert torch.equal(torch.cat([part for part, _ in parts]), whole)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)


@pytest.mark.parametrize("form", ["zip", "npz"])
def test_the_files_hold_what_generate_draws(form, capsys):
    assert sample("--seeds", "70,3,500-640", "--classes", "0-9", "--format", form, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["seeds"], record["nfe"], record["format"]) == ("70,3,500-640", [1], form)
    assert record["files"] == [f"samples/nfe1.{form}"]
    assert record["images_per_second"]["nfe1"] > 0
    beside = json.loads(Path("samples/nfe1.json").read_text())
    assert (beside["seeds"], beside["classes"], beside["times"]) == ("70,3,500-640", "0-9", [80, 0.002])
    assert beside["weights_sha256"] == record["weights_sha256"]
    denoiser, coefficients = load_converted(Path("s.safetensors"))
    assert record["weights_sha256"] == tensor_digest(denoiser.state_dict())
    seeds, classes = [70, 3, *range(500, 641)], [k % 10 for k in range(143)]
    sampler, shares = make_sampler(denoiser, coefficients, nfe=1), denoiser.known_classes.shares
    expected, labels = generate(sampler, (1, 8, 8), seeds, shares, classes)
    source = load_source(f"samples/nfe1.{form}")
    assert torch.equal(source.samples[:], to_uint8(expected))
    assert torch.equal(source.labels, labels)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_resumes_and_draws_nothing_twice(number, monkeypatch, calls, capsys):
    request = ["--seeds", "0-999", "--format", "npz"]
    assert sample(*request, "--out", "whole") == 0
    calls.clear()
    interrupted(monkeypatch, calls, *request, number=number)
    errors = capsys.readouterr().err
    assert "run the same command to resume" in errors
    assert len(errors.strip().splitlines()) == 1
    kept = len(list(Path("samples/.nfe1.shards").glob("[0-9]*.safetensors")))
    assert 3 <= kept < 16
    assert not Path("samples/nfe1.npz").exists()
    assert sample(*request) == 0
    assert len(calls) == 16 - kept
    assert written("npz", "samples") == written("npz", "whole")
    assert {path.name for path in Path("samples").iterdir()} == {"nfe1.npz", "nfe1.json"}


def test_another_format_resumes_from_the_same_samples(monkeypatch, calls):
    interrupted(monkeypatch, calls, "--seeds", "0-399", "--format", "npz")
    kept = len(list(Path("samples/.nfe1.shards").glob("[0-9]*.safetensors")))
    assert sample("--seeds", "0-399", "--format", "tar") == 0
    assert len(calls) == 7 - kept


@pytest.mark.parametrize("changed", [["--seeds", "1-400"], ["--classes", "3"]], ids=lambda changed: changed[0])
def test_another_command_starts_afresh(changed, monkeypatch, calls):
    interrupted(monkeypatch, calls, "--seeds", "0-399", "--format", "npz")
    request = ["--seeds", "0-399", *changed, "--format", "npz"]
    assert sample(*request) == 0
    assert len(calls) == 7
    assert sample(*request, "--out", "whole") == 0
    assert written("npz", "samples") == written("npz", "whole")


def test_other_weights_start_afresh(monkeypatch, calls):
    request = ["--seeds", "0-399", "--format", "npz"]
    interrupted(monkeypatch, calls, *request)
    tensors, header = load_tensors(Path("s.safetensors"), "student")
    tensors[next(iter(tensors))] += 0.01
    save_tensors(Path("s.safetensors"), tensors, "student", header)
    assert sample(*request) == 0
    assert len(calls) == 7


@pytest.mark.parametrize("damage", ["a flipped bit", "a truncated file", "no file"])
def test_damaged_shards_are_drawn_again(damage, monkeypatch, calls):
    request = ["--seeds", "0-399", "--format", "npz"]
    interrupted(monkeypatch, calls, *request)
    path, *others = sorted(Path("samples/.nfe1.shards").glob("[0-9]*.safetensors"))
    data = bytearray(path.read_bytes())
    if damage == "no file":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data if damage == "a flipped bit" else data[:-9])
    assert sample(*request) == 0
    assert len(calls) == 7 - len(others)
    assert sample(*request, "--out", "whole") == 0
    assert written("npz", "samples") == written("npz", "whole")


def test_two_commands_to_one_place_do_not_meet(capsys):
    with held(Path("samples/.nfe1.shards/lock"), "here"):
        assert sample() == 6
    assert "another process samples to this place" in capsys.readouterr().err


def test_seeds_are_told_as_they_are_asked_for():
    assert as_ranges([0, 1, 2, 7, 5, 6]) == "0-2,7,5-6"
    assert as_ranges(range(50000)) == "0-49999"
    assert as_ranges([4]) == "4"


def start(arguments, processes, **variables):
    """Starts so many processes of one group that run Python with `arguments`."""
    common = environment(PYTHONPATH=str(ROOT), **variables, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    if processes > 1:
        common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    command = [sys.executable, *arguments]
    return [subprocess.Popen(command, env={**common, **rank}, stderr=subprocess.PIPE, text=True) for rank in ranks]


@pytest.mark.slow
def test_seeds_in_every_form_are_the_same_on_1_and_3_processes():
    """Seven chunks, the last of them not whole, so that processes have unequal parts; for two see the next test."""
    for form in WRITERS.names():
        assert sample("--seeds", "0-399", "--format", form, "--out", "1") == 0
    for process in start(["-c", CODE, "3"], 3):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for form in WRITERS.names():
        assert written(form, 3) == written(form, 1)


@pytest.mark.slow
def test_nproc_starts_processes_that_make_the_same_file(run_cli):
    """Five chunks, three of them the first process's."""
    request = ["--seeds", "0-299", "--format", "tar"]
    done = run_cli("sample", "--run", "s.safetensors", "--nfe", "1", *request, "--out", "two", "--nproc", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["two/nfe1.tar"]
    assert "nfe1 300/300" in done.stderr
    assert sample(*request) == 0
    assert written("tar", "two") == written("tar", "samples")


# Sends itself a signal when the network is called for the sixth time; of several processes the second does so.
KILLED = """
import os, signal, sys
from cdistill.cli.app import run
from cdistill.networks.denoiser import EDMDenoiser
from cdistill.sampling import sample_store

sample_store._SAVE_EVERY = 0.0
forward, made = EDMDenoiser.forward, []

def counting(self, *arguments):
    made.append(1)
    if len(made) == 6 and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), getattr(signal, os.environ["NUMBER"]))
    return forward(self, *arguments)

EDMDenoiser.forward = counting
sys.exit(run(sys.argv[1:]))
"""


def test_kill_minus_9_loses_what_was_under_way_alone(calls):
    request = ["--seeds", "0-999", "--format", "zip"]
    (process,) = start(["-c", KILLED, "sample", "--run", "s.safetensors", "--nfe", "1", *request], 1, NUMBER="SIGKILL")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    kept = list(Path("samples/.nfe1.shards").glob("[0-9]*.safetensors"))
    assert 1 <= len(kept) <= 5
    assert not Path("samples/nfe1.zip").exists()
    assert sample(*request) == 0
    assert len(calls) <= 16 - len(kept)
    assert sample(*request, "--out", "whole") == 0
    assert written("zip", "samples") == written("zip", "whole")


@pytest.mark.slow
def test_when_one_process_is_stopped_all_stop_and_keep_what_they_have(calls):
    request = ["--seeds", "0-1999", "--format", "zip"]
    arguments = ["-c", KILLED, "sample", "--run", "s.safetensors", "--nfe", "1", *request]
    first, second = start(arguments, 2, NUMBER="SIGTERM")
    errors = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert (first.returncode, second.returncode) == (75, 75), errors
    assert errors[0].splitlines()[-1].endswith("another process was stopped; run the same command to resume")
    assert not Path("samples/nfe1.zip").exists()
    kept = list(Path("samples/.nfe1.shards").glob("[0-9]*.safetensors"))
    assert len(kept) > 16  # the first one finished its part
    assert sample(*request) == 0
    assert len(calls) == 32 - len(kept)
    assert sample(*request, "--out", "whole") == 0
    assert written("zip", "samples") == written("zip", "whole")


def test_samples_do_not_lie_beside_those_of_another_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--teacher", "digits", "--nfe", "2", "--sampler", "euler", "--format", "png", "--seeds"]
    folder, record = Path("samples/teacher-nfe2-euler"), Path("samples/teacher-nfe2-euler.json")
    assert run([*command, "0-9"]) == 0
    assert run([*command, "0-9"]) == 0  # the same again
    before = record.read_text()
    assert run([*command, "0-3"]) == 2
    assert "holds 6 other files (000004.png, ...); choose another --out, or --overwrite" in capsys.readouterr().err
    assert record.read_text() == before
    assert run([*command, "2-5", "--overwrite"]) == 0
    assert sorted(file.name for file in folder.iterdir()) == [f"00000{k}.png" for k in range(2, 6)]
    (folder / "notes.txt").write_text("mine")
    assert run([*command, "0-3", "--overwrite"]) == 2
    assert "holds 1 other files (notes.txt, ...); choose another --out\n" in capsys.readouterr().err
