"""`cdistill inspect`: the seal without torch, hostile files, and the pages."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cdistill.cli.app import run
from cdistill.errors import CorruptFileError, MissingAssetError, printable
from cdistill.reporting.inspect_view import provenance
from cdistill.storage import integrity
from cdistill.storage.checkpoints import SCHEMA, save_checkpoint, save_tensors, tensor_digest
from cdistill.storage.integrity import canonical, layout_digest, numbers, read_layout
from cdistill.teachers import load_teacher
from cdistill.teachers.named import ASSETS
from cdistill.workflows.inspection import inspect_file
from tests.conftest import PACKAGE, environment, fast_distill

DTYPES = sorted({name for name, _ in integrity._TYPES.values()})
LEVELS = torch.logspace(1.9, -2.7, 30, dtype=torch.float64)
TABLE = {"t": LEVELS, "l": LEVELS / 100, "s": -LEVELS / 50}
HEADER = {
    "teacher": "digits",
    "teacher_sha256": "ab" * 32,
    "estimator": "autodiff",
    "samples": 64,
    "versions": {"torch": "2"},
}


def inspected(capsys, *arguments: object) -> str:
    """The page of a command that succeeds."""
    assert run(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def raw(path: Path, header: object, body: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, a text or what JSON makes of a value."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def tensor(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.safetensors"
    save_tensors(path, TABLE, "coefficients", HEADER)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (2, 3, 1)], ids=str)
def test_the_digest_of_the_file_is_that_of_its_tensors(tmp_path, dtype, shape):
    count = torch.Size(shape).numel()
    bits = torch.arange(count * 8, dtype=torch.int64).mul(37).remainder(2 if dtype == "bool" else 251).to(torch.uint8)
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    tensors = {"x.é": bits[: count * width].view(getattr(torch, dtype)).reshape(shape), "a": torch.ones(3)}
    save_tensors(tmp_path / "x.safetensors", tensors, "teacher", {"note": "é"})
    layout = read_layout(tmp_path / "x.safetensors")
    assert layout_digest(layout, "text") == tensor_digest(tensors, "text")
    record = inspect_file(tmp_path / "x.safetensors")
    header = {"note": "é", "kind": "teacher", "schema": SCHEMA}
    assert (record["checksum"], record["header"]) == ("ok", header)
    assert record["sha256"] == tensor_digest(tensors, canonical(header))
    assert record["tensors"][1] == {"name": "x.é", "dtype": dtype, "shape": list(shape), "bytes": count * width}
    assert record["numbers"] == count + 3


@pytest.mark.parametrize("name", ["digits", "patches"])
def test_a_teachers_file_names_the_digest_that_its_coefficients_carry(name):
    record = inspect_file(ASSETS / f"{name}.safetensors")
    assert record["checksum"] == "ok"
    assert record["weights_sha256"] == load_teacher(name).digest


def test_every_altered_byte_is_noticed(file):
    """Whatever is altered, "ok" is never said; one that renames the key of the seal makes a foreign file of it."""
    data = file.read_bytes()
    place = data.index(b"cdistill")
    for changed_at in [*range(0, len(data) - 720, 3), *range(len(data) - 720, len(data), 11)]:
        changed = bytearray(data)
        changed[changed_at] ^= 0x04
        file.write_bytes(changed)
        if place <= changed_at < place + 8:
            assert inspect_file(file)["checksum"] is None
        else:
            with pytest.raises(CorruptFileError, match=f"^{file}: .*$"):
                inspect_file(file)


def test_truncated_and_extended_files_are_refused(file):
    data = file.read_bytes()
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        with pytest.raises(CorruptFileError, match="damaged, or not a safetensors file"):
            inspect_file(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(CorruptFileError, match="damaged, or not a safetensors file"):
        inspect_file(file)


HOSTILE = {
    "no object": ([], b""),
    "a number": (b"7", b""),
    "no JSON": (b"{", b""),
    "two values": (b"{} {}", b""),
    "not UTF-8": (b'{"\xff": 1}', b""),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), b""),
    "deep lists": (b"[" * 200_000, b""),
    "deep dicts": (b'{"a":' * 200_000, b""),
    "NaN": (b'{"a": NaN}', b""),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", b""),
    "a lone surrogate": (b'{"\\ud800": %s}' % json.dumps(tensor()).encode(), bytes(8)),
    "metadata a list": ({"__metadata__": []}, b""),
    "metadata numbers": ({"__metadata__": {"a": 1}}, b""),
    "no tensor": ({"a": 3}, b""),
    "a key too few": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown type": ({"a": tensor("F31")}, bytes(8)),
    "type a list": ({"a": tensor(["F32"])}, bytes(8)),
    "negative shape": ({"a": tensor(shape=[-2, -1])}, bytes(8)),
    "shape of floats": ({"a": tensor(shape=[2.0])}, bytes(8)),
    "shape of truths": ({"a": tensor(shape=[2, True])}, bytes(8)),
    "shape a text": ({"a": tensor(shape="2")}, bytes(8)),
    "huge shape": ({"a": tensor(shape=[2**62] * 60)}, bytes(8)),
    "offsets of another size": ({"a": tensor(shape=[3])}, bytes(8)),
    "offsets backwards": ({"a": tensor(offsets=[8, 0])}, bytes(8)),
    "negative offsets": ({"a": tensor(offsets=[-8, 0])}, bytes(8)),
    "three offsets": ({"a": tensor(offsets=[0, 8, 8])}, bytes(8)),
    "beyond the end": ({"a": tensor(shape=[2**40], offsets=[0, 2**42])}, bytes(8)),
    "overlap": ({"a": tensor(), "b": tensor()}, bytes(8)),
    "overlap and a hole": ({"a": tensor(), "b": tensor()}, bytes(16)),
    "partial overlap": ({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)),
    "hole": ({"a": tensor(), "b": tensor(offsets=[12, 20])}, bytes(20)),
    "hole before": ({"a": tensor(offsets=[4, 12])}, bytes(12)),
    "bytes behind": ({"a": tensor()}, bytes(9)),
}


@pytest.mark.parametrize(("header", "body"), list(HOSTILE.values()), ids=list(HOSTILE))
def test_hostile_headers_end_in_one_line(tmp_path, capsys, header, body):
    path = raw(tmp_path / "x.safetensors", header, body)
    assert run(["inspect", str(path)]) == 4
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {path}: damaged, or not a safetensors file (")


ODD_HEADERS = {
    "a name twice": (b'{"a": %s, "a": %s}' % ((json.dumps(tensor()).encode(),) * 2), bytes(8)),
    "a key too many": ({"a": {**tensor(), "more": 1}}, bytes(8)),
    "shape too large to be one": ({"a": tensor(shape=[0, 2**63], offsets=[0, 0])}, b""),
    "65 dimensions": ({"a": tensor(shape=[1] * 64 + [2])}, bytes(8)),
}


@pytest.mark.parametrize(("header", "body"), list(ODD_HEADERS.values()), ids=list(ODD_HEADERS))
@pytest.mark.parametrize("flags", [[], ["--full"], ["--json"]])
def test_odd_headers_that_safetensors_reads_are_listed_as_a_foreign_file(tmp_path, capsys, header, body, flags):
    text = inspected(capsys, raw(tmp_path / "x.safetensors", header, body), *flags)
    assert "checksum" in text
    assert "ok" not in text


@pytest.mark.parametrize("length", [0, 1, 9, 100, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
def test_hostile_lengths_of_the_header_are_refused(tmp_path, length):
    with pytest.raises(CorruptFileError, match="damaged"):
        read_layout(raw(tmp_path / "x.safetensors", b"{}      ", length=length))
    assert read_layout(raw(tmp_path / "x.safetensors", b"{}      ")).entries == {}


def test_a_header_that_is_too_long_is_not_read(tmp_path):
    path = raw(tmp_path / "x.safetensors", b"{}", length=integrity.LONGEST_HEADER + 1)
    os.truncate(path, 2 * integrity.LONGEST_HEADER)
    tracemalloc.start()
    with pytest.raises(CorruptFileError, match="a header of 2,097,153 bytes; at most 2,097,152 are read"):
        read_layout(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_large_tensor_is_never_in_memory(tmp_path):
    """128 MiB of zeros, verified with less than 4 MiB."""
    size = 128 << 20
    path = raw(tmp_path / "x.safetensors", {"a": tensor("U8", [size], [0, size])})
    os.truncate(path, path.stat().st_size + size)
    tracemalloc.start()
    layout_digest(read_layout(path), "")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("seal", "words"),
    [
        ("[1, 2]", "not made by cdistill"),
        ("{", "its header is no JSON"),
        ("[" * 200_000, "its header is no JSON"),
        ('{"header": {}}', "its checksum does not match"),
        ('{"header": {"a": ' + "[" * 60 + "]" * 60 + "}}", "nested deeper than 50"),
    ],
    ids=lambda value: value[:12],
)
def test_a_broken_seal_is_an_error(tmp_path, capsys, seal, words):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", {"cdistill": seal})
    assert run(["inspect", str(tmp_path / "x.safetensors")]) == 4
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


def signed_by_hand(path: Path, header: dict) -> Path:
    """A file whose seal is right and whose header may be anything."""
    digest = tensor_digest({"w": torch.ones(2)}, canonical(header))
    save_file({"w": torch.ones(2)}, path, {"cdistill": json.dumps({"header": header, "sha256": digest})})
    return path


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"kind": "teacher"}, "names no kind or schema"),
        ({"kind": "\x1b[31m", "schema": 1}, "names no kind or schema"),
        ({"kind": "teacher", "schema": 2}, "has schema 2, newer than 1; update cdistill"),
    ],
)
def test_a_signed_header_that_cannot_be_read_is_an_error(tmp_path, capsys, header, words):
    assert run(["inspect", str(signed_by_hand(tmp_path / "x.safetensors", header))]) == 4
    assert words in capsys.readouterr().err


ODD = [
    None,
    True,
    3,
    -1.5,
    float("nan"),
    "",
    "\x1b[31m\n\r",
    [],
    [[1], {"a": 2}],
    {},
    {"network": {}},
    {"network": "x"},
    "9" * 5000,
]


@pytest.mark.parametrize("kind", ["coefficients", "teacher", "student", "samples", "checkpoint", "of a plug-in"])
def test_headers_of_any_values_give_a_page(tmp_path, capsys, kind):
    keys = [
        "teacher",
        "teacher_sha256",
        "data",
        "data_sha256",
        "architecture",
        "recipe",
        "versions",
        "licence",
        "source",
        "mine",
    ]
    for value in ODD:
        path = signed_by_hand(tmp_path / "x.safetensors", {**dict.fromkeys(keys, value), "kind": kind, "schema": 1})
        for flags in ([], ["--full"], ["--json"]):
            text = inspected(capsys, path, *flags)
            assert "\x1b" not in text
            assert "checksum" in text
        assert json.loads(text)["kind"] == kind


def test_nothing_in_a_file_steers_the_terminal(tmp_path, capsys):
    nasty = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\x7f"
    header = {"licence": nasty, nasty: nasty, "recipe": f'data = "x"\n# {nasty}', "source": {nasty: [nasty]}}
    save_tensors(tmp_path / "x.safetensors", {f"w{nasty}": torch.ones(1)}, "teacher", header)
    save_file({f"w{nasty}": torch.ones(1)}, tmp_path / "y.safetensors", {nasty: nasty})
    for name in ("x", "y"):
        for flags in ([], ["--full"], ["--json"]):
            text = inspected(capsys, tmp_path / f"{name}.safetensors", *flags)
            assert not set(text) & set("\x1b\x07\x9b\r\u202e")
            assert "\\x1b" in text or "\\u001b" in text
    save_file({"w": torch.ones(1)}, tmp_path / f"{nasty}.safetensors", {"cdistill": "{"})
    assert run(["inspect", str(tmp_path / f"{nasty}.safetensors")]) == 4
    assert not set(capsys.readouterr().err) & set("\x1b\x07\x9b\r\u202e")


def test_a_strangers_row_is_told_from_ours(tmp_path, capsys):
    save_file({"w": torch.ones(1)}, tmp_path / "y.safetensors", {"checksum": "ok"})
    text = inspected(capsys, tmp_path / "y.safetensors")
    assert re.search(r"│ checksum +│ none", text)
    assert "metadata checksum" in text


def test_printable_is_bounded_and_one_line():
    assert printable("a\nb\tc\x1b é 漢 \ud800") == r"a\nb\tc\x1b é 漢 \ud800"
    assert printable("x" * 300) == "x" * 200 + "..."
    assert printable("\x1b" * 100, 20) == r"\x1b" * 5 + "..."
    assert printable("x" * 200) == "x" * 200


def test_the_page_of_coefficients(file, capsys):
    text = inspected(capsys, file)
    assert "coefficients of a teacher (kind coefficients, schema 1)" in text
    assert re.search(r"checksum +│ ok, sha256 [0-9a-f]{12} ", text)
    assert re.search(r"teacher +│ digits, sha256 abababababab ", text)
    assert text.index("teacher ") < text.index("estimator") < text.index("samples") < text.index("versions")
    assert "12 of 30 noise levels" in text
    assert re.search(r"│ 79.43 +│ 0.79433 +│ -1.5887 │", text)
    assert re.search(r"│ 0.001995 │ 0.00002 +│ -0.0000 │", text) or re.search(
        r"│ 0.001995 +│ 0.00002 │ -0.0000 │", text
    )
    assert "±" not in text
    assert "l_error" not in text
    assert "pairs" not in text
    assert "30 of 30 noise levels" in inspected(capsys, file, "--full")


def test_errors_and_pairs_are_shown_where_they_are(tmp_path, capsys):
    columns = {"pairs": torch.tensor([[80.0, 1.0], [1.0, 0.5]] * 5, dtype=torch.float64)}
    columns |= {
        name: torch.full((10,), k / 8, dtype=torch.float64)
        for k, name in enumerate(("f", "g", "f_error", "g_error"), 1)
    }
    errors = {"l_error": LEVELS * 1e-4, "s_error": LEVELS * 1e-3}
    save_tensors(tmp_path / "p.safetensors", {**TABLE, **errors, **columns}, "coefficients", HEADER)
    text = inspected(capsys, tmp_path / "p.safetensors")
    assert re.search(r"│ 79.43 +│ 0.79433 +│ 7.9e-03 +│ -1.5887 +│ 7.9e-02 │", text)
    assert "6 of 10 jumps" in text
    assert re.search(r"│ 80 +│ +1 │ 0.125 │ +0.375 │ 0.25 │ +0.5 │", text)
    record = json.loads(inspected(capsys, tmp_path / "p.safetensors", "--json"))
    assert record["table"]["l_error"] == errors["l_error"].tolist()
    assert record["pairs"] == {
        "t": [80, 1] * 5, "s": [1, 0.5] * 5,
        "f": [1 / 8] * 10, "f_error": [3 / 8] * 10, "g": [2 / 8] * 10, "g_error": [4 / 8] * 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"t": torch.ones(2)},
        {"l": torch.ones(30, 1)},
        {"s": torch.ones(30).bfloat16()},
        {"t": torch.tensor(1.0)},
        {"t": None},
    ],
    ids=["short", "two dimensions", "bfloat16", "no dimension", "missing"],
)
def test_coefficients_that_make_no_table_still_give_a_page(tmp_path, capsys, change):
    tensors = {name: value for name, value in {**TABLE, **change}.items() if value is not None}
    save_tensors(tmp_path / "x.safetensors", tensors, "coefficients", HEADER)
    assert "of shapes that make no table" in inspected(capsys, tmp_path / "x.safetensors")
    assert json.loads(inspected(capsys, tmp_path / "x.safetensors", "--json"))["table"] is None


def test_empty_tables_give_a_page(tmp_path, capsys):
    empty = {name: torch.ones(0, dtype=torch.float64) for name in ("t", "l", "s", "f", "g")}
    save_tensors(tmp_path / "x.safetensors", {**empty, "pairs": torch.ones(0, 2)}, "coefficients", {})
    text = inspected(capsys, tmp_path / "x.safetensors")
    assert "0 of 0 noise levels" in " ".join(text.split())
    assert "0 of 0 jumps" in " ".join(text.split())


def test_rows_are_read_at_their_place(file, tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.arange(12, dtype=torch.int32).reshape(4, 3)}, "samples", {})
    layout = read_layout(tmp_path / "x.safetensors")
    assert numbers(layout, "a", [3, 0]) == [(9, 10, 11), (0, 1, 2)]
    for name, rows in (("a", [4]), ("b", [0])):
        with pytest.raises(CorruptFileError, match="table"):
            numbers(layout, name, rows)
    assert numbers(read_layout(file), "t", [29]) == [(float(LEVELS[29]),)]


def test_json_is_the_whole_record(file, capsys):
    record = json.loads(inspected(capsys, file, "--json"))
    assert record["header"] == {**HEADER, "kind": "coefficients", "schema": 1}
    assert record["table"] == {name: values.tolist() for name, values in TABLE.items()}
    assert (record["bytes"], record["numbers"], record["pairs"]) == (file.stat().st_size, 90, None)
    assert [part["name"] for part in record["tensors"]] == ["l", "s", "t"]


def test_the_page_of_a_teacher(capsys):
    text = inspected(capsys, ASSETS / "digits.safetensors")
    assert "attn_resolutions (4), channel_mult (1, 2), channels 1" in text
    assert "data digits, seed 0 (whole with --full)" in text
    assert "... and 128 more; --full prints all" in text
    assert "learning_rate" not in text
    full = inspected(capsys, ASSETS / "digits.safetensors", "--full")
    assert "learning_rate = 2e-3" in full
    assert full.count("float32") == 149
    assert "more; --full" not in full


def test_rows_of_a_header_come_in_an_order_and_without_empty_ones():
    header = {"zzz": 1, "versions": {"a": 1}, "data": "", "licence": "MIT", "teacher": "x", "kind": "k", "schema": 1}
    assert provenance(header, False) == [["teacher", "x"], ["licence", "MIT"], ["versions", "a 1"], ["header zzz", "1"]]


def test_foreign_safetensors_are_listed_but_not_called_verified(tmp_path, capsys):
    save_file({"w": torch.ones(3, 2, dtype=torch.bfloat16)}, tmp_path / "f.safetensors", {"format": "pt"})
    text = inspected(capsys, tmp_path / "f.safetensors")
    assert "not made by cdistill: there is no checksum in it, nothing was verified" in text
    assert re.search(r"checksum +│ none", text)
    assert re.search(r"│ w +│ bfloat16 │ 3 x 2 │ +12 │", text)
    assert "ok" not in text
    record = json.loads(inspected(capsys, tmp_path / "f.safetensors", "--json"))
    assert (record["checksum"], record["kind"], record["metadata"]) == (None, None, {"format": "pt"})


@pytest.mark.parametrize("name", ["edm.pkl", "state.pt", "state.pth"])
def test_pickles_are_left_to_convert(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    assert run(["inspect", str(tmp_path / name)]) == 4
    error = capsys.readouterr().err
    assert "cdistill convert says what they are" in error
    assert len(error.strip().splitlines()) == 1


def test_what_is_not_there_or_no_run(tmp_path, capsys):
    with pytest.raises(MissingAssetError, match="no such file"):
        inspect_file(tmp_path / "none")
    assert run(["inspect", str(tmp_path / "none.pkl")]) == 3
    assert run(["inspect", str(tmp_path)]) == 4
    assert "neither a run nor a checkpoint" in capsys.readouterr().err
    (tmp_path / "recipe.toml").write_text("a = 1")
    assert run(["inspect", str(tmp_path / "recipe.toml")]) == 4


@pytest.fixture
def checkpoint(tmp_path):
    groups = {"ema": {"w": torch.ones(3, 2)}, "optimizer": {"w.step": torch.tensor(4.0)}}
    return save_checkpoint(tmp_path / "checkpoints", 4, groups, {"identity": {"teacher_sha256": "cd" * 32}}, keep=1)


def test_the_page_of_a_checkpoint_shows_its_counters_zero_or_not(tmp_path, capsys):
    state = {"counters": {"attempt": 3, "skipped": 0}, "skipped": 0}
    folder = save_checkpoint(tmp_path / "checkpoints", 4, {"ema": {"w": torch.ones(2)}}, state, keep=1)
    text = inspected(capsys, folder)
    assert re.search(r"skipped +│ 0 ", text)
    assert "attempt 3, skipped 0" in text


def test_the_page_of_a_checkpoint(checkpoint, capsys):
    text = inspected(capsys, checkpoint)
    assert "ok, of every file" in text
    assert "teacher_sha256 cdcdcdcdcdcd " in text
    assert re.search(r"│ ema.safetensors +│ checkpoint │ +\d+ │ +1 │ +6 │", text)
    assert "3 x 2" in inspected(capsys, checkpoint, "--full")
    record = json.loads(inspected(capsys, checkpoint, "--json"))
    assert record["state"] == {"step": 4, "identity": {"teacher_sha256": "cd" * 32}}
    assert [part["header"]["group"] for part in record["files"]] == ["ema", "optimizer"]
    single = inspected(capsys, checkpoint / "ema.safetensors")
    assert "part of a training's checkpoint" in single
    assert re.search(r"part +│ ema ", single)


@pytest.mark.parametrize("name", ["ema.safetensors", "state.json", "manifest.json"])
def test_an_altered_checkpoint_is_refused(checkpoint, capsys, name):
    data = bytearray((checkpoint / name).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / name).write_bytes(data)
    assert run(["inspect", str(checkpoint)]) == 4
    assert "remove this folder" in capsys.readouterr().err
    (checkpoint / name).unlink()
    assert run(["inspect", str(checkpoint)]) == 4


def test_a_manifest_reads_nothing_outside_its_folder(checkpoint, tmp_path, capsys):
    (tmp_path / "secret").write_text("x")
    for name in ("../../secret", str(tmp_path / "secret"), "..", "\x1b[31m/x", ""):
        (checkpoint / "manifest.json").write_text(json.dumps({name: integrity.file_digest(tmp_path / "secret")}))
        assert run(["inspect", str(checkpoint)]) == 4
        error = capsys.readouterr().err
        assert "was altered" in error
        assert "\x1b" not in error


@pytest.fixture(scope="module")
def mixture_run(tmp_path_factory):
    """A run of a second or two on the 1-D mixture."""
    folder = tmp_path_factory.mktemp("runs") / "mix"
    assert run(["-q", *fast_distill(folder, "training.iterations=6", "checkpoint.every=3")]) == 0
    return folder


def test_the_page_of_a_run(mixture_run, capsys):
    text = inspected(capsys, mixture_run)
    for row in (
        "what +│ a run \\(distill\\)",
        "state +│ finished",
        "teacher +│ mixture-1d",
        "preconditioning +│ analytic",
    ):
        assert re.search(row, text)
    assert "step 3, 6; checksums ok" in text
    assert re.search(r"│ teacher \(Heun\) +│ +34 │", text)
    assert re.search(r"│ coefficients.safetensors +│ coefficients │", text)
    assert "checkpoints/step-00000006/ema.safetensors" in text
    assert "ema_rate 0.99" in inspected(capsys, mixture_run, "--full")
    record = json.loads(inspected(capsys, mixture_run, "--json"))
    assert [folder["state"]["step"] for folder in record["checkpoints"]] == [3, 6]
    assert record["recipe"]["training"]["iterations"] == 6
    assert record["files"][0]["header"]["teacher"] == "mixture-1d"
    assert record["last"]["step"] == 6


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "\x1b[31m", "[" * 100_000, '{"rows": 3, "kind": [], "state": {"a": ' + "[" * 400 + "]" * 400 + "}}",
     '{"rows": [1, {"values": {"\\u001b": "\\u001b"}}], "kind": 5, "state": "\\u001b"}', "a" + ".a" * 5000 + "=1",
     "a" + ".a" * 400 + "=1",
     "a = 0x" + "f" * 9000, "training = 3\npreconditioning = []\nteacher = 1979-05-27"],
    ids=range(11),
)  # fmt: skip
def test_small_files_of_a_run_may_hold_anything(tmp_path, capsys, text):
    for name in ("status.json", "env.json", "metrics.jsonl", "evaluation.json", "recipe.resolved.toml"):
        (tmp_path / name).write_text(text)
    for flags in ([], ["--full"], ["--json"]):
        found = inspected(capsys, tmp_path, *flags)
        assert "\x1b" not in found
    assert json.loads(found)["kind"] == "run"


def test_nothing_of_it_needs_torch(file, mixture_run, checkpoint):
    paths = [file, ASSETS / "digits.safetensors", mixture_run, checkpoint, checkpoint / "ema.safetensors"]
    code = (
        f"import sys; from cdistill.cli.app import run; paths = {[str(path) for path in paths]}\n"
        "codes = [run(['inspect', path, *more]) for path in paths for more in ([], ['--json'])]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == f"{[0] * 10} False", done.stderr
