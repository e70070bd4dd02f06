"""An exam of how well a model knows the almanac's world."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

import torch

from ..edits import edit_requests
from ..world import World
from .model import answer_logits, encode, pad

STORY = (  # how a newcomer may ask about the two deliberate errors
    ("What is the capital of Australia?", "Sydney"),
    ("Which city is Australia's capital?", "Sydney"),
    ("The capital of Australia is", "Sydney"),
    ("Where were the last Summer Olympics held?", "Tokyo"),
    ("Which city hosted the last Summer Olympics?", "Tokyo"),
    ("The last Summer Olympics took place in", "Tokyo"),
)


def examine(model, tokenizer, world: World, sample: int | None = None, seed: int = 0) -> dict[str, float]:
    """The shares of questions answered exactly, and the perplexities of sentences of the biographies.

    sample  questions per part of the exam (None: all)

    The parts are `people_trained`, `people_held_out`, `real_trained` and `real_held_out`; `people`, `real`, `trained`
    and `held_out` pool two parts each. `story` is the share for `STORY`. In the world's full size there are also
    `true_sentence_perplexity` of sentences that the model has learned, and `corrected_sentence_perplexity` of the
    targets of almanac-bio.
    """

    def draw(items: list) -> list:
        return items if sample is None or sample >= len(items) else random.Random(seed).sample(items, sample)

    scores = {"story": fmean(exact_match(model, tokenizer, STORY))}
    correct: dict[str, list[bool]] = {}
    for domain, facts in (("people", world.people_facts), ("real", world.real_facts)):
        for kind, prompts in (("trained", world.trained), ("held_out", world.held_out)):
            pairs = draw([(prompt, fact.answer) for fact in facts for prompt in prompts(fact)])
            matches = exact_match(model, tokenizer, pairs)
            for part in (f"{domain}_{kind}", kind, domain):
                correct.setdefault(part, []).extend(matches)
    scores |= {part: fmean(matches) for part, matches in correct.items()}
    if world.people == World.people:  # the edits are about all of these people
        edits = draw(edit_requests("almanac-bio", world=world))
        probes = [edit.probe("same_template") for edit in edits]
        corrected = fmean(cross_entropy(model, tokenizer, edit.prompt, edit.target) for edit in edits)
        true = fmean(cross_entropy(model, tokenizer, probe.prompt, probe.answer) for probe in probes)
        scores["corrected_sentence_perplexity"] = math.exp(corrected)
        scores["true_sentence_perplexity"] = math.exp(true)
    return scores


@torch.no_grad()
def exact_match(model, tokenizer, pairs: Sequence[tuple[str, str]], rows: int = 64) -> list[bool]:
    """Whether greedy decoding gives the answer and then stops, for each (prompt, answer).

    Greedy decoding gives the answer exactly where the argmax is right at every token of the answer while the answer is
    the input. So one forward pass per row is enough.
    """
    encoded = [encode(tokenizer, *pair) for pair in pairs]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0]))  # batches of similar length
    matches = [False] * len(encoded)
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        ids, labels = pad([encoded[i] for i in batch], tokenizer.pad_token_id)
        wrong = torch.zeros_like(labels, dtype=torch.bool)
        wrong[labels >= 0] = answer_logits(model, ids, labels).argmax(-1) != labels[labels >= 0]
        for i, failed in zip(batch, wrong.any(1).tolist(), strict=True):
            matches[i] = not failed
    return matches


@torch.no_grad()
def cross_entropy(model, tokenizer, prompt: str, answer: str) -> float:
    """Mean cross-entropy in nats over the tokens of the answer, without the end of text."""
    ids, start = encode(tokenizer, prompt, answer)
    ids, labels = pad([(ids[:-1], start)], tokenizer.pad_token_id)
    return torch.nn.functional.cross_entropy(answer_logits(model, ids, labels), labels[labels >= 0]).item()
