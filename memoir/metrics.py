"""What is measured, as pure functions of tokens and log-likelihoods.

Reliability, generalization and locality are shares of answer tokens under teacher forcing, as in the MEMOIR paper's
Table 1; perplexity is its Table 2's. Exact match looks at what a model generates by itself and where it stops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def token_match(predicted: Tensor, expected: Tensor, mask: Tensor) -> list[float]:
    """Share of the masked tokens that agree, row by row: Rel., Gen. (expected: the target) and Loc. (expected: what the
    unedited model predicts). predicted, expected (B × T) int64; mask (B × T) bool, at least one in each row."""
    hits = ((predicted == expected) & mask).sum(1)
    return (hits / mask.sum(1)).tolist()


def perplexity(log_likelihood: Tensor, mask: Tensor) -> list[float]:
    """PPL = exp(−mean log p) of the masked tokens, row by row. log_likelihood (B × T) nats, mask (B × T) bool."""
    total = torch.where(mask, log_likelihood.double(), 0.0).sum(1)
    return (-total / mask.sum(1)).exp().tolist()


def exact_match(generated: str, target: str) -> float:
    """1 where the generated answer, to its natural stop, is the target; white space at the ends does not count."""
    return float(generated.strip() == target.strip())


def average(rel: float | None, gen: float | None, loc: float | None) -> float | None:
    """Avg. = (Rel. + Gen. + Loc.) / 3, over those that the data defines."""
    return mean([rel, gen, loc])


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is defined; None where nothing is."""
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def bootstrap_interval(
    runs: Sequence[Sequence[float | None]], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Where a mean over runs lies: the percentile interval of a two-stage bootstrap, which draws runs with replacement
    and from each of them edits with replacement.

    runs  one score per edit in each run; None, where a score is not defined, does not count
    None where nothing is defined, or where there is but one value.
    """
    known = [np.array([v for v in run if v is not None]) for run in runs]
    known = [run for run in known if len(run)]
    if sum(map(len, known)) < 2:
        return None
    generator = np.random.default_rng(seed)
    slots = np.empty((len(known), len(known), resamples))  # run × place in the draw × resample: mean over drawn edits
    for run, means in zip(known, slots, strict=True):
        for place in means:
            place[:] = run[generator.integers(len(run), size=(resamples, len(run)))].mean(1)
    drawn = generator.integers(len(known), size=(len(known), resamples))
    means = slots[drawn, np.arange(len(known))[:, None], np.arange(resamples)].mean(0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
