from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, small_model

from memoir.sites import Attachment, DeltaWeight, PromptScope, Span, Tail, adding, composes, places, watching
from memoir.text import predicting

PROMPTS, TARGETS = ["The tower of Ostrava stands in", "Zinc is"], ["Brno", "Xy or something longer"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return small_model(request.param)


def hooked(module):
    return module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_site_is_the_projection_whatever_its_layout(model, layer):
    site = model.site(layer)
    assert (site.out_features, site.in_features) == tuple(site.weight.shape) == (32, 64)
    assert site.module is dict(model.network.named_modules())[site.name]
    with torch.no_grad(), watching(site) as seen:
        model.forward(model.encode(PROMPTS))
    (a, y), bias = seen[0], getattr(site.module, "bias", None)
    expected = a @ site.weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_tail_is_the_full_forward_call(model, layer):
    site, batch = model.site(layer), model.encode(PROMPTS, TARGETS)
    positions = predicting(batch.target_mask)
    change = torch.randn(*batch.input_ids.shape, 32)
    with torch.no_grad(), adding(site, change):
        expected = model.forward(batch)[positions]
    works = composes(model, site, batch)
    assert works == (model.family != "gemma3_text")
    with torch.no_grad():
        found = Tail.record(model, site, batch, composes=works).logits(change, places(positions))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_tail_of_some_rows_is_theirs_alone(model, layer):
    site, prompts, targets = model.site(layer), [*PROMPTS, "A third"], [*TARGETS, "one"]
    batch = model.encode(prompts, targets)
    positions = predicting(batch.target_mask)
    change = torch.randn(*batch.input_ids.shape, 32)
    works = composes(model, site, batch)
    whole = Tail.record(model, site, batch, composes=works)
    for rows in (slice(0, 1), slice(1, 3)):
        part = whole.of(rows)
        with torch.no_grad(), adding(site, change[rows]):
            expected = model.forward(batch[rows])[positions[rows]]
        with torch.no_grad():
            found = part.logits(change[rows], places(positions[rows]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(part.a, whole.a[rows]) and torch.equal(part.batch.input_ids, batch.input_ids[rows])


def test_the_last_mlp_sees_only_the_positions_asked_for_unless_somebody_looks():
    model = small_model("llama")
    batch = model.encode(PROMPTS, TARGETS)
    positions = predicting(batch.target_mask)
    tail, last = Tail.record(model, model.site(0), batch), model.site(2)
    change = torch.randn(*batch.input_ids.shape, 32)
    rows: dict[int, list[int]] = {1: [], 2: []}
    for layer, seen in rows.items():
        gate = model.site(layer).mlp.gate_proj
        gate.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        found = tail.logits(change, places(positions))
        assert rows == {1: [positions.numel()], 2: [int(positions.sum())]}
        with watching(last) as seen:
            expected = tail.logits(change, places(positions))
    assert seen[0][0].shape[:2] == positions.shape and rows[2][-1] == positions.numel()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not hooked(last.mlp)


def test_gradients_through_the_tail_are_those_through_the_network(model):
    site, batch = model.site(1), model.encode(PROMPTS, TARGETS)
    positions = predicting(batch.target_mask)
    works = composes(model, site, batch)
    gradients = []
    for replayed in (False, works):
        change = torch.zeros(*batch.input_ids.shape, 32, requires_grad=True)
        loss = Tail.record(model, site, batch, composes=replayed).logits(change, places(positions)).logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, change)[0])
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_a_family_that_does_not_compose_says_so():
    model = small_model("gemma3")
    batch = model.encode(PROMPTS)
    with pytest.warns(UserWarning, match=r"blocks of small-gemma3 \(gemma3_text\) do more than add the output of"):
        assert not model.tail(model.site(1), batch).composes
    assert not model.tail(model.site(1), batch).composes  # said once


def test_delta_weight_is_an_edited_matrix(model):
    site, batch = model.site(1), model.encode(PROMPTS)
    patch = DeltaWeight(site, "cpu")
    attachment = Attachment(model.network, model.scope, {site: patch})
    with torch.no_grad():
        before = model.forward(batch)
        patch.set(0.1 * torch.randn(32, 64))
        found = model.forward(batch)
        attachment.remove()
        assert torch.equal(model.forward(batch), before)
        site.weight.add_(patch.delta)
        torch.testing.assert_close(found, model.forward(batch), rtol=1e-4, atol=1e-4)


class Recorder:
    """A patch that only writes down the spans it is called with."""

    def __init__(self):
        self.spans: list[Span] = []

    def __call__(self, a, y, span):
        self.spans.append(span)
        return y


def recorded(model):
    recorder = Recorder()
    return recorder, Attachment(model.network, model.scope, {model.site(1): recorder})


def test_the_prompt_is_what_the_mask_admits_then_the_decision_stays():
    model = small_model("llama")
    recorder, _ = recorded(model)
    batch = model.encode(PROMPTS)
    with torch.no_grad():
        model.network.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), max_new_tokens=3, min_new_tokens=3,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    prefill, *steps = recorder.spans
    assert torch.equal(prefill.prompt, batch.attention_mask)
    assert len(steps) == 2 and all(s.decoding and s.memo is prefill.memo for s in steps)


def test_interleaved_generations_keep_their_own_decisions():
    model = small_model("llama")
    recorder, _ = recorded(model)
    with torch.no_grad():
        caches = [model.network(**model.tokenizer(p, return_tensors="pt"), use_cache=True) for p in PROMPTS]
        for i in (1, 0):
            model.network(input_ids=torch.tensor([[5]]), past_key_values=caches[i].past_key_values, use_cache=True)
    first, second, after_second, after_first = recorder.spans
    assert after_first.memo is first.memo and after_second.memo is second.memo and first.memo is not second.memo


def test_a_copied_cache_goes_on_from_the_same_prefill():
    model = small_model("llama")
    recorder, _ = recorded(model)
    with torch.no_grad():
        cache = model.network(**model.tokenizer(PROMPTS[0], return_tensors="pt"), use_cache=True).past_key_values
        for filled in (copy.deepcopy(cache), copy.copy(cache)):
            model.network(input_ids=torch.tensor([[5]]), past_key_values=filled, use_cache=True)
        prefill, *steps = recorder.spans
        prefill.memo["large"] = object()
        assert all(step.decoding and step.memo is prefill.memo for step in steps)
        saved = pickle.loads(pickle.dumps(cache))  # without what patches keep, which no file of the user's asked for
        with pytest.raises(RuntimeError, match="filled before the editor was attached"):
            model.network(input_ids=torch.tensor([[5]]), past_key_values=saved)


def test_misuse_of_a_cache_or_a_mask_is_named():
    model = small_model("llama")
    with torch.no_grad():
        filled = model.network(**model.tokenizer(PROMPTS[0], return_tensors="pt"), use_cache=True).past_key_values
        _, attachment = recorded(model)
        with pytest.raises(RuntimeError, match="filled before the editor was attached"):
            model.network(input_ids=torch.tensor([[5]]), past_key_values=filled)
        batch = model.encode(PROMPTS)
        with (
            model.scope.prompt(torch.ones(1, 3, dtype=torch.bool)),
            pytest.raises(ValueError, match=r"shape \(1, 3\), expected that of the tokens"),
        ):
            model.network(input_ids=batch.input_ids)
        attachment.remove()


def test_a_scope_needs_tokens():
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        PromptScope().before_forward(torch.nn.Identity(), (), {})
