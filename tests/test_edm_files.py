import pytest
import torch
from torch import nn

from cdistill.formats.edm import read_edm
from tests.edm_writer import write_edm_pickle

SIZES = {"img_resolution": 8, "img_channels": 3, "model_type": "SongUNet", "label_dim": 4, "resample_filter": [1, 3]}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3)
        self.skip = None
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2))
        self.register_buffer("none", None)
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.gain = nn.Parameter(torch.tensor(2.0))


class SongUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.map_layer0 = nn.Linear(5, 7)
        self.enc = nn.ModuleDict({"8x8_conv": nn.Conv2d(3, 4, 1), "8x8_block0": Block()})
        self.dec = nn.ModuleDict({"8x8_in0": Block(), "list": nn.ModuleList([nn.Linear(2, 2), nn.Sequential(Block())])})
        self.register_buffer("steps", torch.arange(6, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("transposed", torch.randn(3, 5).half().T)
        self.register_buffer("empty", torch.empty(0, 3))


class DhariwalUNet(SongUNet):
    pass


class EDMPrecond(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def network(kind=SongUNet, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EDMPrecond(kind())


def assert_same_state(got, wanted):
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].is_contiguous(), name
        assert got[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [SongUNet, DhariwalUNet])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, kind, protocol):
    source = network(kind)
    kwargs = {**SIZES, "model_type": kind.__name__}
    write_edm_pickle(tmp_path / "x.pkl", source, kwargs, protocol=protocol, dataset_kwargs={"path": "x.zip"})
    found = read_edm(tmp_path / "x.pkl")
    assert_same_state(found.state, source.state_dict())
    assert found.init_kwargs == kwargs
    assert (found.class_name, found.model_class, found.entry) == ("EDMPrecond", kind.__name__, "ema")
    assert found.dataset_kwargs == {"path": "x.zip"}
