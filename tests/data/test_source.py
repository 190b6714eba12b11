import torch

from cdistill.data import load_source
from cdistill.data.source import from_uint8, to_uint8


def test_uint8_and_back_keeps_every_value():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(values)), values)


def test_quantising_clips_and_cuts_as_edm_does():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 5.0])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 255]


def test_flips_mirror_what_may_be_mirrored():
    patches, digits = load_source("patches"), load_source("digits")
    index = torch.arange(2)
    flip = torch.tensor([True, False])
    plain, _ = patches.batch(index)
    mirrored, _ = patches.batch(index, flip)
    assert torch.equal(mirrored[0], plain[0].flip(-1))
    assert torch.equal(mirrored[1], plain[1])
    assert torch.equal(digits.batch(index, flip)[0], digits.batch(index)[0])
