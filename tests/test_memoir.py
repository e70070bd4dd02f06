"""MEMOIR against plain, dense forms of itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import small_model
from torch.nn.functional import cross_entropy

from memoir.editors import EDITORS, EditError, load_editor, make_editor
from memoir.records import EditRequest
from memoir.sites import adding, watching

EDITS = [
    EditRequest(prompt=f"In the long list, the name of {name}", target=target)
    for name, target in zip("ABCDEF", ["plum", "anchor", "violet", "seven hills", "moss", "kite"], strict=True)
]
SETTINGS = dict(layer=1, k=24, feature="last", tau=0.96, prefixes=2, prefix_tokens=4)


@pytest.fixture
def model():
    return small_model("llama")


def scale(editor, edit_id):
    """How far weight decay has faded an edit."""
    return float(editor.scales[editor.memory.bank.ids.index(edit_id)])


def plain_sgd(model, editor, requests, *, steps, rate, decay, clip):
    """MEMOIR as a textbook writes it: autograd through the whole model into a dense W_m, torch's own SGD."""
    site, memory = editor.site, editor.memory
    weight = torch.zeros_like(memory.weight)
    for request in requests:
        copies = [request.prompt, *(f"{p}{request.prompt}" for p in editor._prefixes)]
        batch = model.encode(copies, [request.target] * len(copies), end=True)
        alone = model.encode([request.prompt])
        with editor.detached(), torch.no_grad(), watching(site) as seen:
            model.forward(alone)
            model.forward(batch)
        mask = memory.fingerprint(seen[0][0], alone.prompt_mask)[0]
        parameter = torch.nn.Parameter(weight)
        optimizer = torch.optim.SGD([parameter], lr=rate, weight_decay=decay)
        for _ in range(steps):
            with editor.detached(), adding(site, (seen[1][0] * mask) @ parameter.T):
                logits = model.forward(batch)
            loss = cross_entropy(logits[:, :-1][batch.learn_mask[:, 1:]], batch.input_ids[batch.learn_mask])
            optimizer.zero_grad()
            loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_([parameter], clip)
            optimizer.step()
        weight = parameter.detach()
    return weight


@pytest.mark.parametrize(("decay", "clip"), [(0.0, 0.0), (0.01, 0.0), (0.0, 0.05), (0.01, 0.05)])
def test_sgd_in_the_span_of_the_keys_is_sgd_on_the_whole_memory(model, decay, clip):
    settings = dict(iterations=6, step_rule="constant", learning_rate=0.7, weight_decay=decay, clip=clip, stop_loss=0)
    editor = make_editor("memoir", model, **SETTINGS, **settings)
    editor.edit(EDITS[:3])
    expected = plain_sgd(model, editor, EDITS[:3], steps=6, rate=0.7, decay=decay, clip=clip)
    assert (editor.memory.weight - expected).norm() <= 1e-5 * expected.norm()
    total = sum(scale(editor, i) * f.values.T @ editor.pairs(i)[0] for i, f in editor.factors.items())
    assert (total - expected).norm() <= 1e-5 * expected.norm()  # the factors are the memory


def test_the_paper_preset_is_the_released_algorithm(model):
    """The authors' release in plain torch: SGD on a dense W_m, one loss over n + 1 tokens, stopped by EarlyStopMeter's
    rule, behind contexts that continue five openings, with no end token."""
    overrides = dict(layer=1, k=24, tau=0.4, clip=0.5, learning_rate=2.0)
    editor = make_editor("memoir", model, preset="paper", **overrides)
    reports = editor.edit(EDITS[:3])
    site, weight, steps = editor.site, torch.zeros_like(editor.memory.weight), []
    with editor.detached():
        contexts = ["{}"]
        for length in (5, 10):
            for opening in ("I", "You", "Because", "Yes", "Q: "):
                ids = torch.tensor([model.tokenizer(opening)["input_ids"]])
                out = model.network.generate(input_ids=ids, max_new_tokens=length, pad_token_id=0)
                contexts.append(model.tokenizer.decode(out[0], skip_special_tokens=True) + " {}")
        for request in EDITS[:3]:
            prompts = [context.format(request.prompt) for context in contexts]
            batch, alone = model.encode(prompts, [request.target] * len(prompts)), model.encode([request.prompt])
            with torch.no_grad(), watching(site) as seen:
                model.forward(alone)
                model.forward(batch)
            mask = editor.memory.fingerprint(seen[0][0], alone.prompt_mask)[0]
            parameter = torch.nn.Parameter(weight.clone())
            optimizer = torch.optim.SGD([parameter], lr=2.0, weight_decay=1e-5)
            before = float("inf")
            for step in range(31):
                with adding(site, (seen[1][0] * mask) @ parameter.T):
                    log_p = model.forward(batch)[:, :-1].float().log_softmax(-1)
                each = -log_p.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.target_mask[:, 1:]
                loss = (each.sum(1) / (batch.target_mask.sum(1) + 1)).mean()
                if step == 30 or (loss <= 0.02 and abs(loss.item() - before) <= 1e-4):
                    break
                before = loss.item()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_([parameter], 0.5)
                optimizer.step()
            weight = parameter.detach()
            steps.append(step)
    assert (editor.memory.weight - weight).norm() <= 1e-5 * weight.norm()
    assert [report.iterations for report in reports] == steps
    assert len(set(editor.background)) == 100 and editor.config.on_conflict == "keep-both"


def test_a_batch_of_edits_is_one_joint_descent(model):
    """Gradient of the summed per-edit means in W_m, each edit under its own mask: one step against autograd."""
    settings = dict(
        SETTINGS, prefixes=0, iterations=1, step_rule="constant", learning_rate=0.3, weight_decay=0, clip=0, stop_loss=0
    )
    pair = [EditRequest(prompt=e.prompt, target=t) for e, t in zip(EDITS[:2], ["plum", "kite"], strict=True)]
    editor = make_editor("memoir", model, **settings, batch_size=2)
    editor.edit(pair)
    expected = torch.zeros_like(editor.memory.weight)
    for request in pair:  # equal lengths, so the joint mean is the mean of the means
        alone = make_editor("memoir", model, **settings)
        alone.edit(request)
        expected += alone.memory.weight
    torch.testing.assert_close(editor.memory.weight, expected, rtol=1e-4, atol=1e-6)


def dense_ridge(editor, ids):
    keys = torch.cat([editor.pairs(i)[0] for i in ids]).double().T
    values = torch.cat([editor.factors[i].values for i in ids]).double().T
    penalty = editor.ridge * torch.eye(len(keys), dtype=torch.float64)
    return values @ keys.T @ torch.linalg.inv(keys @ keys.T + penalty)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rls_is_the_batch_ridge_solution_over_all_edits(model, batch_size):
    settings = dict(SETTINGS, write="rls", value_rate=0.3, value_steps=5, ridge=0.1, fill=0)
    editor = make_editor("memoir", model, **settings, batch_size=batch_size)
    editor.edit(EDITS)
    expected = dense_ridge(editor, editor.edits)
    assert (editor.memory.weight - expected).norm() <= 1e-6 * expected.norm()


def test_strength_multiplies_what_the_first_edit_writes(model):
    written = []
    for strength in (1.0, 3.0):
        settings = dict(SETTINGS, write="rls", value_rate=0.3, value_steps=5, ridge=0.1, strength=strength)
        editor = make_editor("memoir", model, **settings)
        editor.edit(EDITS[:1])
        written.append(editor.memory.weight.clone())
        editor.detach()
    assert written[0].any()
    torch.testing.assert_close(written[1], 3 * written[0])


def test_a_full_page_is_left_alone_and_a_further_one_written(model, tmp_path):
    settings = dict(SETTINGS, write="rls", value_rate=0.3, value_steps=5, ridge=0.1)
    editor = make_editor("memoir", model, **settings, fill=0.2)
    editor.edit(EDITS)
    pages = [[i for i in editor.edits if editor.memory.page_of[i] == page] for page in range(len(editor.memory.pages))]
    assert len(pages) > 1 and [i for page in pages for i in page] == list(editor.edits)
    batch = model.encode([e.prompt for e in EDITS])
    answers = model.forward(batch)
    for ids, weight in zip(pages, editor.memory.pages, strict=True):
        expected = dense_ridge(editor, ids)
        assert (weight - expected).norm() <= 1e-6 * expected.norm()
        # What is read is the page of the edit that matches, whatever else is in the batch.
        a = torch.randn(1, 3, editor.site.in_features)
        row = editor.memory.bank.ids.index(ids[0])
        mask = editor.memory.bank.masks(np.array([row]))
        read = editor.memory.forward(a, torch.zeros(1, 3, weight.shape[0]), editor.memory.route(mask))
        torch.testing.assert_close(read[0], (a[0] * mask) @ weight.T, rtol=1e-4, atol=1e-6)
    editor.save(tmp_path / "memory")
    one, *others = pages[0]
    editor.forget(one)
    expected = dense_ridge(editor, others) if others else torch.zeros_like(editor.memory.weight)
    assert (editor.memory.pages[0] - expected).norm() <= 1e-5 * (expected.norm() or 1)
    editor.detach()
    again = load_editor(tmp_path / "memory", model)
    assert torch.equal(model.forward(batch), answers) and len(again.memory.pages) == len(pages)
    one = make_editor("memoir", model, **settings, fill=0)
    one.edit(EDITS)
    assert len(one.memory.pages) == 1


@pytest.mark.parametrize("settled", [False, True])
def test_forgetting_with_rls_is_a_solution_that_never_saw_the_edit(model, settled):
    settings = dict(SETTINGS, write="rls", value_rate=0.3, value_steps=5, ridge=0.1, fill=0)
    editor = make_editor("memoir", model, **settings)
    editor.edit(EDITS)
    if settled:
        editor.settle()
    editor.forget(EDITS[2].id)
    expected = dense_ridge(editor, [e.id for e in EDITS if e is not EDITS[2]])
    assert (editor.memory.weight - expected).norm() <= 1e-5 * expected.norm()
    assert EDITS[2].id not in editor.edits and EDITS[2].id not in editor.memory.bank.ids


def test_forgetting_with_sgd_subtracts_exactly_one_term(model):
    editor = make_editor(
        "memoir", model, **SETTINGS, iterations=5, weight_decay=0.01, step_rule="constant", learning_rate=2.0
    )
    editor.edit(EDITS)
    gone = EDITS[1].id
    factors = editor.factors[gone]
    expected = editor.memory.weight - scale(editor, gone) * (factors.values.T @ editor.pairs(gone)[0])
    editor.forget(gone)
    torch.testing.assert_close(editor.memory.weight, expected, rtol=0, atol=0)
    for request in [e for e in EDITS if e.id != gone]:
        editor.forget(request.id)
    assert not editor.memory.weight.any() and not editor.edits
    with pytest.raises(KeyError, match="no edit 'nobody' in this editor; it holds 0"):
        editor.forget("nobody")


def test_conflicts_replace_keep_or_raise(model):
    settings = dict(SETTINGS, iterations=10, step_rule="constant", learning_rate=5.0)
    other = EditRequest(prompt=EDITS[0].prompt, target="quince")
    replacing = make_editor("memoir", model, **settings)
    replacing.edit(EDITS[:2])
    (report,) = replacing.edit(other)
    assert report.replaced == report.conflicts == (EDITS[0].id,)
    assert list(replacing.edits) == [EDITS[1].id, other.id]
    assert len(replacing.memory.bank) == 2
    keeping = make_editor("memoir", model, **settings, on_conflict="keep-both")
    keeping.edit(EDITS[:2])
    (report,) = keeping.edit(other)
    assert report.replaced == () and report.conflicts == (EDITS[0].id,) and len(keeping.edits) == 3
    assert keeping.explain(other.prompt).edit_id == other.id  # of equal masks the newest is read
    raising = make_editor("memoir", model, **settings, on_conflict="raise")
    raising.edit(EDITS[:2])
    before = raising.memory.weight.clone()
    with pytest.raises(EditError, match=r"conflicts with edit .* are one question \(overlap 1\.00\)"):
        raising.edit(other)
    assert torch.equal(raising.memory.weight, before) and list(raising.edits) == [e.id for e in EDITS[:2]]
    # A prompt that merely reads another edit is another question: both stay.
    alike = make_editor("memoir", model, **settings | dict(tau=0.1, same_question=0.99))
    alike.edit(EDITS[:2])
    assert alike.explain(EDITS[2].prompt).fired
    (report,) = alike.edit(EDITS[2])
    assert report.conflicts == report.replaced == () and len(alike.edits) == 3
    # Case, white space and final punctuation make no other question.
    for prompt in ("in the LONG list,  the name of A?", "In the long list, the name of A ."):
        one = make_editor("memoir", model, **settings | dict(same_question=1.0))
        one.edit(EDITS[:2])
        (report,) = one.edit(EditRequest(prompt=prompt, target="quince"))
        assert report.replaced == (EDITS[0].id,)
    # The same answer to the same prompt is no conflict, but the same edit is not kept twice either.
    again = make_editor("memoir", model, **settings)
    again.edit(EDITS[0])
    (report,) = again.edit(EDITS[0])
    assert report.conflicts == () and report.replaced == (EDITS[0].id,)
    assert len(again.edits) == len(again.memory.bank) == len(again.factors) == 1


@pytest.mark.parametrize("write", ["sgd", "rls"])
@pytest.mark.parametrize("on_conflict", ["replace", "keep-both", "raise"])
def test_a_batch_with_conflicts_in_it_ends_as_one_by_one_does(model, write, on_conflict):
    form = dict(iterations=10, step_rule="constant", learning_rate=5.0) if write == "sgd" else dict(fill=0)
    settings = dict(SETTINGS, **form, write=write, on_conflict=on_conflict)
    other = EditRequest(prompt=EDITS[0].prompt, target="quince")
    renamed = EditRequest(prompt="Something else altogether", target="oak", id=EDITS[1].id)
    requests = [EDITS[0], EDITS[1], other, EDITS[2], renamed, EDITS[2]]

    def made(**changes):
        editor = make_editor("memoir", model, **settings, **changes)
        try:
            reports = editor.edit(requests)
        except EditError as error:
            assert on_conflict == "raise" and other.id in str(error)
            reports = []
        assert set(editor.edits) == set(editor.factors) == set(editor.memory.bank.ids) == set(editor.memory.page_of)
        assert len(editor.memory.bank) == len(editor.edits)
        return editor, [(report.edit_id, report.replaced, report.conflicts) for report in reports]

    singly, expected = made()
    together, found = made(batch_size=4)
    assert found == expected and list(together.edits) == list(singly.edits)
    assert together.edits == singly.edits
    for edit_id in list(together.edits):
        together.forget(edit_id)
    assert not together.memory.weight.any()


@pytest.mark.parametrize("write", ["sgd", "rls"])
@pytest.mark.parametrize("prefixes", [0, 2])
def test_prompts_run_ahead_make_the_same_edits(model, write, prefixes, monkeypatch):
    """A list's prompts run through the model in few calls, and the edits are the same but for rounding; also where an
    edit takes an earlier one out of W_m."""
    settings = dict(SETTINGS, prefixes=prefixes, write=write, stop_loss=3.0 if write == "sgd" else 0)
    settings |= (
        dict(weight_decay=0.01, iterations=30, step_rule="constant", learning_rate=2.0)
        if write == "sgd"
        else dict(value_steps=4)
    )
    otherwise = EditRequest(prompt=EDITS[3].prompt, target="harbour")
    requests = [*EDITS[:4], otherwise, EditRequest(prompt="Short", target="a"), EDITS[4], EDITS[0]]
    passes, tail = [], model.tail
    monkeypatch.setattr(model, "tail", lambda site, batch: passes.append(len(batch)) or tail(site, batch))
    singly = make_editor("memoir", model, **settings, ahead=1)
    expected = singly.edit(requests)
    assert passes == [1 + prefixes] * len(requests)
    passes.clear()
    ahead = make_editor("memoir", model, **settings)
    found = ahead.edit(requests)
    assert len(passes) <= 2 and passes[0] == len(requests) * (1 + prefixes)
    for one, other in zip(found, expected, strict=True):
        assert (one.edit_id, one.iterations, one.replaced) == (other.edit_id, other.iterations, other.replaced)
        assert (one.loss_before, one.loss_after) == pytest.approx((other.loss_before, other.loss_after), rel=1e-3)
    assert sum(bool(report.replaced) for report in found) == 2 and list(ahead.edits) == list(singly.edits)
    for page, its in zip(ahead.memory.pages, singly.memory.pages, strict=True):
        assert (page - its).norm() <= 1e-4 * its.norm()
    assert np.array_equal(ahead.memory.bank.packed, singly.memory.bank.packed)


def test_a_mistake_among_edits_that_run_ahead_is_told_when_its_turn_comes(model):
    editor = make_editor("memoir", model, **SETTINGS, ahead=32)
    bad = EditRequest(prompt="x" * 200, target="too long for the context")
    with pytest.raises(ValueError, match="exceed the context of 128"):
        editor.edit([*EDITS[:2], bad, EDITS[2]])
    assert list(editor.edits) == [e.id for e in EDITS[:2]] and len(editor.memory.bank) == 2
    editor.edit(EDITS[2:4])
    assert len(editor.edits) == 4


@pytest.mark.parametrize("write", ["sgd", "rls"])
def test_a_loss_that_is_no_number_leaves_the_memory_alone(model, write, monkeypatch):
    editor = make_editor("memoir", model, **SETTINGS, write=write)
    editor.edit(EDITS[:2])
    weight, packed = editor.memory.weight.clone(), editor.memory.bank.packed.copy()
    monkeypatch.setattr(model, "head", lambda hidden: hidden @ hidden.new_full((hidden.shape[-1], 259), torch.nan))
    bad = EditRequest(prompt=EDITS[0].prompt, target="nonsense")  # conflicts, so the first edit is out when it fails
    with pytest.raises(EditError, match=r"the loss of edit .* became nan"):
        editor.edit(bad)
    assert torch.equal(editor.memory.weight, weight) and (editor.memory.bank.packed == packed).all()
    assert list(editor.edits) == [e.id for e in EDITS[:2]] and set(editor.factors) == set(editor.edits)


def test_an_edit_that_fails_after_its_last_step_leaves_nothing_behind(model, monkeypatch):
    editor = make_editor("memoir", model, **SETTINGS)
    editor.edit(EDITS[0])
    weight = editor.memory.weight.clone()

    def interrupted(keys, values):
        raise KeyboardInterrupt

    monkeypatch.setattr("memoir.editors.memoir.compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(EDITS[1])
    assert torch.equal(editor.memory.weight, weight) and list(editor.factors) == [EDITS[0].id]


@pytest.mark.parametrize("method", [name for name, editor in EDITORS.items() if editor.can_forget])
def test_one_edit_twice_in_a_batch_is_held_once_and_forgotten_whole(model, method):
    settings = {} if method == "incontext" else {**SETTINGS, "write": EDITORS[method].write_rule}
    editor = make_editor(method.removesuffix("-rls"), model, batch_size=2, **settings)
    fresh = model.generate(EDITS[0].prompt, max_new_tokens=3)
    editor.edit([EDITS[0], EDITS[0]])
    assert list(editor.edits) == [EDITS[0].id]
    editor.forget(EDITS[0].id)
    assert model.generate(EDITS[0].prompt, max_new_tokens=3) == fresh
    editor.edit(EDITS[0])
    assert list(editor.edits) == [EDITS[0].id]


def test_explain_names_the_edit_that_answers(model):
    editor = make_editor("memoir", model, **SETTINGS, iterations=10, step_rule="constant", learning_rate=5.0)
    nothing = editor.explain("Anything")
    assert (nothing.edit_id, nothing.fired, nothing.contribution) == (None, False, 0.0)
    editor.edit(EDITS)
    for request in EDITS:
        found = editor.explain(request.prompt)
        assert (found.edit_id, found.score, found.threshold, found.fired) == (request.id, 1.0, 0.96, True)
        assert found.contribution == pytest.approx(editor.contribution(request.prompt), rel=1e-4)
    stranger = editor.explain("zzz zzz")
    assert not stranger.fired and stranger.contribution == 0 and stranger.score < 0.96


def test_routing_off_reads_the_memory_on_every_prompt(model):
    editor = make_editor(
        "memoir", model, **SETTINGS, iterations=5, step_rule="constant", learning_rate=5.0, routing=False
    )
    editor.edit(EDITS)
    assert editor.explain("zzz zzz").fired and editor.contribution("zzz zzz") > 0


def test_centred_features_need_a_background_and_keep_it(model, tmp_path):
    settings = dict(SETTINGS, feature="mean_centred", iterations=2)
    with pytest.raises(EditError, match="needs background prompts"):
        make_editor("memoir", model, **settings, background=()).edit(EDITS[0])
    texts = ["A plain sentence.", "Another, longer plain sentence about nothing."]
    editor = make_editor("memoir", model, **settings, background=texts)
    editor.edit(EDITS[0])
    with editor.detached(), torch.no_grad(), watching(editor.site) as seen:
        for text in texts:
            model.forward(model.encode([text]))
    expected = torch.stack([a[0].mean(0) for a, _ in seen]).mean(0)
    torch.testing.assert_close(editor.memory.background, expected, rtol=1e-4, atol=1e-6)


def test_a_saved_memory_holds_little_more_than_its_factors(model, tmp_path):
    editor = make_editor("memoir", model, **dict(SETTINGS, write="rls", value_steps=2, on_conflict="keep-both", fill=0))
    editor.edit([EditRequest(prompt=f"{i} items {i}", target=f"thing {i}") for i in range(40)])
    folder = editor.save(tmp_path / "memory")
    factors = sum(f.keys.nbytes + f.values.nbytes for f in editor.factors.values())
    assert (folder / "memory.safetensors").stat().st_size <= 1.2 * factors
    header = json.loads((folder / "config.json").read_text())
    assert header["method"] == "memoir-rls" and header["edits"] == 40
