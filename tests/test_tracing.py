"""Causal tracing against a literal one, restoring one state at a time."""

from __future__ import annotations

import contextlib

import pytest
import torch
from families import FAMILIES, small_model

from memoir.explore.tracing import causal_trace
from memoir.sites import rewriting
from memoir.text import subject_tokens

PROMPT, SUBJECT = "So Ida Verne plays it", "Ida Verne"


def literal(model, kind, noise, samples, window, seed):
    """The clean and the noisy probability, and every indirect effect, one forward call each."""
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    first, last = PROMPT.index("I"), PROMPT.index("I") + len(SUBJECT) - 1  # bytes are tokens
    embedding, blocks = model.network.get_input_embeddings(), range(len(model.blocks))
    modules = [model.blocks[i] if kind == "hidden" else model.site(i).module for i in blocks]
    states = {}

    def keep(i):
        return rewriting(modules[i], lambda output: states.setdefault(i, output.clone()))

    with torch.no_grad(), contextlib.ExitStack() as stack:
        for i in blocks:
            stack.enter_context(keep(i))
        embedded = embedding(ids)[0, first : last + 1]
        probabilities = model.network(ids).logits[0, -1].softmax(-1)
    answer = int(probabilities.argmax())
    drawn = torch.randn(samples, *embedded.shape, generator=torch.Generator().manual_seed(seed))
    drawn *= noise * embedded.std()

    def noisy(sample, token=None, layers=()):
        def corrupt(output):
            output = output.clone()
            output[0, first : last + 1] += drawn[sample]
            return output

        def restoring(i):
            def restore(output):
                output = output.clone()
                output[0, token] = states[i][0, token]
                return output

            return rewriting(modules[i], restore)

        with torch.no_grad(), contextlib.ExitStack() as stack:
            stack.enter_context(rewriting(embedding, corrupt))
            for i in layers:
                stack.enter_context(restoring(i))
            return float(model.network(ids).logits[0, -1].softmax(-1)[answer])

    low = sum(noisy(s) for s in range(samples)) / samples
    effects = torch.zeros(ids.shape[1], len(blocks))
    for token in range(ids.shape[1]):
        for i in blocks:
            around = [j for j in blocks if abs(j - i) <= window // 2]
            effects[token, i] = sum(noisy(s, token, around) for s in range(samples)) / samples - low
    return float(probabilities[answer]), low, effects


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "window"), [("hidden", 1), ("mlp", 1), ("mlp", 3)])
def test_equals_restoring_one_state_at_a_time(family, kind, window):
    model = small_model(family)
    trace = causal_trace(model, PROMPT, SUBJECT, kind=kind, window=window, noise=2.0, samples=3, rows=12, seed=4)
    clean, corrupted, effects = literal(model, kind, 2.0, 3, window, 4)
    assert trace.clean == pytest.approx(clean, rel=1e-4)
    assert trace.corrupted == pytest.approx(corrupted, rel=1e-4)
    torch.testing.assert_close(trace.effects, effects, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_stream_at_the_last_token_is_the_whole_answer(family):
    trace = causal_trace(small_model(family), PROMPT, SUBJECT, samples=2)
    assert trace.corrupted + float(trace.effects[-1, -1]) == pytest.approx(trace.clean, rel=1e-4)
    assert trace.effects[:-1, -1].abs().max() < 1e-6  # nothing behind the last block looks back
    assert "".join(trace.tokens) == PROMPT


def test_a_subject_is_found_where_it_stands_last():
    model = small_model("llama")
    assert subject_tokens(model, "Ida met Ida.", "Ida") == (8, 10)
    assert subject_tokens(model, "Zoë ok", "Zoë") == (0, 3)  # two bytes, two tokens
    with pytest.raises(ValueError, match=r"'Ada' does not occur in prompt 'Ida met"):
        subject_tokens(model, "Ida met Ida.", "Ada")
    with pytest.raises(ValueError, match="has no subject"):
        subject_tokens(model, "Ida met Ida.", " ")


def test_wrong_options_are_named():
    model = small_model("llama")
    with pytest.raises(ValueError, match="kind = 'attention'"):
        causal_trace(model, PROMPT, SUBJECT, kind="attention")
    with pytest.raises(ValueError, match="window = 2"):
        causal_trace(model, PROMPT, SUBJECT, window=2)
