"""The store of samples: by seed, whole or not at all, extended, shared, verified."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from cdistill.data.source import to_uint8
from cdistill.errors import CorruptFileError, StoppedError
from cdistill.sampling import sample_store
from cdistill.sampling.drawing import Drawn
from cdistill.sampling.sample_store import SampleStore

IMAGE = (1, 2, 2)


def value(seed: int, shape=IMAGE) -> torch.Tensor:
    return torch.full(shape, seed % 200 / 100 - 1, dtype=torch.float64)


@pytest.fixture
def drawn(monkeypatch):
    """Seeds that have been drawn; the network is replaced by a function of the seed, eight seeds at a time."""
    seen = []

    def fake(sampler, shape, seeds, num_classes, classes, *more):
        for start in range(0, len(seeds), 8):
            rows = torch.arange(start, min(start + 8, len(seeds)))
            wanted = [seeds[k] for k in rows.tolist()]
            seen.extend(wanted)
            labels = torch.tensor([seed % 10 for seed in wanted]) if num_classes else None
            yield Drawn(rows, torch.stack([value(seed, shape) for seed in wanted]), labels)

    monkeypatch.setattr(sample_store, "stream", fake)
    return seen


def draw(store: SampleStore, seeds, classes: int = 10) -> int:
    return store.draw(None, seeds, classes, Accelerator(cpu=True), "samples")


@pytest.fixture(params=[0.0, 100.0], ids=["a shard a chunk", "one shard"])
def _save_every(request, monkeypatch):
    monkeypatch.setattr(sample_store, "_SAVE_EVERY", request.param)


@pytest.mark.usefixtures("_save_every")
def test_samples_are_read_by_seed_in_any_order(tmp_path, drawn):
    seeds = [*range(100, 150), 7, 3, 2**31]
    store = SampleStore(tmp_path, {}, IMAGE)
    assert draw(store, seeds) == len(seeds)
    for again in (store, SampleStore(tmp_path, {}, IMAGE)):
        samples, labels = again.rows([3, 149, 2**31, 100, 101])
        assert torch.equal(samples, to_uint8(torch.stack([value(seed) for seed in (3, 149, 2**31, 100, 101)])))
        assert labels.tolist() == [seed % 10 for seed in (3, 149, 2**31, 100, 101)]
    batches = list(store.read(seeds * 10))
    assert [batch.start for batch in batches] == [0, 256, 512]
    assert np.array_equal(np.concatenate([batch.samples for batch in batches]), store.rows(seeds * 10)[0].numpy())


@pytest.mark.usefixtures("_save_every")
def test_only_what_is_missing_is_drawn(tmp_path, drawn):
    draw(SampleStore(tmp_path, {}, IMAGE), range(20))
    drawn.clear()
    store = SampleStore(tmp_path, {}, IMAGE)
    assert draw(store, [50, *range(10, 30)]) == 11
    assert drawn == [50, *range(20, 30)]
    assert draw(store, range(30)) == 0
    assert store.missing(range(25, 60)).tolist() == [k for k in range(5, 35) if k != 25]


def test_two_stores_on_one_folder_see_what_the_other_writes(tmp_path, drawn):
    first, second = SampleStore(tmp_path, {}, IMAGE), SampleStore(tmp_path, {}, IMAGE)
    draw(first, range(10))
    draw(second, range(5, 15))
    assert sorted(drawn) == list(range(15))
    assert torch.equal(first.rows(range(15))[0], second.rows(range(15))[0])


@pytest.mark.parametrize(
    ("shape", "dtype", "kept"),
    [(IMAGE, None, torch.uint8), (IMAGE, torch.float32, torch.float32), ((3,), None, torch.float64)],
)
def test_what_is_stored(shape, dtype, kept, tmp_path, drawn):
    store = SampleStore(tmp_path, {}, shape, dtype)
    draw(store, range(10), 0)
    samples, labels = store.rows([4])
    assert samples.dtype == kept
    assert labels is None
    expected = value(4, shape)[None]
    assert torch.equal(samples, to_uint8(expected) if kept == torch.uint8 else expected.to(kept))


@pytest.mark.parametrize("damage", ["a flipped bit", "a truncated file", "another identity"])
def test_damaged_shards_and_those_of_something_else_are_drawn_again(damage, tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(sample_store, "_SAVE_EVERY", 0.0)
    draw(SampleStore(tmp_path, {"teacher": 1}, IMAGE), range(24))
    path, *others = sorted(tmp_path.glob("*.safetensors"))
    assert len(others) == 2
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage != "another identity":
        path.write_bytes(data if damage == "a flipped bit" else data[:-9])
    drawn.clear()
    store = SampleStore(tmp_path, {"teacher": 2 if damage == "another identity" else 1}, IMAGE)
    draw(store, range(24))
    assert drawn == list(range(24 if damage == "another identity" else 8))
    assert torch.equal(store.rows(range(24))[0], to_uint8(torch.stack([value(seed) for seed in range(24)])))


def test_missing_samples_are_refused(tmp_path, drawn):
    store = SampleStore(tmp_path, {}, IMAGE)
    draw(store, range(10))
    with pytest.raises(CorruptFileError, match="lacks 2 of 12 samples"):
        store.rows(range(12))
    with pytest.raises(CorruptFileError, match="lacks 2 of 12 samples"):
        next(store.read(range(12)))


def test_what_was_finished_before_a_signal_is_kept(tmp_path, drawn, monkeypatch):
    fake = sample_store.stream

    def stopped(*arguments):
        parts = fake(*arguments)
        yield next(parts)
        raise StoppedError("sampling: stopped", 75)

    store = SampleStore(tmp_path, {}, IMAGE)
    with monkeypatch.context() as patched:
        patched.setattr(sample_store, "stream", stopped)
        with pytest.raises(StoppedError):
            draw(store, range(20))
    drawn.clear()
    assert draw(store, range(20)) == 12
    assert drawn == list(range(8, 20))


def test_a_large_shard_is_written_when_it_is_full(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(sample_store, "_SHARD_BYTES", 20 * 4)
    draw(SampleStore(tmp_path, {}, IMAGE), range(64))
    assert len(list(tmp_path.glob("*.safetensors"))) == 4  # two chunks of eight fit into 20 rows
