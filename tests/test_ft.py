"""FT against torch's own Adam on the dense weight, and the two places its loss can stand."""

from __future__ import annotations

import pytest
import torch
from families import small_model

from memoir.editors.ft import FT
from memoir.records import EditRequest

REQUESTS = [EditRequest(prompt=f"Number {i} is called", target=t) for i, t in enumerate(["foo", "barx", "q"])]


def editor(model, **settings) -> FT:
    return FT(model, FT.Config(**{"layer": 1, "learning_rate": 1e-2, "iterations": 5, "stop_loss": 0.0, **settings}))


def dense_adam(model, requests, *, variant, steps, rate, limit=0.0):
    """The oracle: full autograd and Adam on the projection's own weight, row by row, without padding.

    Returns the change of the weight (d × D) and the losses after each number of steps; the weight is put back."""
    weight = model.site(1).module.weight
    before, losses = weight.detach().clone(), []
    weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=rate)
    for step in range(steps + 1):
        total = 0.0
        for request in requests:
            prompt = model.tokenizer(request.prompt)["input_ids"]
            whole = model.tokenizer(f"{request.prompt} {request.target}")["input_ids"]
            whole.append(model.tokenizer.eos_token_id)  # learned with the target
            log_p = model.network(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = [len(prompt) - 1 if variant == "FT-L" else t - 1 for t in range(len(prompt), len(whole))]
            total = total - log_p[places, whole[len(prompt) :]].mean() / len(requests)
        losses.append(float(total.detach()))
        if step < steps:
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if limit:
                weight.data.copy_(before + (weight.data - before).clamp(-limit, limit))
    change = (weight - before).detach()
    weight.requires_grad_(False)
    weight.data.copy_(before)
    return (change if model.family != "gpt2" else change.T), losses


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("variant", ["FT-M", "FT-L"])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_adam_on_the_dense_weight(family, variant, batch):
    model = small_model(family)
    change, losses = dense_adam(model, REQUESTS[:batch], variant=variant, steps=5, rate=1e-2)
    ft = editor(model, variant=variant, batch_size=batch)
    reports = ft.edit(REQUESTS[:batch])
    assert sum(r.loss_before for r in reports) / batch == pytest.approx(losses[0], rel=1e-4)
    assert sum(r.loss_after for r in reports) / batch == pytest.approx(losses[-1], rel=1e-3)
    # Adam divides by |gradient|: where it is near 0, rounding alone decides a weight's direction. Hence not 1e-6.
    assert (ft.patch.delta - change).norm() < 5e-3 * change.norm()


def test_norm_limit_bounds_each_edit_by_itself():
    model = small_model("llama")
    change, _ = dense_adam(model, REQUESTS[:1], variant="FT-M", steps=5, rate=1e-2, limit=0.02)
    ft = editor(model, norm_limit=0.02)
    ft.edit(REQUESTS[0])
    first = ft.patch.delta.clone()
    assert first.abs().max() == pytest.approx(0.02)
    assert (first - change).norm() < 5e-3 * change.norm()
    ft.edit(REQUESTS[1])
    assert (ft.patch.delta - first).abs().max() <= 0.02 + 1e-7
    assert ft.patch.delta.abs().max() > 0.02


def test_stops_when_the_loss_is_low_enough():
    ft = editor(small_model("llama"), stop_loss=0.5, iterations=200)
    (report,) = ft.edit(REQUESTS[0])
    assert report.loss_after < 0.5 < report.loss_before
    assert 0 < report.iterations < 200
    assert ft.edit(REQUESTS[0])[0].iterations == 0


@pytest.mark.parametrize("variant", ["FT-M", "FT-L"])
def test_a_beginning_of_sequence_token_is_never_learned(variant):
    """A tokenizer that puts <s> in front of every text, as Llama's does, puts it in front of a lone target too."""
    from tokenizers.processors import TemplateProcessing

    model = small_model("llama")
    bos = model.tokenizer.bos_token_id
    model.tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    batch = model.encode([REQUESTS[0].prompt])
    assert batch.input_ids[0, 0] == bos  # the trap is set

    def probability_of_bos():
        return float(model.forward(batch)[0, -1].softmax(-1)[bos])

    before = probability_of_bos()
    ft = editor(model, variant=variant, iterations=60, learning_rate=3e-3)
    (report,) = ft.edit(REQUESTS[0])
    assert report.loss_after < report.loss_before
    assert probability_of_bos() < max(before, 1e-3)
