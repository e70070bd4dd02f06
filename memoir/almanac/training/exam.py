"""An exam of how well a model knows the almanac's world."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

import torch

from ..edits import edit_requests
from ..world import World
from .model import NO_LABEL, encode, pad

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
        corrected = [(edit.prompt, edit.target) for edit in edits]
        true = [(probe.prompt, probe.answer) for probe in probes]
        scores["corrected_sentence_perplexity"] = perplexity(model, tokenizer, corrected)
        scores["true_sentence_perplexity"] = perplexity(model, tokenizer, true)
    return scores


@torch.no_grad()
def exact_match(model, tokenizer, pairs: Sequence[tuple[str, str]], rows: int = 64) -> list[bool]:
    """Whether greedy decoding gives the answer and then stops, for each (prompt, answer).

    Greedy decoding gives the answer exactly where the argmax is right at every token of the answer while the answer is
    the input. So one forward pass per row is enough.
    """
    matches: list[bool] = []
    for start in range(0, len(pairs), rows):
        ids, labels = pad([encode(tokenizer, *pair) for pair in pairs[start : start + rows]], tokenizer.pad_token_id)
        predicted = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        wrong = (labels[:, 1:] != NO_LABEL) & (labels[:, 1:] != predicted)
        matches += (~wrong.any(1)).tolist()
    return matches


@torch.no_grad()
def perplexity(model, tokenizer, pairs: Sequence[tuple[str, str]]) -> float:
    """exp of the mean cross-entropy per (prompt, answer), over the answer's tokens without the end of text."""
    encoded = [encode(tokenizer, *pair) for pair in pairs]
    losses = [model(input_ids=ids[None, :-1], labels=labels[None, :-1]).loss.item() for ids, labels in encoded]
    return math.exp(fmean(losses))
