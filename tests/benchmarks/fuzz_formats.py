"""Breaks files of all kinds at random and reads them: only a CdistillError may come out, quickly, and nothing may run.

python -m tests.benchmarks.fuzz_formats --seconds 60 --seed 0

Other people's weights are broken bit by bit, piece by piece and opcode by opcode; one whose error is of a new kind is
kept and broken further. In two thirds of the time every other reader of `tests.readers` has its turn: recipes, the
files of a run, coefficients, trajectories, samples, data, pictures, statistics, with right checksums too. Prints what
was found and ends with 1 if anything was; the inputs are left in a temporary folder.
"""

# ruff: noqa: TID251, T201 - the files that are to be read must be written here

import argparse
import collections
import contextlib
import io
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickletools import genops, opcodes
from typing import Any

import numpy as np
import torch
from torch import nn

from cdistill.errors import CdistillError
from cdistill.formats.edm_pickles import EDMNetwork, read_edm
from cdistill.formats.pickle_stubs import container_names, numpy_names, to_array
from cdistill.formats.safe_pickle import read_pickle
from cdistill.formats.torch_files import map_file, read_torch_file
from cdistill.runtime import console
from tests.assembler import call, legacy, name, program, storage, tensor, text
from tests.edm_writer import fake_modules, snapshot, write_edm_pickle
from tests.formats.test_edm_pickles import SIZES, network
from tests.formats.test_safe_pickle import python2_batch
from tests.formats.test_torch_files import widened
from tests.readers import PAGES, READERS, broken_file

SECONDS = 1.0
ROOM = 1 << 30
NUMBERS = [0, 1, 2, 7, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 1 << 20, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40]
NUMBERS += [(1 << 62) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
FORBIDDEN = ("os.", "subprocess.", "exec", "compile", "import", "ctypes.", "socket.", "shutil.", "pickle.", "marshal.")
PIECES = [
    *(opcode.code.encode("latin-1") for opcode in opcodes),
    name("os", "system"),
    call("os", "system", text("touch hacked")),
    call("builtins", "getattr", text("x"), text("__class__")),
    call("collections", "OrderedDict"),
    b"h\x00",
    b"q\x00",
    b")" + b"2\x86" * 40,
    storage(),
    tensor(),
]


class Guard:
    """Fails whatever a reader must not do; built once, since an audit hook cannot be taken away."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(arguments)[:100]}")
            raise RuntimeError(f"forbidden: {self.seen[-1]}")


def seeds(folder: Path) -> list[bytes]:
    """Returns sound files of every kind, each small."""
    found = []
    for protocol in (2, 3, 4):
        write_edm_pickle(
            folder / "x", network(), SIZES, protocol=protocol, dataset_kwargs={"path": "x", "size": (1, 2)}
        )
        found.append((folder / "x").read_bytes())
        value = {
            "a": np.float64(2),
            "b": np.arange(6).reshape(2, 3),
            "c": {1, "x"},
            "d": collections.OrderedDict(e=b"f"),
        }
        found.append(pickle.dumps(value, protocol=protocol))
    found.append(pickle.dumps([1, 2.5, "x", b"y", {"z": (True, None)}], protocol=0))
    shared = torch.randn(6, 8)
    state = {"a": shared.T, "b": shared[::2], "c": nn.Parameter(torch.ones(2)).half(), "d": torch.tensor([True])}
    with fake_modules():
        values = [state, {"net": snapshot(network(), SIZES)["ema"], "optimizer_state": {"state": {0: torch.ones(2)}}}]
        for value in values:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            found.append(buffer.getvalue())
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return [*found, widened(found[-1]), buffer.getvalue(), program(tensor()), legacy(), python2_batch(2)]


def places(data: bytes) -> list[int]:
    """Returns where the opcodes of a file's pickles begin, as far as they can be told."""
    found, start = [], 0
    try:
        while start < len(data):
            for opcode, _, place in genops(data[start:]):
                found.append(start + place)
                if opcode.name == "STOP":
                    start += place + 1
    except Exception:  # noqa: BLE001, RUF100
        pass
    return found or [0]


def flip(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    start, end = sorted(rng.randrange(len(other) + 1) for _ in range(2))
    at = rng.randrange(len(data))
    return data[:at] + other[start : min(end, start + 2000)] + data[at + rng.choice([0, 0, end - start]) :]


def repeat(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    start, length = rng.randrange(len(data)), rng.choice([1, 2, 8, 50])
    return data[: start + length] + data[start : start + length] * rng.choice([0, 1, 3, 1000]) + data[start + length :]


def resize(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    width = rng.choice([1, 1, 2, 4, 4, 8])
    at = rng.randrange(len(data))
    number = rng.choice(NUMBERS) + rng.choice([0, 0, -1, 1])
    field = (number % (1 << 8 * width)).to_bytes(width, rng.choice(["little", "little", "big"]))
    return data[:at] + field + data[at + width :]


def swap_opcodes(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Deletes, doubles or moves the opcodes between two places."""
    found = [*places(data), len(data)]
    start = rng.randrange(len(found) - 1)
    first, last = found[start], found[min(start + rng.choice([1, 1, 2, 5]), len(found) - 1)]
    at = rng.choice(found)
    piece = data[first:last][:2000]
    kind = rng.randrange(3)
    if kind == 0:
        return data[:first] + data[last:]
    return data[:at] + piece * (kind if kind == 1 else rng.choice([1, 2, 300])) + data[at:]


def insert_opcode(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    at = rng.choice(places(data))
    piece = rng.choice(PIECES) + rng.choice([b"", b"", rng.randbytes(rng.choice([1, 4, 8]))])
    return data[:at] + piece + data[at + rng.choice([0, 0, 1]) :]


def renumber(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Replaces a number or its length."""
    at = rng.choice(places(data))
    code, number = data[at : at + 1], rng.choice(NUMBERS)
    layouts = {b"K": "<B", b"M": "<H", b"J": "<I", b"X": "<I", b"B": "<I", b"\x8c": "<B", b"h": "<B", b"q": "<B"}
    layouts |= {b"\x95": "<Q", b"\x8a": "<B", b"r": "<I", b"j": "<I", b"T": "<I"}
    if code not in layouts:
        return resize(data, rng, others)
    width = struct.calcsize(layouts[code])
    value = rng.choice([number % (1 << 8 * width), rng.randrange(10)])
    longer = b"\x8a\x09" + number.to_bytes(9, "little", signed=True)
    if code in b"KMJ" and rng.random() < 0.3:
        return data[:at] + longer + data[at + 1 + width :]
    return data[: at + 1] + struct.pack(layouts[code], value) + data[at + 1 + width :]


MUTATIONS: list[Callable[[bytes, random.Random, list[bytes]], bytes]] = [
    *(flip, truncate, splice, repeat, resize),
    *(swap_opcodes, swap_opcodes, insert_opcode, insert_opcode, renumber, renumber),
]


def broken(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Breaks a file once or a few times; within an archive mostly its pickle, so that the checksums stay right."""
    if data[:4] == b"PK\3\4" and rng.random() < 0.8:
        return within_archive(data, rng, others)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice(MUTATIONS)(data, rng, others) or b"x"
    return data[:500_000]


def within_archive(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
            for key in old.namelist():
                content = old.read(key)
                if key.endswith("data.pkl"):
                    for _ in range(rng.choice([1, 1, 2])):
                        content = rng.choice(MUTATIONS)(content, rng, others) or b"x"
                new.writestr(key, content[:500_000])
    except Exception:  # noqa: BLE001, RUF100
        return flip(data, rng, others)
    return buffer.getvalue()


def read_arrays(path: Path) -> None:
    value = read_pickle(map_file(path), {**container_names(), **numpy_names()})
    for item in value.values() if isinstance(value, dict) else []:
        to_array(item)


def check(path: Path, guard: Guard, read: Callable[[Path], Any]) -> tuple[str, str | None]:
    """Returns how the reading ended, in general words, and what was wrong with that, if anything."""
    size, began = path.stat().st_size, time.process_time()
    guard.armed, guard.seen = True, []
    try:
        value = read(path)
        ended, wrong = f"read {type(value).__name__}", None
    except CdistillError as error:
        ended, wrong = str(error), None if "\n" not in str(error) else "more than one line"
    except BaseException as error:  # noqa: BLE001, RUF100
        if isinstance(error, KeyboardInterrupt):
            raise
        ended = wrong = f"{type(error).__name__}: {error}"
    finally:
        guard.armed = False
    seconds = time.process_time() - began
    if guard.seen:
        wrong = f"{guard.seen}"
    elif seconds > SECONDS:
        wrong = f"{seconds:.2f} s"
    elif ended == "read EDMNetwork" and (room := total(value)) > 3 * size + (1 << 20):
        wrong = f"{room} bytes of tensors out of {size}"
    return re.sub(r"'[^']*'|[0-9]+", "#", ended.partition(": ")[2] or ended), wrong


def total(value: EDMNetwork) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in value.state.values()}.values())


class Fuzzer:
    """One run: the files to break, what came of them and what was wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.path = folder, folder / "input"
        self.rng, self.guard = random.Random(seed), Guard()
        self.sound = seeds(folder)
        self.corpus = list(self.sound)
        self.readers = [read_edm, read_torch_file, read_arrays]
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.findings: list[str] = []
        self.slowest = 0.0

    def warm(self) -> None:
        """Reads every seed, so that what is imported late is imported now, and bounds the memory from here on."""
        for data in self.corpus:
            self.path.write_bytes(data)
            for read in self.readers:
                with contextlib.suppress(CdistillError):
                    read(self.path)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))

    def one(self) -> None:
        """Breaks one file and reads it in every way."""
        start = self.rng.choice(self.sound if self.rng.random() < 0.6 else self.corpus)
        data = broken(start, self.rng, self.corpus)
        self.path.write_bytes(data)
        for read in self.readers:
            before = time.process_time()
            ended, wrong = check(self.path, self.guard, read)
            self.slowest = max(self.slowest, time.process_time() - before)
            if not self.outcomes[ended] and len(self.corpus) < 3000 and len(data) < 50_000:
                self.corpus.append(data)
            self.outcomes[ended] += 1
            if wrong and f"{read.__name__}: {wrong}" not in self.findings:
                (self.folder / f"finding-{len(self.findings)}").write_bytes(data)
                self.findings.append(f"{read.__name__}: {wrong}")
                print(f"finding {len(self.findings) - 1}: {self.findings[-1]}", flush=True)


class OwnFiles:
    """The readers of `tests.readers` in turn: how often each read or refused, and what else it did."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.counts: dict[str, collections.Counter[str]] = {}
        self.findings: list[str] = []
        self.readers = {**READERS, **PAGES}
        self.sound: dict[str, bytes] = {}
        for kind, reader in self.readers.items():
            self.place(kind).mkdir()
            reader.make(self.place(kind))
            reader.read(self.place(kind))
            self.sound[kind] = (self.place(kind) / reader.name).read_bytes()

    def place(self, kind: str) -> Path:
        return self.folder / re.sub(r"[^\w.]", "_", kind)

    def turn(self) -> None:
        """Breaks the file of every reader once; those of pages, which take a second, now and then."""
        for kind, reader in self.readers.items():
            if kind in PAGES and self.rng.random() > 0.02:
                continue
            place, counts = self.place(kind), self.counts.setdefault(kind, collections.Counter())
            if not (place / reader.name).parent.exists():
                reader.make(place)
            broken_file(reader, place, self.sound[kind], self.rng)
            data, began = (place / reader.name).read_bytes(), time.process_time()
            try:
                reader.read(place)
                ended, wrong = "read", None
            except CdistillError as error:
                ended, wrong = "refused", "more than one line" if "\n" in str(error) and kind != "recipe" else None
            except Exception as error:  # noqa: BLE001, RUF100
                ended = wrong = f"{type(error).__name__}: {error}"
            if (seconds := time.process_time() - began) > SECONDS and kind not in PAGES:
                wrong = f"{seconds:.2f} s"
            counts[ended if ended in ("read", "refused") else "other"] += 1
            if wrong and f"{kind}: {wrong}" not in self.findings:
                (self.folder / f"own-finding-{len(self.findings)}").write_bytes(data)
                self.findings.append(f"{kind}: {wrong}")
                print(f"finding: {self.findings[-1]}", flush=True)

    def report(self) -> None:
        for kind, counts in self.counts.items():
            print(f"{kind:32} {sum(counts.values()):7} files: {dict(counts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-formats-"))
    os.environ["CDISTILL_ASSETS"] = str(folder / "assets")
    warnings.simplefilter("ignore")
    fuzzer = Fuzzer(folder, options.seed)
    (folder / "own").mkdir()
    own = OwnFiles(folder / "own", options.seed)
    console.set_verbosity(-1)
    fuzzer.warm()
    count, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < options.seconds:
        if passed % 3 < 1:
            fuzzer.one()
            count += 1
        else:
            own.turn()
    own.report()
    fuzzer.findings += own.findings
    sound = sum(number for ended, number in fuzzer.outcomes.items() if ended.startswith("read "))
    print(
        f"seed {options.seed}: {count} files, {3 * count} readings in {time.monotonic() - began:.0f} s; "
        f"{sound} were read, {len(fuzzer.outcomes)} kinds of outcome, slowest {fuzzer.slowest:.2f} s; "
        f"{len(fuzzer.findings)} findings"
    )
    if fuzzer.findings:
        print(f"inputs in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    sys.exit(main())
