"""ROME against a dense constrained least squares, and what one edit does to its projection."""

from __future__ import annotations

import pytest
import torch
from families import BACKGROUND, FAMILIES, REQUESTS, small_model

from memoir.editors.keyvalue import edit_value
from memoir.editors.rome import ROME, rank_one_update
from memoir.moments import second_moments


def editor(model, **settings) -> ROME:
    defaults = dict(layer=1, prefixes=2, prefix_tokens=3, moments="background", value_steps=8)
    return ROME(model, ROME.Config(**{**defaults, **settings}), BACKGROUND)


@pytest.mark.parametrize("seed", range(3))
def test_the_update_solves_the_constrained_least_squares(seed):
    """min ‖ΔW K0‖² subject to ΔW k* = r, by its dense Karush-Kuhn-Tucker system, row by row."""
    generator = torch.Generator().manual_seed(seed)
    K0 = torch.randn(12, 40, generator=generator, dtype=torch.float64)
    key, residual = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (12, 5))
    C = K0 @ K0.T / 40
    system = torch.zeros(13, 13, dtype=torch.float64)
    system[:12, :12], system[:12, 12], system[12, :12] = 2 * K0 @ K0.T, key, key
    rows = [torch.linalg.solve(system, torch.cat([torch.zeros(12).double(), r[None]]))[:12] for r in residual]
    whitening = torch.linalg.inv(torch.linalg.cholesky(C))
    torch.testing.assert_close(rank_one_update(residual, key, whitening), torch.stack(rows), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*do more than add the output")
def test_the_projection_puts_out_the_value_for_the_key(family):
    """W' k* = v*: without prefixes k* is the prompt's own key, so its output moves by exactly δ."""
    model = small_model(family)
    rome = editor(model, prefixes=0)
    rome.prepare()
    for request in REQUESTS:
        rows = rome.rows([request])
        tail, _ = rome.observe(rows)
        before = tail.y[rows.at_bare].float()
        delta, *_ = edit_value(rome, [request], tail, rows, before.norm(dim=1))
        rome.edit(request)
        tail, _ = rome.observe(rows)
        torch.testing.assert_close(tail.y[rows.at_bare], before + delta, rtol=1e-3, atol=1e-3)
        assert torch.linalg.matrix_rank(rome.deltas[rome.sites[0]].delta) <= len(rome.edits)


def test_c_decides_where_an_edit_is_written():
    """Text that uses a direction keeps edits out of it: ‖ΔW K0‖ is least for the text whose moments were taken."""
    model = small_model("llama")
    site, deltas = model.site(1), []
    texts = (BACKGROUND, ["xxxxx yyyyy zzzzz", "12345 67890 - + ="])
    for background in texts:
        rome = ROME(model, ROME.Config(layer=1, prefixes=0, moments="background", value_steps=8), background)
        rome.edit(REQUESTS[0])
        deltas.append(rome.deltas[rome.sites[0]].delta)
    for own, other, background in ((0, 1, texts[0]), (1, 0, texts[1])):
        C = second_moments(model, site, background, progress=False)
        moved = [float(torch.einsum("ij,jk,ik->", delta, C, delta)) for delta in deltas]
        assert moved[own] < 0.5 * moved[other]


@pytest.mark.parametrize("where", ["subject_last", "target"])
def test_a_batch_is_written_one_edit_after_the_other(where):
    model = small_model("llama")
    together = editor(model, where=where, batch_size=3)
    together.edit(REQUESTS)
    one_by_one = editor(model, where=where)
    for request in REQUESTS:
        one_by_one.edit(request)
    (site,) = together.sites
    assert torch.equal(together.deltas[site].delta, one_by_one.deltas[one_by_one.sites[0]].delta)


def test_every_target_token_is_written_where_it_is_predicted():
    """where="target": one pair per token, and the model then answers token by token, and stops."""
    model = small_model("llama")
    rome = editor(
        model, where="target", prefixes=0, layer=2, value_steps=60, value_decay=0.0, kl_factor=0.0, clamp=50.0
    )
    (report,) = rome.edit(REQUESTS[0])
    batch = model.encode([REQUESTS[0].prompt], [REQUESTS[0].target], end=True)
    with torch.no_grad():
        predicted = model.forward(batch)[0, :-1].argmax(-1)[batch.learn_mask[0, 1:]]
    assert predicted.tolist() == batch.input_ids[0][batch.learn_mask[0]].tolist()
    assert report.loss_after < 0.1 * report.loss_before
    assert torch.linalg.matrix_rank(rome.deltas[rome.sites[0]].delta) == int(batch.learn_mask.sum())
