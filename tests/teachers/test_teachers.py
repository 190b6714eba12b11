"""Teachers by name and by file: EDM's pickles, converted files, other people's checkpoints, missing and wrong ones."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cdistill.cli.app import run
from cdistill.errors import CdistillError, CorruptFileError, MismatchError, MissingAssetError, RecipeError
from cdistill.registry import TEACHERS
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.teachers import Teacher, load_teacher, named, official
from cdistill.teachers.foreign import read_foreign, unet_architecture
from cdistill.teachers.official import OFFICIAL, find_weights
from cdistill.workflows.students import load_converted
from tests.edm_teacher import random_denoiser, write_teacher

TINY = {"model_channels": 16, "num_blocks": 1}
SONG = {**OFFICIAL["edm-cifar10-cond"].architecture, **TINY, "attn_resolutions": [8]}
NCSN = {**OFFICIAL["edm-cifar10-ve"].architecture, **TINY, "attn_resolutions": [8]}
ADM = {
    **OFFICIAL["edm-imagenet64"].architecture,
    "model_channels": 64, "num_classes": 7, "channel_mult": [1, 1, 2, 1],
}  # fmt: skip


@pytest.fixture(autouse=True)
def assets(tmp_path, monkeypatch):
    folder = tmp_path / "assets"
    folder.mkdir()
    monkeypatch.setenv("CDISTILL_ASSETS", str(folder))
    monkeypatch.setenv("CDISTILL_OFFLINE", "1")
    return folder


@pytest.fixture
def small_official(monkeypatch):
    """The official table with `edm-cifar10` narrowed to a network that a test can make."""
    narrow = {**OFFICIAL["edm-cifar10"].architecture, **TINY}
    table = {**OFFICIAL, "edm-cifar10": dataclasses.replace(OFFICIAL["edm-cifar10"], architecture=narrow)}
    for module in (official, named):
        monkeypatch.setattr(module, "OFFICIAL", table)
    return narrow


def batch(denoiser) -> tuple[Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(3) % denoiser.num_classes if denoiser.num_classes else None
    return torch.randn(3, *denoiser.sample_shape, generator=draw), torch.tensor([0.01, 1, 50]).double(), labels


@pytest.mark.parametrize("architecture", [SONG, NCSN, ADM], ids=["ddpmpp", "ncsnpp", "adm"])
def test_a_pickle_of_edm_is_a_teacher_with_the_same_outputs(architecture, tmp_path):
    denoiser = random_denoiser(architecture)
    write_teacher(tmp_path / "net.pkl", denoiser, architecture)
    teacher = load_teacher(str(tmp_path / "net.pkl"))
    x, t, labels = batch(denoiser)
    assert torch.equal(teacher.denoiser(x, t, None, labels), denoiser(x, t, None, labels))
    assert teacher.data == ""


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_converting_changes_nothing(protocol, tmp_path, capsys):
    denoiser = random_denoiser(SONG)
    write_teacher(tmp_path / "net.pkl", denoiser, SONG, protocol=protocol, dataset_kwargs={"sigma": float("inf")})
    assert run(["convert", str(tmp_path / "net.pkl"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    tensors, header = load_tensors(tmp_path / "net.safetensors", "teacher")
    assert record["licence"].startswith("CC BY-NC-SA 4.0")
    assert header["source"]["dataset_kwargs"] == {"sigma": "Infinity"}
    assert header["source"]["file_sha256"] == record["source"]["file_sha256"]
    state = denoiser.state_dict()
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
    pickled, converted = (load_teacher(str(tmp_path / f"net.{kind}")) for kind in ("pkl", "safetensors"))
    assert pickled.digest == converted.digest


def test_converting_never_overwrites(tmp_path, capsys):
    write_teacher(tmp_path / "net.pkl", random_denoiser(SONG), SONG)
    (tmp_path / "net.safetensors").write_text("precious")
    assert run(["convert", str(tmp_path / "net.pkl")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "net.safetensors").read_text() == "precious"


# ------------------------------------------------------------------------------------------------- official names


def test_every_official_teacher_is_registered_and_says_what_is_missing(capsys, assets):
    assert {name for name in TEACHERS.names() if name.startswith("edm-")} == set(OFFICIAL)
    for name, facts in OFFICIAL.items():
        assert run(["estimate-coeffs", "--teacher", name]) == 3
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert facts.file in line
        assert f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{facts.file}" in line
        assert str(assets / facts.file) in line
        assert "--weights FILE" in line


def test_what_is_missing_is_said_before_torch_is_imported(run_cli):
    code = (
        "import sys, cdistill.cli.app as cli\n"
        "code = cli.run(['estimate-coeffs', '--teacher', 'edm-cifar10'])\n"
        "sys.exit(0 if code == 3 and 'torch' not in sys.modules else 1)"
    )
    import subprocess
    import sys

    environment = {**os.environ, "CDISTILL_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, timeout=60)


def test_a_published_file_is_found_recorded_and_checked(small_official, assets, capsys):
    path = assets / OFFICIAL["edm-cifar10"].file
    write_teacher(path, random_denoiser(small_official), small_official)
    teacher = load_teacher("edm-cifar10")
    assert (teacher.name, teacher.data, teacher.shape) == ("edm-cifar10", "cifar10", (3, 32, 32))
    assert json.loads(path.with_name(f"{path.name}.json").read_text())["size"] == path.stat().st_size
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptFileError, match=r"sha256 is \w+\.\.\., not"):
        load_teacher("edm-cifar10")


def test_a_converted_file_in_the_folder_is_taken(small_official, assets, tmp_path):
    denoiser = random_denoiser(small_official)
    write_teacher(tmp_path / "x.pkl", denoiser, small_official)
    target = assets / "edm-cifar10-32x32-uncond-vp.safetensors"
    assert run(["convert", str(tmp_path / "x.pkl"), "--out", str(target)]) == 0
    assert load_teacher("edm-cifar10").digest == Teacher("", denoiser, "").digest


def test_weights_can_be_anywhere(small_official, tmp_path):
    write_teacher(tmp_path / "mine.pkl", random_denoiser(small_official), small_official)
    assert load_teacher("edm-cifar10", tmp_path / "mine.pkl").name == "edm-cifar10"
    with pytest.raises(MissingAssetError, match=r"nothing\.pkl: no such file"):
        load_teacher("edm-cifar10", tmp_path / "nothing.pkl")


def test_weights_of_another_network_are_refused(small_official, tmp_path):
    write_teacher(tmp_path / "other.pkl", random_denoiser(SONG), SONG)
    with pytest.raises(MismatchError, match=r"another network than 'edm-cifar10' \(.*num_classes: 10, not 0"):
        load_teacher("edm-cifar10", tmp_path / "other.pkl")


def test_weights_go_with_names_that_need_them(tmp_path):
    for name in ("digits", str(tmp_path / "a.pkl")):
        with pytest.raises(RecipeError, match="weights: "):
            load_teacher(name, tmp_path / "b.pkl")
    assert find_weights("digits") is None


# ------------------------------------------------------------------------------------------------- wrong files


def test_wrappings_of_another_kind_are_refused(tmp_path):
    write_teacher(tmp_path / "vp.pkl", random_denoiser(SONG), SONG, class_name="VPPrecond")
    with pytest.raises(CorruptFileError, match=r"vp\.pkl: .*VPPrecond; only EDMPrecond"):
        load_teacher(str(tmp_path / "vp.pkl"))


@pytest.mark.parametrize(
    "change",
    [{"decoder_type": "skip"}, {"channel_mult_emb": 2}, {"windows": 3}, {"encoder": "skip"}, {"channel_mult": [2]}],
    ids=["decoder", "embedding", "unknown", "encoder", "levels"],
)
def test_networks_of_another_kind_are_refused(change, tmp_path):
    write_teacher(tmp_path / "net.pkl", random_denoiser(SONG), {**SONG, **change})
    with pytest.raises(CorruptFileError, match=r"net\.pkl: "):
        load_teacher(str(tmp_path / "net.pkl"))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x04}.", b"cos\nsystem\n(S'touch owned'\ntR.", b"PK\x03\x04" + bytes(100)],
    ids=["empty", "text", "no network", "hostile", "broken zip"],
)
@pytest.mark.parametrize("suffix", ["pkl", "pt"])
def test_other_files_end_in_one_line(content, suffix, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    assert run(["convert", str(path)]) == 4
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------------------------- plain state dicts


SIDES = [64, 32, 16, 8]
RESIDUAL = {
    "norm0": "in_layers.0", "conv0": "in_layers.2", "affine": "emb_layers.1", "affine_s": "emb_layers_s.1",
    "norm1": "out_layers.0", "conv1": "out_layers.3", "skip": "skip_connection",
}  # fmt: skip
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
OUTER = {
    "map_layer0": "time_embed.0", "map_layer1": "time_embed.2", "map_layer0_s": "time_embed_s.0",
    "map_layer1_s": "time_embed_s.2", "out_norm": "out.0", "out_conv": "out.2", "enc.64x64_conv": "input_blocks.0.0",
}  # fmt: skip


def openai_blocks(attends: Callable[[int], bool]) -> Iterator[tuple[str, str, str]]:
    """Walks OpenAI's U-Net as it is built: (our block, where its residual part goes, where its attention goes)."""
    names = [name for side in SIDES for name in (f"{side}x{side}_down", *[f"{side}x{side}_block{k}" for k in range(3)])]
    for place, name in enumerate(names[1:], start=1):  # the first is a plain convolution
        yield f"enc.{name}", f"input_blocks.{place}.0", f"input_blocks.{place}.1"
    yield "dec.8x8_in0", "middle_block.0", "middle_block.1"
    yield "dec.8x8_in1", "middle_block.2", ""
    for place, (side, k) in enumerate((side, k) for side in reversed(SIDES) for k in range(4)):
        yield f"dec.{side}x{side}_block{k}", f"output_blocks.{place}.0", f"output_blocks.{place}.1"
        if k == 3 and side != 64:
            yield f"dec.{2 * side}x{2 * side}_up", f"output_blocks.{place}.{1 + attends(side)}", ""


def openai_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An ADM's weights as OpenAI's U-Net stores them."""
    pairs = dict(OUTER)
    for ours, residual, attention in openai_blocks(lambda side: side in (32, 16, 8)):
        pairs |= {f"{ours}.{name}": f"{residual}.{other}" for name, other in RESIDUAL.items()}
        pairs |= {f"{ours}.{name}": f"{attention}.{other}" for name, other in ATTENTION.items()}
    found = {}
    for (ours, theirs), kind in product(pairs.items(), ("weight", "bias")):
        if (tensor := state.get(f"model.{ours}.{kind}")) is not None:
            found[f"{theirs}.{kind}"] = heads_inside(tensor) if ours.endswith("qkv") else tensor
    return {**found, "label_emb.weight": state["model.map_label.weight"].T}


def heads_inside(qkv: Tensor) -> Tensor:
    """Rows (heads, 64, 3) -> (3, heads, 64): all queries first."""
    return torch.cat([qkv[k::3] for k in range(3)])


def save_state(path: Any, state: Mapping[str, Tensor]) -> None:
    torch.save(dict(state), path)  # noqa: TID251


@pytest.mark.parametrize("takes_s", [False, True], ids=["openai", "ctm"])
def test_the_unet_of_openai_computes_the_same_under_our_names(takes_s, tmp_path):
    """Their time input is 250 ln(t), so ours with `noise_scale` 1000 must see the same angles."""
    architecture = {**ADM, "s_branch": takes_s, "noise_scale": 1000.0}
    denoiser = random_denoiser(architecture)
    state = openai_layout(denoiser.state_dict())
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in denoiser.parameters())
    save_state(tmp_path / "x.pt", state)
    arguments = ["convert", str(tmp_path / "x.pt"), *([] if takes_s else ["--as", "cd"])]
    assert run(arguments) == 0
    found, form = load_converted(tmp_path / "x.safetensors")
    assert type(form).__name__ == ("CTM" if takes_s else "CM")
    x, t, labels = batch(denoiser)
    assert torch.equal(found(x, t, t / 2, labels), denoiser(x, t, t / 2, labels))


def test_openais_files_look_alike_so_the_user_says_which(tmp_path, capsys):
    save_state(tmp_path / "x.pt", openai_layout(random_denoiser({**ADM, "noise_scale": 1000.0}).state_dict()))
    assert run(["convert", str(tmp_path / "x.pt")]) == 2
    assert "--as edm, --as cd or --as ct" in capsys.readouterr().err
    assert read_foreign(tmp_path / "x.pt", "edm").preconditioning is None
    with pytest.raises(RecipeError, match="look alike"):
        load_teacher(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("base_architecture", [SONG, NCSN], ids=["ddpmpp", "ncsnpp"])
def test_a_student_of_ctm_is_recognised_converted_and_drawn_from(base_architecture, tmp_path, capsys):
    architecture = {**base_architecture, "s_branch": True, "augment_dim": 0}
    denoiser = random_denoiser(architecture)
    save_state(tmp_path / "ctm.pt", denoiser.state_dict())
    foreign = read_foreign(tmp_path / "ctm.pt")
    assert (foreign.what, foreign.preconditioning) == ("CTM, CIFAR-10", "ctm")
    assert foreign.architecture == {**architecture, "dropout": 0.0}
    with pytest.raises(MismatchError, match="a student"):
        load_teacher(str(tmp_path / "ctm.pt"))
    assert run(["convert", str(tmp_path / "ctm.pt"), "--out", str(tmp_path / "s.safetensors")]) == 0
    out = tmp_path / "drawn"
    arguments = ["--run", str(tmp_path / "s.safetensors"), "--nfe", "1,2", "--seeds", "0-1", "--out", str(out)]
    assert run(["sample", *arguments]) == 0
    assert sorted(path.name for path in out.glob("*.png")) == ["nfe1.png", "nfe2.png"]
    with pytest.raises(CorruptFileError, match="is a student file; a teacher file is needed"):
        load_teacher(str(tmp_path / "s.safetensors"))


def test_an_edm_state_dict_is_read_off_its_names(tmp_path):
    for architecture in (SONG, NCSN):
        denoiser = random_denoiser(architecture)
        assert unet_architecture(denoiser.state_dict()) == {**architecture, "dropout": 0.0}
        save_state(tmp_path / "sd.pth", denoiser.state_dict())
        x, t, labels = batch(denoiser)
        teacher = load_teacher(str(tmp_path / "sd.pth"))
        assert torch.equal(teacher.denoiser(x, t, None, labels), denoiser(x, t, None, labels))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"state": {}, "param_groups": []}, "the state of an optimiser"),
        ({"discriminators.0.weight": torch.ones(1)}, "a discriminator"),
        ({"layer.weight": torch.ones(1)}, "of no known network"),
        ({"model.map_layer0.weight": torch.ones(2, 2)}, "no blocks of an encoder"),
        ({"model.map_layer0.weight": torch.ones(2, 2), "step": 3}, "'step' is no tensor with a name"),
        ({"time_embed.0.weight": torch.ones(4, 1), "label_emb.weight": torch.ones(3, 4)}, "no U-Net of 4 levels"),
        ({"time_embed_s.0.weight": torch.ones(4, 1)}, "no U-Net of 4 levels"),
    ],
    ids=["optimiser", "discriminator", "unknown", "rest", "no tensor", "no unet", "no ctm"],
)
def test_other_checkpoints_are_refused_by_name(state, message, tmp_path):
    torch.save(state, tmp_path / "x.pt")  # noqa: TID251
    flavour = "edm" if "time_embed.0.weight" in state else None
    with pytest.raises(CdistillError, match=re.escape(message)) as caught:
        read_foreign(tmp_path / "x.pt", flavour)
    assert str(tmp_path / "x.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


ODD_STATES = {
    "width 0": {"time_embed.0.weight": torch.ones(4, 0)},
    "label of no dimension": {"label_emb.weight": torch.tensor(1.0)},
    "qkv of 5 rows": {"middle_block.1.qkv.weight": torch.ones(5, 3)},
    "block far out": {"output_blocks.99999.0.in_layers.0.weight": torch.ones(1)},
    "unknown entry": {"nothing.weight": torch.ones(1)},
    "a number for a name": {7: torch.ones(1)},
    "a list for a tensor": {"out.0.weight": [1.0]},
}


@pytest.mark.parametrize("change", list(ODD_STATES.values()), ids=list(ODD_STATES))
def test_odd_state_dicts_of_openai_end_in_one_line(change, tmp_path, capsys):
    state = openai_layout(random_denoiser({**ADM, "noise_scale": 1000.0}).state_dict())
    torch.save({**state, **change}, tmp_path / "x.pt")  # noqa: TID251
    assert run(["convert", str(tmp_path / "x.pt"), "--as", "edm"]) == 4
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("value", [torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), float("nan")), torch.ones(0)])
def test_odd_filters_end_in_one_line(value, tmp_path, capsys):
    state = random_denoiser(NCSN).state_dict()
    save_state(tmp_path / "x.pt", {k: value if k.endswith("resample_filter") else v for k, v in state.items()})
    assert run(["convert", str(tmp_path / "x.pt")]) == 4
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


ODD_HEADERS = {
    "sigma_data NaN": {"sigma_data": float("nan")},
    "sigma_data 0": {"sigma_data": 0.0},
    "sigma_data huge": {"sigma_data": 10**400},
    "sigma_data text": {"sigma_data": "x"},
    "a list of pairs": {"architecture": [["network", "song"]]},
    "no network": {"architecture": {"resolution": 32}},
    "no data": {"data": None, "architecture": None},
}
ODD_NETWORKS = {
    "narrow": {"model_channels": 2},
    "wide": {"model_channels": 10**9},
    "dropout": {"dropout": -3.0},
    "dropout text": {"dropout": "x"},
    "many taps": {"taps": [1] * 16000},
    "argument of another": {"noise_scale": 2.0},
    "many blocks": {"num_blocks": 10**6},
}


@pytest.mark.parametrize(
    "change",
    [*ODD_HEADERS.values(), *[{"architecture": {**SONG, **change}} for change in ODD_NETWORKS.values()]],
    ids=[*ODD_HEADERS, *ODD_NETWORKS],
)
def test_odd_headers_end_in_one_line(change, tmp_path, capsys):
    header = {"architecture": SONG, "sigma_data": 0.5, "data": "digits", **change}
    save_tensors(tmp_path / "t.safetensors", random_denoiser(SONG).state_dict(), "teacher", header)
    assert run(["-q", "sample", "--teacher", str(tmp_path / "t.safetensors"), "--seeds", "0"]) == 4
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("change", [{"head_channels": 7}, {"head_channels": 0}, {"noise_scale": float("nan")}])
def test_odd_adms_are_refused(change, tmp_path, capsys):
    header = {"architecture": {**ADM, **change}, "sigma_data": 0.5, "data": ""}
    save_tensors(tmp_path / "t.safetensors", random_denoiser(ADM).state_dict(), "teacher", header)
    assert run(["-q", "sample", "--teacher", str(tmp_path / "t.safetensors"), "--seeds", "0"]) == 4
    assert next(iter(change)) in capsys.readouterr().err


def test_weights_that_are_not_float32_are_refused(tmp_path, capsys):
    state = {name: tensor.bfloat16() for name, tensor in random_denoiser(SONG).state_dict().items()}
    header = {"architecture": SONG, "sigma_data": 0.5, "data": ""}
    save_tensors(tmp_path / "t.safetensors", state, "teacher", header)
    assert run(["-q", "sample", "--teacher", str(tmp_path / "t.safetensors"), "--seeds", "0"]) == 4
    assert "float32 is needed" in capsys.readouterr().err


def test_a_teacher_of_other_data_does_not_take_an_official_name(tmp_path):
    """FFHQ's and AFHQv2's networks are the same; what a converted file says of its data decides."""
    narrow = {**OFFICIAL["edm-ffhq64"].architecture, **TINY}
    header = {"architecture": narrow, "sigma_data": 0.5, "data": "afhqv2-64"}
    save_tensors(tmp_path / "t.safetensors", random_denoiser(narrow).state_dict(), "teacher", header)
    table = {**OFFICIAL, "edm-ffhq64": dataclasses.replace(OFFICIAL["edm-ffhq64"], architecture=narrow)}
    with mock.patch.object(named, "OFFICIAL", table), pytest.raises(MismatchError, match="was trained on afhqv2-64"):
        load_teacher("edm-ffhq64", tmp_path / "t.safetensors")


def test_an_adm_in_edms_naming_is_read_off_its_names(tmp_path):
    denoiser = random_denoiser(ADM)
    assert unet_architecture(denoiser.state_dict()) == {**ADM, "dropout": 0.0}
    save_state(tmp_path / "sd.pth", denoiser.state_dict())
    assert load_teacher(str(tmp_path / "sd.pth")).denoiser.num_classes == 7


def test_half_precision_weights_become_float32(tmp_path):
    denoiser = random_denoiser({**SONG, "augment_dim": 0})
    halves = {name: t.half() if t.is_floating_point() else t for name, t in denoiser.state_dict().items()}
    save_state(tmp_path / "half.pt", halves)
    teacher = load_teacher(str(tmp_path / "half.pt"))
    assert {tensor.dtype for tensor in teacher.denoiser.state_dict().values()} == {torch.float32}


def test_weights_that_share_one_buffer_become_separate(tmp_path):
    """fp16 training saves views of one flat buffer; safetensors would refuse them."""
    denoiser = random_denoiser({**SONG, "augment_dim": 0})
    state = denoiser.state_dict()
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    views, start = {}, 0
    for name, tensor in state.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    save_state(tmp_path / "views.pt", views)
    assert run(["convert", str(tmp_path / "views.pt")]) == 0
    tensors, _ = load_tensors(tmp_path / "views.safetensors", "teacher")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
