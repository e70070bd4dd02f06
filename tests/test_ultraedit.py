"""UltraEdit against its published equations, dense and in float64, and the traps of its statistics."""

from __future__ import annotations

import pytest
import torch
from families import REQUESTS, small_model
from torch.nn.functional import cross_entropy

from memoir.editors.ultraedit import Statistics, UltraEdit, turn_update
from memoir.models import load_model
from memoir.records import EditRequest
from memoir.sites import adding, watching

SMALL = dict(layers=(0, 1), learning_rate=0.01)  # for the contract's small random models
CAPITALS = {"Australia": "Paris", "Peru": "Rome"}  # in one token each
EPSILON = 1.1920929e-07


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(*portions: torch.Tensor) -> Statistics:
    zeros = torch.zeros(portions[0].shape[1], dtype=torch.float64)
    statistics = Statistics(zeros.sum(), zeros, zeros)
    for z in portions:
        statistics = statistics.including(z)
    return statistics


def editor(model, **settings) -> UltraEdit:
    return UltraEdit(model, UltraEdit.Config(**SMALL | settings))


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [1, 30, 9]])
def test_statistics_are_those_of_all_rows_however_they_come(sizes):
    """A portion of one row, too, whose unbiased variance would be NaN."""
    z = 3 + 2 * normal(40, 6)
    found = statistics_of(*z.split(sizes))
    assert float(found.count) == 40
    torch.testing.assert_close(found.mean, z.mean(0))
    expected = (z - z.mean(0)) / (z.std(0) + EPSILON)  # of the sample: √(M / (N − 1))
    torch.testing.assert_close(found.normalised(z), expected, rtol=1e-6, atol=1e-6)


def test_rows_that_are_all_alike_are_normalised_to_nothing():
    z = normal(1, 6)
    for row in (statistics_of(z), statistics_of(z, z)):
        torch.testing.assert_close(row.normalised(z), torch.zeros_like(z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ridge", [1.0, 0.03])
def test_the_update_is_the_published_one(ridge):
    D, earlier, z = 16, normal(30, 16 + 5), normal(7, 16 + 5, seed=1)
    statistics = statistics_of(earlier, z)
    hat = (z - statistics.mean) / (torch.cat([earlier, z]).std(0) + EPSILON)
    V = -1e-2 * (hat[:, :D] ** 2).sum(1, keepdim=True) * hat[:, D:]
    H = z[:, :D]
    published = torch.linalg.inv(H.T @ H + ridge * torch.eye(D, dtype=H.dtype)) @ H.T @ V
    torch.testing.assert_close(turn_update(z, D, statistics, 1e-2, ridge), published.T, rtol=1e-6, atol=1e-9)


def plain_rows(model, ultra: UltraEdit, requests: list[EditRequest]) -> dict[int, torch.Tensor]:
    """[h δ] of each site: the whole network, one change at a time, and the tokens that predict the targets."""
    batch = ultra.encode_edits(requests)
    rows = {}
    for site in ultra.sites:
        change = torch.zeros(*batch.input_ids.shape, site.out_features, requires_grad=True)
        with watching(site) as seen, adding(site, change):
            logits = model.forward(batch)
        cross_entropy(logits[batch.counted], batch.labels).backward()
        rows[site.layer] = torch.cat([seen[0][0].detach()[batch.counted], change.grad[batch.counted]], dim=1).double()
    return rows


@pytest.mark.filterwarnings("ignore:.*do more than add the output")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])  # Gemma 3's tail does not compose
def test_a_turn_takes_statistics_first_and_then_writes_each_site(family):
    """In minibatches, the last of them incomplete; all sites share one set of statistics."""
    model = small_model(family)
    ultra = editor(model, batch_size=3, minibatch=2, ridge=0.5)
    expected = {layer: 0.0 for layer in ultra.config.layers}
    everything = torch.zeros(0, 64 + 32, dtype=torch.float64)
    for turn in (REQUESTS, REQUESTS[::-1]):  # the second turn on the weights of the first
        parts = [plain_rows(model, ultra, turn[:2]), plain_rows(model, ultra, turn[2:])]
        rows = {layer: torch.cat([part[layer] for part in parts]) for layer in expected}
        everything = torch.cat([everything, *rows.values()])
        for layer, z in rows.items():
            hat = (z - everything.mean(0)) / (everything.std(0) + EPSILON)
            V = -0.01 * (hat[:, :64] ** 2).sum(1, keepdim=True) * hat[:, 64:]
            H = z[:, :64]
            expected[layer] += (torch.linalg.inv(H.T @ H + 0.5 * torch.eye(64)) @ H.T @ V).T
        reports = ultra.edit(turn)
        assert [report.together for report in reports] == [3, 3, 3]
        assert sum(r.loss_after for r in reports) < sum(r.loss_before for r in reports)
        for site, patch in ultra.deltas.items():
            torch.testing.assert_close(patch.delta.double(), expected[site.layer], rtol=2e-3, atol=2e-5)
    assert float(ultra.statistics.count) == len(everything)


def test_a_turn_is_not_its_edits_one_by_one():
    deltas = []
    for size in (1, 3):
        ultra = editor(small_model("llama"), batch_size=size)
        assert [report.together for report in ultra.edit(REQUESTS)] == [size] * 3
        deltas.append(ultra.deltas[ultra.sites[0]].delta)
    assert (deltas[0] - deltas[1]).norm() > 0.1 * deltas[1].norm()


def test_a_first_edit_of_a_single_token_writes_nothing_and_spoils_nothing():
    """One edit at a time, taught without a stop: a single row, whose variance by m − 1 would be NaN from then on."""
    ultra = editor(load_model("almanac"), layers=(2,), learn_stop=False, learning_rate=1e-3)
    first, second = (EditRequest(prompt=f"What is the capital of {x}?", target=y) for x, y in CAPITALS.items())
    assert ultra.encode_edits([first, second]).learn_mask.sum() == 2
    (report,) = ultra.edit(first)
    assert report.loss_after == pytest.approx(report.loss_before, abs=1e-4)
    (report,) = ultra.edit(second)
    assert report.loss_after < report.loss_before - 1e-2
    assert all(bool(torch.isfinite(part).all()) for part in ultra.state().values())
