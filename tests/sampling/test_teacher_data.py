"""A teacher's samples as data and as endpoints: the same whatever was drawn before, extended, verified."""

import os
from pathlib import Path

import pytest
import torch

from cdistill.errors import RecipeError
from cdistill.sampling import sample_store
from cdistill.sampling.drawing import generate, stream
from cdistill.sampling.samplers import make_sampler
from cdistill.sampling.teacher_data import _FIRST_SEED, teacher_data, teacher_endpoints
from cdistill.teachers import load_teacher
from cdistill.training.loop import make_accelerator

TEN = (0.1,) * 10  # classes, drawn alike


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    return load_teacher("mixture-1d")


@pytest.fixture
def drawn(monkeypatch):
    """The seeds that samples are drawn for."""
    seen = []

    def recording(sampler, shape, seeds, *more):
        seen.extend(seeds)
        return stream(sampler, shape, seeds, *more)

    monkeypatch.setattr(sample_store, "stream", recording)
    return seen


def test_shards_make_the_whole(teacher, monkeypatch):
    monkeypatch.setattr(sample_store, "_SAVE_EVERY", 0.0)
    source = teacher_data("teacher:150", "train", teacher, make_accelerator("fp32"))
    first = _FIRST_SEED["train"]
    expected, _ = generate(make_sampler(teacher.denoiser, None), (1,), range(first, first + 150))
    assert torch.equal(source.samples, expected)
    assert (source.name, source.labels, source.num_classes, source.flips) == ("teacher:150", None, 0, False)


def test_samples_are_kept_and_smaller_sets_are_the_beginning_of_larger_ones(teacher, drawn):
    accelerator = make_accelerator("fp32")
    small = teacher_data("teacher:24", "train", teacher, accelerator)
    drawn.clear()
    large = teacher_data("teacher:48", "train", teacher, accelerator)
    assert drawn == [_FIRST_SEED["train"] + k for k in range(24, 48)]
    assert torch.equal(large.samples[:24], small.samples)
    assert large.digest != small.digest


def test_heldout_samples_are_others(teacher):
    accelerator = make_accelerator("fp32")
    train, heldout = (teacher_data("teacher:24", split, teacher, accelerator) for split in ("train", "heldout"))
    assert not torch.isin(train.samples, heldout.samples).any()


def test_images_become_uint8_with_the_labels_they_were_drawn_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    source = teacher_data("teacher:10", "train", load_teacher("digits"), make_accelerator("fp32"))
    assert (source.samples.dtype, source.shape, source.num_classes) == (torch.uint8, (1, 8, 8), 10)
    assert source.labels is not None
    assert len(source.labels) == 10


def test_a_recipe_says_so_before_anything_runs():
    from cdistill.recipe.files import load_recipe
    from cdistill.recipe.schema import DistillRecipe

    with pytest.raises(RecipeError, match="data: got 'teacher:0'; needs teacher:COUNT"):
        load_recipe(Path("digits"), DistillRecipe, ["data=teacher:0"])
    assert load_recipe(Path("digits"), DistillRecipe, ["data=teacher"]).data == "teacher:50000"


def test_a_damaged_shard_is_drawn_again(teacher, tmp_path, drawn):
    accelerator = make_accelerator("fp32")
    whole = teacher_data("teacher:24", "train", teacher, accelerator)
    (shard,) = tmp_path.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    drawn.clear()
    assert torch.equal(teacher_data("teacher:24", "train", teacher, accelerator).samples, whole.samples)
    assert len(drawn) == 24


@pytest.mark.parametrize("count", ["0", "1", "99999999999", "", "ten", "9" * 5000])
def test_too_few_and_too_many_are_refused(teacher, count):
    with pytest.raises(RecipeError, match="COUNT from 2 to 1,073,741,824"):
        teacher_data(f"teacher:{count}", "train", teacher, make_accelerator("fp32"))


# --- endpoints ---


def endpoints(teacher, seeds):
    return teacher_endpoints(teacher, seeds, teacher.denoiser.known_classes.shares, make_accelerator("fp32"))


def test_endpoints_are_drawn_once_for_whole_chunks_and_extended(teacher, drawn):
    store = endpoints(teacher, range(300))
    assert drawn == list(range(320))  # whole chunks of 64
    expected, _ = generate(make_sampler(teacher.denoiser, None), (1,), [0, 299, 255])
    assert torch.equal(store.rows([0, 299, 255])[0], expected)
    drawn.clear()
    endpoints(teacher, range(100, 300))
    assert drawn == []
    assert torch.equal(endpoints(teacher, range(600)).rows([299])[0], expected[1:2])
    assert drawn == list(range(320, 640))


def test_endpoints_of_images_are_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    digits = load_teacher("digits")
    expected, _ = generate(make_sampler(digits.denoiser, None), digits.shape, [60, 64], TEN)
    assert torch.equal(endpoints(digits, range(60, 66)).rows([60, 64])[0], expected.float())


def test_another_teacher_has_endpoints_of_its_own(teacher, drawn):
    endpoints(teacher, range(10))
    drawn.clear()
    endpoints(load_teacher("mixture-narrow"), range(10))
    assert drawn == list(range(64))


def test_endpoints_that_cannot_be_kept_are_in_a_folder_that_goes(monkeypatch, teacher, capsys):
    monkeypatch.setenv("CDISTILL_ASSETS", os.devnull)
    store = endpoints(teacher, range(100))
    assert len(store.rows(range(100))[0]) == 100
    assert capsys.readouterr().err.count("not kept for the next evaluation") == 1
    folder = store.folder
    assert folder.is_dir()
    del store
    assert not folder.exists()
