import itertools
import json
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from cdistill.errors import CdistillError, CorruptFileError, DiskFullError, MissingAssetError
from cdistill.storage import checkpoints as checkpoint
from cdistill.storage import integrity
from cdistill.storage.bounded import read_json
from cdistill.storage.checkpoints import (
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
    tensor_digest,
)
from cdistill.storage.files import list_checkpoints, step_of
from cdistill.storage.integrity import check_manifest
from cdistill.storage.run_folder import RunFolder

TENSORS = {
    "a": torch.arange(1000, dtype=torch.float64),
    "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "c": torch.tensor(7),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, "coefficients", {"note": "hello"})
    return path


def test_round_trip_keeps_every_bit(file):
    tensors, header = load_tensors(file, "coefficients")
    assert tensor_digest(tensors) == tensor_digest(TENSORS)
    assert header == {"note": "hello", "kind": "coefficients", "schema": 1}


def test_the_same_content_gives_the_same_bytes(file, tmp_path):
    again = tmp_path / "again.safetensors"
    save_tensors(again, dict(reversed(TENSORS.items())), "coefficients", {"note": "hello"})
    assert again.read_bytes() == file.read_bytes()


def test_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        save_tensors(tmp_path / "x.safetensors", TENSORS, "coefficients", {})
    finally:
        os.umask(old)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("part", [k / 12 for k in range(12)])
def test_truncated_files_are_refused(file, part):
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CorruptFileError, match=str(file)):
        load_tensors(file, "coefficients")


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_noticed(file, seed):
    data = bytearray(file.read_bytes())
    place = int(torch.randint(8 * len(data), (), generator=torch.Generator().manual_seed(seed)))
    data[place // 8] ^= 1 << (place % 8)
    file.write_bytes(data)
    with pytest.raises(CorruptFileError):
        load_tensors(file, "coefficients")


def test_every_flipped_bit_of_the_tensors_is_noticed(file):
    data = file.read_bytes()
    for place in range(len(data) - 8, len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        file.write_bytes(changed)
        with pytest.raises(CorruptFileError):
            load_tensors(file, "coefficients")


def test_a_zeroed_tail_is_noticed(file):
    data = file.read_bytes()
    file.write_bytes(data[:-512] + bytes(512))
    with pytest.raises(CorruptFileError, match="checksum"):
        load_tensors(file, "coefficients")


def test_foreign_files_are_told_apart(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(2)}, foreign)
    with pytest.raises(CorruptFileError, match="not made by cdistill"):
        load_tensors(foreign, "teacher")
    save_file({"w": torch.ones(2)}, foreign, {"cdistill": "[1, 2]"})
    with pytest.raises(CorruptFileError, match="not made by cdistill"):
        load_tensors(foreign, "teacher")
    foreign.write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(CorruptFileError):
        load_tensors(foreign, "teacher")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "sealed",
    ["[" * 200_000, "{", '{"header": []}', '{"header": 1}', "{}", '{"header": ' + '{"x": ' * 900 + "1" + "}" * 901],
    ids=lambda value: value[:20],
)
def test_a_header_of_another_shape_is_said_in_one_line(tmp_path, sealed):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(2)}, foreign, {"cdistill": sealed})
    with pytest.raises(CorruptFileError) as caught:
        load_tensors(foreign, "teacher")
    assert str(caught.value).startswith(f"{foreign}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [1, None, [], "a\nb", "\x1b[31m"])
def test_a_kind_that_is_no_plain_text_is_refused(tmp_path, kind):
    path, header = tmp_path / "x.safetensors", {"kind": kind, "schema": 1}
    sealed = {"header": header, "sha256": tensor_digest(TENSORS, json.dumps(header, sort_keys=True))}
    save_file(TENSORS, path, {"cdistill": json.dumps(sealed)})
    with pytest.raises(CorruptFileError, match="names no kind or schema"):
        load_tensors(path, "teacher")


@pytest.mark.parametrize("text", ["", "[]", "[" * 200_000, '{"x": ' * 200_000], ids=lambda value: value[:6])
def test_a_json_file_that_holds_no_object_is_empty(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert read_json(tmp_path / "x.json") == {}


def test_a_manifest_of_another_shape_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"weights": TENSORS}, {}, keep=1)
    for text in ("[" * 200_000, "[]", "null", '{"none": "x"}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CorruptFileError, match="damaged checkpoint"):
            check_manifest(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(CorruptFileError, match=r"its manifest names no state\.json; remove this folder"):
        load_checkpoint(folder)


def test_other_kinds_and_newer_schemas_are_refused(file):
    with pytest.raises(CorruptFileError, match="is a coefficients file; a teacher file is needed"):
        load_tensors(file, "teacher")


def test_a_missing_file_is_a_missing_asset(tmp_path):
    with pytest.raises(MissingAssetError, match=r"no such file; a teacher file"):
        load_tensors(tmp_path / "none.safetensors", "teacher")


def test_checkpoints_are_whole_and_pruned(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"weights": TENSORS}, {"scaler": None}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000030"]
    groups, state = load_checkpoint(tmp_path / "step-00000030")
    assert tensor_digest(groups["weights"]) == tensor_digest(TENSORS)
    assert state == {"scaler": None, "step": 30}
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize(("steps", "kept"), [((), [40, 50]), ((10,), [10, 40, 50]), ((20, 30), [20, 30, 40, 50])])
def test_protected_checkpoints_stay_besides_the_newest(tmp_path, steps, kept):
    for step in (10, 20, 30, 40, 50):
        save_checkpoint(tmp_path, step, {"weights": TENSORS}, {}, keep=2, protected=steps)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == kept
    assert not list(tmp_path.glob(".tmp*"))


def test_a_checkpoint_that_is_pruned_leaves_at_once(tmp_path, monkeypatch):
    """Killed while the files of an old checkpoint are removed: none is found with a part of its files."""
    save_checkpoint(tmp_path / "checkpoints", 10, {"weights": TENSORS}, {}, keep=1)

    def killed(folder, **options):
        if folder.is_dir():
            (folder / "weights.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path / "checkpoints", 20, {"weights": TENSORS}, {}, keep=1)
    assert [step_of(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [20]
    load_checkpoint(tmp_path / "checkpoints" / "step-00000020")
    with RunFolder(tmp_path).locked():
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_with_advice(tmp_path, name):
    folder = save_checkpoint(tmp_path, 2, {"weights": TENSORS}, {}, keep=1)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"remove this folder to start again$"):
        check_manifest(folder)
    save_checkpoint(tmp_path, 1, {"weights": TENSORS}, {}, keep=2)
    with pytest.raises(CorruptFileError, match=r"remove this folder to resume from step-00000001$"):
        load_checkpoint(folder)


def test_a_missing_file_of_a_checkpoint_is_noticed(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"weights": TENSORS}, {}, keep=1)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=r"weights\.safetensors"):
        check_manifest(folder)


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from cdistill.storage.checkpoints import save_checkpoint
from cdistill.errors import DiskFullError
parent = Path(sys.argv[1])
save_checkpoint(parent, 1, {"weights": {"w": torch.ones(10)}}, {}, keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(parent, 2, {"weights": {"w": torch.ones(100_000)}}, {}, keep=1)
except DiskFullError as error:
    print("full:", error)
"""


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.startswith("full:")
    assert "free some room" in found.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path / "step-00000001")[1]["step"] == 1


def test_a_full_disk_leaves_the_previous_file(tmp_path, monkeypatch, file):
    before = file.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cdistill.storage.checkpoints.save_file", full)
    with pytest.raises(DiskFullError, match="disk"):
        save_tensors(file, TENSORS, "coefficients", {})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(CdistillError, match=r"^/proc/x\.safetensors: cannot be written \(No such file.*choose another"):
        save_tensors(Path("/proc/x.safetensors"), TENSORS, "coefficients", {})


def test_the_state_is_plain_json(tmp_path):
    folder = save_checkpoint(tmp_path, 1, {"weights": TENSORS}, {"x": 1}, keep=1)
    assert json.loads((folder / "state.json").read_text())["x"] == 1
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """safetensors opens a path twice; the second time another file may be there."""
    path = tmp_path / "x.safetensors"
    contents = [{"a": torch.full((1000,), float(value))} for value in range(3)]
    save_tensors(path, contents[0], "coefficients", {})
    waiting, honest = contents[1:], integrity.safe_open

    def replaced_in_between(*arguments):
        opened = honest(*arguments)
        metadata = opened.metadata()
        if waiting:
            save_tensors(path, waiting.pop(0), "coefficients", {"step": len(waiting)})
            again = honest(*arguments)
            return SimpleNamespace(metadata=lambda: metadata, keys=again.keys, get_tensor=again.get_tensor)
        return opened

    monkeypatch.setattr(integrity, "safe_open", lambda *given: nullcontext(replaced_in_between(*given)))
    tensors, header = load_tensors(path, "coefficients")
    assert torch.equal(tensors["a"], contents[2]["a"])
    assert header["step"] == 0


def test_many_readers_of_a_file_that_is_written_again_and_again_see_whole_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(100)}, "coefficients", {"value": 0})
    ended = threading.Event()

    def write():
        for value in itertools.count(1):
            if ended.is_set():
                return
            save_tensors(path, {"a": torch.full((100,), float(value))}, "coefficients", {"value": value})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            tensors, header = load_tensors(path, "coefficients")
            assert (tensors["a"] == header["value"]).all()
    finally:
        ended.set()
        writer.join()
