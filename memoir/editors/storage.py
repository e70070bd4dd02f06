"""Memory files: one folder per editor, whole or refused.

memory.safetensors   the method's tensors
edits.jsonl          one EditRequest per line, in the order of editing
config.json          schema, method, configuration, the base model's fingerprint, sha256 of the other two and of itself

A save first writes all three to `.memory.new` inside the folder, then renames that to `.memory.ready`, which makes it
the memory, and last moves each file to its place. Only a memory's own files are ever replaced.
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

from memoir.records import EditRequest

SCHEMA = 1
CONFIG, EDITS, TENSORS = FILES = ("config.json", "edits.jsonl", "memory.safetensors")
CARD = "README.md"  # the hub's; it may lie beside a memory, and stays as it is
NEW, READY = ".memory.new", ".memory.ready"
HEADER = {
    "schema": int,
    "method": str,
    "config": dict,
    "model": str,
    "fingerprint": str,
    "background": list,
    "edits": int,
    "sha256": dict,
}


class MemoryFileError(ValueError):
    """A memory file that cannot be trusted, or does not belong to this model."""


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever the content of a file makes its readers raise becomes a MemoryFileError that says `what` is wrong."""
    try:
        yield
    except (MemoryFileError, MemoryError, OutOfMemoryError):
        raise
    except Exception as error:
        raise MemoryFileError(f"{what} ({type(error).__name__}: {error})") from error


def write_memory(
    folder: str | os.PathLike, header: dict[str, Any], edits: list[EditRequest], tensors: dict[str, Tensor]
) -> Path:
    """Write a memory file; returns where it is. The memory that was there stays whole until the new one is.

    MemoryFileError where the path is a file, or a folder with anything else in it than a memory.
    """
    folder = Path(folder).resolve()  # a link to a folder stays one
    _check_replaceable(folder)
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
    """Whether there is anything at that path to go on from; `read_memory` says whether it is a memory."""
    folder = Path(folder)
    return folder.exists() and (not folder.is_dir() or bool(_entries(folder) - {NEW, CARD}))


def read_memory(folder: str | os.PathLike) -> tuple[dict[str, Any], list[EditRequest], dict[str, Tensor]]:
    """Read a memory file: its header, edits and tensors. MemoryFileError names what is wrong with it."""
    folder = Path(folder)
    files = {}
    for name in FILES:
        ready = folder / READY / name  # there where a save was interrupted once it was whole
        try:
            files[name] = (ready if ready.exists() else folder / name).read_bytes()
        except OSError as error:
            raise MemoryFileError(f"{folder / name} cannot be read: {error.strerror}") from None
    header = _unsealed(folder / CONFIG, files[CONFIG])
    for name in (EDITS, TENSORS):
        found, expected = hashlib.sha256(files[name]).hexdigest(), header["sha256"].get(name)
        if found != expected:
            raise MemoryFileError(
                f"{folder / name} is damaged: its sha256 is {found[:12]}…, {CONFIG} expects {str(expected)[:12]}…"
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


def make_repository(repo_id: str, *, private: bool, token: str | None) -> tuple[str, str]:
    """A repository on the Hugging Face hub, made where it does not exist: its address, and its id with the owner."""
    from huggingface_hub import HfApi

    url = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True)
    return str(url), url.repo_id


def push_folder(folder: Path, repo_id: str, *, token: str | None) -> None:
    """Upload a folder to a repository on the Hugging Face hub."""
    from huggingface_hub import HfApi

    HfApi(token=token).upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload memory")


def pull_folder(repo_id: str, *, revision: str | None, token: str | None) -> Path:
    """Download a memory's files from the Hugging Face hub; returns the local folder."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=[TENSORS, EDITS, CONFIG]))


def _entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _check_replaceable(folder: Path) -> None:
    """MemoryFileError unless there is nothing at that path, or an empty folder, or a memory and nothing beside it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise MemoryFileError(f"{folder} is a file; expected a new folder or an older memory")
    found = _entries(folder) - {NEW, READY, CARD}
    # Many things keep a config.json; it is a memory's beside its edits only.
    if others := sorted(found - set(FILES) if EDITS in found or (folder / READY).exists() else found):
        raise MemoryFileError(
            f"{folder} holds other files than a memory's: {', '.join(others[:5])}{', …' * (len(others) > 5)}; "
            "expected a new folder or an older memory"
        )


def _settle(folder: Path) -> None:
    """Move the files of a save that is whole to their places."""
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
    with refusing(f"{path} is damaged: it is not the JSON that was written"):
        header = dict(json.loads(data))
    # A newer schema may know of no seal.
    if isinstance(header.get("schema"), int) and header["schema"] > SCHEMA:
        raise MemoryFileError(f"{path} has schema {header['schema']}; this version of memoir reads up to {SCHEMA}")
    seal = header.pop("seal", None)
    # Compared byte by byte: a header that says the same in other bytes has been touched too.
    with refusing(f"{path} is damaged: it is not the JSON that was written"):
        whole = data == _sealed(header)
    if not whole:
        raise MemoryFileError(f"{path} is damaged: its seal {str(seal)[:12]}… does not fit its content")
    for name, kind in HEADER.items():
        if not isinstance(header.get(name), kind):
            raise MemoryFileError(f"{path} is damaged: {name} is {header.get(name)!r:.60}, expected {kind.__name__}")
    return header
