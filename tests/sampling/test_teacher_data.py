"""Data drawn from a teacher: the same whatever was drawn before, resumable, damaged pieces are noticed."""

from pathlib import Path

import pytest
import torch

from cdistill.errors import CorruptFileError, RecipeError
from cdistill.sampling import teacher_data as synthetic
from cdistill.sampling.drawing import generate
from cdistill.sampling.samplers import make_sampler
from cdistill.sampling.teacher_data import teacher_data
from cdistill.teachers import load_teacher
from cdistill.training.loop import make_accelerator


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    monkeypatch.setattr(synthetic, "PIECE", 24)
    return load_teacher("mixture-1d")


def test_pieces_make_the_whole(teacher):
    found = teacher_data("teacher:60", "train", teacher, make_accelerator("fp32"))
    first = synthetic._FIRST_SEED["train"]
    expected, _ = generate(make_sampler(teacher.denoiser, None), (1,), range(first, first + 60))
    assert torch.equal(found.samples, expected)
    assert (found.name, found.labels, found.num_classes, found.flips) == ("teacher:60", None, 0, False)


def test_finished_pieces_are_kept_and_smaller_sets_are_the_beginning_of_larger_ones(teacher, tmp_path, monkeypatch):
    accelerator = make_accelerator("fp32")
    small = teacher_data("teacher:24", "train", teacher, accelerator)
    drawn = []

    def recording(*arguments, **options):
        drawn.append(arguments[2])
        return generate(*arguments, **options)

    monkeypatch.setattr(synthetic, "generate", recording)
    large = teacher_data("teacher:48", "train", teacher, accelerator)
    assert [len(seeds) for seeds in drawn] == [24]
    assert torch.equal(large.samples[:24], small.samples)
    assert large.digest != small.digest


def test_heldout_samples_are_others(teacher):
    accelerator = make_accelerator("fp32")
    train, heldout = (teacher_data("teacher:24", split, teacher, accelerator) for split in ("train", "heldout"))
    assert not torch.isin(train.samples, heldout.samples).any()


def test_images_become_uint8_with_the_labels_they_were_drawn_for(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    found = teacher_data("teacher:10", "train", load_teacher("digits"), make_accelerator("fp32"))
    assert (found.samples.dtype, found.shape, found.num_classes) == (torch.uint8, (1, 8, 8), 10)
    assert found.labels is not None
    assert len(found.labels) == 10


def test_a_recipe_says_so_before_anything_runs():
    from cdistill.recipe.files import load_recipe
    from cdistill.recipe.schema import DistillRecipe

    with pytest.raises(RecipeError, match="data: got 'teacher:0'; needs teacher:COUNT"):
        load_recipe(Path("digits"), DistillRecipe, ["data=teacher:0"])
    assert load_recipe(Path("digits"), DistillRecipe, ["data=teacher"]).data == "teacher:50000"


def test_a_damaged_piece_is_noticed(teacher, tmp_path):
    accelerator = make_accelerator("fp32")
    teacher_data("teacher:24", "train", teacher, accelerator)
    (piece,) = tmp_path.rglob("*.safetensors")
    data = bytearray(piece.read_bytes())
    data[-1] ^= 1
    piece.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"checksum.*or remove it, and it is drawn again"):
        teacher_data("teacher:24", "train", teacher, accelerator)


@pytest.mark.parametrize("count", ["0", "1", "99999999999", "", "ten", "9" * 5000])
def test_too_few_and_too_many_are_refused(teacher, count):
    with pytest.raises(RecipeError, match="COUNT from 2 to 1,073,741,824"):
        teacher_data(f"teacher:{count}", "train", teacher, make_accelerator("fp32"))
