"""MEMIT against a dense least squares in float64, for one edit, many at once, and several in a row."""

from __future__ import annotations

import pytest
import torch
from families import BACKGROUND, FAMILIES, REQUESTS, small_model

from memoir.editors.keyvalue import edit_value, whitener
from memoir.editors.memit import MEMIT, least_squares_update


def editor(model, **settings) -> MEMIT:
    defaults = dict(layers=(0, 1), prefixes=2, prefix_tokens=3, moments="background", value_steps=8, moment_weight=1.0)
    return MEMIT(model, MEMIT.Config(**{**defaults, **settings}), BACKGROUND)


def dense(residual, keys, C, weight):
    """argmin ‖ΔW K − R‖² + λ tr(ΔW C ΔWᵀ), by one least squares over all its rows."""
    A = torch.cat([keys, torch.linalg.cholesky(weight * C)], dim=1)
    B = torch.cat([residual, residual.new_zeros(len(residual), A.shape[1] - residual.shape[1])], dim=1)
    return torch.linalg.lstsq(A.T, B.T).solution.T


@pytest.mark.parametrize("weight", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("exact", [True, False])
def test_the_update_solves_the_least_squares(weight, exact):
    generator = torch.Generator().manual_seed(0)
    K0, keys, residual = (
        torch.randn(rows, n, generator=generator, dtype=torch.float64) for rows, n in ((12, 40), (12, 3), (5, 3))
    )
    C = K0 @ K0.T / 40
    whitening = torch.linalg.inv(torch.linalg.cholesky(C)) if exact else whitener(C)
    published = residual @ keys.T @ torch.linalg.inv(weight * C + keys @ keys.T)
    found = least_squares_update(residual, keys, whitening, weight).double()
    for expected in (published, dense(residual, keys, C, weight)):
        assert (found - expected).norm() < (1e-9 if exact else 1e-3) * expected.norm()


def test_edits_in_a_row_and_at_once_are_dense_solutions():
    """One layer, so that ΔW must be what a dense solve makes of the keys and values seen."""
    from memoir.moments import second_moments

    model = small_model("llama")
    for size in (1, 3):
        memit = editor(model, layers=(1,), batch_size=size)
        (site,) = memit.sites
        C = second_moments(model, site, BACKGROUND, progress=False).double()
        C += (1e-4 * C.diagonal() + 1e-6 * C.diagonal().mean()).diag()
        expected = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
        for start in range(0, 3, size):
            batch = REQUESTS[start : start + size]
            memit.prepare()
            rows = memit.rows(batch)
            tail, keys = memit.observe(rows)
            delta, *_ = edit_value(memit, batch, tail, rows, tail.stream[rows.at_bare].norm(dim=1))
            expected = expected + dense(delta.T.double(), keys[site].T.double(), C, 1.0)
            memit.edit(batch)
            found = memit.deltas[site].delta.double()
            assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3"])
@pytest.mark.parametrize("where", ["subject_last", "target"])
def test_the_stream_becomes_the_value_when_nothing_weighs_against_it(family, where):
    """λ → 0: every layer writes its whole share, and behind the last the stream is h + δ."""
    model = small_model(family)
    layers = (0, 1, 2) if where == "target" else (0, 1)  # nothing behind the last block looks back at the subject
    memit = editor(model, layers=layers, prefixes=0, moment_weight=1e-7, where=where)
    memit.prepare()
    rows = memit.rows(REQUESTS[:1])
    tail, _ = memit.observe(rows)
    before = tail.stream[rows.at_bare]
    delta, *_ = edit_value(memit, REQUESTS[:1], tail, rows, before.norm(dim=1))
    memit.edit(REQUESTS[0])
    after, _ = memit.observe(rows)
    moved = after.stream[rows.at_bare] - before
    assert 0 < (moved - delta).norm() < 0.02 * delta.norm()
    assert all(bool(patch.delta.any()) for patch in memit.deltas.values())


@pytest.mark.filterwarnings("ignore:.*do more than add the output")
def test_where_blocks_do_not_compose_only_the_last_layer_is_written():
    memit = editor(small_model("gemma3"), layers=(0, 1))
    (report,) = memit.edit(REQUESTS[0])
    first, last = (memit.deltas[site].delta for site in memit.sites)
    assert not first.any() and last.any()
    assert report.loss_after < report.loss_before


def test_tied_embeddings_are_no_obstacle():
    model = small_model("gemma")
    assert model.head.weight is model.network.get_input_embeddings().weight
    before = model.head.weight.clone()
    (report,) = editor(model).edit(REQUESTS[0])
    assert report.loss_after < report.loss_before
    assert torch.equal(model.head.weight, before)


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(IndexError, match="layer 3 does not exist"):
        editor(small_model("llama"), layers=(1, 3))
