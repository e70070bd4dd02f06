"""The scores, as pure functions of tokens and log-likelihoods.

Reliability, generalization and locality are shares of answer tokens under teacher forcing, as in Table 1 of the MEMOIR
paper; perplexity is the score of its Table 2. The other scores of an answer (generated, begins, exact match) compare
the text that a model generates by itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

FINAL_PUNCTUATION = ".,;:!?…。！？"

PROTOCOL = {
    "evaluated": "all edits made so far, after the last of them",
    "rel, gen": "teacher-forced share of target tokens that are the argmax",
    "loc": "teacher-forced share of answer tokens whose argmax is the unedited model's",
    "avg": "mean of rel, gen and loc, of those that the data defines",
    "ppl": "mean over edits of exp(mean negative log-likelihood of the target's tokens)",
    "generated": "share of edits whose free greedy answer, up to its natural stop, is the target, whatever its case, "
    "leading article and final punctuation",
    "begins": "share of edits whose free greedy answer begins with the target, compared in the same way",
    "exact_match": "share of edits whose free greedy answer, up to its natural stop, is the target letter by letter",
    "text_ppl": "perplexity of ordinary passages, each after its first sentence, beside the unedited model's",
    "known": "share of edits whose true answer the unedited model gave, token by token; of data with true answers",
    "routing_recall": "mean over edits of the share of edited and rephrased prompts that read the right edit",
    "routing_precision": "mean over edits: of the prompts that read any edit, the share that read the right one",
}


def token_match(predicted: Tensor, expected: Tensor) -> float:
    """Share of an answer's tokens that agree: Rel., Gen. (expected: the target) and Loc. (expected: what the unedited
    model predicts). predicted, expected (n,) int64."""
    return float((predicted == expected).sum() / len(expected))


def perplexity(log_likelihood: Tensor) -> float:
    """PPL = exp(−mean log p) of an answer's tokens. log_likelihood (n,) nats."""
    return float((-log_likelihood.double().sum() / len(log_likelihood)).exp())


def normalised(text: str) -> str:
    """A text in the form in which answers are compared: without case, leading article and final punctuation, and with
    single spaces. A text that consists of an article or of punctuation keeps it."""
    words = " ".join(text.casefold().split())
    words = words.rstrip(FINAL_PUNCTUATION + " ") or words
    return re.sub(r"^(an?|the) (?=\S)", "", words)


def generated(answer: str, target: str) -> float:
    """1 where a free answer is the target, both normalised."""
    return float(normalised(answer) == normalised(target))


def begins(answer: str, target: str) -> float:
    """1 where a free answer begins with the target, both normalised: "Paris, France" begins with Paris, and neither
    "Parisian" nor, for the target 3, "3.5" does."""
    return float(re.match(re.escape(normalised(target)) + r"(?!\w|[.,]\d)", normalised(answer)) is not None)


def exact_match(answer: str, target: str) -> float:
    """1 where a free answer is the target letter by letter; white space at the ends does not count."""
    return float(answer.strip() == target.strip())


def average(rel: float | None, gen: float | None, loc: float | None) -> float | None:
    """Avg. = (Rel. + Gen. + Loc.) / 3, or the mean of those that the data defines."""
    return mean([rel, gen, loc])


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None without any."""
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None


def bootstrap_interval(
    runs: Sequence[Sequence[float | None]], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Confidence interval of a mean over runs: the percentiles of a two-stage bootstrap, which draws runs with
    replacement and, from each of them, edits with replacement.

    runs  one score per edit in each run; an undefined score, None, does not count
    None where fewer than two values are defined.
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
