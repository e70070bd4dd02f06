"""RLSEdit against the ridge solution over all its edits, dense and in float64; SimIE's recursion is its case μ = 0."""

from __future__ import annotations

import pytest
import torch
from families import BACKGROUND, REQUESTS, small_model

from memoir.editors import load_editor, make_config
from memoir.editors.memit import MEMIT
from memoir.editors.rlsedit import RLSEdit, recursive_update
from memoir.moments import second_moments
from memoir.records import EditRequest

KEY_VALUE = dict(moments="background", where="prompt_last", prefixes=0, value_steps=20, value_rate=0.5, clamp=4.0)
SMALL = KEY_VALUE | dict(layers=(0, 1), moment_weight=0.1)  # for the contract's small random models
D, d = 16, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ridge_solution(K: torch.Tensor, V: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
    """argmin ‖W K − V‖² + tr(W P Wᵀ), W = ΔW counted from W₀."""
    return V @ K.T @ torch.linalg.inv(K @ K.T + pull)


def editor(model, **settings) -> RLSEdit:
    return RLSEdit(model, RLSEdit.Config(**SMALL | settings), BACKGROUND)


@pytest.mark.parametrize("lam, mu", [(0.7, 0.0), (0.0, 1.3), (0.7, 1.3)])
@pytest.mark.parametrize("sizes", [[14], [1] * 14, [5, 1, 8], [1, 13]])
def test_edits_in_any_portions_are_the_ridge_solution_over_all_of_them(lam, mu, sizes):
    K, V, K0 = normal(D, 14), normal(d, 14, seed=1), normal(D, 40, seed=2)
    pull = lam**2 * torch.eye(D, dtype=K.dtype) + mu**2 * K0 @ K0.T
    root = torch.linalg.inv(torch.linalg.cholesky(pull)) if mu else 1 / lam
    delta, known = torch.zeros(d, D, dtype=K.dtype), None
    for keys, values in zip(K.split(sizes, dim=1), V.split(sizes, dim=1), strict=True):
        update, known = recursive_update(values - delta @ keys, keys, root, known)
        delta += update
    torch.testing.assert_close(delta, ridge_solution(K, V, pull), rtol=1e-8, atol=1e-10)


def test_many_edits_with_nothing_but_the_pull_are_simies_unrolled_solution():
    """SimIE, unrolled: Σ_t ΔŴ_t K_t K_tᵀ (λI + Σ_t K_t K_tᵀ)⁻¹, with ΔŴ_t K_t what edit t asks for, counted from W₀."""
    K, V, lam = normal(D, 30), normal(d, 30, seed=1), 10.0
    proposed = [v[:, None] @ k[None] / k.square().sum() for k, v in zip(K.T, V.T, strict=True)]  # a ΔŴ with ΔŴ k = v
    unrolled = sum(W @ torch.outer(k, k) for W, k in zip(proposed, K.T, strict=True))
    unrolled = unrolled @ torch.linalg.inv(lam * torch.eye(D, dtype=K.dtype) + K @ K.T)
    delta, known = torch.zeros(d, D, dtype=K.dtype), None
    for k, W in zip(K.T, proposed, strict=True):
        update, known = recursive_update(((W - delta) @ k)[:, None], k[:, None], lam**-0.5, known)
        delta += update
    torch.testing.assert_close(delta, unrolled, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("lam, mu", [(0.3, 0.0), (0.3, 1.0)])
@pytest.mark.parametrize("size", [1, 2])
def test_the_editor_keeps_every_edit_in_one_solution(lam, mu, size, tmp_path):
    """One by one or two at a time, saved and loaded between them: what each edit asked for when it came is fitted at
    once, towards the unedited weights and the outputs of ordinary text."""
    model = small_model("llama")
    rls, asked = editor(model, layers=(1,), lam=lam, mu=mu, batch_size=size), []

    def edit(rls: RLSEdit, requests: list[EditRequest]) -> None:
        (site,) = rls.sites
        patch, update = rls.deltas[site], rls.update

        def recorded(site, residual, keys, earlier):
            asked.append((keys.double(), (patch.delta @ keys + residual).double()))
            return update(site, residual, keys, earlier)

        rls.update = recorded
        rls.edit(requests)

    edit(rls, REQUESTS[:2])
    loaded = load_editor(rls.save(tmp_path / "memory"), model)
    edit(loaded, REQUESTS[2:])
    assert len(asked) == 4 - size
    (site,) = loaded.sites
    moment = second_moments(model, site, BACKGROUND, progress=False).double()
    pull = lam**2 * torch.eye(len(moment), dtype=moment.dtype) + mu**2 * 0.1 * moment
    if mu:  # what keeps a singular moment regular
        pull.diagonal().add_(1e-4 * pull.diagonal() + 1e-6 * pull.diagonal().mean())
    K, V = (torch.cat(parts, dim=1) for parts in zip(*asked, strict=True))
    torch.testing.assert_close(
        loaded.deltas[site].delta.double(), ridge_solution(K, V, pull), rtol=1e-3, atol=1e-4 * float(V.abs().max())
    )


def test_with_the_hold_on_ordinary_keys_alone_the_first_edit_is_memits():
    model, deltas = small_model("llama"), []
    for kind, own in ((RLSEdit, dict(lam=0.0, mu=1.0)), (MEMIT, {})):
        made = kind(model, kind.Config(**SMALL | own), BACKGROUND)
        made.edit(REQUESTS[0])
        deltas.append([patch.delta for patch in made.deltas.values()])
    for mine, memits in zip(*deltas, strict=True):
        torch.testing.assert_close(mine, memits, rtol=1e-3, atol=1e-5 * float(memits.abs().max()))


def test_without_a_hold_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("memoir.editors.keyvalue.second_moments", None)  # whoever measures now, fails
    reports = editor(small_model("llama"), lam=0.3, mu=0.0).edit(REQUESTS)
    assert all(report.loss_after < report.loss_before for report in reports)
    with pytest.raises(TypeError):
        editor(small_model("llama"), lam=0.3, mu=1.0).edit(REQUESTS)


def test_the_pull_weakens_a_change():
    norms = []
    for lam in (0.1, 1.0, 10.0):
        rls = editor(small_model("llama"), layers=(1,), lam=lam, mu=0.0)
        rls.edit(REQUESTS[0])
        norms.append(float(rls.deltas[rls.sites[0]].delta.norm()))
    assert norms[0] > norms[1] > norms[2] > 0


def test_neither_pull_nor_hold_is_refused():
    with pytest.raises(ValueError, match=r"^lam = 0\.0 and mu = 0\.0, expected one of them"):
        make_config("rlsedit", dict(layers=(1,), mu=0))
