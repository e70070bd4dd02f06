"""The benchmark: its baseline is MEMOIR, its floor is one, it leaves nothing behind. No time is tested."""

from __future__ import annotations

import functools
import json
import weakref
from dataclasses import fields

import numpy as np
import pytest
import torch
from families import small_model

from memoir import bench, plain, shapes
from memoir.__main__ import main
from memoir.editors import EDITORS, EditError, make_editor
from memoir.files import read_json
from memoir.records import EditRequest

NAMES = {"AX": "oboe", "BY": "harp", "CZ": "drum", "DW": "lute", "EV": "bell"}
EDITS = [EditRequest(prompt=f"The instrument of {name}", target=target) for name, target in NAMES.items()]
SETTINGS = dict(
    layer=1,
    k=24,
    feature="last",
    on_conflict="keep-both",
    step_rule="constant",
    learning_rate=plain.PAPER_RATE,
    stop_loss=0,
    iterations=4,
)
SUMMARY = {
    "model",
    "edit_speedup_vs_plain",
    "prefill_overhead",
    "decode_overhead",
    "mask_search_million_seconds",
    "seconds_per_edit",
}


@pytest.fixture
def model():
    return small_model("llama")


def editor_on(model, **settings):
    return make_editor("memoir", model, **{**SETTINGS, "prefixes": 0, **settings})


@pytest.mark.parametrize("prefixes", [0, 2])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_plain_form_writes_what_memoir_writes(model, frozen, prefixes):
    editor = editor_on(model, prefixes=prefixes, prefix_tokens=3)
    reports = editor.edit(EDITS)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    weight = torch.zeros_like(editor.memory.weight)
    with editor.detached():
        for request, report in zip(EDITS, reports, strict=True):
            weight, made, loss = plain.plain_edit(editor, request, weight, 0, 4, frozen=frozen)
            assert made == report.iterations == 4 and loss == pytest.approx(report.loss_after, rel=1e-4)
    assert (weight - editor.memory.weight).norm() <= 1e-5 * weight.norm()
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())


def test_the_plain_form_stops_at_the_loss_it_is_given(model):
    editor = editor_on(model)
    editor.prepare()
    with editor.detached():
        weight = torch.zeros_like(editor.memory.weight)
        _, never, _ = plain.plain_edit(editor, EDITS[0], weight, 1e9, frozen=True)
    assert never == 0


def test_at_the_same_loss_the_plain_form_is_no_worse(model):
    rows = plain.against_plain(editor_on(model, learning_rate=2.0, stop_loss=0.5, iterations=50), EDITS)
    assert rows["plain"]["loss"] <= max(0.5, rows["memoir"]["loss"]) and rows["plain"]["iterations"] <= 100


def test_out_of_time_the_plain_form_still_makes_one_edit_that_counts(model):
    editor = editor_on(model)
    rows = plain.against_plain(editor, EDITS, budget=0)
    assert rows["plain"]["seconds"] > 0 and list(editor.edits) == [edit.id for edit in EDITS]


def test_the_floor_grows_with_every_pass(model):
    editor = editor_on(model)
    rates = shapes.rates_of(model)
    floors = [shapes.edit_floor(editor, EDITS[0], iterations, **rates) for iterations in (0, 1000)]
    assert 0 < floors[0] < floors[1]


@pytest.mark.parametrize("method", bench.METHODS)
def test_the_floor_counts_the_passes_of_every_method(model, method):
    """By hand, where each character is a token: 26 tokens with the stop, once through one block, then through two
    blocks four times forward and three times backward."""
    several = "layers" in {field.name for field in fields(EDITORS[method].Config)}
    editor = make_editor(method, model, **({"layers": (0,)} if several else {"layer": 0}))
    copies = getattr(editor.config, "prefixes", 0)
    tokens = 26 * (1 + copies) + copies * getattr(editor.config, "prefix_tokens", 0)
    block, mlp = sum(p.numel() for p in model.blocks[0].parameters()), 3 * 32 * 64
    floor = shapes.edit_floor(editor, EDITS[0], 3, operations_per_second=1.0, bytes_per_second=1e30)
    assert floor == pytest.approx(2 * tokens * (block + 7 * (2 * block - mlp)))


def test_out_of_time_a_method_still_times_one_edit_and_says_how_many(model):
    editor = make_editor("ft", model, layer=1, iterations=2)
    assert bench.time_edits(editor, EDITS, budget=0)["edits"] == 1 and len(editor.edits) == 2
    assert bench.time_edits(make_editor("ft", model, layer=1, iterations=2), EDITS)["edits"] == 2
    ahead = editor_on(model)  # its edits run ahead together, so they are timed together
    assert bench.time_edits(ahead, EDITS, budget=0)["edits"] == 2


def test_synthetic_masks_have_no_bits_beyond_their_width():
    words = bench.synthetic_masks(5000, 100)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    assert words.shape == (5000, 2) and 0.49 < bits[:, :100].mean() < 0.51 and not bits[:, 100:].any()


def test_overheads_leave_the_memory_as_it_was(model):
    editor = editor_on(model)
    editor.edit(EDITS)
    packed = editor.memory.bank.packed.copy()
    rows = bench.overheads(editor, EDITS[:1], (10, 20), rounds=1)
    assert [row["edits"] for row in rows] == [10, 20] and all(row["prefill"] > 0 < row["decode"] for row in rows)
    assert editor.memory.bank.ids == [edit.id for edit in EDITS] and (editor.memory.bank.packed == packed).all()


def test_overheads_are_those_of_questions_that_read_the_memory(model):
    editor = editor_on(model)
    bench.overheads(editor, EDITS[:2], (10,), rounds=1)
    assert list(editor.edits) == [edit.id for edit in EDITS[:2]]
    editor.memory.tau = 2.0
    with pytest.raises(EditError, match="none of 2 edited prompts reads the memory"):
        bench.overheads(editor, EDITS[:2], (10,), rounds=1)


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 2), (1e9, 4)])
def test_out_of_time_each_question_is_still_asked_twice(model, monkeypatch, seconds, rounds):
    """Once to warm up, and once that counts."""
    asked = []
    monkeypatch.setattr(bench, "question_seconds", lambda *what: asked.append(what) or (1.0, 1.0))
    (row,) = bench.overheads(editor_on(model), EDITS[:1], (10,), rounds=3, budget=seconds)
    assert len(asked) == 2 * rounds and row == {"edits": 10, "prefill": 1.0, "decode": 1.0}


def test_the_mask_search_finds_times_for_each_count():
    rows = bench.mask_search((10, 100), torch.device("cpu"), width=128)
    assert [row["masks"] for row in rows] == [10, 100] and all(row["seconds"] > 0 for row in rows)


def test_every_method_that_changes_the_model_is_measured():
    assert set(bench.METHODS) == {name for name, editor in EDITORS.items() if editor.changes_model}


@pytest.mark.parametrize("name", shapes.REAL_SHAPES)
def test_shapes_are_those_of_the_published_models(name):
    model = shapes.shaped(name, torch.device("meta"))
    shape = shapes.SHAPES[name]
    site = model.site(1)
    assert (model.family, len(model.blocks), site.out_features, site.in_features) == (shape.family, 2, shape.d, shape.D)


def test_methods_at_a_real_shape_have_a_row_each_or_a_reason(model, monkeypatch):
    monkeypatch.setattr(shapes, "shaped", lambda name, device: model)
    monkeypatch.setattr(shapes, "COUNTS", (10, 20))
    labels, lines = ["ft+iterations=2", "memoir+tau=0", "memoir+iterations=4+tau=0"], []
    found = shapes.measure_shapes(["gpt-j-6b"], labels, n_edits=5, say=lines.append)
    rows = found["shapes"]["gpt-j-6b"]["methods"]
    assert list(rows) == labels and len(lines) == 3 and model.editor is None
    assert [rows[label]["iterations"] for label in labels[1:]] == [30, 4]  # the paper's, unless the variant says
    assert all(row["floor_seconds"] > 0 < row["first_edit_seconds"] and row["edits"] == 2 for row in rows.values())
    assert ["decode at 20 edits" in row for row in rows.values()] == [False, True, False]  # once is enough
    assert found["info"].keys() == {"started", "machine", "commit", "dirty", "versions"}
    assert shapes.shapes_summary(found).keys() == {*(f"gpt-j-6b, {label}" for label in labels), "seconds"}
    monkeypatch.setattr(shapes, "SHAPE_SECONDS", -1)
    late = shapes.measure_shapes(["gpt-j-6b"], ["ft"], n_edits=5, say=lines.append)["shapes"]["gpt-j-6b"]["methods"]
    assert late == {"ft": {"reason": "not begun: -1 s had passed"}}


def test_the_command_ends_with_its_summary(monkeypatch, capsys, tmp_path):
    small = functools.partial(bench.measure, n_edits=5, n_plain=3, rounds=1, counts=(10,), masks=(100,))
    monkeypatch.setattr(bench, "measure", small)
    assert main(["bench", "--quick", "--methods", "memoir", "--out", str(tmp_path / "bench.json")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == read_json(tmp_path / "bench.json")["summary"] and summary.keys() == SUMMARY
    assert summary.pop("model") == "almanac" and summary.pop("seconds_per_edit")["memoir"] > 0
    assert all(value > 0 for value in summary.values())


def test_each_shape_is_freed_before_the_next_is_built(monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", (10,))
    earlier, alive = [], []

    def shaped(name, device):
        alive.append([name for name, model in earlier if model() is not None])
        model = small_model("llama")
        earlier.append((name, weakref.ref(model)))
        return model

    monkeypatch.setattr(shapes, "shaped", shaped)
    shapes.measure_shapes(["gpt-j-6b", "mistral-7b"], ["ft+iterations=2", "memoir+tau=0"], n_edits=5, say=print)
    assert alive == [[], []]


def test_an_unknown_size_is_named():
    with pytest.raises(TypeError, match="n_edit'"):
        bench.measure(n_edit=3)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [(["--shape", "llama-9"], "llama-3-8b, mistral-7b, gpt-j-6b or all"), (["--methods", "mmoir"], "mmoir")],
)
def test_mistakes_end_before_anything_is_measured(capsys, wrong, named):
    assert main(["bench", *wrong]) == 2
    assert named in capsys.readouterr().err
