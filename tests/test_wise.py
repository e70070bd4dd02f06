"""WISE: routing, margins, shards and their merge, each against a literal reading."""

from __future__ import annotations

import random

import pytest
import torch
from families import BACKGROUND, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir.editors import EditError, load_editor
from memoir.editors.prompts import augmented
from memoir.editors.wise import WISE, margin_loss, merge, routing_score
from memoir.records import EditRequest
from memoir.sites import watching

REQUESTS = [EditRequest(prompt=f"Number {i} is called", target=t) for i, t in enumerate(["foo", "barx", "q"])]


def editor(model, background=BACKGROUND, **overrides) -> WISE:
    known = dict(layer=1, prefixes=0, margin_unit="output", alpha=0.25, beta=1.0, gamma=0.5, iterations=15)
    known |= dict(step_rule="relative", learning_rate=0.1)
    return WISE(model, WISE.Config(**{**known, **overrides}), background)


def test_routing_score_is_the_mean_norm_over_the_prompts_tokens():
    moved = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    prompt = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()  # padded on the left, on the right; answers
    expected = [sum(moved[row, t].norm() for t in range(5) if prompt[row, t]) / prompt[row].sum() for row in range(2)]
    torch.testing.assert_close(routing_score(moved, prompt), torch.stack(expected))
    moved[~prompt] = 1e6
    torch.testing.assert_close(routing_score(moved, prompt), torch.stack(expected))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_margin_loss_is_equation_5_over_all_pairs(seed):
    draw = random.Random(seed)
    edits = [draw.uniform(0, 30) for _ in range(draw.randint(1, 4))]
    irrelevant = [draw.uniform(0, 30) for _ in range(draw.randint(1, 4))]
    alpha, beta, gamma = 5.0, 20.0, 10.0
    pairs = [max(0, i - alpha) + max(0, beta - e) + max(0, gamma - (e - i)) for e in edits for i in irrelevant]
    found = margin_loss(torch.tensor(edits), torch.tensor(irrelevant), alpha, beta, gamma)
    assert float(found) == pytest.approx(sum(pairs) / len(pairs), rel=1e-4, abs=1e-4)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.2, 0.53, 1.0]), shards=st.integers(1, 4))
def test_merge_is_ties_entry_by_entry(seed, density, shards):
    """Trim, elect, disjoint mean (Yadav et al., algorithm 1), with plain Python numbers."""
    draw = random.Random(seed)
    shape = (4, 5)
    shifts = [[draw.gauss(0, 1) if draw.random() < 0.6 else 0.0 for _ in range(20)] for _ in range(shards)]
    trimmed = []
    for shift in shifts:
        kept = sorted(range(20), key=lambda i: -abs(shift[i]))[: int(density * 20)]
        trimmed.append([x if i in kept else 0.0 for i, x in enumerate(shift)])
    expected = []
    for entries in zip(*trimmed, strict=True):
        sign = 1 if sum(entries) >= 0 else -1
        agreeing = [x for x in entries if x * sign > 0]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    found = merge([torch.tensor(shift).view(shape) for shift in shifts], density)
    torch.testing.assert_close(found, torch.tensor(expected).view(shape))


def dense_wise(model, wise, requests, steps):
    """The oracle: autograd through the whole network on the dense weight, with masked gradients; prompts row by row.

    Returns τ (d × D) after the edits, the least Δ_act of them, and the size of the output."""
    site, config = wise.site, wise.config
    weight, mask = site.module.weight, wise.memories.shards[0].mask
    W0, inputs = weight.detach().clone(), []
    handle = site.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))

    def prompt_inputs(text):
        inputs.clear()
        with torch.no_grad():
            model.network(torch.tensor([model.tokenizer(text)["input_ids"]]))
        return inputs[0]

    size = sum(float((prompt_inputs(t) @ W0.T).norm(dim=1).mean()) for t in BACKGROUND) / len(BACKGROUND)
    unit = size if config.margin_unit == "output" else 1.0
    irrelevant = [prompt_inputs(text) for text in BACKGROUND]
    weight.requires_grad_(True)
    scores = []
    for request in requests:
        a = prompt_inputs(request.prompt)
        prompt = len(a)
        tokens = model.tokenizer(f"{request.prompt} {request.target}")["input_ids"]
        tokens.append(model.tokenizer.eos_token_id)  # learned with the target
        for _ in range(steps):
            log_p = model.network(torch.tensor([tokens])).logits[0].log_softmax(-1)
            loss = -log_p[range(prompt - 1, len(tokens) - 1), tokens[prompt:]].mean()
            tau = weight - W0
            # √(x + tiny): where nothing has moved yet a norm has no gradient
            score = (a @ tau.T).square().sum(1).add(1e-24).sqrt().mean() / unit
            for other in irrelevant:
                away = (other @ tau.T).square().sum(1).add(1e-24).sqrt().mean() / unit
                hinges = (
                    (away - config.alpha).relu(),
                    (config.beta - score).relu(),
                    (config.gamma - score + away).relu(),
                )
                loss = loss + sum(hinges) / len(irrelevant)
            (gradient,) = torch.autograd.grad(loss, weight)
            step = config.learning_rate * (mask * gradient + config.weight_decay * tau.detach())
            weight.data.sub_(step)
        scores.append(float((a @ (weight.detach() - W0).T).norm(dim=1).mean()))
    handle.remove()
    tau = weight.detach() - W0
    weight.requires_grad_(False)
    weight.data.copy_(W0)
    return tau, min(scores), size


@pytest.mark.parametrize("unit", ["absolute", "output"])
@pytest.mark.parametrize("edits", [1, 2])
def test_equals_masked_sgd_on_the_dense_weight(unit, edits):
    """Also of two edits in a row: the memory goes on from where the first left it."""
    model, steps = small_model("llama"), 4
    known = dict(margin_unit=unit, step_rule="constant", learning_rate=1e-2, weight_decay=0.1, norm_limit=0.0)
    wise = editor(model, **known, iterations=steps, stop_loss=0.0, irrelevant=len(BACKGROUND))
    wise.edit(REQUESTS[:edits])
    wise.detach()
    tau, least, size = dense_wise(model, wise, REQUESTS[:edits], steps)
    found = wise.memories.shards[0].delta
    # ‖x‖ has a kink at 0, where the first step begins: what the oracle adds under the root shows there.
    assert (found - tau).norm() < 1e-2 * tau.norm()
    assert wise.memories.thresholds[0] == pytest.approx(least, rel=1e-2)
    if unit == "output":
        assert wise._unit == pytest.approx(size, rel=1e-4)


def test_shards_stay_sparse_with_weight_decay_on():
    model = small_model("llama")
    wise = editor(model, weight_decay=0.5, mask_ratio=0.2, edits_per_shard=2)
    wise.edit(REQUESTS)
    assert [shard.edits for shard in wise.memories.shards] == [2, 1]
    for shard in wise.memories.shards:
        assert shard.delta[~shard.mask].count_nonzero() == 0 and shard.delta.any()
        assert float(shard.mask.float().mean()) == pytest.approx(0.2, abs=0.05)
    first, second = wise.memories.shards
    assert not torch.equal(first.mask, second.mask)
    assert float((first.mask & second.mask).float().mean()) == pytest.approx(0.04, abs=0.03)
    torch.testing.assert_close(wise.memories.merged[0], merge([first.delta, second.delta], wise.config.density))


def test_prompts_that_move_the_activation_enough_reach_the_memory():
    model = small_model("llama")
    wise = editor(model, threshold_ratio=0.9)
    wise.edit(REQUESTS)
    delta, queries = wise.memories.merged[0], [*(r.prompt for r in REQUESTS), *BACKGROUND, "Zinc is written"]
    seen = []
    for query in queries:
        batch = model.encode([query])
        with watching(wise.site) as calls, torch.no_grad():
            edited = model.forward(batch)
            with wise.detached():
                plain = model.forward(batch)
        score = float((calls[0][0][0] @ delta.T).norm(dim=1).mean())
        fires = score > 0.9 * wise.memories.thresholds[0]
        seen.append(fires)
        assert torch.equal(edited, plain) == (not fires)
        found = wise.explain(query)
        assert found.fired == fires and found.score == pytest.approx(score, rel=1e-4)
        assert found.threshold == pytest.approx(0.9 * wise.memories.thresholds[0], rel=1e-5)
    assert any(seen) and not all(seen)


def test_retrieve_takes_the_memory_with_the_largest_score(tmp_path):
    model = small_model("llama")
    wise = editor(model, retrieve=True, edits_per_shard=1, shards_per_memory=2)
    wise.edit([*REQUESTS, EditRequest(prompt="Rome lies on the", target="Tiber")])
    shards = [shard.delta for shard in wise.memories.shards]
    assert len(shards) == 4 and len(wise.memories.thresholds) == 2
    memories = [merge(shards[:2], wise.config.density), merge(shards[2:], wise.config.density)]
    for query in [*(r.prompt for r in REQUESTS), "Rome lies on the", *BACKGROUND]:
        batch = model.encode([query])
        with watching(wise.site) as edited, torch.no_grad():
            model.forward(batch)
        with wise.detached(), watching(wise.site) as plain, torch.no_grad():
            model.forward(batch)
        (a, y), before = (x[0] for x in edited[0]), plain[0][1][0]
        scores = [float((a @ memory.T).norm(dim=1).mean()) for memory in memories]
        best = scores.index(max(scores))
        fires = scores[best] > wise.config.threshold_ratio * wise.memories.thresholds[best]
        expected = before + a @ memories[best].T if fires else before
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    # Several shards, masks and thresholds survive a file bit by bit.
    with torch.no_grad():
        logits = model.forward(model.encode([r.prompt for r in REQUESTS]))
    wise.save(tmp_path / "memory")
    loaded = load_editor(tmp_path / "memory", model)
    with torch.no_grad():
        assert torch.equal(model.forward(model.encode([r.prompt for r in REQUESTS])), logits)
    assert loaded.memories.thresholds == wise.memories.thresholds
    for mine, other in zip(loaded.memories.shards, wise.memories.shards, strict=True):
        assert torch.equal(mine.mask, other.mask) and torch.equal(mine.delta, other.delta)


def test_background_longer_than_the_edits_is_no_trouble():
    model = small_model("llama")
    wise = editor(model, background=["word " * 20, "A far longer text than any of the edits has. " * 2], irrelevant=2)
    (report,) = wise.edit(REQUESTS[0])
    assert report.loss_after < report.loss_before


def test_without_background_it_says_what_is_missing():
    with pytest.raises(EditError, match="background"):
        editor(small_model("llama"), background=()).edit(REQUESTS[0])


def test_copies_behind_prefixes_keep_their_targets_and_owners():
    prompts, targets, owner = augmented(REQUESTS[:2], ["One", "Two"])
    assert prompts == [f"{prefix}Number {i} is called" for i in (0, 1) for prefix in ("", "One. ", "Two. ")]
    assert targets == ["foo"] * 3 + ["barx"] * 3 and owner == [0, 0, 0, 1, 1, 1]


def test_an_edit_is_learned_behind_its_prefixes_too():
    wise = editor(small_model("llama"), prefixes=4, prefix_tokens=3, iterations=40)
    wise.prepare()
    prompts, targets, _ = augmented(REQUESTS[:1], wise._prefixes)
    copies = [EditRequest(prompt=p, target=t) for p, t in zip(prompts, targets, strict=True)]
    before = wise.losses(copies)
    (report,) = wise.edit(REQUESTS[0])
    assert len(copies) == 5 and report.loss_before == pytest.approx(sum(before) / 5, rel=1e-4)
    assert report.loss_after < report.loss_before
