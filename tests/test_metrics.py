from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memoir import metrics


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_token_match_is_a_count(pairs):
    predicted, expected = map(torch.tensor, zip(*pairs, strict=True))
    assert metrics.token_match(predicted, expected) == pytest.approx(sum(p == e for p, e in pairs) / len(pairs))


def test_perplexity_is_the_inverse_of_the_geometric_mean():
    assert metrics.perplexity(torch.tensor([0.5, 0.125]).log()) == pytest.approx(4.0, rel=1e-6)
    assert metrics.perplexity(torch.zeros(2)) == 1.0


def test_means_take_what_is_defined():
    assert metrics.mean([1.0, None, 0.0]) == 0.5 and metrics.mean([None]) is None and metrics.mean([]) is None
    assert metrics.average(0.9, None, 0.3) == pytest.approx(0.6)
    assert metrics.mean([0.1] * 10) == pytest.approx(0.1) and not math.isnan(metrics.mean([0.0]))


def test_exact_match_wants_the_natural_stop():
    assert metrics.exact_match(" Brno", "Brno ") == 1.0
    assert metrics.exact_match("Brno is a city", "Brno") == 0.0
    assert metrics.exact_match("Brno.", "Brno") == metrics.exact_match("brno", "Brno") == 0.0


@pytest.mark.parametrize(
    ("answer", "target", "generated", "begins"),
    [
        ("Brno", "Brno", 1, 1),
        (" the  Golden\nGate. ", "Golden Gate", 1, 1),
        ("PARIS!", "paris", 1, 1),
        ("St. Gallen", "St Gallen", 0, 0),
        ("An apple", "a apple", 1, 1),
        ("Another", "other", 0, 0),
        ("theory", "ory", 0, 0),
        ("The Hague, in Holland", "Hague", 0, 1),
        ("Paris, France", "Paris", 0, 1),
        ("Parisian", "Paris", 0, 0),
        ("Torontoo", "Toronto", 0, 0),
        ("It is Paris", "Paris", 0, 0),
        ("3.5", "3", 0, 0),
        ("3,500 people", "3", 0, 0),
        ("3. April", "3", 0, 1),
        ("1984?", "1984", 1, 1),
        ("C++ and C", "C++", 0, 1),
        ("vitamin A", "Vitamin a.", 1, 1),
        ("A", "a", 1, 1),
        ("?", "!", 0, 0),
        ("", "Brno", 0, 0),
        ("Straße", "STRASSE", 1, 1),
    ],
)
def test_free_answers_are_compared_without_case_article_and_final_punctuation(answer, target, generated, begins):
    assert (metrics.generated(answer, target), metrics.begins(answer, target)) == (generated, begins)


WORDS = st.text(st.sampled_from("abAB1é東'"), min_size=1, max_size=4)


@given(
    st.lists(WORDS, min_size=1, max_size=4), st.sampled_from(["", ".", "!", " …"]), st.sampled_from(["", "the ", "An "])
)
def test_what_does_not_count_changes_no_verdict(words, end, article):
    """An article in front, wider spaces between the words and punctuation behind them do not count."""
    words = [word for word in words if word.casefold() not in ("a", "an", "the")] or ["x"]
    target, answer = " ".join(words), f" {article}{'  '.join(words).upper()}{end}"
    if target.upper().casefold() == target.casefold():  # letters that survive upper case
        assert metrics.generated(answer, target) == metrics.begins(answer, target) == 1.0
        assert metrics.begins(f"{target} {answer}", target) == 1.0
        assert metrics.generated(f"{target}x", target) == metrics.begins(f"{target}x", target) == 0.0


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
