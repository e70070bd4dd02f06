"""AlphaEdit against its published formula, dense and in float64, and the keys that it promises to leave alone."""

from __future__ import annotations

import pytest
import torch
from families import REQUESTS, small_model

from memoir.editors import EditError
from memoir.editors.alphaedit import AlphaEdit, null_space_projector, projected_update
from memoir.sites import watching

BACKGROUND = ["The weather is mild today.", "Two plus two makes four."]


@pytest.fixture
def problem():
    """Keys of ordinary text that span 7 of 16 dimensions, new keys, keys of earlier edits, and residuals."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(16, 7) @ normal(7, 50), normal(16, 3), normal(16, 12), normal(5, 3)


def test_the_projector_is_onto_the_null_space(problem):
    K0, *_ = problem
    P = null_space_projector(K0 @ K0.T / 50, 1e-6)
    torch.testing.assert_close(P, P.T)
    torch.testing.assert_close(P @ P, P)
    assert float(P.trace()) == pytest.approx(16 - 7)
    assert (P @ K0).norm() < 1e-10 * K0.norm()
    values = torch.tensor([0.001, 0.019, 0.021, 5.0])
    torch.testing.assert_close(null_space_projector(values.diag(), 2e-2), torch.tensor([1.0, 1.0, 0.0, 0.0]).diag())
    with pytest.raises(EditError, match=r"null_threshold = 0.0001, but the eigenvalues of C lie between 0.001 and"):
        null_space_projector(values.diag(), 1e-4)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 10.0])
def test_the_update_is_the_published_one_and_leaves_preserved_keys_alone(problem, ridge):
    K0, keys, earlier, residual = problem
    P = null_space_projector(K0 @ K0.T / 50, 1e-6)
    identity = ridge * torch.eye(16, dtype=torch.float64)
    published = residual @ keys.T @ P @ torch.linalg.inv(keys @ keys.T @ P + identity)
    found, _ = projected_update(residual, keys, P, ridge)
    torch.testing.assert_close(found, published, rtol=1e-8, atol=1e-10)
    assert (found @ K0).norm() < 1e-9 * found.norm() * K0.norm()
    # With the keys of earlier edits, written in any portions.
    _, known = projected_update(residual[:, :2], earlier[:, :2], P, ridge)
    for count in range(2, 12):
        found, _ = projected_update(residual, keys, P, ridge, known)
        system = earlier[:, :count] @ earlier[:, :count].T @ P + keys @ keys.T @ P + identity
        torch.testing.assert_close(found, residual @ keys.T @ P @ torch.linalg.inv(system), rtol=1e-8, atol=1e-10)
        assert (found @ K0).norm() < 1e-9 * found.norm() * K0.norm()
        _, known = projected_update(residual[:, :1], earlier[:, count : count + 1], P, ridge, known)


def editor(model, background=BACKGROUND, **settings) -> AlphaEdit:
    defaults = dict(
        layers=(0, 1), prefixes=0, moments="background", value_steps=8, null_threshold=1e-4, ridge=1e-3, clamp=4.0
    )
    return AlphaEdit(model, AlphaEdit.Config(**{**defaults, **settings}), background)


def keys_of(model, site, texts):
    with watching(site) as seen, torch.no_grad():
        for text in texts:
            model.network(torch.tensor([model.tokenizer(text)["input_ids"]]))
    return torch.cat([a[0] for a, _ in seen])


def test_edits_leave_the_outputs_of_preserved_texts_alone():
    """The texts behind C keep their outputs and their logits, while the edits arrive."""
    model = small_model("llama")
    texts = ["A river", "Two plus"]  # fewer tokens than dimensions, so that there is a null space
    batch = model.encode(texts)
    before = model.forward(batch)
    alpha = editor(model, texts, null_threshold=1e-6)
    reports = alpha.edit(REQUESTS)
    assert all(r.loss_after < r.loss_before for r in reports)
    for site in alpha.sites:
        delta, K0 = alpha.deltas[site].delta, keys_of(model, site, texts)
        assert (K0 @ delta.T).norm() < 2e-2 * delta.norm() * K0.norm(dim=1).mean()
        own = keys_of(model, site, [r.prompt for r in REQUESTS])
        assert (K0 @ delta.T).norm() / len(K0) ** 0.5 < 0.1 * (own @ delta.T).norm() / len(own) ** 0.5
    edited = model.encode([r.prompt for r in REQUESTS])
    with alpha.detached():
        plain = model.forward(edited)

    def moved(batch, before):
        """How far the logits of a batch's tokens are from before, relatively."""
        own = batch.attention_mask
        return float((model.forward(batch) - before)[own].norm() / before[own].norm())

    assert moved(batch, before) < 0.05 * moved(edited, plain)


def test_earlier_edits_are_held_in_place():
    """K_p K_pᵀ: what a later edit writes moves an earlier key's output less than if it were forgotten."""
    model = small_model("llama")
    alpha = editor(model, layers=(1,), ridge=1e-2)
    alpha.edit(REQUESTS[:2])
    (site,), first = alpha.sites, alpha.deltas[alpha.sites[0]].delta
    kept = dict(alpha.kept)
    rows = alpha.rows(REQUESTS[:1])
    _, keys = alpha.observe(rows)
    moved = []
    for known in (kept, {}):
        alpha.deltas[site].set(first)
        alpha.kept = dict(known)
        alpha.edits.pop(REQUESTS[2].id, None)
        alpha.edit(REQUESTS[2])
        moved.append(float(((alpha.deltas[site].delta - first) @ keys[site].T).norm()))
    assert moved[0] < 0.3 * moved[1]


def test_projectors_are_cached_with_what_they_belong_to(tmp_path, monkeypatch):
    from memoir.editors import alphaedit

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(BACKGROUND))
    model = small_model("llama")
    first = editor(model, moments=str(texts))
    first.edit(REQUESTS[0])
    expected = first.deltas[first.sites[1]].delta
    monkeypatch.setattr(alphaedit, "null_space_projector", None)  # whoever decomposes now, fails
    model = small_model("llama")
    again = editor(model, moments=str(texts))
    again.edit(REQUESTS[0])
    assert torch.equal(again.deltas[again.sites[1]].delta, expected)
    with pytest.raises(TypeError):
        editor(model, moments=str(texts), null_threshold=0.5).edit(REQUESTS[0])
