# ruff: noqa: TID251 - torch must write here what is to be read

import collections
import io
import struct
import zipfile

import pytest
import torch
from torch import nn

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.formats.state_dicts import state_dict_kind
from cdistill.formats.torch_files import read_torch_file


def tensors():
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(200, generator=generator)
    shared = torch.randn(6, 8, generator=generator)
    integers = torch.randint(0, 100, (5, 3), generator=generator)
    return {
        "plain": torch.randn(3, 4, 5, generator=generator),
        "double": torch.randn(7, generator=generator, dtype=torch.float64),
        "half": flat.half(),
        "bfloat16": flat.bfloat16().reshape(10, 20).T,
        "transposed": shared.T,
        "every second row": shared[::2, 1::3],
        "whole": shared,
        "view of flat 1": flat[10:40].reshape(5, 6),
        "view of flat 2": flat[40:41],
        "scalar": torch.tensor(3.5),
        "scalar of flat": flat[199],
        "empty": torch.empty(0, 3),
        "nothing": torch.empty(0),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(flat[:4]),
        "bool": torch.tensor([[True, False], [False, True]]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        **{str(kind): integers.to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)},
        **{f"{kind} as columns": integers.to(kind).T for kind in (torch.int64, torch.int16, torch.uint8)},
    }


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        got = found[name]
        assert (got.dtype, got.shape, type(got)) == (tensor.dtype, tensor.shape, torch.Tensor), name
        assert got.is_contiguous(), name
        assert got.reshape(-1).view(torch.uint8).equal(tensor.detach().contiguous().reshape(-1).view(torch.uint8)), name
        assert got.untyped_storage().nbytes() == got.nbytes, name


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("new", [False, True])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, new, protocol):
    path = tmp_path / "x.pt"
    torch.save(tensors(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    assert_same(read_torch_file(path), tensors())


@pytest.mark.parametrize("new", [False, True])
def test_the_state_of_a_network_and_its_optimiser_come_back(tmp_path, new):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimiser = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    optimiser.step()
    path = tmp_path / "x.pt"
    torch.save({"net": network.state_dict(), "opt": optimiser.state_dict()}, path, _use_new_zipfile_serialization=new)
    found = read_torch_file(path)
    assert_same(found["net"], network.state_dict())
    assert found["opt"]["param_groups"][0]["betas"] == (0.9, 0.99)
    wanted = optimiser.state_dict()["state"]
    assert list(found["opt"]["state"]) == list(wanted)
    for key, values in wanted.items():
        assert_same(found["opt"]["state"][key], values)


def test_tensors_do_not_need_the_file_any_more(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(tensors(), path)
    found = read_torch_file(path)
    path.unlink()
    found["whole"].add_(1)
    assert found["transposed"].equal(tensors()["transposed"])


def test_equal_views_of_one_tensor_stay_one(tmp_path):
    tensor = torch.ones(3)
    torch.save({"a": tensor, "b": tensor}, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert found["a"] is found["b"]


def test_files_that_torch_aligns_otherwise_are_read(tmp_path):
    path, moved = tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save(tensors(), path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(moved, "w") as new:
        for name in reversed(old.namelist()):
            new.writestr(name.replace("archive/", "elsewhere/"), old.read(name))
    assert_same(read_torch_file(moved), tensors())


def test_a_tensor_that_repeats_its_elements_is_refused(tmp_path):
    torch.save(torch.ones(1).expand(1000), tmp_path / "x.pt")
    with pytest.raises(CorruptFileError, match="elements overlap"):
        read_torch_file(tmp_path / "x.pt")


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CorruptFileError, match=r"it asks for 'torch\.nn\.modules\.linear\.Linear'"):
        read_torch_file(tmp_path / "x.pt")


def test_other_files_are_told_apart(tmp_path):
    with pytest.raises(MissingAssetError, match="no such file"):
        read_torch_file(tmp_path / "none.pt")
    with pytest.raises(MissingAssetError, match="a folder, not a file"):
        read_torch_file(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(CorruptFileError, match="the file is empty"):
        read_torch_file(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"{}")
    with pytest.raises(CorruptFileError, match="no file that torch saved"):
        read_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("part", [k / 16 for k in range(16)])
def test_truncated_files_are_refused(tmp_path, new, part):
    buffer = io.BytesIO()
    torch.save(tensors(), buffer, _use_new_zipfile_serialization=new)
    data = buffer.getvalue()
    (tmp_path / "x.pt").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CorruptFileError, match=r"x\.pt"):
        read_torch_file(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("ctm-cifar10", ["model.map_layer0_s.weight", "model.map_layer0.weight", "model.enc.32x32_conv.weight"]),
        ("ctm-imagenet64", ["time_embed_s.0.weight", "time_embed.0.weight", "label_emb.weight"]),
        ("openai", ["time_embed.0.weight", "label_emb.weight", "out.0.weight"]),
        ("edm", ["model.map_layer0.weight", "model.enc.32x32_conv.weight"]),
    ],
)
def test_state_dicts_are_told_apart_by_their_keys(kind, keys):
    assert state_dict_kind(keys) == kind
    assert state_dict_kind(collections.OrderedDict.fromkeys(reversed(keys))) == kind


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["state", "param_groups"], "is the state of an optimiser"),
        (["feature_networks.0.x", "discriminators.0.main.weight"], "is a discriminator"),
        (["time_embed.0.weight"], r"holds 1 entries \('time_embed\.0\.weight'\), of no known network"),
        (list("abcdef"), r"holds 6 entries \('a', 'b', 'c', 'd', \.\.\.\)"),
        ([], r"holds 0 entries \(none\)"),
        ([7, None, "x\ny"], r"\(7, a NoneType, 'x\\ny'\)"),
    ],
)
def test_other_dicts_are_refused_by_what_they_are(keys, reason):
    with pytest.raises(CorruptFileError, match=reason):
        state_dict_kind(keys)


def widened(data):
    """Rewrites an archive as one beyond 4 GB is written: every size and place in fields of 64 bits."""
    end = data.rindex(b"PK\5\6")
    count, _, start = struct.unpack("<HII", data[end + 10 : end + 20])
    place, entries = start, b""
    for _ in range(count):
        fixed = bytearray(data[place : place + 46])
        packed, full, name, extra, comment = struct.unpack("<IIHHH", fixed[20:34])
        wide = struct.pack("<HHIHHQQQ", 7, 4, 0, 1, 24, full, packed, *struct.unpack("<I", fixed[42:46]))
        fixed[20:32] = struct.pack("<IIHH", 0xFFFFFFFF, 0xFFFFFFFF, name, len(wide))
        fixed[42:46] = b"\xff" * 4
        entries += fixed + data[place + 46 : place + 46 + name] + wide
        place += 46 + name + extra + comment
    far = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(entries), 1)
    last = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:start] + entries + far + locator + last


def test_a_wide_field_that_is_cut_is_refused(tmp_path):
    """Its length reaches beyond the extra field: found by fuzzing."""
    buffer = io.BytesIO()
    torch.save(tensors(), buffer)
    data = widened(buffer.getvalue())
    at = data.index(struct.pack("<IIH", 0xFFFFFFFF, 0xFFFFFFFF, len("archive/data.pkl"))) + 10
    path = tmp_path / "x.pt"
    for length in range(36):
        path.write_bytes(data[:at] + struct.pack("<H", length) + data[at + 2 :])
        with pytest.raises(CorruptFileError, match="no valid directory"):
            read_torch_file(path)


def test_archives_beyond_4_gb_are_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(tensors(), path)
    path.write_bytes(widened(path.read_bytes()))
    with zipfile.ZipFile(path) as second_opinion:
        assert second_opinion.testzip() is None
    assert_same(read_torch_file(path), tensors())
