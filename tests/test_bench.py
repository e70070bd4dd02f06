"""The benchmark: its baseline is MEMOIR, its floors are counted right, it leaves nothing behind. No time is tested."""

from __future__ import annotations

import functools
import json
import statistics

import pytest
import torch
from families import small_model

from memoir import bench
from memoir.__main__ import main
from memoir.bank import MaskBank
from memoir.editors import EditError, make_editor
from memoir.memory import ResidualMemory
from memoir.models import LanguageModel
from memoir.records import EditRequest, read_json
from memoir.sites import Tail

EDITS = [EditRequest(prompt=f"The name of {name}", target=target) for name, target in ("AX", "BY", "CZ")]
SETTINGS = dict(
    layer=1,
    k=24,
    feature="last",
    prefixes=0,
    on_conflict="keep-both",
    learning_rate=bench.PAPER_RATE,
    stop_loss=0,
    iterations=4,
)


@pytest.fixture
def model():
    return small_model("llama")


@pytest.mark.parametrize("frozen", [True, False])
def test_the_plain_form_writes_what_memoir_writes(model, frozen):
    editor = make_editor("memoir", model, **SETTINGS)
    editor.edit(EDITS)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    weight = torch.zeros_like(editor.memory.weight)
    with editor.detached():
        for request in EDITS:
            weight, made = bench.plain_edit(editor, request, weight, iterations=4, frozen=frozen)
            assert made == 4
    assert (weight - editor.memory.weight).norm() <= 1e-4 * weight.norm()
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())


def test_the_plain_form_stops_at_the_loss_it_is_given(model):
    editor = make_editor("memoir", model, **SETTINGS)
    with editor.detached():
        weight = torch.zeros_like(editor.memory.weight)
        _, never = bench.plain_edit(editor, EDITS[0], weight, iterations=9, stop_loss=1e9, frozen=True)
    assert never == 0


def test_parts_add_up_and_nothing_stays_wrapped(model):
    wrapped = [(owner, name) for functions in bench.PARTS.values() for owner, name in functions]
    before = [getattr(owner, name) for owner, name in wrapped]
    found = bench.split(make_editor("memoir", model, **SETTINGS), EDITS)
    assert [getattr(owner, name) for owner, name in wrapped] == before
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"]) and found["iterations"] == 4
    assert all(seconds > 0 for seconds in found["parts"].values())
    with pytest.raises(ZeroDivisionError), bench.parts_of(model.device):
        1 / 0  # noqa: B018
    assert [getattr(owner, name) for owner, name in wrapped] == before
    assert (LanguageModel, "forward") in wrapped and (Tail, "logits") in wrapped and (MaskBank, "add") in wrapped


def test_the_floor_counts_every_pass_of_an_edit(model):
    editor = make_editor("memoir", model, **SETTINGS)
    tokens, answers = len(EDITS[0].prompt) + 1 + len(EDITS[0].target), 1 + len(EDITS[0].target)
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    head = model.head.weight.numel()
    mlp = 3 * 32 * 64  # of the last block: gate, up and down
    # The prefix once, then five times forward and four times backward; the last MLP and the head at the answer only.
    operations = 2 * (tokens * (sizes[0] + sizes[1]) + 9 * (tokens * (sizes[2] - mlp) + answers * (mlp + head)))
    weights = sizes[0] + sizes[1] + 9 * (sizes[2] + head)
    slow_arithmetic = bench.edit_floor(editor, EDITS[0], 4, rate=1.0, reading=1e30)
    assert slow_arithmetic == {"operations": operations, "bytes": 4 * weights, "seconds": operations}
    assert bench.edit_floor(editor, EDITS[0], 4, rate=1e30, reading=1.0)["seconds"] == 4 * weights
    # Of 32 edits at a time the prefix is read once, and the fifth pass of all but the last with the next one's first.
    shared = (sizes[0] + sizes[1]) / 32 + (8 + 1 / 32) * (sizes[2] + head)
    several = bench.edit_floor(editor, EDITS[0], 4, rate=1e30, reading=1.0, ahead=32)
    assert (several["operations"], several["seconds"]) == (operations, pytest.approx(4 * shared))


def test_each_rival_makes_all_edits_and_is_asked_for_them(model):
    editor = make_editor("memoir", model, **SETTINGS)
    stopped = bench.together([bench.against_plain(editor, EDITS), bench.against_plain(editor, EDITS)])
    assert [*stopped] == ["memoir", "memoir, ahead", "plain", "plain, frozen"]
    assert all(len(row["seconds_by_turn"]) == 2 for row in stopped.values())  # one turn by lot
    found = bench.against_plain(editor, EDITS, iterations=4)
    for name, row in (found | stopped).items():
        assert row["iterations"] == 4 or "plain" in name  # the settings never stop early
        assert 0 <= row["reliability"] <= 1 and min(row["seconds_by_turn"]) > 0
        assert row["median_seconds"] == statistics.median(row["seconds_by_turn"])
    # After the same steps the plain form's memory answers as ours does.
    same = [found[f"{name}, same iterations"]["reliability"] for name in ("memoir", "plain", "plain, frozen")]
    assert same == [same[0]] * 3


def test_a_speedup_is_that_of_the_turns():
    theirs, ours = {"seconds_by_turn": [10.0, 40.0, 60.0]}, {"seconds_by_turn": [1.0, 8.0, 10.0]}
    assert bench.speedup(theirs, ours) == 6


def test_a_device_has_a_name():
    assert bench.device_name(torch.device("cpu")).strip()


def test_synthetic_masks_fit_their_width():
    bank = MaskBank(100)
    bank.replace([str(i) for i in range(5000)], bench.synthetic_masks(5000, 100))
    share = bank.masks(torch.arange(5000).numpy()).float().mean()
    assert 0.24 < share < 0.26 and int(bench.synthetic_masks(5000, 100)[:, 1].max()) < 2**36


def test_overheads_leave_the_bank_as_it_was(model):
    editor = make_editor("memoir", model, **SETTINGS)
    editor.edit(EDITS)
    packed = editor.memory.bank.packed.copy()
    found = bench.overheads(editor, EDITS[:1], (10, 20), rounds=1)
    assert [row["edits"] for row in found] == [10, 20] and all(row["decode"] > 0 for row in found)
    assert editor.memory.bank.ids == [edit.id for edit in EDITS] and (editor.memory.bank.packed == packed).all()


def test_overheads_are_those_of_questions_that_read_the_memory(model, monkeypatch):
    routes, ask = [], ResidualMemory._ask
    monkeypatch.setattr(ResidualMemory, "_ask", lambda *args: routes.append(ask(*args)) or routes[-1])
    editor = make_editor("memoir", model, **SETTINGS)
    bench.overheads(editor, EDITS[:2], (10,), rounds=2)
    assert list(editor.edits) == [edit.id for edit in EDITS[:2]]
    assert len(routes) >= 2 * 3 * 2 and all(route.fired.all() for route, _ in routes)  # prompts, rounds, prefills each
    editor.memory.tau = 2.0
    with pytest.raises(EditError, match="do not read the memory"):
        bench.overheads(editor, EDITS[:2], (10,), rounds=2)


@pytest.mark.parametrize("name", bench.REAL_SHAPES)
def test_shapes_are_those_of_the_published_models(name):
    model = bench.shaped(name, torch.device("meta"))
    shape = bench.SHAPES[name]
    site = model.site(1)
    assert (model.family, len(model.blocks), site.out_features, site.in_features) == (shape.family, 2, shape.d, shape.D)


def test_methods_at_a_real_shape_have_a_row_each_or_a_reason(model, monkeypatch):
    monkeypatch.setattr(bench, "shaped", lambda name, device: model)
    labels, said = ["ft+iterations=2", "memoir+tau=0", "memoir+ahead=2+iterations=4+tau=0"], []
    found = bench.measure_shapes(["gpt-j-6b"], labels, n_edits=3, say=said.append)
    rows = {row["method"]: row for row in bench.shape_rows(found)}
    assert list(rows) == labels and len(said) == 3 and model.editor is None
    assert [rows[label]["iterations"] for label in labels] == ["2", "30", "4"]  # the paper's, where nothing is said
    for label in labels[1:]:
        assert float(rows[label]["floor"]) > 0 and float(rows[label]["prefill at 1000 edits"]) > 0
    assert rows[labels[0]]["decode at 1000 edits"] is None and rows[labels[0]]["note"] is None
    assert bench.shapes_summary(found).keys() == {*(f"gpt-j-6b, {label}" for label in labels), "seconds"}
    monkeypatch.setattr(bench, "BUDGET_SECONDS", -1)
    (late,) = bench.shape_rows(bench.measure_shapes(["gpt-j-6b"], ["ft"], n_edits=2, say=said.append))
    assert (late["seconds per edit"], late["note"]) == (None, "not begun: -1 s had passed")


def test_the_command_ends_with_its_six_numbers(monkeypatch, capsys, tmp_path):
    small = functools.partial(bench.measure, n_edits=2, rounds=1, counts=(10,), nearby=20, masks=(100,))
    monkeypatch.setattr(bench, "measure", small)
    assert main(["bench", "--quick", "--methods", "memoir", "--out", str(tmp_path / "bench.json")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == read_json(tmp_path / "bench.json")["summary"] and len(summary) == 6
    assert summary.keys() >= {"edit_speedup_vs_plain", "prefill_overhead", "mask_search_bandwidth_share"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [(["--shape", "llama-9"], "llama-3-8b, mistral-7b, gpt-j-6b or all"), (["--methods", "mmoir"], "mmoir")],
)
def test_mistakes_end_before_anything_is_measured(capsys, wrong, named):
    assert main(["bench", *wrong]) == 2
    assert named in capsys.readouterr().err
