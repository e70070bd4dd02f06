"""DEFER: a gate that is soft while it learns and hard when it answers, against plain `nn.Linear` modules."""

from __future__ import annotations

import math

import pytest
import torch
from families import small_model
from torch import nn

from memoir.editors.defer import DEFER, gate
from memoir.records import EditRequest
from memoir.sites import watching

REQUESTS = [EditRequest(prompt=f"Number {i} is called", target=t) for i, t in enumerate(["foo", "barx", "q"])]
QUERIES = [*(r.prompt for r in REQUESTS), "A prompt about nothing", "Ida", "Zinc is written", "Rome lies on the"]


def editor(model, **settings) -> DEFER:
    return DEFER(model, DEFER.Config(**{"layer": 1, "learning_rate": 1e-2, "scope_loss": 1.0, **settings}))


def test_gate_is_the_sigmoid_of_a_linear_form():
    generator = torch.Generator().manual_seed(0)
    a, w, b = torch.randn(5, 7, generator=generator), torch.randn(7, generator=generator), torch.tensor(0.3)
    for row, found in zip(a.tolist(), gate(a, w, b).tolist(), strict=True):
        assert found == pytest.approx(
            1 / (1 + math.exp(-sum(x * y for x, y in zip(row, w.tolist(), strict=True)) - 0.3))
        )


def outputs(model, site, prompts):
    batch = model.encode(prompts)
    with watching(site) as seen, torch.no_grad():
        model.forward(batch)
    return *seen[0], batch


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_the_gate_is_hard_at_inference(threshold):
    """Whatever lies between 0 and 1 in training, an answer's outputs are all the predictor's, or all the model's."""
    model = small_model("llama")
    defer = editor(model, threshold=threshold, iterations=3, scope_loss=0.0, learning_rate=3e-3)
    defer.edit(REQUESTS[0])
    a, found, batch = outputs(model, defer.site, QUERIES)
    with defer.detached():
        _, plain, _ = outputs(model, defer.site, QUERIES)
    p = defer.patch.parameters
    opened = []
    for row in range(len(QUERIES)):
        query = a[row, batch.last_prompt[row]]
        g = float(torch.sigmoid(query @ p["gate_weight"] + p["gate_bias"]))
        assert 0.02 < g < 0.98  # soft, as training left it
        opened.append(g >= threshold)
        value = p["weight"] @ query + p["bias"]
        if g >= threshold:
            torch.testing.assert_close(found[row], value.expand_as(found[row]), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found[row], plain[row])
    explained = [defer.explain(query) for query in QUERIES]
    assert [e.fired for e in explained] == opened and all(e.threshold == threshold for e in explained)


def test_thresholds_of_that_test_tell_gates_apart():
    model = small_model("llama")
    defer = editor(model, iterations=3, scope_loss=0.0, learning_rate=3e-3)
    defer.edit(REQUESTS[0])
    openings = sorted(defer.explain(query).score for query in QUERIES)
    assert openings[0] < openings[-1] and any(openings[0] < t <= openings[-1] for t in (0.3, 0.5, 0.7))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scope_loss", [0.0, 1.0])
def test_equals_adam_on_two_linear_modules(family, scope_loss):
    """The oracle: the published adaptor in the projection's place, autograd through the whole network, row by row.

    Its query is the last token of the prompt, so that the answer behind it is not read."""
    model, steps, rate = small_model(family), 4, 1e-2
    defer = editor(model, iterations=steps, learning_rate=rate, stop_loss=0.0, scope_loss=scope_loss)
    start = {name: value.clone() for name, value in defer.patch.parameters.items()}
    defer.edit(REQUESTS[:2])
    found = defer.patch.parameters
    defer.detach()
    D, d = defer.site.in_features, defer.site.out_features
    gate_module, predictor = nn.Linear(D, 1), nn.Linear(D, d)
    with torch.no_grad():
        gate_module.weight.copy_(start["gate_weight"][None])
        gate_module.bias.copy_(start["gate_bias"][None])
        predictor.weight.copy_(start["weight"])
        predictor.bias.copy_(start["bias"])
    for request in REQUESTS[:2]:
        prompt = len(model.tokenizer(request.prompt)["input_ids"])
        tokens = model.tokenizer(f"{request.prompt} {request.target}")["input_ids"]
        tokens.append(model.tokenizer.eos_token_id)  # learned with the target
        opening = []

        def adaptor(module, args, output, place=prompt - 1, opening=opening):
            query = args[0][:, place]
            g = torch.sigmoid(gate_module(query))
            opening[:] = [g]
            return (g * predictor(query))[:, None] + (1 - g)[:, None] * output

        handle = defer.site.module.register_forward_hook(adaptor)
        optimizer = torch.optim.Adam([*gate_module.parameters(), *predictor.parameters()], lr=rate)
        for _ in range(steps):
            log_p = model.network(torch.tensor([tokens])).logits[0].log_softmax(-1)
            loss = -log_p[range(prompt - 1, len(tokens) - 1), tokens[prompt:]].mean()
            optimizer.zero_grad()
            (loss - scope_loss * opening[0].log().sum()).backward()
            optimizer.step()
        handle.remove()
    # Adam divides by |gradient|: where it is near 0, rounding alone decides a direction. Hence not 1e-6.
    assert (found["weight"] - predictor.weight).norm() < 5e-3 * (predictor.weight - start["weight"]).norm()
    assert (found["gate_weight"] - gate_module.weight[0]).norm() < 5e-3 * (
        found["gate_weight"] - start["gate_weight"]
    ).norm()
    assert float(found["gate_bias"]) == pytest.approx(float(gate_module.bias.detach()), abs=1e-4)


def test_the_report_is_of_the_hard_answer():
    model = small_model("llama")
    defer = editor(model)
    before = defer.losses([REQUESTS[0]])
    (report,) = defer.edit(REQUESTS[0])
    assert report.loss_before == pytest.approx(before[0], rel=1e-4)
    assert report.loss_after == pytest.approx(defer.losses([REQUESTS[0]])[0], rel=1e-4)
    assert report.loss_after < report.loss_before


def test_a_batch_of_edits_is_learned_together():
    model = small_model("llama")
    defer = editor(model, batch_size=3)
    reports = defer.edit(REQUESTS)
    assert len({r.iterations for r in reports}) == 1
    assert all(r.loss_after < r.loss_before for r in reports)
