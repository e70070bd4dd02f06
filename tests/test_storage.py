"""Memory files: whole, or refused by name."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil

import pytest
import torch
from families import small_model

from memoir.editors import EditError, MemoryFileError, from_hub, load_editor, make_editor, merge_memories
from memoir.editors.storage import read_memory, write_memory
from memoir.records import EditRequest

EDITS = [EditRequest(prompt=f"Name {c}", target=t) for c, t in zip("XYZ", ["oak", "ash\u2028elm", "fir"], strict=True)]
HEADER = {"method": "m", "config": {}, "model": "x", "fingerprint": "f", "background": []}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = small_model("llama")
    editor = make_editor("memoir", model, layer=1, k=16, feature="last", tau=0.9, iterations=3, prefixes=0)
    editor.edit(EDITS)
    folder = editor.save(tmp_path_factory.mktemp("saved") / "memory")
    return model, folder


def test_what_is_written_is_read(tmp_path):
    tensors = {"a": torch.arange(5), "b": torch.randn(2, 3, dtype=torch.float64), "empty": torch.zeros(0)}
    write_memory(tmp_path / "m", HEADER, EDITS, tensors)
    header, edits, found = read_memory(tmp_path / "m")
    assert edits == EDITS and header["method"] == "m" and header["edits"] == 3
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], v) for k, v in tensors.items())


def test_another_base_model_is_refused(saved):
    _, folder = saved
    with pytest.raises(MemoryFileError, match=r"written on small-llama \([0-9a-f]{12}…\); this model is small-llama"):
        load_editor(folder, small_model("llama", seed=1))


def test_missing_cut_and_flipped_files_are_refused_by_name(saved, tmp_path):
    model, folder = saved
    for name in os.listdir(folder):
        for damage, message in [(None, "cannot be read"), ("cut", "damaged"), ("flip", "damaged")]:
            copy = tmp_path / f"{name}-{damage}"
            shutil.copytree(folder, copy)
            data = bytearray((copy / name).read_bytes())
            if damage is None:
                (copy / name).unlink()
            elif damage == "cut":
                (copy / name).write_bytes(data[:-3])
            else:
                data[len(data) // 2] ^= 1
                (copy / name).write_bytes(data)
            with pytest.raises(MemoryFileError, match=rf"{name} .*{message}"):
                load_editor(copy, model)


def test_a_newer_schema_is_refused_by_number(saved, tmp_path):
    model, folder = saved
    copy = shutil.copytree(folder, tmp_path / "newer")
    header = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(header | {"schema": 99}))
    with pytest.raises(MemoryFileError, match=r"has schema 99; this version of memoir reads up to"):
        load_editor(copy, model)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One random change: a bit, a byte, a cut, an insertion, a swap of two stretches, a repeat."""
    at, kind = rng.randrange(len(data)), rng.randrange(6)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([(data[at] + rng.randrange(1, 256)) % 256]) + data[at + 1 :]
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if kind == 4:
        return data[at:] + data[:at]
    return data[:at] + data[max(0, at - 16) :]


def test_no_mutation_of_a_memory_file_is_loaded(saved, tmp_path):
    model, folder = saved
    rng, refused = random.Random(0), 0
    originals = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    copy = shutil.copytree(folder, tmp_path / "fuzz")
    while refused < 2000:
        name = rng.choice(list(originals))
        changed = mutate(originals[name], rng)
        if changed == originals[name]:
            continue
        (copy / name).write_bytes(changed)
        with pytest.raises(MemoryFileError):
            load_editor(copy, model)
        (copy / name).write_bytes(originals[name])
        refused += 1
    load_editor(copy, model)


@pytest.mark.parametrize("moment", range(6))
def test_an_interrupted_save_leaves_a_whole_memory(tmp_path, monkeypatch, moment):
    """Every step of a save may be its last: what is then on disk is the old memory or the new one, whole."""
    folder = tmp_path / "memory"
    write_memory(folder, HEADER, EDITS[:1], {"a": torch.zeros(3)})
    calls = iter(range(100))

    class Killed(BaseException):
        pass

    def dying(function):
        def call(*args, **kwargs):
            if next(calls) == moment:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", dying(os.fsync))
        patched.setattr("pathlib.Path.rename", dying(type(folder).rename))
        patched.setattr("pathlib.Path.mkdir", dying(type(folder).mkdir))
        with contextlib.suppress(Killed):
            write_memory(folder, HEADER, EDITS, {"a": torch.ones(3)})
    _, edits, tensors = read_memory(folder)
    assert (edits, tensors["a"].tolist()) in [(EDITS[:1], [0.0] * 3), (EDITS, [1.0] * 3)]
    write_memory(folder, HEADER, EDITS, {"a": torch.ones(3)})
    assert len(read_memory(folder)[1]) == 3
    assert os.listdir(tmp_path) == ["memory"]


@pytest.mark.parametrize("write", ["sgd", "rls"])
def test_merging_two_memories_is_holding_both(tmp_path, write):
    model = small_model("llama")
    settings = dict(layer=1, k=16, feature="last", tau=0.97, iterations=4, prefixes=0, write=write, weight_decay=0)
    settings |= dict(learning_rate=2.0, ridge=0.1)
    halves = []
    for i, edits in enumerate([EDITS[:2], EDITS[1:]]):  # one edit in both
        editor = make_editor("memoir", model, **settings)
        editor.edit(edits)
        halves.append(editor.save(tmp_path / str(i)))
    merged = merge_memories(model, *halves)
    assert [e.id for e in EDITS] == list(merged.edits) == merged.memory.bank.ids and model.editor is merged
    keys = torch.cat([merged.pairs(i)[0] for i in merged.factors]).double().T
    values = torch.cat([f.values for f in merged.factors.values()]).double().T
    if write == "sgd":
        expected = values @ keys.T
    else:
        expected = values @ keys.T @ torch.linalg.inv(keys @ keys.T + 0.1 * torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(merged.memory.weight.double(), expected, rtol=1e-4, atol=1e-6)
    other = make_editor("memoir", model, **settings | {"k": 17})
    with pytest.raises(EditError, match="different settings cannot be merged; they differ in k"):
        merged.absorb(other)
    with pytest.raises(ValueError, match="1 memory files to merge, expected at least 2"):
        merge_memories(model, halves[0])


def test_the_hub_carries_a_memory_and_its_card(saved, tmp_path, monkeypatch):
    import huggingface_hub

    model, folder = saved
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(hub / repo_id))
    editor = load_editor(folder, model)
    assert editor.push_to_hub("me/edits") == "https://hub/me/edits"
    card = (hub / "me/edits/README.md").read_text()
    assert "3 edits of small-llama by memoir" in card and model.fingerprint in card and "| Name X | oak |" in card
    assert from_hub("me/edits", model).edits == editor.edits
