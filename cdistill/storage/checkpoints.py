"""Files that survive a crash: safetensors with a JSON header and a checksum, written atomically; folders of them.

A file made here is a safetensors file whose metadata has the one key ``cdistill`` (several would be written in any
order), a JSON object of ``header``, with at least ``kind`` and ``schema``, and ``sha256``, the digest of the header and
of every tensor. safetensors itself has no checksum: a flipped bit would load silently.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cdistill.errors import CorruptFileError, MismatchError, MissingAssetError
from cdistill.storage.files import (
    disk_full,
    file_digest,
    list_checkpoints,
    read_steadily,
    replacing,
    step_of,
    sync,
    write_text,
)
from cdistill.storage.integrity import (
    SCHEMA,
    canonical,
    check_header,
    check_manifest,
    load_state,
    open_tensors,
    own_header,
)


def tensor_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Returns the SHA-256 of `text` and of every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any]) -> None:
    """Writes one file atomically, a reader finds the old file or the new one; DiskFullError if it did not fit.

    The tensors are stored contiguous, in their own types, beside `header`, JSON values, and `kind`, what the file is.
    """
    whole = {**header, "kind": kind, "schema": SCHEMA}
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        signed = {"header": whole, "sha256": tensor_digest(ready, canonical(whole))}
        save_file(ready, temporary, {"cdistill": json.dumps(signed, sort_keys=True)})


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the header of a file made by :func:`save_tensors` and verifies its checksum.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is truncated, altered, not made by cdistill, of a newer schema or of another kind.
    """
    return read_steadily(path, lambda: _load_tensors(path, kind))


def _load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise MissingAssetError(f"{path}: no such file; a {kind} file is needed here")
    with open_tensors(path, "pt") as (file, _):
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header, stated = own_header(path, metadata, kind)
    check_header(path, header, stated, tensor_digest(tensors, canonical(header)))
    if header["kind"] != kind:
        raise CorruptFileError(f"{path}: is a {header['kind']} file; a {kind} file is needed")
    return tensors, header


def save_checkpoint(
    parent: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    protected: Collection[int] = (),
) -> Path:
    """Writes ``parent/step-XXXXXXXX`` whole or not at all, then prunes the oldest that are not `protected`.

    Temporary folder -> files, synced -> manifest with the SHA-256 of each -> rename -> sync of the parent.

    Args:
        parent: Folder of the checkpoints of one run.
        step: Number of finished steps.
        groups: File stem -> tensors.
        state: JSON values (counters, scaler), stored in ``state.json``.
        keep: How many of the newest checkpoints to keep, at least 1.
        protected: Steps whose checkpoints stay, however old they are.

    Raises:
        DiskFullError: It did not fit; earlier checkpoints are untouched.
    """
    final = parent / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = parent / f".tmp-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_full(final):
            temporary.mkdir(parents=True)
            for stem, tensors in groups.items():
                save_tensors(temporary / f"{stem}.safetensors", tensors, "checkpoint", {"group": stem, "step": step})
            write_text(temporary / "state.json", json.dumps({"step": step, **state}, indent=1, sort_keys=True))
            names = sorted(path.name for path in temporary.iterdir())
            manifest = {name: file_digest(temporary / name) for name in names}
            write_text(temporary / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))
            temporary.rename(final)
            sync(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(parent)[:-keep]:
        if step_of(old) not in protected:
            remove_checkpoint(old)
    return final


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint; it leaves the list at once, so that none is ever listed with some of its files missing."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".tmp-{checkpoint.name}")))


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Reads the groups of tensors by file stem, and the state, verified; CorruptFileError names an altered file.

    The state is of the step that the folder is named after, see `load_state`.
    """
    names = [Path(name) for name in check_manifest(folder)]
    groups = {n.stem: load_tensors(folder / n, "checkpoint")[0] for n in names if n.suffix == ".safetensors"}
    return groups, load_state(folder)


def check_identity(folder: Path, state: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Raises MismatchError unless a checkpoint was made with what `identity` names."""
    made_with = state.get("identity", {})
    wrong = [key for key, digest in identity.items() if made_with.get(key) != digest]
    if wrong:
        names = ", ".join(key.removesuffix("_sha256").replace("_", " ") for key in wrong)
        data = wrong == ["data_sha256"]
        what = "other data" if data else f"another {names}"
        remedy = "give these, or --accept-data if they were repaired," if data else "give that one,"
        raise MismatchError(f"{folder}: made with {what} than given now; {remedy} or start again with another --out")
