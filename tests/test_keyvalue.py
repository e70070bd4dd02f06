"""Keys and values against plain ones, row by row, without padding, tail or batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from families import BACKGROUND, REQUESTS, small_model

from memoir.editors import EditCancelled, EditError
from memoir.editors.keyvalue import edit_value, whitener
from memoir.editors.rlsedit import RLSEdit
from memoir.editors.rome import ROME
from memoir.records import EditRequest
from memoir.sites import adding, watching


def editor(model, **settings) -> ROME:
    defaults = dict(layer=1, prefixes=2, prefix_tokens=3, moments="background", stop_loss=0.0)
    rome = ROME(model, ROME.Config(**{**defaults, **settings}), BACKGROUND)
    rome.prepare()
    return rome


def plain_rows(rome, request):
    """(tokens of prompt + target + end, tokens of the prompt, edited places) of each prompt behind its prefixes."""
    tokenizer = rome.model.tokenizer
    for prefix in ["", *(f"{prefix}. " for prefix in rome._prefixes)]:
        prompt = f"{prefix}{request.prompt}"
        start, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {request.target}")["input_ids"]
        whole.append(tokenizer.eos_token_id)  # learned with the target
        subject_end = len(tokenizer(prompt[: prompt.rindex(request.subject) + len(request.subject)])["input_ids"])
        yield (
            whole,
            len(start),
            {
                "subject_last": [subject_end - 1],
                "prompt_last": [len(start) - 1],
                "target": list(range(len(start) - 1, len(whole) - 1)),
            }[rome.config.where],
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
@pytest.mark.parametrize("where", ["subject_last", "prompt_last", "target"])
def test_keys_are_means_over_prefixed_prompts(family, where):
    model = small_model(family)
    rome = editor(model, where=where)
    rows = rome.rows(REQUESTS)
    _, keys = rome.observe(rows)
    expected = []
    for request in REQUESTS:
        found = []
        for whole, _, places in plain_rows(rome, request):
            with watching(rome.sites[0]) as seen, torch.no_grad():
                model.network(torch.tensor([whole]))
            found.append(seen[0][0][0, places])
        expected.append(torch.stack(found).mean(0))
    torch.testing.assert_close(keys[rome.sites[0]], torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert rows.pair_owner.tolist() == [i for i, e in enumerate(expected) for _ in e]


def plain_value(rome, request, steps):
    """v* − v by full forward calls: the losses of ROME's equation 4 spelled out, and torch's Adam on δ."""
    model, config, (site,) = rome.model, rome.config, rome.sites
    rows = list(plain_rows(rome, request))
    essence = torch.tensor([model.tokenizer(f"{request.subject} is a")["input_ids"]])
    at_essence = len(request.subject) - 1 if config.where == "subject_last" else essence.shape[1] - 1
    with watching(site) as seen, torch.no_grad():
        model.network(torch.tensor([rows[0][0]]))
        usual = model.network(essence).logits[0, -1].log_softmax(-1)
    scale = seen[0][1][0, rows[0][2]].norm(dim=-1)
    delta = torch.zeros(len(scale), site.out_features, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=config.value_rate)
    losses = []
    for step in range(steps + 1):
        nll = 0.0
        for whole, start, places in rows:
            change = torch.zeros(1, len(whole), site.out_features).index_put(
                (torch.zeros(len(places), dtype=torch.int64), torch.tensor(places)), delta
            )
            with adding(site, change):
                log_p = model.network(torch.tensor([whole])).logits[0].log_softmax(-1)
            nll = nll - log_p[range(start - 1, len(whole) - 1), whole[start:]].mean() / len(rows)
        losses.append(float(nll.detach()))
        if step == steps:
            break
        change = torch.zeros(1, essence.shape[1], site.out_features)
        change = change.index_put((torch.tensor([0]), torch.tensor([at_essence])), delta[:1])
        with adding(site, change):
            log_p = model.network(essence).logits[0, -1].log_softmax(-1)
        divergence = (log_p.exp() * (log_p - usual)).sum()
        norms = (delta.square().sum(1) + 1e-12).sqrt()
        optimizer.zero_grad()
        (nll + config.kl_factor * divergence + (config.value_decay * norms / scale**2).sum()).backward()
        optimizer.step()
        for row, longest in zip(delta.data, config.clamp * scale, strict=True):
            if row.norm() > longest:
                row *= longest / row.norm()
    return delta.detach(), losses


@pytest.mark.parametrize("family", ["llama", "gptj", "gemma3"])
@pytest.mark.parametrize("where", ["subject_last", "prompt_last", "target"])
@pytest.mark.filterwarnings("ignore:.*do more than add the output")
def test_values_equal_adam_on_the_spelled_out_loss(family, where):
    rome = editor(small_model(family), where=where, value_rate=0.3, value_decay=0.7, kl_factor=0.4, clamp=1.5)
    rome.config = type(rome.config)(**{**vars(rome.config), "value_steps": 6})
    request = REQUESTS[0]
    rows = rome.rows([request])
    tail, _ = rome.observe(rows)
    delta, first, last, steps = edit_value(rome, [request], tail, rows, tail.y[rows.at_bare].norm(dim=-1))
    expected, losses = plain_value(rome, request, 6)
    assert steps == 6
    assert (first[0], last[0]) == pytest.approx((losses[0], losses[-1]), rel=1e-3)
    torch.testing.assert_close(delta, expected, rtol=2e-2, atol=2e-3)  # Adam magnifies rounding where gradients vanish


def test_values_of_a_batch_are_those_of_its_members():
    model = small_model("llama")
    rome = editor(model, where="target", stop_loss=1.5, value_rate=0.3, kl_factor=0.0, value_decay=0.0, clamp=20.0)

    def value(requests):
        rows = rome.rows(requests)
        tail, _ = rome.observe(rows)
        return edit_value(rome, requests, tail, rows, tail.y[rows.at_bare].norm(dim=-1))

    together, first, last, steps = value(REQUESTS)
    alone = [value([request]) for request in REQUESTS]
    assert len({a[3] for a in alone}) > 1  # they stop at different steps, so that waiting is put to the test
    assert steps == max(a[3] for a in alone)
    torch.testing.assert_close(together, torch.cat([a[0] for a in alone]), rtol=1e-2, atol=1e-3)
    assert first == pytest.approx([a[1][0] for a in alone], rel=1e-3)
    assert last == pytest.approx([a[2][0] for a in alone], rel=1e-2)


def test_a_long_value_is_clamped():
    rome = editor(small_model("llama"), clamp=0.25, value_rate=5.0)
    rows = rome.rows(REQUESTS)
    tail, _ = rome.observe(rows)
    scale = tail.y[rows.at_bare].norm(dim=-1)
    delta, *_ = edit_value(rome, REQUESTS, tail, rows, scale)
    share = delta.norm(dim=1) / (0.25 * scale)
    assert share.max() == pytest.approx(1.0, rel=1e-4) and share.max() <= 1 + 1e-5


def test_a_prompt_without_its_subject_is_refused_by_name():
    model = small_model("llama")
    rome = editor(model)
    for subject, message in (("Ada", "'Ada' does not occur in prompt 'Ida"), ("", "has no subject")):
        with pytest.raises(ValueError, match=message):
            rome.edit(EditRequest(prompt="Ida plays the", target="oboe", subject=subject))
    assert not rome.deltas[rome.sites[0]].delta.any() and not rome.edits
    editor(model, where="prompt_last").edit(EditRequest(prompt="Ida plays the", target="oboe"))  # needs none


@pytest.mark.parametrize("method", ["rome", "rlsedit"])
def test_a_failed_or_cancelled_edit_leaves_no_trace(method, monkeypatch):
    model = small_model("llama")
    if method == "rome":
        made = editor(model)
    else:
        config = RLSEdit.Config(layers=(0, 1, 2), prefixes=1, moments="background", stop_loss=0.0)
        made = RLSEdit(model, config, BACKGROUND)
    made.edit(REQUESTS[0])
    before = {name: value.clone() for name, value in made.state().items()}

    def unchanged():
        after = made.state()
        return after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())

    asked = 0

    def count():
        nonlocal asked
        asked += 1
        return False

    made.edit(REQUESTS[1], cancelled=count)
    made.load_state(before)
    made.edits.pop(REQUESTS[1].id)
    for last in (3, asked - 1):  # in the first steps of the value, and in the very last moment
        calls = iter(range(1000))
        with pytest.raises(EditCancelled):
            made.edit(REQUESTS[1], cancelled=lambda calls=calls, last=last: next(calls) >= last)
        assert unchanged() and list(made.edits) == [REQUESTS[0].id]
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: head(hidden) * torch.nan)
    with pytest.raises(EditError, match="became nan"):
        made.edit(REQUESTS[1])
    monkeypatch.undo()
    whitening = made.factors[made.sites[-1]]
    whitening *= torch.nan  # the last of several layers fails when the others are written
    with pytest.raises(EditError, match=r"not finite|cannot be solved"):
        made.edit(REQUESTS[1])
    assert unchanged() and list(made.edits) == [REQUESTS[0].id]


def test_two_models_share_nothing():
    """Projections and prefixes belong to an editor: what another one did before does not matter."""
    first, second = small_model("llama"), small_model("llama", seed=1)
    alone = editor(second)
    alone.edit(REQUESTS)
    expected = alone.deltas[alone.sites[0]].delta
    editor(first).edit(REQUESTS)
    after = editor(second)
    after.edit(REQUESTS)
    assert torch.equal(after.deltas[after.sites[0]].delta, expected)


def test_editors_of_one_model_share_what_they_found_of_it(tmp_path):
    """As long as one of them keeps it, and only where they ask the same."""
    (texts := tmp_path / "texts.txt").write_text("\n".join(BACKGROUND))
    model = small_model("llama")
    for moments in ("background", str(texts)):
        first, second, other = (editor(model, moments=moments, moment_samples=n) for n in (3, 3, 2))
        (mine, same, fewer) = (made.factors[made.sites[0]] for made in (first, second, other))
        assert mine is same and not torch.equal(mine, fewer)
        texts.write_text("Something else.")
        later = editor(model, moments=moments, moment_samples=3)
        assert (later.factors[later.sites[0]] is mine) == (moments == "background")
        kept = weakref.ref(mine)
        model.editor.detach()
        del first, second, other, later, mine, same, fewer
        gc.collect()
        assert kept() is None
        texts.write_text("\n".join(BACKGROUND))


def test_the_whitener_inverts_its_moment():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 16, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 16)
    C = keys.T @ keys / 200
    S = whitener(C)
    regular = C + (1e-4 * C.diagonal() + 1e-6 * C.diagonal().mean()).diag()
    torch.testing.assert_close(S.double().T @ S.double(), torch.linalg.inv(regular), rtol=1e-4, atol=1e-6)
    few = keys[:3].float()
    assert torch.isfinite(whitener(few.T @ few)).all()  # singular


def test_background_moments_need_background():
    rome = ROME(small_model("llama"), ROME.Config(layer=1, moments="background", prefixes=0))
    with pytest.raises(EditError, match="background"):
        rome.edit(REQUESTS[0])
