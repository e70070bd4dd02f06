"""Subjects in the fingerprint: an early block's mask of the subject's last token beside the prompt's own mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import BACKGROUND, small_model

from memoir.editors import load_editor, make_editor
from memoir.records import EditRequest
from memoir.sites import watching
from memoir.text import subject_tokens

EDITS = [
    EditRequest(prompt="The mother tongue of Ann Lee is", target="Welsh", subject="Ann Lee"),
    EditRequest(prompt="The mother tongue of Bo Rask is", target="Sami", subject="Bo Rask"),
    EditRequest(prompt="Nothing is named in this sentence, which", target="ends"),
]
QUERIES = ["Where was Bo Rask born?", "Ann Lee", "The mother tongue of Cy Voss is", EDITS[2].prompt, "zz"]
SETTINGS = dict(layer=2, subject_layer=0, subject_share=0.4, k=20, feature="last", tau=0.5, prefixes=1, prefix_tokens=3)


pytestmark = pytest.mark.filterwarnings("ignore:.*do more than add the output.*")  # Gemma 3


@pytest.fixture(params=["llama", "gptj", "gemma3"])
def model(request):
    return small_model(request.param)


@pytest.fixture(params=["memoir", "memoir-rls"])
def editor(request, model):
    return make_editor(request.param, model, background=BACKGROUND, **SETTINGS)


def largest(a: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(-np.abs(a), kind="stable")[:count].tolist())


@torch.no_grad()
def inputs(editor, prompt: str) -> tuple[np.ndarray, np.ndarray]:
    """What reaches the early block's projection and the edited one, (T × D) each, on the unedited model."""
    with editor.detached(), watching(editor.model.site(0)) as early, watching(editor.site) as late:
        editor.model.forward(editor.model.encode([prompt]))
    return early[0][0][0].float().numpy(), late[0][0][0].float().numpy()


def score(editor, query: str) -> tuple[float, str]:
    """R_match of a query by brute force, and the edit that has it."""
    tokens, late = inputs(editor, query)
    best = []
    for edit in EDITS:
        its_tokens, its_late = inputs(editor, edit.prompt)
        at = subject_tokens(editor.model, edit.prompt, edit.subject)[1] if edit.subject else -1
        bits = round(20 * 0.4 / 0.6)
        prompt = len(largest(late[-1], 20) & largest(its_late[-1], 20))
        subject = max(len(largest(token, bits) & largest(its_tokens[at], bits)) for token in tokens)
        best.append(((prompt + subject) / (20 + bits), edit.id))
    return max(best, key=lambda pair: pair[0])


def test_the_score_counts_the_prompt_and_the_nearest_token(editor):
    editor.edit(EDITS)
    for query in [*QUERIES, *(edit.prompt for edit in EDITS)]:
        found, (expected, _) = editor.explain(query), score(editor, query)
        assert found.score == pytest.approx(expected, abs=1e-9), query
        assert found.fired == (expected >= 0.5)
    assert [editor.explain(edit.prompt).score for edit in EDITS] == [1.0, 1.0, 1.0]


def test_a_batch_reads_what_its_members_read_alone(editor):
    editor.edit(EDITS)
    alone = [editor.explain(query) for query in QUERIES]
    assert editor.matches(QUERIES) == [found.edit_id if found.fired else None for found in alone]
    together = editor.model.generate(QUERIES, max_new_tokens=4)
    assert together == [editor.ask(query, max_new_tokens=4) for query in QUERIES]


def test_no_further_pass_is_made(editor):
    editor.edit(EDITS)
    calls = []
    handle = editor.model.network.register_forward_hook(lambda *_: calls.append(1))
    editor.model.forward(editor.model.encode(QUERIES))
    handle.remove()
    assert len(calls) == 1


def test_look_ahead_and_one_by_one_store_the_same_masks(model):
    together = make_editor("memoir", model, background=BACKGROUND, **SETTINGS)
    together.edit(EDITS)
    apart = make_editor("memoir", model, background=BACKGROUND, **SETTINGS)
    for edit in EDITS:
        apart.edit(edit)
    assert np.array_equal(together.memory.bank.packed, apart.memory.bank.packed)


def test_saved_loaded_and_forgotten(editor, tmp_path):
    editor.edit(EDITS)
    editor.save(tmp_path / "memory")
    before = [(editor.explain(query), editor.ask(query, max_new_tokens=3)) for query in QUERIES]
    again = load_editor(tmp_path / "memory", editor.model)
    assert [(again.explain(query), again.ask(query, max_new_tokens=3)) for query in QUERIES] == before
    again.forget(EDITS[1].id)
    assert EDITS[1].id not in {again.explain(query).edit_id for query in QUERIES}
    for edit in (EDITS[0], EDITS[2]):
        again.forget(edit.id)
    assert not any(page.any() for page in again.memory.pages)


def test_tau_is_calibrated_on_tokens_too(model):
    editor = make_editor("memoir", model, background=BACKGROUND * 40, **SETTINGS | dict(tau="auto"))
    editor.prepare()
    assert 0 < editor.memory.tau <= 1
    editor.edit(EDITS)
    assert all(editor.explain(edit.prompt).fired for edit in EDITS)


def test_the_block_must_come_before_the_edited_one(model):
    with pytest.raises(ValueError, match="subject_layer = 2, expected a block before layer = 2"):
        make_editor("memoir", model, background=BACKGROUND, **SETTINGS | dict(subject_layer=2))
