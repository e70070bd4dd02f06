"""τ = "auto": the share of unrelated questions that read the memory is the share that was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import small_model
from hypothesis import given
from hypothesis import strategies as st

from memoir import calibration
from memoir.bank import MaskBank
from memoir.editors import EditError, load_editor, make_editor
from memoir.records import EditRequest

TEXTS = [f"{verb} the {noun} by {place}." for verb in ("See", "Find", "Hold") for noun in "abcdef" for place in "xyz"]
EDITS = [EditRequest(prompt=f"Item {i} of {7 * i % 23} in box {i % 5} is", target=f"number {i}") for i in range(60)]
SETTINGS = dict(layer=1, k=16, prefixes=0, iterations=1, unrelated_share=0.1, on_conflict="keep-both")


def editor_on(model, **settings):
    return make_editor("memoir", model, background=TEXTS, **SETTINGS | settings)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=40), st.floats(0, 1))
def test_fewer_texts_pass_than_the_share_and_no_lower_threshold_does_as_well(overlaps, share):
    """Of n texts at most share × (n + 1) − 1 pass, so that a further one passes with probability ≤ share; or none."""
    overlaps = np.array(overlaps)
    tau, allowed = calibration.pick(overlaps, share), max(1, int(share * (len(overlaps) + 1))) - 1
    assert (overlaps >= tau).sum() <= allowed or tau == 1.0  # no τ keeps an overlap of 1 from passing
    lower = overlaps[overlaps < tau]
    if len(lower):
        assert (overlaps >= lower.max()).sum() > allowed


def test_a_further_text_passes_with_the_probability_that_was_asked_for():
    rng = np.random.default_rng(0)
    passed = [rng.random() >= calibration.pick(rng.random(204), 0.05) for _ in range(4000)]
    assert 0.04 < np.mean(passed) <= 0.055


def test_the_threshold_is_set_anew_when_the_number_of_edits_has_grown_by_a_quarter():
    moved, last = [], None
    for edits in range(200):
        if calibration.due(edits, last):
            moved.append(edits)
            last = edits
    assert moved == [0, 51, 64, 80, 100, 125, 157, 197]


def test_few_edits_are_stood_in_for_by_other_texts():
    masks = torch.zeros(4, 8, dtype=torch.bool)
    for row, columns in enumerate([(0, 1, 2, 3), (0, 1, 2, 4), (4, 5, 6, 7), (4, 5, 6, 0)]):
        masks[row, list(columns)] = True
    bank = MaskBank(8)
    assert calibration.nearest_overlaps(masks, bank).tolist() == [0.75, 0.75, 0.75, 0.75]
    bank.add([str(i) for i in range(51)], masks[:1].expand(51, -1))
    assert calibration.nearest_overlaps(masks, bank).tolist() == [1.0, 0.75, 0.0, 0.25]


def test_so_many_unrelated_questions_read_the_memory_and_no_more():
    model = small_model("llama")
    editor = editor_on(model)
    editor.edit(EDITS)
    assert 0 < editor.memory.tau < 1
    tau = editor.calibrate()
    reading = sum(found is not None for found in editor.matches(TEXTS))
    assert reading <= 0.1 * len(TEXTS)
    editor.memory.tau = np.nextafter(tau, 0) - 1 / 16  # one column less
    assert sum(found is not None for found in editor.matches(TEXTS)) > 0.1 * len(TEXTS)


def test_the_threshold_stays_from_edit_to_edit_and_through_a_file(tmp_path):
    model = small_model("llama")
    editor, seen = editor_on(model), []
    for edit in EDITS[:54]:
        editor.edit(edit)
        seen.append(editor.memory.tau)
    assert len(set(seen[:50])) == 1 and len(set(seen[50:])) == 1
    assert editor.explain(EDITS[0].prompt).threshold == seen[-1]
    editor.save(tmp_path / "memory")
    loaded = load_editor(tmp_path / "memory", model)
    assert loaded.memory.tau == seen[-1] and loaded.config.tau == "auto"
    loaded.edit(EDITS[54])
    assert loaded.memory.tau == seen[-1]


def test_without_texts_the_remedy_is_named():
    editor = make_editor("memoir", small_model("llama"), background=[], feature="last", **SETTINGS)
    with pytest.raises(EditError, match="tau 'auto' needs background prompts"):
        editor.edit(EDITS[0])
    editor = make_editor("memoir", small_model("llama"), background=TEXTS[:1], feature="last", **SETTINGS)
    with pytest.raises(EditError, match="tau 'auto' needs at least 2 background texts to compare, got 1"):
        editor.edit(EDITS[0])


def test_background_texts_pass_one_model_once_for_all_its_editors():
    model = small_model("llama")
    first = editor_on(model)
    first.prepare()
    calls = []
    handle = model.network.register_forward_pre_hook(lambda *call: calls.append(call))
    second = editor_on(model, k=8)
    second.prepare()
    assert not calls and torch.equal(second.memory.background, first.memory.background)
    assert int(second.unrelated[0].sum(1)[0]) == 8  # masks are each editor's own
    editor_on(model, layer=2).prepare()
    assert calls
    handle.remove()
    alone = editor_on(small_model("llama"), k=8)
    alone.prepare()
    assert torch.equal(alone.unrelated[0], second.unrelated[0]) and alone.memory.tau == second.memory.tau
