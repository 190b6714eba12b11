"""Kept trajectories: what is in them, and what becomes of them when anything goes wrong."""

import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock

from cdistill.data import load_source
from cdistill.errors import CorruptFileError, DiskFullError, MismatchError, RecipeError, StoppedError
from cdistill.runtime import signals
from cdistill.sampling import trajectories
from cdistill.sampling.drawing import draw_chunks
from cdistill.sampling.settings import TrajectoriesSection
from cdistill.sampling.solvers import heun_step, trajectory
from cdistill.sampling.trajectories import (
    SHARD,
    class_shares,
    open_trajectories,
    refined,
    stored_trajectories,
    trajectory_store,
)
from cdistill.schedule import RHO, rho_grid
from cdistill.storage.checkpoints import load_tensors
from cdistill.teachers import load_teacher

GRID = rho_grid(5)


@pytest.fixture(autouse=True)
def assets(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("mixture-narrow-cond")


def opened(teacher, source=None, grid=GRID, **values):
    section = TrajectoriesSection(**{"count": 300, **values})
    return open_trajectories(section, grid, teacher, source, Accelerator(cpu=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def all_points(store, level):
    every = torch.arange(len(store))
    return store.points(every, store.levels[level].expand(len(store)))


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-6), ("fp16", 2**-10)])
def test_points_are_those_of_heuns_method_from_the_noise_of_their_seeds(teacher, precision, bound):
    store = opened(teacher, precision=precision)
    seeds = range(store.identity["first_seed"], store.identity["first_seed"] + 64)
    (chunk,) = draw_chunks(teacher.shape, seeds, teacher.denoiser.known_classes.shares)
    labels = store.labels(torch.arange(64))
    with torch.no_grad():
        path = trajectory(lambda x, t, s: heun_step(lambda y, u: teacher.denoiser(y, u, None, labels), x, t, s),
                          chunk.x, GRID)  # fmt: skip
    for place, level in enumerate(GRID):
        read = store.points(torch.arange(64), level.expand(64)).double()
        scale = (level**2 + teacher.denoiser.sigma_data**2).sqrt()
        torch.testing.assert_close(read / scale, path[place] / scale, rtol=bound, atol=bound)


def test_a_chosen_few_levels_are_those_of_the_whole_store(teacher):
    whole, few = opened(teacher), opened(teacher, levels=[0, 2, 4])
    assert few.levels.tolist() == GRID[[0, 2, 4]].tolist()
    for place, level in enumerate([0, 2, 4]):
        assert torch.equal(all_points(few, place), all_points(whole, level))
    with pytest.raises(trajectories.CdistillError, match="is not kept"):
        few.points(torch.arange(2), GRID[[1, 3]])
    with pytest.raises(RecipeError, match=r"trajectories.levels: got 7; the grid has the levels 0 to 4"):
        opened(teacher, levels=[7])


def test_substeps_come_nearer_to_the_exact_ode(teacher):
    """Second order: half the step, a quarter of the error, against sixteen times as many."""
    fine = all_points(opened(teacher, substeps=32, precision="fp32"), 4)
    coarse, half = (all_points(opened(teacher, substeps=k, precision="fp32"), 4) for k in (4, 8))
    assert (half - fine).square().mean() < (coarse - fine).square().mean() / 8


def test_refined_grids_keep_the_old_levels_and_space_the_new_ones_evenly():
    fine = refined(GRID, 4)
    assert torch.equal(fine[::4], GRID)
    torch.testing.assert_close((fine ** (1 / RHO)).diff(), (fine ** (1 / RHO)).diff()[0].expand(16))
    assert torch.equal(refined(GRID, 1), GRID)


def test_a_store_grows_by_shards_that_never_change(teacher):
    small = opened(teacher, count=SHARD)
    before = contents(small.folder)
    large = opened(teacher, count=2 * SHARD + 1)
    after = contents(large.folder)
    assert large.folder == small.folder
    assert len(before) == 1
    assert len(after) == 3
    assert before.items() <= after.items()
    assert large.digest != small.digest
    assert opened(teacher, count=SHARD).digest == small.digest


def test_what_the_numbers_depend_on_has_a_folder_of_its_own(teacher):
    folders = {
        opened(teacher, count=1, **values).folder
        for values in ({}, {"substeps": 2}, {"precision": "fp32"}, {"levels": [0, 1]})
    }
    folders.add(opened(teacher, count=1, grid=rho_grid(6)).folder)
    folders.add(opened(load_teacher("mixture-narrow"), count=1).folder)
    assert len(folders) == 6
    assert opened(teacher, count=1, flips=True).folder in folders


def test_classes_occur_as_in_the_data(teacher):
    source = load_source("mixture-narrow-cond")
    rare = replace(source, labels=torch.where(torch.arange(len(source)) % 10 == 0, 1, 0))
    assert class_shares(teacher, rare)[:3] == pytest.approx([0.9, 0.1, 0], abs=1e-4)
    store = opened(teacher, rare, count=4 * SHARD)
    share = (store.labels(torch.arange(4 * SHARD)) == 1).double().mean()
    assert abs(share - 0.1) < 4 * (0.09 / (4 * SHARD)) ** 0.5
    assert class_shares(load_teacher("mixture-narrow"), source) is None


def test_mirrored_images_only(teacher):
    section = TrajectoriesSection(flips=True)
    assert not trajectory_store(section, GRID, teacher, None).flips
    assert trajectory_store(section, GRID, load_teacher("patches"), None).flips


def test_a_store_that_is_there_is_read_and_not_followed_again(teacher, monkeypatch):
    first = opened(teacher)
    monkeypatch.setattr(teacher.denoiser, "forward", None)
    assert opened(teacher).digest == first.digest


def test_a_signal_keeps_whole_shards_and_the_store_comes_out_the_same(teacher, monkeypatch, tmp_path):
    whole = contents(opened(teacher, count=3 * SHARD).folder)
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "other"))
    save = trajectories.save_tensors

    def save_and_stop(*arguments):
        save(*arguments)
        monkeypatch.setattr(signals, "requested", lambda: 15)

    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "save_tensors", save_and_stop)
        patch.setattr(signals, "check", stop_when_requested)
        with pytest.raises(StoppedError):
            opened(teacher, count=3 * SHARD)
    (about,) = stored_trajectories()
    assert about["count"] == SHARD
    monkeypatch.undo()
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "other"))
    assert contents(opened(teacher, count=3 * SHARD).folder) == whole


def stop_when_requested(what: str) -> None:
    if signals.requested():
        raise StoppedError(f"{what}: stopped", 75)


def test_shards_that_others_are_following_are_left_to_them_and_waited_for(teacher, monkeypatch):
    """Another process holds the only shard, and finishes it while this one waits."""
    done = opened(teacher, count=1)
    path = done.shards[0]
    finished = path.read_bytes()
    path.unlink()
    lock = FileLock(path.with_suffix(".lock"))
    lock.acquire()
    naps = []

    def nap(seconds):
        naps.append(seconds)
        path.write_bytes(finished)
        lock.release()

    monkeypatch.setattr(trajectories.time, "sleep", nap)
    monkeypatch.setattr(trajectories.TrajectoryStore, "_follow", None)
    assert opened(teacher, count=1).digest == done.digest
    assert len(naps) == 1


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_a_damaged_shard_is_named_and_not_read(teacher, damage):
    store = opened(teacher)
    damage(store.shards[1])
    with pytest.raises(CorruptFileError, match=r"000000256\.safetensors") as caught:
        opened(teacher)
    assert caught.value.exit_code == 4
    store.shards[1].unlink()
    assert opened(teacher).digest == store.digest


def test_another_teachers_shard_is_refused(teacher):
    store, other = opened(teacher), opened(load_teacher("mixture-narrow"))
    shutil.copy(other.shards[0], store.shards[0])
    with pytest.raises(MismatchError, match=r"000000000\.safetensors: trajectories of another teacher") as caught:
        opened(teacher)
    assert "\n" not in str(caught.value)


def test_a_disk_that_is_too_small_is_reported_before_the_work(teacher, monkeypatch):
    monkeypatch.setattr(trajectories.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    monkeypatch.setattr(teacher.denoiser, "forward", None)
    with pytest.raises(
        DiskFullError, match=r"GiB of trajectories to write, 0\.00 GiB free; .* lower trajectories.count"
    ):
        opened(teacher)


def test_more_shards_than_open_files_are_allowed(teacher):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        store = opened(teacher, count=100 * SHARD, levels=[0, 4])
        assert len(store.points(torch.arange(0, 100 * SHARD, SHARD), GRID[[0]].expand(100))) == 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_teacher_that_leaves_the_finite_is_reported(teacher, monkeypatch):
    monkeypatch.setattr(teacher.denoiser, "forward", lambda x, *rest: x * torch.nan)
    with pytest.raises(trajectories.CdistillError, match="a trajectory is not finite"):
        opened(teacher)
    assert not stored_trajectories()[0]["count"]


def test_the_header_of_a_shard_says_what_it_is(teacher):
    tensors, header = load_tensors(opened(teacher).shards[0], "trajectories")
    assert tensors["points"].shape == (SHARD, 5, 16)
    assert tensors["points"].dtype == torch.float16
    assert header["identity"]["teacher_sha256"] == teacher.digest
