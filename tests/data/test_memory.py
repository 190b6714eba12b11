"""Images that do not fit in memory: the same numbers, decoded once, and nothing incomplete is ever read."""

import errno
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch

from cdistill.data import load_source
from cdistill.data.memory import free_memory, hold_images, memory_limit
from cdistill.errors import DiskFullError, StoppedError
from cdistill.evaluation.features import Pixels
from cdistill.evaluation.metrics import PixelFrechet, SampleSet
from cdistill.evaluation.references import Reference
from cdistill.training.step_data import draw_data
from tests.archives import members, random_images, write_folder, write_zip
from tests.data.stores import CLASSES, COUNT, IMAGES, KINDS, write_store

DIGEST = "5" * 64


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where decoded images are kept."""
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path / "assets"))
    return tmp_path / "assets" / "decoded"


@pytest.fixture
def mapped(folder, monkeypatch):
    """Loads a file's images as if they did not fit in memory."""

    def load(path):
        with monkeypatch.context() as patch:
            patch.setattr("cdistill.data.memory.memory_limit", lambda: 0)
            return load_source(str(path))

    return load


def hold(folder, blocks):
    """Maps IMAGES, which come in two blocks."""
    return hold_images(folder / "x.zip", IMAGES.shape, blocks, lambda: DIGEST)


def halves():
    yield IMAGES[:10]
    yield IMAGES[10:]


def broken(error):
    def blocks():
        yield IMAGES[:10]
        raise error

    return blocks


@pytest.fixture
def nothing_fits(monkeypatch):
    monkeypatch.setattr("cdistill.data.memory.memory_limit", lambda: 0)


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("kind", KINDS)
def test_mapped_images_are_those_in_memory(tmp_path, folder, mapped, kind):
    path = write_store(tmp_path, kind)
    held, source = load_source(str(path)), mapped(path)
    assert [file.name for file in folder.glob("*.npy")] == [f"{source.content()}-1.npy"]
    assert np.array_equal(np.load(next(folder.glob("*.npy"))), IMAGES)
    assert source.digest == held.digest
    assert source.samples.equal(held.samples)
    assert source.samples.is_contiguous()
    index = torch.tensor([5, 3, 3, 23, 0])
    flip = torch.tensor([True, False, True, False, True])
    for first, second in zip(held.batch(index, flip), source.batch(index, flip), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(held.batch(index, flip)[0][0], held.batch(index)[0][0].flip(-1))
    for step in range(5):
        for first, second in zip(*(draw_data(data, 3, step, 7, True) for data in (held, source)), strict=True):
            assert torch.equal(first, second)
    assert torch.equal(torch.cat(source.samples.split(7)), held.samples)


def test_moments_of_a_mapped_source_are_those_in_memory(tmp_path, mapped, monkeypatch):
    monkeypatch.setattr("cdistill.evaluation.references._READ", 64)
    images = random_images(300, 8, 1)
    path = write_zip(tmp_path / "x.zip", members(images, None))
    held, kept = load_source(str(path)), mapped(path)
    samples = SampleSet(torch.from_numpy(random_images(200, 8, 1, seed=1)))
    distances = [PixelFrechet(Pixels())(samples, Reference(source)).value for source in (held, kept)]
    assert distances[0] == distances[1] > 0


def test_training_on_a_mapped_source_is_training_in_memory(tmp_path, mapped):
    from cdistill.networks.architecture import build_denoiser
    from cdistill.training.denoising import DenoisingTask
    from cdistill.training.loop import Counters, finish, make_accelerator, read
    from cdistill.training.settings import DenoisingSection

    path = write_zip(tmp_path / "x.zip", members(random_images(COUNT, 8, 1), CLASSES))
    section = DenoisingSection(iterations=3, batch_size=8, learning_rate=1e-3, ema_rate=0.9)
    architecture = {"network": "song", "resolution": 8, "channels": 1, "num_classes": 10, "model_channels": 16}
    architecture |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    weights = []
    for source in (load_source(str(path)), mapped(path)):
        torch.manual_seed(0)
        task = DenoisingTask(build_denoiser(architecture, 0.5), source, make_accelerator("fp32"), section, 0)
        for step in range(3):
            finish(task, step, read(task.accelerator, task.backward(step)), Counters())
        weights.append(torch.cat([value.flatten() for value in task.network.state_dict().values()]))
    assert torch.equal(*weights)


# ---------------------------------------------------------------------------------------------- once, and all or none


def test_images_are_decoded_once(tmp_path, mapped, capsys, monkeypatch):
    path = write_store(tmp_path, "zip")
    first = mapped(path)
    error = capsys.readouterr().err
    assert f"{path}: 24 images do not fit in memory: decoded once into " in error
    second = mapped(path)
    assert capsys.readouterr().err == ""
    assert first.samples.equal(second.samples)
    other = mapped(write_zip(tmp_path / "other.zip", members(IMAGES[::-1].copy(), CLASSES)))
    assert other.samples.equal(torch.from_numpy(IMAGES[::-1].copy()))


def test_what_fits_in_memory_is_not_written(tmp_path, folder):
    load_source(str(write_store(tmp_path, "zip")))
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["cut", "longer", "another shape", "a folder of old files"])
def test_a_file_of_another_size_or_shape_is_written_again(folder, nothing_fits, damage):
    hold(folder, halves)
    file = folder / f"{DIGEST}-1.npy"
    content = file.read_bytes()
    if damage == "another shape":
        np.save(file, IMAGES.reshape(COUNT, 1, 24, 8))
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "longer":
        file.write_bytes(content + b"x")
    else:
        (folder / f".tmp-1-{DIGEST}-1.npy").write_bytes(b"x")
        file.unlink()
    assert hold(folder, halves).equal(torch.from_numpy(IMAGES))
    assert file.read_bytes() == content
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("moment", ["first", "second"])
def test_a_killed_process_leaves_nothing_to_be_read(folder, nothing_fits, run_python, moment):
    code = (
        "import os, signal; from pathlib import Path\n"
        "from cdistill.data import memory; from tests.data.test_memory import *\n"
        "memory.memory_limit = lambda: 0\n"
        "def blocks():\n"
        f"    if {moment == 'second'}: yield IMAGES[:10]\n"
        "    os.kill(os.getpid(), signal.SIGKILL); yield\n"
        f"hold(Path({str(folder)!r}), blocks)"
    )
    run_python(code, CDISTILL_ASSETS=str(folder.parent))
    assert list(folder.glob(".tmp-*"))
    assert not list(folder.glob("[!.]*.npy"))
    assert hold(folder, halves).equal(torch.from_numpy(IMAGES))
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("error", "kind"), [(OSError(errno.ENOSPC, "full"), DiskFullError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_interrupted_file_is_removed(folder, nothing_fits, error, kind):
    with pytest.raises(kind):
        hold(folder, broken(error))
    assert not list(folder.glob("*.npy")) + list(folder.glob(".tmp-*"))


def test_too_small_a_disk_is_refused_at_once(folder, nothing_fits, monkeypatch):
    usage = shutil._ntuple_diskusage(2**20, 2**20 - 4000, 4000)
    monkeypatch.setattr("cdistill.data.memory.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"GiB to write, 0\.0 GiB free; .*CDISTILL_ASSETS"):
        hold(folder, broken(AssertionError()))


@pytest.mark.parametrize("fits", [True, False])
def test_signals_are_answered(tmp_path, mapped, monkeypatch, fits):
    monkeypatch.setattr("cdistill.data.memory.FEW", 3)
    monkeypatch.setattr("cdistill.runtime.signals._received", [signal.SIGTERM])
    path = write_store(tmp_path, "nchw")
    with pytest.raises(StoppedError, match="reading the data: stopped by SIGTERM") as caught:
        load_source(str(path)) if fits else mapped(path)
    assert caught.value.exit_code == 75


def test_processes_share_a_file_and_one_writes_it(folder, nothing_fits):
    """Threads stand for processes: their locks are as separate."""
    begun, resume, results = threading.Event(), threading.Event(), {}

    def slow():
        begun.set()
        assert resume.wait(60)
        yield from halves()

    def refuse():
        raise AssertionError("decoded twice")
        yield

    def run(name, blocks):
        results[name] = hold(folder, blocks)

    writer = threading.Thread(target=run, args=("writer", slow))
    reader = threading.Thread(target=run, args=("reader", refuse))
    writer.start()
    assert begun.wait(60)
    reader.start()
    time.sleep(0.1)
    assert not results
    resume.set()
    for thread in (writer, reader):
        thread.join(60)
    assert results["reader"].equal(results["writer"])
    assert results["reader"].equal(torch.from_numpy(IMAGES))


# ------------------------------------------------------------------------------------------------------ free memory


def test_half_of_what_is_free_is_used(monkeypatch):
    monkeypatch.setattr("cdistill.data.memory.free_memory", lambda: 1200)
    assert memory_limit() == 600
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory_limit() == 200


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_its_limit_less_what_is_in_use(tmp_path, monkeypatch, version):
    """Cached files are not in use: they are given up when memory is needed."""
    monkeypatch.setattr("cdistill.data.memory._CGROUPS", tmp_path)
    free = free_memory()
    folder, limit, used, cached = {
        1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: (".", "memory.max", "memory.current", "inactive_file"),
    }[version]
    counters = {limit: b"1000000\n", used: b"300000\n", "memory.stat": f"anon 7\n{cached} 100000\n".encode()}
    write_folder(tmp_path / folder, counters)
    assert free_memory() == 800_000
    write_folder(tmp_path / folder, {used: b"2000000\n"})
    assert free_memory() == 0
    for unlimited in (b"max\n", b"9223372036854771712\n"):
        write_folder(tmp_path / folder, {limit: unlimited})
        assert free_memory() > free / 2
