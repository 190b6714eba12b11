import json
import os
import time
import tracemalloc

import pytest

from cdistill.errors import CorruptFileError
from cdistill.storage.bounded import (
    LARGEST_RECIPE,
    load_json,
    open_regular,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
)
from cdistill.storage.files import file_digest, list_checkpoints, step_of
from cdistill.storage.integrity import LONGEST_HEADER, read_layout


def make(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("read", [open_regular, read_bytes, load_json, file_digest])
def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path, kind, read):
    path = make(tmp_path / "x", kind)
    with pytest.raises(CorruptFileError, match=f"x: a {kind}, not a file; give the path of a file"):
        read(path)
    assert read_json(path) == {}


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "x").write_text("{}")
    (tmp_path / "y").symlink_to("x")
    assert load_json(tmp_path / "y") == {}


def test_no_more_is_read_than_is_allowed(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 32)
    tracemalloc.start()
    with pytest.raises(CorruptFileError, match=r"x: damaged \(it has more than 100 bytes\); restore it, or make it"):
        read_bytes(tmp_path / "x", 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = " + "1" * 5000, "4300 digits"),
        ("x = " + "9" * 20, "a whole number of more than 64 bits"),
        ("x = " + "[" * 100_000, "nested deeper than 50"),
        ("x = " + "[" * 60 + "]" * 60, "nested deeper than 50"),
        ("x = " + "{a=" * 3000 + "1" + "}" * 3000, "nested deeper than 50"),
        (".".join(["a"] * 20_000) + " = 1", "a key of more than 16 parts"),
        ("[" + " . ".join(["'a'"] * 20_000) + "]", "a key of more than 16 parts"),
        ("x = 1\n" * LARGEST_RECIPE, "more than 262,144 bytes"),
        (b"\xff", "utf-8"),
        ("= 1", "Invalid statement"),
    ],
    ids=lambda value: value[:12],
)
def test_toml_is_bounded_before_the_work(text, words):
    begun = time.process_time()
    with pytest.raises(ValueError, match=words) as caught:
        parse_toml(text)
    assert time.process_time() - begun < 2
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_toml_of_people_passes():
    assert parse_toml('a.b = [[1.5, "x.y.z"], [-2]]\n[c.d]\n"e f" = 2024-01-01') | {"c": 0} == {
        "a": {"b": [[1.5, "x.y.z"], [-2]]},
        "c": 0,
    }
    assert parse_toml('address = "' + ".".join("abcdefghijklmnop") + '"')


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 60 + "1" + "}" * 60, "1" * 5000, str(1 << 64), "{", b"\xff", ""], ids=len
)
def test_json_is_bounded(text):
    with pytest.raises(ValueError, match=r"nested|digits|64 bits|Expect|utf-8"):
        parse_json(text)
    assert parse_json(json.dumps({"a": [1.5, None, 2**63, "x"]})) == {"a": [1.5, None, 2**63, "x"]}


def test_checkpoints_of_more_than_eight_digits_come_last(tmp_path):
    names = ["step-99999999", "step-100000000", "step-00000007"]
    for name in [*names, "step-000000008", "step-7", ".tmp-step-00000001", "step-0000000x"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [7, 99_999_999, 100_000_000]


def test_a_header_of_forty_megabytes_is_refused_at_once(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((40 << 20).to_bytes(8, "little") + b'{"a":' * (8 << 20))
    begun = time.process_time()
    with pytest.raises(CorruptFileError, match=f"at most {LONGEST_HEADER:,} are read"):
        read_layout(path)
    assert time.process_time() - begun < 1
