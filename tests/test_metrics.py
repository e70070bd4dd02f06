from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memoir import metrics


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=4, max_size=4), min_size=1
    )
)
def test_token_match_is_a_count(rows):
    rows = [[(*row[0][:2], True), *row[1:]] for row in rows]  # at least one masked token each
    predicted, expected, mask = (torch.tensor([[cell[i] for cell in row] for row in rows]) for i in range(3))
    for row, found in zip(rows, metrics.token_match(predicted, expected, mask), strict=True):
        counted = [p == e for p, e, m in row if m]
        assert found == pytest.approx(sum(counted) / len(counted))


def test_perplexity_ignores_what_is_not_the_answer():
    likelihood = torch.log(torch.tensor([[0.5, 0.125, 1e-9], [0.25, 1e-9, 0.25]]))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert metrics.perplexity(likelihood, mask) == pytest.approx([4.0, 4.0], rel=1e-6)
    assert metrics.perplexity(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)) == [1.0]


def test_means_take_what_is_defined():
    assert metrics.mean([1.0, None, 0.0]) == 0.5 and metrics.mean([None]) is None and metrics.mean([]) is None
    assert metrics.average(0.9, None, 0.3) == pytest.approx(0.6)
    assert metrics.mean([0.1] * 10) == pytest.approx(0.1) and not math.isnan(metrics.mean([0.0]))


def test_exact_match_wants_the_natural_stop():
    assert metrics.exact_match(" Brno", "Brno ") == 1.0
    assert metrics.exact_match("Brno is a city", "Brno") == 0.0


def test_bootstrap_intervals_cover_what_they_promise():
    """Of runs drawn from a known distribution, about 95 % of the intervals hold its mean."""
    generator, held = np.random.default_rng(0), 0
    for trial in range(200):
        levels = generator.normal(0.5, 0.1, size=12)  # what a run's edits share
        runs = [generator.normal(level, 0.2, size=20) for level in levels]
        low, high = metrics.bootstrap_interval(runs, seed=trial, resamples=300)
        held += low <= 0.5 <= high
    assert 0.87 <= held / 200 <= 0.99


def test_bootstrap_interval_of_one_run_is_that_of_its_edits():
    values = np.random.default_rng(1).random(400).tolist()
    low, high = metrics.bootstrap_interval([values])
    spread = np.std(values) / len(values) ** 0.5
    assert low == pytest.approx(np.mean(values) - 1.96 * spread, abs=0.3 * spread)
    assert high == pytest.approx(np.mean(values) + 1.96 * spread, abs=0.3 * spread)
    assert metrics.bootstrap_interval([values]) == (low, high)  # the same seed


def test_bootstrap_interval_wants_two_values():
    assert metrics.bootstrap_interval([]) is None and metrics.bootstrap_interval([[None], [0.5]]) is None
    assert metrics.bootstrap_interval([[0.5, None, 0.5]]) == (0.5, 0.5)
