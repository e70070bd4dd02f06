"""Memory files: one folder per editor, read whole or refused.

memory.safetensors   the method's tensors
edits.jsonl          one EditRequest per line, in the order of editing
config.json          schema, method, configuration, the base model's fingerprint, sha256 of the other two and of itself

A save first writes all three files to `.memory.new` inside the folder. Renaming that to `.memory.ready` is the moment
when the new memory replaces the old one. Last, each file moves to its place. A save replaces no other files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import OutOfMemoryError, Tensor

from memoir.files import LOCK
from memoir.records import EditRequest

SCHEMA = 3
CONFIG, EDITS, TENSORS = FILES = ("config.json", "edits.jsonl", "memory.safetensors")
CARD = "README.md"  # the hub's model card: it may stand beside a memory, and no save changes it
NEW, READY = ".memory.new", ".memory.ready"
ASIDE = {NEW, CARD, LOCK}  # files that may stand in a folder that holds no memory
HEADER = dict(
    schema=int, method=str, config=dict, model=str, fingerprint=str, dtype=str, rounded=dict, chat=bool,
    background=list, edits=int, sha256=dict,
)  # fmt: skip


class MemoryFileError(ValueError):
    """A memory file that is damaged, or does not belong to this model."""


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn any error that reading a file's content raises into a MemoryFileError that says `what` is wrong."""
    try:
        yield
    except (MemoryFileError, MemoryError, OutOfMemoryError):
        raise
    except Exception as error:
        raise MemoryFileError(f"{what} ({type(error).__name__}: {error})") from error


def write_memory(
    folder: str | os.PathLike, header: dict[str, Any], edits: list[EditRequest], tensors: dict[str, Tensor]
) -> Path:
    """Write a memory file; returns where it is. An older memory there can be read until the new one is complete.

    MemoryFileError where the path is a file, or a folder that holds anything but a memory.
    """
    folder = check_replaceable(folder)
    files = {
        TENSORS: save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()}),
        EDITS: "".join(json.dumps(edit.to_json(), ensure_ascii=False) + "\n" for edit in edits).encode(),
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files[CONFIG] = _sealed({"schema": SCHEMA, **header, "edits": len(edits), "sha256": sums})
    folder.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        for name, data in files.items():
            with open(new / name, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        new.rename(folder / READY)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    _settle(folder)
    return folder


def holds_memory(folder: str | os.PathLike) -> bool:
    """Whether the path holds anything that a run could resume; `read_memory` checks whether that is a memory."""
    folder = Path(folder).expanduser()
    return folder.exists() and (not folder.is_dir() or bool(_entries(folder) - ASIDE))


def read_header(folder: str | os.PathLike) -> dict[str, Any]:
    """The header of a memory file alone. MemoryFileError where it is damaged."""
    folder = Path(folder).expanduser()
    return _unsealed(folder / CONFIG, _read(folder, CONFIG))


def _read(folder: Path, name: str) -> bytes:
    ready = folder / READY / name  # newer, where a save was interrupted before it moved the file
    try:
        return (ready if ready.exists() else folder / name).read_bytes()
    except OSError as error:
        raise MemoryFileError(f"{folder / name} cannot be read: {error.strerror}") from None


def read_memory(folder: str | os.PathLike) -> tuple[dict[str, Any], list[EditRequest], dict[str, Tensor]]:
    """Read a memory file: its header, edits and tensors. MemoryFileError names the damaged file."""
    folder = Path(folder).expanduser()
    header, files = read_header(folder), {name: _read(folder, name) for name in (EDITS, TENSORS)}
    for name in (EDITS, TENSORS):
        actual, expected = hashlib.sha256(files[name]).hexdigest(), header["sha256"].get(name)
        if actual != expected:
            raise MemoryFileError(
                f"{folder / name} is damaged: its sha256 is {actual[:12]}…, {CONFIG} expects {str(expected)[:12]}…"
            )
    with refusing(f"{folder / EDITS} is damaged: not every line of it is an edit"):
        edits = [EditRequest.from_json(json.loads(line)) for line in files[EDITS].decode().split("\n") if line]
        ids = {edit.id for edit in edits}
    if not len(ids) == len(edits) == header["edits"]:
        raise MemoryFileError(
            f"{folder / EDITS} is damaged: it holds {len(edits)} edits with {len(ids)} different ids, "
            f"{CONFIG} expects {header['edits']}"
        )
    with refusing(f"{folder / TENSORS} is damaged: it does not hold tensors"):
        return header, edits, load_tensors(files[TENSORS])


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_replaceable(folder: str | os.PathLike) -> Path:
    """The full path of a folder. MemoryFileError unless it is free, empty, or holds a memory and nothing else."""
    folder = Path(folder).expanduser().resolve()  # write through a link, and keep the link
    if not folder.exists():
        return folder
    if not folder.is_dir():
        raise MemoryFileError(f"{folder} is a file; expected a new folder or an older memory")
    entries = _entries(folder) - ASIDE - {READY}
    # Other programs write a config.json too; one belongs to a memory only if the edits stand beside it.
    memory = EDITS in entries or (folder / READY).exists()
    if others := sorted(entries - set(FILES) if memory else entries):
        raise MemoryFileError(
            f"{folder} contains files that do not belong to a memory: {', '.join(others[:5])}"
            f"{', …' * (len(others) > 5)}; expected a new folder or an older memory"
        )
    return folder


def _settle(folder: Path) -> None:
    """Move the files of a complete save to their places."""
    ready = folder / READY
    if ready.is_dir():
        for name in _entries(ready):
            (ready / name).replace(folder / name)
        ready.rmdir()


def _sealed(header: dict[str, Any]) -> bytes:
    """JSON bytes that carry their own sha256."""
    body = json.dumps(header, indent=1, sort_keys=True, ensure_ascii=False)
    return json.dumps(
        {**header, "seal": hashlib.sha256(body.encode()).hexdigest()}, indent=1, ensure_ascii=False
    ).encode()


def _unsealed(path: Path, data: bytes) -> dict[str, Any]:
    """The header in a config.json; MemoryFileError where its seal or its entries are wrong."""
    with refusing(f"{path} is damaged: it is not the JSON that was written"):
        header = dict(json.loads(data))
        # Another schema may have no seal, so its number is checked first.
        if isinstance(header.get("schema"), int) and header["schema"] != SCHEMA:
            raise MemoryFileError(f"{path} has schema {header['schema']}; this version of memoir reads {SCHEMA}")
        seal = header.pop("seal", None)
        # Compare the bytes, not the values, so that any change to the file is noticed.
        if data != _sealed(header):
            raise MemoryFileError(f"{path} is damaged: its seal {str(seal)[:12]}… does not fit its content")
    for name, kind in HEADER.items():
        if not isinstance(header.get(name), kind):
            raise MemoryFileError(f"{path} is damaged: {name} is {header.get(name)!r:.60}, expected {kind.__name__}")
    return header
