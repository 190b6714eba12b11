# ruff: noqa: TID251 - the files that are to be read must be written here

import hashlib
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.formats.edm_pickles import read_edm
from tests.edm_writer import SOURCE, fake_modules, persistent, snapshot, write_edm_pickle

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
    assert (found.model_class, found.entry) == (kind.__name__, "ema")
    assert found.dataset_kwargs == {"path": "x.zip"}


def test_the_same_network_is_found_in_every_kind_of_file(tmp_path):
    source = network()
    found = {}
    for name, value in {"": persistent_network(source), "ema": snapshot(source, SIZES)}.items():
        with fake_modules():
            (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
        found[name] = read_edm(tmp_path / "x.pkl")
    with fake_modules():
        torch.save({"net": persistent_network(source), "optimizer_state": {}}, tmp_path / "x.pt")
    found["net"] = read_edm(tmp_path / "x.pt")
    for entry, got in found.items():
        assert got.entry == entry
        assert got.init_kwargs == SIZES
        assert got.source_sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
        assert_same_state(got.state, source.state_dict())


def persistent_network(source, **changes):
    attributes = {
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 4,
        "use_fp16": np.bool_(True),
        "sigma_min": 0.002,
    }
    attributes |= {"sigma_max": float("inf"), "sigma_data": np.float64(0.5)}
    return persistent(source, **{"_init_args": (), "_init_kwargs": SIZES, **attributes, **changes})


def write(path, value):
    with fake_modules(), path.open("wb") as file:
        pickle.dump(value, file)
    return path


def test_what_the_network_says_of_itself_is_plain_numbers(tmp_path):
    found = read_edm(write(tmp_path / "x.pkl", persistent_network(network())))
    assert found.attributes == {
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 4,
        "use_fp16": True,
        "sigma_min": 0.002,
        "sigma_max": math.inf,
        "sigma_data": 0.5,
    }
    assert {type(value) for value in found.attributes.values()} == {int, float, bool}


def test_positional_arguments_get_their_names(tmp_path):
    value = persistent_network(
        network(), _init_args=(8, 3, 4), _init_kwargs={"model_type": "SongUNet", "dropout": None}
    )
    found = read_edm(write(tmp_path / "x.pkl", value))
    assert found.init_kwargs == {
        "img_resolution": 8,
        "img_channels": 3,
        "label_dim": 4,
        "model_type": "SongUNet",
        "dropout": None,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"class_name": "VPPrecond"}, "x.pkl: is a VPPrecond; only EDMPrecond networks are teachers here"),
        ({"_init_args": (8,)}, "was given an argument twice"),
        ({"_init_args": None}, "does not state what it was built with"),
        ({"_init_kwargs": {}}, "its model is a SongUNet, but was built as a 'DhariwalUNet'"),
        ({"_init_kwargs": {**SIZES, "dropout": {1}}}, "_init_kwargs holds a set"),
        ({"_init_kwargs": {**SIZES, "dropout": {1: 2}}}, "_init_kwargs holds a dict"),
        ({"_init_kwargs": {**SIZES, "dropout": 1 << 70}}, "_init_kwargs holds a int"),
        ({"sigma_data": None}, "the EDMPrecond has no number sigma_data"),
        ({"_parameters": None}, "'' has no _parameters"),
        ({"_parameters": {"a": 1}}, "'a' is 1 where a tensor is needed"),
        ({"_parameters": {"a.b": torch.ones(1)}}, r"'' has an entry called 'a\.b'"),
        ({"_parameters": {"": torch.ones(1)}}, "'' has an entry called ''"),
        ({"_buffers": {7: torch.ones(1)}}, "'' has an entry called 7"),
        ({"_non_persistent_buffers_set": [1]}, "has no set of its non-persistent buffers"),
    ],
)
def test_other_networks_are_refused_by_what_they_are(tmp_path, changes, reason):
    path = write(tmp_path / "x.pkl", {"ema": persistent_network(network(), **changes)})
    with pytest.raises(CorruptFileError, match=reason) as error:
        read_edm(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")


def test_a_network_around_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(CorruptFileError, match="its model is 'Block'; known: SongUNet, DhariwalUNet"):
        read_edm(write(tmp_path / "x.pkl", persistent_network(network(Block))))


def test_other_files_are_told_apart(tmp_path):
    with pytest.raises(MissingAssetError, match="no such file"):
        read_edm(tmp_path / "none.pkl")
    with pytest.raises(CorruptFileError, match=r"no network 'ema' or 'net' .*\('model', 'x', 'y', 7, \.\.\."):
        read_edm(write(tmp_path / "x.pkl", {"model": 1, "x": 2, "y": 3, 7: 4, 8: 5}))
    with pytest.raises(CorruptFileError, match="a list where a network is needed"):
        read_edm(write(tmp_path / "x.pkl", [1]))
    (tmp_path / "x.pkl").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(CorruptFileError, match="byte 1: "):
        read_edm(tmp_path / "x.pkl")


def test_the_network_may_be_used_once_the_file_is_gone(tmp_path):
    source = network()
    write_edm_pickle(tmp_path / "x.pkl", source, SIZES)
    found = read_edm(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").unlink()
    for tensor in found.state.values():
        tensor.zero_()
    assert not any(tensor.any() for tensor in found.state.values())


@pytest.mark.parametrize("protocol", [2, 4])
def test_reading_takes_the_room_of_the_tensors(tmp_path, protocol):
    """Ten blobs of 4 MB: they are dropped one by one, in protocol 2 too, where they are text first."""
    source = network()
    source.model.dec["many"] = nn.ModuleList([nn.Linear(1000, 1000, bias=False) for _ in range(10)])
    write_edm_pickle(tmp_path / "x.pkl", source, SIZES, protocol=protocol)
    code = (
        "import resource, sys, torch; from pathlib import Path; from cdistill.formats.edm_pickles import read_edm\n"
        "torch.ones(10).numpy(); peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); found = read_edm(Path(sys.argv[1])); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.pkl"], capture_output=True, text=True, check=True)
    size = (tmp_path / "x.pkl").stat().st_size
    assert int(done.stdout) * 1024 < size + 40e6 + 40e6  # the mapped file, the tensors, and one blob in three forms
