"""Copies of prompts behind random prefixes."""

from __future__ import annotations

from collections.abc import Sequence

from memoir.models import LanguageModel
from memoir.records import EditRequest

# The words that MEMOIR's release, and WISE's before it, let the model continue.
OPENINGS = ("I", "You", "Because", "Yes", "Q: ")


def augmented(
    requests: Sequence[EditRequest], prefixes: Sequence[str], joint: str = ". "
) -> tuple[list[str], list[str], list[int]]:
    """Each request's prompt, bare and then behind every prefix and the joint.

    returns  prompts, targets, and for each of them the number of the request it belongs to. Every request has
             1 + len(prefixes) of them in a row, the bare prompt first.
    """
    prompts, targets, owner = [], [], []
    for i, request in enumerate(requests):
        copies = [request.prompt, *(f"{prefix}{joint}{request.prompt}" for prefix in prefixes)]
        prompts += copies
        targets += [request.target] * len(copies)
        owner += [i] * len(copies)
    return prompts, targets, owner


def opened(model: LanguageModel, count: int, tokens: int, seed: int) -> list[str]:
    """Texts to put in front of a prompt: each of the `OPENINGS` with tokens // 2 tokens that the model adds to it, then
    each with `tokens`; at most `count`, and each with a space behind it."""
    texts = []
    for length in (max(1, tokens // 2), tokens):
        texts += model.continuations(OPENINGS, length, seed=seed)
    return [f"{text} " for text in texts[:count]]
