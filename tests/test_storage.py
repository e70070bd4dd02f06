"""Memory files: whole, or refused by name."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil

import pytest
import torch
from families import BACKGROUND, byte_tokenizer, network, small_model
from safetensors.torch import load_file, save
from test_models import TEMPLATE

from memoir.editors import EditError, MemoryFileError, from_hub, load_editor, make_editor, merge_memories
from memoir.editors.merging import absorb
from memoir.editors.storage import holds_memory, read_memory, write_memory
from memoir.models import LanguageModel, load_model
from memoir.records import EditRequest

EDITS = [EditRequest(prompt=f"Name {c}", target=t) for c, t in zip("XYZ", ["oak", "ash\u2028elm", "fir"], strict=True)]
HEADER = {"method": "m", "config": {}, "model": "x", "fingerprint": "f", "background": []}
HEADER |= {"dtype": "float32", "rounded": {}, "chat": False}


def contents(folder):
    """Every file below a folder, by its path."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forge(folder, files=None, **entries):
    """Put other files and header entries into a memory (None: take it out), with all sums and the seal right."""
    header = json.loads((folder / "config.json").read_bytes())
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
        header["sha256"][name] = hashlib.sha256(data).hexdigest()
    del header["seal"]
    header = {name: value for name, value in (header | entries).items() if value is not None}
    body = json.dumps(header, indent=1, sort_keys=True, ensure_ascii=False)
    header["seal"] = hashlib.sha256(body.encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(header, indent=1, ensure_ascii=False), encoding="utf-8")


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
    with pytest.raises(
        MemoryFileError, match=r"written on small-llama \([0-9a-f]{12}…, float32\); this model is small-llama"
    ):
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


@pytest.mark.parametrize("schema", [2, 99])
def test_another_schema_is_refused_by_number(saved, tmp_path, schema):
    model, folder = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    header = json.loads((copy / "config.json").read_text())
    for other in (header | {"schema": schema}, {"schema": schema, "signature": "of another kind"}):
        (copy / "config.json").write_text(json.dumps(other))
        with pytest.raises(MemoryFileError, match=rf"has schema {schema}; this version of memoir reads 3$"):
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
    while refused < 400:
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


@pytest.mark.parametrize(
    "config",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"seal": ' + b"[" * 500 + b"]" * 500 + b"}",
        b"",
        b"[]",
        b"5",
        b"null",
        b'"seal"',
        b'[["seal", 1]]',
        b'{"seal": 1}',
        b'{"seal": [], "schema": "99"}',
        b'{"seal": 1, "a": "\\ud800"}',
        b'{"seal": 1, "a": NaN}',
        b'{"seal": ' + b"9" * 5000 + b"}",
        "{}".encode("utf-16"),
        b"\xff",
    ],
    ids=lambda config: str(config[:20]),
)
def test_whatever_stands_in_the_header_is_refused_by_name(saved, tmp_path, config):
    model, folder = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").write_bytes(config)
    with pytest.raises(MemoryFileError, match=r"config.json is damaged"):
        load_editor(copy, model)


def test_a_sealed_header_that_no_editor_wrote_is_refused(saved, tmp_path):
    model, folder = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    header = read_memory(folder)[0]
    forge(copy)
    assert load_editor(copy, model).edits == load_editor(folder, model).edits
    wrong = [(name, value) for name in header for value in (None, 5, "x", [1], {"x": 1}) if name != "background"]
    wrong.remove(("model", "x"))
    wrong += [("background", None), ("background", 5), ("background", {"x": 1}), ("sha256", {})]
    wrong += [("config", header["config"] | change) for change in ({"k": "x"}, {"k": 65}, {"layer": 9}, {"knob": 1})]
    for name, value in wrong:
        forge(copy, **header | {name: value})
        with pytest.raises(MemoryFileError, match=str(copy)):
            load_editor(copy, model)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 200_000,
        b"5",
        b"[]",
        b"{}",
        b"\xff",
        b'{"prompt": "a", "target": 5}',
        b'{"prompt": "a", "target": "b", "knob": 1}',
        b'{"prompt": "a", "target": "b", "probes": 5}',
        b'{"prompt": "a", "target": "b", "probes": [{}]}',
        b'{"prompt": "a", "target": "b", "id": [1]}',
    ],
    ids=lambda line: str(line[-20:]),
)
def test_lines_that_are_no_edits_are_refused(saved, tmp_path, line):
    model, folder = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    lines = (folder / "edits.jsonl").read_bytes().splitlines(keepends=True)
    forge(copy, {"edits.jsonl": b"".join(lines[:2]) + line})
    with pytest.raises(MemoryFileError, match=r"edits.jsonl is damaged: not every line of it is an edit"):
        load_editor(copy, model)


def test_edits_and_tensors_that_disagree_are_refused_and_leave_the_model_as_it_was(saved, tmp_path):
    model, folder = saved
    lines = (folder / "edits.jsonl").read_bytes().splitlines(keepends=True)
    tensors = load_file(folder / "memory.safetensors")
    one_less = {"masks", "order", "factor_rows", "factor_scales", "factor_keys", "factor_values"}
    forged = [
        ({"edits.jsonl": b"".join(lines[:2])}, {}, r"holds 2 edits with 2 different ids, config.json expects 3"),
        ({"edits.jsonl": b"".join(lines[:2] * 2)[:-1]}, {"edits": 4}, r"holds 4 edits with 2 different ids"),
        ({"edits.jsonl": b"".join(lines[:2])}, {"edits": 2}, r"its tensors do not fit its 2 edits by memoir"),
        ({"edits.jsonl": b"".join(lines) + lines[0].replace(b'"id": "', b'"id": "4')}, {"edits": 4}, "fit its 4 edits"),
        ({"memory.safetensors": b"\0" * 20}, {}, r"memory.safetensors is damaged: it does not hold tensors"),
        ({"memory.safetensors": b""}, {}, r"memory.safetensors is damaged: it does not hold tensors"),
        *(
            ({"memory.safetensors": save({k: v for k, v in tensors.items() if k != name})}, {}, name)
            for name in tensors
        ),
        *(({"memory.safetensors": save(tensors | {name: tensors[name][1:]})}, {}, "do not fit") for name in one_less),
        ({"memory.safetensors": save(tensors | {"masks": tensors["masks"] | 255})}, {}, "another number of columns"),
    ]
    before = make_editor("ft", model, layer=1)
    for i, (files, entries, message) in enumerate(forged):
        copy = shutil.copytree(folder, tmp_path / str(i))
        forge(copy, files, **entries)
        with pytest.raises(MemoryFileError, match=message) as refused:
            load_editor(copy, model)
        assert str(copy) in str(refused.value) and model.editor is before
    before.detach()
    copy = shutil.copytree(folder, tmp_path / "unedited")
    forge(copy, {"memory.safetensors": save({})})
    expected = model.forward(model.encode(["Name X"]))
    with pytest.raises(MemoryFileError, match="do not fit"):
        load_editor(copy, model)
    assert model.editor is None and torch.equal(model.forward(model.encode(["Name X"])), expected)


def test_a_memory_written_on_chats_is_for_chats(tmp_path):
    """The template stands between the words of every prompt: without it no prompt would meet its edit again."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chatting, plain = (LanguageModel(network("llama"), tokenizer, "chatty", chat=chat) for chat in (True, False))
    settings = dict(layer=1, k=16, feature="last", tau=0.9, iterations=1, prefixes=0)
    for model, other in [(chatting, plain), (plain, chatting)]:
        editor = make_editor("memoir", model, **settings)
        editor.edit(EDITS)
        folder = editor.save(tmp_path / str(model.chat))
        assert load_editor(folder, model).matches(["Name X"]) == [EDITS[0].id]
        message = f"written on chatty with chat={model.chat}; this model was opened with chat={other.chat}"
        with pytest.raises(MemoryFileError, match=message):
            load_editor(folder, other)
        with pytest.raises(MemoryFileError, match=message):
            make_editor("memoir", other, **settings).resume(folder)
        with pytest.raises(EditError, match="chat=True and one without cannot be merged"):
            absorb(make_editor("memoir", other, **settings), editor)


def test_a_memory_that_is_older_than_a_setting_has_its_default(saved, tmp_path):
    model, folder = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = read_memory(folder)[0]["config"]
    forge(copy, config={name: value for name, value in config.items() if name not in ("on_conflict", "iterations")})
    with pytest.raises(MemoryFileError, match=r"other settings .*\(they differ in iterations\)"):
        make_editor("memoir", model, **config).resume(copy)
    assert vars(load_editor(copy, model).config) == config | {"iterations": 50}


@pytest.mark.parametrize("first", [True, False])
def test_a_save_killed_at_any_moment_leaves_a_whole_memory(tmp_path, monkeypatch, first):
    """What is then on disk is the old memory, or none before the first, or the new one: whole, read as often as you
    like, and the next save goes on from there."""

    class Killed(BaseException):
        pass

    def dying(function, calls, moment):
        def call(*args, **kwargs):
            if next(calls) >= moment:  # nor is anything cleaned up after it
                raise Killed
            return function(*args, **kwargs)

        return call

    outcomes = []
    for moment in itertools.count():
        folder, calls, killed = tmp_path / str(moment), itertools.count(), False
        if not first:
            write_memory(folder, HEADER, EDITS[:1], {"a": torch.zeros(3)})
        with monkeypatch.context() as patched:
            for owner, name in [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "rmdir")]:
                patched.setattr(owner, name, dying(getattr(owner, name), calls, moment))
            patched.setattr(shutil, "rmtree", dying(shutil.rmtree, calls, moment))
            try:
                write_memory(folder, HEADER, EDITS, {"a": torch.ones(3)})
            except Killed:
                killed = True
        if first and not holds_memory(folder):
            outcomes.append("none")
        else:
            for _ in range(2):
                _, edits, tensors = read_memory(folder)
            found = {"old": (EDITS[:1], [0.0] * 3), "new": (EDITS, [1.0] * 3)}
            outcomes += [name for name, value in found.items() if value == (edits, tensors["a"].tolist())]
        assert len(outcomes) == moment + 1
        write_memory(folder, HEADER, EDITS[1:], {"a": torch.full((3,), 2.0)})
        assert read_memory(folder)[1] == EDITS[1:] and len(os.listdir(folder)) == 3
        if not killed:
            break
    kinds = [kind for kind, _ in itertools.groupby(outcomes)]
    assert kinds == ["none" if first else "old", "new"] and outcomes.count("new") >= 5  # three files to move, and done
    assert len(os.listdir(tmp_path)) == moment + 1


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["thesis.txt"], "thesis.txt"),
        (["edits.jsonl", "thesis.txt"], "thesis.txt"),
        (["config.json", "edits.jsonl", "memory.safetensors", "notes/today.txt"], "notes"),
        (["config.json", "model.safetensors"], "config.json, model.safetensors"),
        (["config.json"], "config.json"),
        (["memory.safetensors", "README.md"], "memory.safetensors"),
        ([f"{i}.txt" for i in range(9)], "0.txt, 1.txt, 2.txt, 3.txt, 4.txt, …"),
    ],
)
def test_a_folder_of_other_files_is_refused_by_their_names_and_kept(tmp_path, files, named):
    folder = tmp_path / "home"
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(
        MemoryFileError, match=rf"home contains files that do not belong to a memory: {named}; expected a new folder"
    ):
        write_memory(folder, HEADER, EDITS, {})
    assert contents(tmp_path) == before and holds_memory(folder)


def test_a_file_is_refused_by_name_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(MemoryFileError, match=r"thesis.txt is a file; expected a new folder or an older memory"):
        write_memory(tmp_path / "thesis.txt", HEADER, EDITS, {})
    with pytest.raises(MemoryFileError, match=r"thesis.txt.config.json cannot be read: Not a directory"):
        read_memory(tmp_path / "thesis.txt")
    assert contents(tmp_path) == before


def test_the_hubs_card_beside_a_memory_stays(tmp_path):
    (tmp_path / "README.md").write_text("a card")
    for edits in (EDITS[:1], EDITS):
        write_memory(tmp_path, HEADER, edits, {})
        assert read_memory(tmp_path)[1] == edits and (tmp_path / "README.md").read_text() == "a card"


def test_an_empty_folder_a_link_to_one_and_the_folder_at_work_are_saved_into_again_and_again(tmp_path, monkeypatch):
    place, link, dangling = tmp_path / "place", tmp_path / "link", tmp_path / "dangling"
    place.mkdir()
    link.symlink_to(place)
    dangling.symlink_to(tmp_path / "later")
    monkeypatch.chdir(place)
    assert not holds_memory(".") and not holds_memory(dangling)
    for folder, at in [(".", place), (".", place), (link, place), (link, place), (place, place)] + [
        (dangling, tmp_path / "later")
    ] * 2:
        edits = [EditRequest(prompt="Where?", target=os.fspath(folder))]
        assert write_memory(folder, HEADER, edits, {}) == at
        assert read_memory(folder)[1] == read_memory(at)[1] == edits and holds_memory(folder)
    assert os.getcwd() == str(place) and link.is_symlink() and dangling.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["dangling", "later", "link", "place"]
    assert sorted(os.listdir()) == ["config.json", "edits.jsonl", "memory.safetensors"]


@pytest.mark.parametrize("write", ["sgd", "rls"])
def test_merging_two_memories_is_holding_both(tmp_path, write):
    model = small_model("llama")
    settings = dict(layer=1, k=16, feature="last", tau=0.97, prefixes=0, write=write)
    settings |= (
        dict(iterations=4, weight_decay=0, step_rule="constant", learning_rate=2.0)
        if write == "sgd"
        else dict(ridge=0.1)
    )
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
        expected = values @ keys.T @ torch.linalg.inv(keys @ keys.T + merged.ridge * torch.eye(64, dtype=torch.float64))
    torch.testing.assert_close(merged.memory.weight.double(), expected, rtol=1e-4, atol=1e-6)
    other = make_editor("memoir", model, **settings | {"k": 17})
    with pytest.raises(EditError, match="different settings cannot be merged; they differ in k"):
        absorb(merged, other)
    with pytest.raises(ValueError, match="1 memory files to merge, expected at least 2"):
        merge_memories(model, halves[0])


def everything(editor):
    """All that a memory is, by name: the tensors it saves and holds, its edits, and what the model then says."""
    editor.attach()
    model, pages = editor.model, editor.memory.pages
    found = {f"page {i}": page for i, page in enumerate(pages)} | editor.state()
    found["logits"] = model.forward(model.encode([edit.prompt for edit in EDITS]))
    return {name: value.clone() for name, value in found.items()} | {"edits": list(editor.edits.values())}


def same(one, other):
    tensors = [name for name in one if name != "edits"]
    return (
        one.keys() == other.keys()
        and one["edits"] == other["edits"]
        and all(torch.equal(one[name], other[name]) for name in tensors)
    )


MERGING = {
    write: dict(layer=1, k=16, feature="last", tau=0.97, prefixes=0, write=write, **form)
    for write, form in {
        "sgd": dict(iterations=3, step_rule="constant", learning_rate=2.0),
        "rls": dict(value_steps=3),
    }.items()
}


@pytest.mark.parametrize("write", ["sgd", "rls"])
@pytest.mark.parametrize("on_conflict", ["replace", "keep-both", "raise"])
def test_a_merge_meets_conflicts_as_editing_does(tmp_path, write, on_conflict):
    """Which edits are left is what making the second memory's edits on top of the first leaves."""
    model = small_model("llama")
    settings = MERGING[write] | dict(on_conflict=on_conflict)
    ours = [EDITS[0], EDITS[1]]
    theirs = [EDITS[2], EditRequest(prompt=EDITS[0].prompt, target="yew")]
    together, *apart = (make_editor("memoir", model, **settings) for _ in range(3))
    folders = []
    for i, (editor, edits) in enumerate(zip(apart, (ours, theirs), strict=True)):
        editor.attach()
        editor.edit(edits)
        folders.append(editor.save(tmp_path / str(i)))
    together.attach()
    together.edit(ours)
    if on_conflict == "raise":
        before = everything(apart[0])
        for attempt in (
            lambda: together.edit(theirs),
            lambda: absorb(apart[0], apart[1]),
            lambda: merge_memories(model, *folders),
        ):
            together.attach()
            with pytest.raises(EditError, match=f"edit '{theirs[1].id}' conflicts with edit '{ours[0].id}'"):
                attempt()
            assert model.editor is together
        assert same(everything(apart[0]), before)
        return
    together.edit(theirs)
    merged = merge_memories(model, *folders)
    assert list(merged.edits.values()) == list(together.edits.values())
    assert merged.memory.bank.ids == together.memory.bank.ids == list(merged.edits) == list(merged.factors)
    assert len(merged.edits) == (3 if on_conflict == "replace" else 4)
    assert merged.matches(["Name X", "Name Y", "Name Z"]) == [theirs[1].id, ours[1].id, theirs[0].id]
    keys, values = (torch.cat(part).double() for part in zip(*map(merged.pairs, merged.edits), strict=True))
    scales = [merged.scales[merged.memory.bank.ids.index(i)] for i in merged.edits for _ in merged.factors[i].keys]
    if write == "sgd":
        expected = (values * torch.tensor(scales)[:, None]).T @ keys
    else:
        expected = values.T @ torch.linalg.solve(keys @ keys.T + merged.ridge * torch.eye(len(keys)), keys)
    torch.testing.assert_close(merged.memory.weight.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write", ["sgd", "rls"])
def test_a_merge_that_fails_half_way_leaves_the_memory_as_it_was(monkeypatch, write):
    model = small_model("llama")
    settings = MERGING[write] | (dict(fill=0.1) if write == "rls" else {})
    ours, theirs = (make_editor("memoir", model, **settings) for _ in range(2))
    ours.attach()
    ours.edit(EDITS)
    theirs.attach()
    theirs.edit([EditRequest(prompt=e.prompt, target=f"the new {e.target}") for e in EDITS])
    before, other, enters, plainly = everything(ours), everything(theirs), iter(range(3)), type(ours).enter

    def enter(self, ids, masks, scale):
        if next(enters) == 2:
            raise KeyboardInterrupt
        plainly(self, ids, masks, scale)

    with monkeypatch.context() as patched:
        patched.setattr(type(ours), "enter", enter)
        with pytest.raises(KeyboardInterrupt):
            absorb(ours, theirs)
    assert same(everything(ours), before) and same(everything(theirs), other)
    absorb(ours, theirs)  # and it can be tried again
    assert ours.edits == theirs.edits and ours.memory.bank.ids == theirs.memory.bank.ids


def test_memories_centred_on_other_backgrounds_are_not_merged(tmp_path):
    """A mask shows where a prompt differs from the background: on another one it would be another mask."""
    model = small_model("llama")
    settings = MERGING["sgd"] | dict(feature="mean_centred", tau=0.9)
    made = {}
    for name, background, edits in [
        ("ours", BACKGROUND, EDITS[:2]),
        ("alike", BACKGROUND, EDITS[2:]),
        ("unlike", ["%%%% 17", "//"], EDITS[2:]),
        ("empty", BACKGROUND, []),
    ]:
        editor = made[name] = make_editor("memoir", model, background=background, **settings)
        editor.edit(edits)
        editor.save(tmp_path / name)
    before = everything(made["ours"])
    with pytest.raises(EditError, match="centred on different background prompts cannot be merged"):
        absorb(made["ours"], made["unlike"])
    with pytest.raises(EditError, match="centred on different background prompts cannot be merged"):
        merge_memories(model, tmp_path / "ours", tmp_path / "unlike")
    absorb(made["ours"], made["empty"])
    assert same(everything(made["ours"]), before)
    prompts = [edit.prompt for edit in EDITS]
    merged = merge_memories(model, *(tmp_path / name for name in ("empty", "ours", "alike")))
    assert merged.matches(prompts) == [edit.id for edit in EDITS]
    # Nothing was centred yet: the other's background is as good as one's own.
    absorb(made["empty"], made["unlike"])
    assert made["empty"].background == ("%%%% 17", "//")
    made["empty"].attach()
    assert made["empty"].matches(prompts)[2] == EDITS[2].id


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder, whose user is called me."""
    import huggingface_hub

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.removeprefix('me/')}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(tmp_path / "hub" / repo_id))
    return tmp_path / "hub"


def test_the_hub_carries_a_memory_and_its_card(saved, hub):
    model, folder = saved
    editor = load_editor(folder, model)
    assert editor.push_to_hub("edits") == "https://huggingface.co/me/edits"
    card = (hub / "me/edits/README.md").read_text()
    assert "3 edits of small-llama by memoir" in card and model.fingerprint in card and "| Name X | oak |" in card
    assert 'mm.load_model("small-llama", dtype="float32")' in card and 'mm.from_hub("me/edits", model)' in card
    assert from_hub("me/edits", model).edits == editor.edits


def test_the_card_names_the_base_as_the_hub_does_and_no_folder_of_ours(tiny_model, hub, tmp_path, monkeypatch):
    """A model out of the hub's cache, and the same one from a folder: by its path, and by a path like a hub's id."""
    from huggingface_hub import constants

    snapshots = tmp_path / "cache/models--meta-llama--Foo"
    shutil.copytree(tiny_model("llama"), snapshots / "snapshots" / ("a" * 40))
    (snapshots / "refs").mkdir()
    (snapshots / "refs/main").write_text("a" * 40)
    shutil.copytree(tiny_model("llama"), tmp_path / "secret/Foo")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["meta-llama/Foo", tmp_path / "secret/Foo", "./secret/Foo", "secret/Foo"]):
        editor = make_editor("memoir", load_model(name), **MERGING["sgd"])
        editor.edit(EditRequest(prompt="Two lines:\n1\r\n\n2 | 3", target="one\u2028two"))
        editor.push_to_hub(f"me/edits{i}")
        card = (hub / f"me/edits{i}/README.md").read_text()
        if i == 0:
            assert "\nbase_model: meta-llama/Foo\n" in card and 'mm.load_model("meta-llama/Foo", ' in card
        else:
            assert "base_model" not in card and 'mm.load_model("Foo", ' in card
            assert "secret" not in card
        table = card[card.index("| prompt") :].strip().split("\n")
        assert table[2:] == ["| Two lines: 1 2 ∣ 3 | one two |"]
