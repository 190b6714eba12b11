"""The loop: what it does with steps that are not finite, what it counts, saves and logs."""

import json
from types import SimpleNamespace

import pytest
import torch

from cdistill.errors import CdistillError, DivergedError, MismatchError, RecipeError, StoppedError
from cdistill.runtime import signals
from cdistill.storage.files import file_digest, list_checkpoints
from cdistill.storage.run_folder import RunFolder
from cdistill.training.loop import Task, gradient_norm, make_accelerator, step_scaled, train
from cdistill.training.settings import CheckpointSection

NAN, INFINITY = float("nan"), float("inf")


class Walk(Task):
    """A weight that is moved by plain gradient descent; `bad(index, attempt)` spoils the gradient of a step."""

    def __init__(self, bad=lambda index, attempt: False, value=NAN, scaler=None):
        self.accelerator = SimpleNamespace(
            scaler=scaler, num_processes=1, is_main_process=True, device=torch.device("cpu"),
            wait_for_everyone=lambda: None, trackers=[],
        )  # fmt: skip
        self.identity, self.images, self.seed = {}, 4, 7
        self.bad, self.value = bad, value
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.seen = []

    def at(self):
        return float(self.weight.detach())

    def backward(self, index):
        self.seen.append((index, self.attempt))
        self.optimizer.zero_grad()
        factor = 1.0 if self.accelerator.scaler is None else float(self.accelerator.scaler.scale(torch.ones(())))
        draw = torch.Generator().manual_seed((self.draw_seed + index) % 2**32)
        gradient = torch.rand((), generator=draw) * (self.value if self.bad(index, self.attempt) else 1.0)
        self.weight.grad = gradient * factor
        return {"loss": self.weight.detach().clone(), "norm": gradient_norm(self.optimizer, self.accelerator.scaler)}

    def update(self, index):
        step_scaled(self.optimizer, self.accelerator.scaler)

    def groups(self):
        return {"weights": {"weight": self.weight.detach()}}

    def load(self, groups):
        with torch.no_grad():
            self.weight.copy_(groups["weights"]["weight"])


def run(task, path, iterations=40, patience=3, every=10, keep=2, log_every=5, **more) -> RunFolder:
    folder = RunFolder(path)
    folder.path.mkdir(exist_ok=True)
    section = CheckpointSection(every=every, keep=keep)
    train(task, folder, iterations, section, patience, log_every, **more)
    return folder


def state(folder):
    return json.loads((list_checkpoints(folder.checkpoints)[-1] / "state.json").read_text())


def lines(folder, event="train"):
    return [record for record in folder.metrics() if record["event"] == event]


def test_single_bad_steps_are_skipped_counted_and_logged(tmp_path):
    task, clean = Walk(lambda index, attempt: index in (4, 11, 12)), Walk()
    folder = run(task, tmp_path / "a")
    run(clean, tmp_path / "b")
    lost = sum(float(torch.rand((), generator=torch.Generator().manual_seed(7 + index))) for index in (4, 11, 12))
    assert task.at() == pytest.approx(clean.at() + lost, rel=1e-5)
    assert [record["skipped"] for record in lines(folder)] == [1, 1, 3, 3, 3, 3, 3, 3]
    assert lines(folder)[0]["norm"] is None
    assert lines(folder)[1]["norm"] is not None
    assert state(folder)["counters"] == {
        "skipped": 3, "in_a_row": {}, "attempt": 0, "returned_to": -1, "latest": {},
    }  # fmt: skip


@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_several_in_a_row_go_back_to_the_last_checkpoint_and_draw_other_numbers(tmp_path, value):
    task = Walk(lambda index, attempt: index in range(25, 35) and attempt == 0, value)
    folder = run(task, tmp_path / "run")
    assert task.seen == [*((k, 0) for k in range(28)), *((k, 1) for k in range(20, 40))]
    counters = state(folder)["counters"]
    assert (counters["skipped"], counters["attempt"], counters["returned_to"]) == (3, 1, 20)
    assert [(record["step"], record["to"]) for record in lines(folder, "went back")] == [(28, 20)]
    assert [record["step"] for record in lines(folder)] == [5, 10, 15, 20, 25, 30, 35, 40]


def test_going_back_twice_to_the_same_checkpoint_stops_with_advice(tmp_path):
    task = Walk(lambda index, attempt: index >= 25)
    with pytest.raises(
        DivergedError, match=r"3 steps in a row were skipped, norm not finite, after .*step-00000020 once"
    ):
        run(task, tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000010",
        "step-00000020",
    ]
    assert all(torch.isfinite(value) for value in task.groups()["weights"].values())


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    with pytest.raises(DivergedError, match=r"step 5: 3 steps .* no checkpoint to go back to"):
        run(Walk(lambda index, attempt: index >= 2), tmp_path / "run")


def test_a_row_is_a_row_of_one_kind_of_steps(tmp_path):
    """A student that is never finite is not hidden by the discriminator's good steps in between."""
    task = Walk(lambda index, attempt: index >= 25 and index % 2 == 0)
    task.kind = lambda index: "student" if index % 2 == 0 else "discriminator"
    with pytest.raises(DivergedError, match="3 steps in a row"):
        run(task, tmp_path / "run")
    assert task.seen[30:33] == [(30, 0), (20, 1), (21, 1)]


def test_counters_of_a_newer_version_are_refused(tmp_path):
    folder = run(Walk(), tmp_path / "run", iterations=10)
    newest = list_checkpoints(folder.checkpoints)[-1]
    values = json.loads((newest / "state.json").read_text())
    values["counters"]["unheard of"] = 1
    (newest / "state.json").write_text(json.dumps(values))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = file_digest(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match="unheard of; made by a newer cdistill"):
        run(Walk(), tmp_path / "run")


def test_nothing_is_saved_while_steps_are_skipped(tmp_path):
    task = Walk(lambda index, attempt: index in range(18, 22) and attempt == 0)
    folder = run(task, tmp_path / "run", iterations=23, patience=4, keep=9)
    assert [path.name for path in list_checkpoints(folder.checkpoints)] == [
        "step-00000010", "step-00000020", "step-00000023",
    ]  # fmt: skip
    assert task.seen[22] == (10, 1)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 7, 12, 13, 14, 15, 16, 22, 33])
def test_a_run_that_is_stopped_anywhere_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch, stop_at, keep):
    """Also between the skipped steps, before and after it went back."""

    def bad(index, attempt):
        return index in range(12, 20) and attempt == 0

    whole = run(Walk(bad), tmp_path / "whole", keep=keep)
    task = Walk(bad)
    monkeypatch.setattr(signals, "requested", lambda: 15 if len(task.seen) >= stop_at else 0)
    with pytest.raises(StoppedError):
        run(task, tmp_path / "stopped", keep=keep)
    monkeypatch.undo()
    again = Walk(bad)
    folder = run(again, tmp_path / "stopped", keep=keep)
    first, second = (state(found) for found in (whole, folder))
    assert first == second
    final = [list_checkpoints(found.checkpoints)[-1] / "weights.safetensors" for found in (whole, folder)]
    assert final[0].read_bytes() == final[1].read_bytes()


def test_the_scaler_for_fp16_learns_from_skipped_steps(tmp_path):
    """Its factor is halved, saved and restored; the weights see the gradient without it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    task, plain = Walk(lambda index, attempt: index == 3, INFINITY, scaler), Walk(lambda index, attempt: index == 3)
    folder = run(task, tmp_path / "a", iterations=10)
    run(plain, tmp_path / "b", iterations=10)
    assert task.at() == pytest.approx(plain.at(), rel=1e-6)
    assert scaler.get_scale() == 512
    fresh = Walk(scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    run(fresh, folder.path, iterations=11)
    assert fresh.accelerator.scaler.get_scale() == 512


def test_evaluations_have_a_checkpoint_of_their_own(tmp_path):
    asked = []
    folder = run(Walk(), tmp_path / "run", every=1000, keep=99, evaluate_every=15, evaluate=asked.append)
    assert asked == [0, 15, 30]
    assert [path.name for path in list_checkpoints(folder.checkpoints)] == [
        "step-00000015", "step-00000030", "step-00000040",
    ]  # fmt: skip


def test_more_steps_than_the_recipe_and_foreign_tensors_are_refused(tmp_path):
    run(Walk(), tmp_path / "run")
    with pytest.raises(RecipeError, match="has 40 steps already"):
        run(Walk(), tmp_path / "run", iterations=30)
    other = Walk()
    other.load = lambda groups: groups["ema"]
    with pytest.raises(MismatchError, match="do not fit this recipe"):
        run(other, tmp_path / "run", iterations=50)


def test_the_rate_counts_the_steps_alone(tmp_path, monkeypatch):
    """Neither saving nor evaluating takes time from the training's rate."""
    clock = iter(range(10**6))
    monkeypatch.setattr("cdistill.training.loop.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    folder = run(Walk(), tmp_path / "run", evaluate_every=1, evaluate=lambda done: [next(clock) for _ in range(100)])
    assert {record["images_per_second"] for record in lines(folder)} == {4.0}


def test_float32_is_float32_on_a_gpu_unless_tf32_is_asked_for():
    for precision, allowed in (("tf32", True), ("fp32", False)):
        make_accelerator(precision)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == allowed


def test_more_processes_than_gpus_and_missing_bf16_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(CdistillError, match="this GPU has no bf16; choose fp16 or fp32"):
        make_accelerator("bf16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(CdistillError, match="2 processes on this machine, which has 1 GPUs"):
        make_accelerator("fp32")
