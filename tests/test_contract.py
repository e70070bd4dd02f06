"""The laws that every editor keeps: all methods × all model families."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import pytest
import torch
from families import BACKGROUND, FAMILIES, small_model
from torch.nn.functional import cross_entropy

from memoir.editors import EDITORS, EditCancelled, EditError, Editor, load_editor, make_editor
from memoir.evaluation import Evaluation
from memoir.records import EditRequest

# Settings that suit random models of 32 dimensions; everything else is as for any unknown model.
SETTINGS = {
    "memoir": dict(
        feature="last", tau=0.9, prefixes=2, prefix_tokens=3, iterations=20, step_rule="constant", learning_rate=5.0
    ),
    "memoir-rls": dict(feature="last", tau=0.9, prefixes=0, value_steps=20, value_rate=0.5, ridge=1e-3),
}
KEY_VALUE = dict(moments="background", where="prompt_last", prefixes=0, value_steps=20, clamp=4.0)
SETTINGS |= {
    "rome": KEY_VALUE | dict(layer=1),
    "grace": dict(iterations=20),
    "defer": dict(iterations=20),
    "wise": dict(iterations=15),
    "memit": KEY_VALUE | dict(layers=(0, 1), moment_weight=0.1),
    "alphaedit": KEY_VALUE | dict(layers=(0, 1), null_threshold=1.0, ridge=0.1),
}
METHODS = list(EDITORS)
WITHOUT_WEIGHTS = {name for name, editor in EDITORS.items() if not editor.changes_model}
EDITS = [
    EditRequest(prompt="The tower of Ostrava stands in", target="Brno", subject="tower of Ostrava"),
    EditRequest(prompt="Ida Verne plays the", target="oboe", subject="Ida Verne"),
    EditRequest(prompt="Zinc is written", target="Xy", subject="Zinc"),
]
QUERIES = [*(e.prompt for e in EDITS), "A prompt about nothing", "Ida"]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return small_model(family)


# One process runs all laws of a method, so that the editors in `_EDITED` are made once.
@pytest.fixture(params=[pytest.param(method, marks=pytest.mark.xdist_group(method)) for method in METHODS])
def method(request):
    return request.param


def editor_for(method: str, model, **overrides):
    settings = SETTINGS.get(method) or own_settings(method)
    return make_editor(method, model, background=BACKGROUND, **settings | overrides)


def own_settings(method: str) -> dict:
    """`SMALL` of the method's own test module, where it says how the method is set on small random models."""
    module = f"test_{method}".replace("-", "_")
    return getattr(importlib.import_module(module), "SMALL", {}) if importlib.util.find_spec(module) else {}


def edit(editor, requests):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*do more than add the output.*")  # Gemma 3, tested on its own
        return editor.edit(requests)


def with_edits(method: str, model) -> Editor:
    """An editor with all of `EDITS`. Before the first of them it changes nothing."""
    before = logits(model)
    editor = editor_for(method, model)
    assert torch.equal(logits(model), before), f"a fresh {method} changes what {model.name} says"
    edit(editor, EDITS)
    return editor


_EDITED: dict[tuple[str, str], Editor] = {}


@pytest.fixture
def edited(method, family):
    """An editor with all of `EDITS`, shared by the laws that only ask: writing would take most of their time."""
    if (method, family) not in _EDITED:
        _EDITED[method, family] = with_edits(method, small_model(family))
    return _EDITED[method, family]


@torch.no_grad()
def logits(model, prompts=QUERIES, targets=None):
    return model.forward(model.encode(prompts, targets))


def loss(model, request) -> float:
    batch = model.encode([request.prompt], [request.target])
    with torch.no_grad():
        predicted = model.forward(batch)[:, :-1][batch.target_mask[:, 1:]]
    return float(cross_entropy(predicted, batch.input_ids[batch.target_mask]))


def test_detached_it_leaves_the_model_as_it_was_bit_by_bit(edited, model):
    """`model` is another copy of what is edited."""
    before, weights = logits(model), model.network.state_dict()
    if edited.name != "unedited":
        assert not torch.equal(logits(edited.model), before)
    with edited.detached():
        assert torch.equal(logits(edited.model), before)
    edited.detach()
    assert torch.equal(logits(edited.model), before)
    after = edited.model.network.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[k], v) for k, v in weights.items())
    edited.attach()


def test_same_seed_same_result_and_one_call_equals_many(edited, method, model):
    """Up to rounding, as prompts of a list may run through the model together."""
    expected = logits(edited.model)
    again = editor_for(method, model)
    edit(again, EDITS)
    assert torch.equal(logits(model), expected)
    one_by_one = editor_for(method, model)
    for request in EDITS:
        edit(one_by_one, request)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert list(one_by_one.edits) == list(again.edits) == [e.id for e in EDITS]


def test_an_edit_lowers_its_own_loss(method, model):
    if method in WITHOUT_WEIGHTS:
        pytest.skip(f"{method} learns nothing")
    editor = editor_for(method, model)
    before = loss(model, EDITS[0])
    edit(editor, EDITS[0])
    assert loss(model, EDITS[0]) < before


def test_a_batch_answers_as_its_members_do(edited):
    model = edited.model
    together = logits(model)[:, -1]
    for row, query in zip(together, QUERIES, strict=True):
        torch.testing.assert_close(logits(model, [query])[0, -1], row, rtol=1e-4, atol=1e-4)


def test_the_answer_does_not_enter_the_decision(edited):
    """What a target says cannot change the logits of the prompt before it; causal attention grants the rest."""
    model = edited.model
    for query in QUERIES:
        alone = logits(model, [query])[0]
        followed = logits(model, [query], ["something else"])[0]
        torch.testing.assert_close(followed[: len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_padding_on_the_right_changes_nothing(edited):
    model = edited.model
    batch = model.encode([EDITS[0].prompt])
    ids, mask = batch.input_ids, torch.ones_like(batch.input_ids)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=ids.dtype)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(1, 5, dtype=mask.dtype)], dim=1)
    with torch.no_grad():
        expected = model.network(input_ids=ids, attention_mask=mask).logits
        found = model.network(input_ids=padded, attention_mask=padded_mask).logits[:, : ids.shape[1]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generation_keeps_the_decision_of_the_prefill(edited):
    """With the KV cache, each token is what a teacher-forced pass over prompt + answer so far predicts."""
    model = edited.model
    batch = model.encode(QUERIES)
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        tokens = model.network.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), **options
        )
    width = batch.input_ids.shape[1]
    prompt_mask = torch.zeros_like(tokens, dtype=torch.bool)
    prompt_mask[:, :width] = batch.prompt_mask
    attention = torch.ones_like(tokens)
    attention[:, :width] = batch.attention_mask.long()
    with torch.no_grad(), model.scope.prompt(prompt_mask):
        forced = model.network(
            input_ids=tokens, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0)
        ).logits
    forced[..., 2] = -torch.inf  # min_new_tokens forbids the end of the sequence
    chosen = tokens[:, width:]
    best, given = forced[:, width - 1 : -1].max(-1).values, forced[:, width - 1 : -1].gather(-1, chosen[..., None])
    torch.testing.assert_close(given[..., 0], best, rtol=1e-3, atol=1e-3)


def test_save_and_load_give_the_same_outputs_bit_by_bit(method, model, tmp_path):
    editor = editor_for(method, model)
    edit(editor, EDITS)
    expected = logits(model)
    editor.save(tmp_path / "memory")
    loaded = load_editor(tmp_path / "memory", model)
    assert loaded.model.editor is loaded and list(loaded.edits) == list(editor.edits)
    assert torch.equal(logits(model), expected)
    # And both go on alike.
    more = EditRequest(prompt="Rome lies on the", target="Tiber", subject="Rome")
    edit(loaded, more)
    resumed = logits(model)
    editor.attach()
    edit(editor, more)
    assert torch.equal(logits(model), resumed)


def test_a_cancelled_or_failed_edit_leaves_everything_as_it_was(method, family, model, monkeypatch):
    editor = editor_for(method, model)
    edit(editor, EDITS[:2])
    before, calls = logits(model), iter(range(1000))
    with pytest.raises(EditCancelled), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        editor.edit(EDITS[2], cancelled=lambda: next(calls) >= (0 if method in WITHOUT_WEIGHTS else 2))
    assert torch.equal(logits(model), before)
    if method not in WITHOUT_WEIGHTS and family != "gemma3":  # its losses come from the whole network, not from `head`
        head = model.head
        with monkeypatch.context() as patched, pytest.raises(EditError, match=rf"{EDITS[2].id}.* became nan"):
            patched.setattr(model, "head", lambda hidden: head(hidden) * torch.nan)
            edit(editor, EDITS[2])
        assert torch.equal(logits(model), before)
    assert list(editor.edits) == [e.id for e in EDITS[:2]]


def test_any_method_works_after_its_neighbours_on_one_model():
    """What one editor left of a generation, the next one does not see."""
    used, earlier = small_model("llama"), "nothing"
    for method in [*METHODS, *reversed(METHODS)]:
        fresh = small_model("llama")
        for model in (fresh, used):
            edit(editor_for(method, model), EDITS[:1])
        assert torch.equal(logits(used), logits(fresh)), f"{method} after {earlier}"
        used.generate(EDITS[1].prompt, max_new_tokens=3)
        earlier = method


def test_scores_of_the_edited_model_against_a_plain_reading(edited):
    """Reliability, from the logits of one unpadded prompt at a time."""
    model = edited.model
    rel = Evaluation(edited, generate=False).scores(EDITS)["rel"]
    for request, found in zip(EDITS, rel, strict=True):
        batch = model.encode([request.prompt], [request.target])
        target = batch.input_ids[0][batch.target_mask[0]]
        predicted = logits(model, [request.prompt], [request.target])[0].argmax(-1)[-len(target) - 1 : -1]
        assert found == pytest.approx(float((predicted == target).float().mean()))


def test_what_many_prompts_read_is_what_each_of_them_reads(edited):
    found = edited.matches(QUERIES)
    if not edited.routes:
        assert found is None
        return
    explained = [edited.explain(query) for query in QUERIES]
    assert found == [each.edit_id if each.fired else None for each in explained]
    assert found[: len(EDITS)] == [e.id for e in EDITS]
