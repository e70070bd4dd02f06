"""GRACE: the codebook against a brute-force reading of Algorithm 1, and where a value stands in for the output."""

from __future__ import annotations

import math
import random

import pytest
import torch
from families import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from memoir.editors import EditCancelled, EditError
from memoir.editors.grace import GRACE, Codebook
from memoir.records import EditRequest
from memoir.sites import watching

REQUESTS = [EditRequest(prompt=f"Number {i} is called", target=t) for i, t in enumerate(["foo", "barx", "q"])]
WIDTH = 3


def editor(model, **overrides) -> GRACE:
    known = dict(layer=1, value_init="warm", learning_rate=0.5, iterations=30)
    return GRACE(model, GRACE.Config(**{**known, **overrides}))


def codebook() -> Codebook:
    return Codebook(torch.zeros(0, WIDTH), torch.zeros(0, 2), torch.zeros(0), [], [])


def algorithm_1(stream, first_radius):
    """GRACE's Algorithm 1, read literally with plain Python numbers: a list of [key, radius, label]."""
    entries = []
    for key, label in stream:
        distances = [math.dist(key, entry[0]) for entry in entries]
        if not entries:
            entries.append([key, first_radius, label])
            continue
        nearest = distances.index(min(distances))
        d, entry = distances[nearest], entries[nearest]
        if d > entry[1] + first_radius:
            entries.append([key, first_radius, label])
        elif entry[2] == label:
            entry[1] = max(d, entry[1])
        else:
            entry[1] = d / 2
            entries.append([key, d / 2, label])
    return entries


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), radius=st.sampled_from([0.1, 0.5, 1.0, 3.0]))
def test_codebook_follows_algorithm_1(seed, radius):
    draw = random.Random(seed)
    centres = [[draw.uniform(-3, 3) for _ in range(WIDTH)] for _ in range(4)]
    labels = [(1, 4), (2, 3), (5,), (2, 3, 0)]  # the first two have the same mean
    stream = [([c + draw.gauss(0, 0.5) for c in draw.choice(centres)], draw.choice(labels)) for _ in range(30)]
    expected, found = algorithm_1(stream, radius), codebook()
    for i, (key, label) in enumerate(stream):
        found.add(torch.tensor(key), torch.zeros(2), label, str(i), radius)
    assert found.labels == [label for _, _, label in expected]
    torch.testing.assert_close(found.keys, torch.tensor([key for key, _, _ in expected]))
    torch.testing.assert_close(found.radii, torch.tensor([radius for _, radius, _ in expected]), rtol=1e-4, atol=1e-5)
    # And it answers as a search through the list does; queries within rounding of a radius are left out.
    queries = [[draw.uniform(-4, 4) for _ in range(WIDTH)] for _ in range(50)]
    rows, _, fired = found.nearest(torch.tensor(queries))
    for query, row, answered in zip(queries, rows.tolist(), fired.tolist(), strict=True):
        distances = [math.dist(query, key) for key, _, _ in expected]
        nearest = distances.index(min(distances))
        assert distances[row] == pytest.approx(distances[nearest], rel=1e-5)
        if abs(distances[nearest] - expected[nearest][1]) > 1e-3:
            assert answered == (distances[nearest] < expected[nearest][1])


def test_an_expanded_entry_answers_the_key_that_expanded_it():
    book = codebook()
    for key in ([0.0, 0.0, 0.0], [1.7, 0.0, 0.0]):
        book.add(torch.tensor(key), torch.ones(2), (7,), "a", 1.0)
    _, fired = book.answers(torch.tensor([[1.7, 0.0, 0.0], [1.69, 0.0, 0.0], [1.71, 0.0, 0.0]]))
    assert len(book) == 1 and fired.tolist() == [True, True, False]


def test_a_label_of_the_same_mean_is_another_label():
    book = codebook()
    book.add(torch.tensor([0.0, 0.0, 0.0]), torch.zeros(2), (1, 4), "a", 1.0)
    book.add(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(2), (2, 3), "b", 1.0)
    assert book.radii.tolist() == [0.5, 0.5]


def test_another_answer_at_the_very_same_key_takes_the_entry_over():
    model = small_model("llama")
    grace = editor(model)
    grace.edit(REQUESTS[0])
    other = EditRequest(prompt=REQUESTS[0].prompt, target="zap")
    (report,) = grace.edit(other)
    assert report.replaced == (REQUESTS[0].id,) and list(grace.edits) == [other.id]
    assert len(grace.patch.codebook) == 1
    assert grace.losses([other])[0] == pytest.approx(report.loss_after, rel=1e-4)
    # In one batch too: the later one holds the entry.
    batched = editor(model, batch_size=2)
    batched.edit([REQUESTS[0], other])
    assert list(batched.edits) == [other.id]
    assert batched.losses([other])[0] == pytest.approx(report.loss_after, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma3"])
@pytest.mark.filterwarnings("ignore:the blocks of small-gemma3")
def test_the_value_is_what_adam_finds_through_the_whole_network(family):
    """The oracle: autograd through every layer, the value put in by a hook of its own, without the tail."""
    model, request, steps, rate = small_model(family), REQUESTS[1], 4, 0.1
    grace = editor(model, iterations=steps, learning_rate=rate, stop_loss=0.0, replace="onward")
    (report,) = grace.edit(request)
    found = grace.patch.codebook.values[0]
    grace.detach()
    tokens = model.tokenizer(f"{request.prompt} {request.target}")["input_ids"]
    tokens.append(model.tokenizer.eos_token_id)  # learned with the target
    last = len(model.tokenizer(request.prompt)["input_ids"]) - 1
    with watching(model.site(1)) as seen, torch.no_grad():
        model.network(torch.tensor([tokens[: last + 1]]))
    value = seen[0][1][0, -1].clone().requires_grad_()

    def put_in(module, args, output):
        return torch.cat([output[:, :last], value.expand(1, output.shape[1] - last, -1)], dim=1)

    handle, optimizer, losses = (
        model.site(1).module.register_forward_hook(put_in),
        torch.optim.Adam([value], lr=rate),
        [],
    )
    for step in range(steps + 1):
        log_p = model.network(torch.tensor([tokens])).logits[0].log_softmax(-1)
        loss = -log_p[range(last, len(tokens) - 1), tokens[last + 1 :]].mean()
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    handle.remove()
    torch.testing.assert_close(found, value.detach(), rtol=1e-3, atol=1e-4)
    assert report.loss_after == pytest.approx(losses[-1], rel=1e-3)


@pytest.mark.parametrize("replace", ["last", "prompt", "onward"])
def test_the_value_stands_where_it_should(replace):
    model = small_model("llama")
    grace = editor(model, replace=replace)
    grace.edit(REQUESTS[0])
    value, prompts = grace.patch.codebook.values[0], [REQUESTS[0].prompt, "Quite another prompt, and a longer one"]
    batch = model.encode(prompts, ["and on", "so"])
    with watching(grace.site) as edited, torch.no_grad():
        model.forward(batch)
    with grace.detached(), watching(grace.site) as plain, torch.no_grad():
        model.forward(batch)
    places = batch.prompt_mask[0].nonzero()[:, 0].tolist()
    expected = {"last": places[-1:], "prompt": places, "onward": range(places[-1], batch.input_ids.shape[1])}[replace]
    (_, y), (_, before) = edited[0], plain[0]
    assert torch.equal(y[1], before[1])
    for place in range(y.shape[1]):
        assert torch.equal(y[0, place], value if place in expected else before[0, place])


def test_a_batch_learns_what_its_members_learn_alone():
    model = small_model("llama")
    known = dict(iterations=5, stop_loss=0.0, learning_rate=0.1)
    alone, together = editor(model, **known), editor(model, **known, batch_size=3)
    alone.attach()
    alone.edit(REQUESTS)
    together.attach()
    together.edit(REQUESTS)
    one, other = alone.patch.codebook, together.patch.codebook
    assert one.labels == other.labels
    torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.values, other.values, rtol=1e-3, atol=1e-3)


def test_explain_names_the_edit_and_its_distance():
    model = small_model("llama")
    grace = editor(model)
    assert grace.explain("Anything").edit_id is None
    grace.edit(REQUESTS)
    for request in REQUESTS:
        found = grace.explain(request.prompt)
        assert (found.edit_id, found.fired) == (request.id, True)
        assert found.score == pytest.approx(0, abs=1e-3) and found.contribution > 0
    far = grace.explain("Something that has nothing to do with it")
    key = grace.patch.codebook.keys
    assert not far.fired and far.contribution == 0 and far.score > far.threshold
    assert far.edit_id in grace.edits and len(key) == 3


def test_a_loss_that_is_no_number_is_an_error_and_changes_nothing(monkeypatch):
    model = small_model("llama")
    grace = editor(model, radius=1e6)  # the next edit is a conflict with the first
    grace.edit(REQUESTS[0])
    before, head = grace.patch.codebook, model.head
    monkeypatch.setattr(model, "head", lambda hidden: head(hidden) * float("nan"))
    with pytest.raises(EditError, match=REQUESTS[1].id):
        grace.edit(REQUESTS[1])
    assert grace.patch.codebook is before and before.radii.tolist() == [1e6] and list(grace.edits) == [REQUESTS[0].id]


def test_a_cancelled_edit_leaves_radii_as_they_were():
    model = small_model("llama")
    grace = editor(model, radius=1e6, stop_loss=0.0)  # every further edit is a conflict with the first
    grace.edit(REQUESTS[0])
    calls = iter(range(100))
    with pytest.raises(EditCancelled):
        grace.edit(REQUESTS[1], cancelled=lambda: next(calls) >= 3)
    assert grace.patch.codebook.radii.tolist() == [1e6]
