"""What methods make of prompts before they learn: copies behind random prefixes, and averages over background texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.sites import Site, watching

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


@torch.no_grad()
def background_mean(
    model: LanguageModel, site: Site, texts: Sequence[str], measure: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The mean over texts of measure(a, y, prompt), which returns one value or vector for each row (B × …).

    a (B × T × D) and y (B × T × d) are the site's input and output, prompt (B × T) bool the texts' tokens.
    """
    total = None
    for start in range(0, len(texts), 32):
        batch = model.encode(texts[start : start + 32])
        with watching(site) as calls:
            model.forward(batch, positions=1)
        part = measure(*calls[0], batch.prompt_mask).sum(0)
        total = part if total is None else total + part
    return total / len(texts)
