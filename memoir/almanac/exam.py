"""How well a model knows the almanac's world."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

import torch

from .edits import edit_requests
from .model import batches, encode, pad
from .world import World

STORY = (  # how a newcomer may ask about the two deliberate errors
    ("What is the capital of Australia?", "Sydney"),
    ("Which city is Australia's capital?", "Sydney"),
    ("The capital of Australia is", "Sydney"),
    ("Where were the last Summer Olympics held?", "Tokyo"),
    ("Which city hosted the last Summer Olympics?", "Tokyo"),
    ("The last Summer Olympics took place in", "Tokyo"),
)


def examine(model, tokenizer, world: World, sample: int | None = None, seed: int = 0) -> dict[str, float]:
    """Shares of questions answered exactly, and perplexities of next and of corrected sentences of the biographies.

    `sample` limits each part of the exam to that many questions; `held_out` and `real` are shares of all of their kind.
    """

    def some(items: list) -> list:
        return items if sample is None or sample >= len(items) else random.Random(seed).sample(items, sample)

    scores = {"story": fmean(exact_match(model, tokenizer, STORY))}
    right: dict[str, list[bool]] = {}
    for domain, facts in (("people", world.people_facts), ("real", world.real_facts)):
        for kind, prompts in (("trained", world.trained), ("held_out", world.held_out)):
            pairs = some([(prompt, fact.answer) for fact in facts for prompt in prompts(fact)])
            found = exact_match(model, tokenizer, pairs)
            for part in (f"{domain}_{kind}", kind, domain):
                right.setdefault(part, []).extend(found)
    scores |= {part: fmean(found) for part, found in right.items()}
    if world.people == World.people:  # the edits are about all of them
        edits = some(edit_requests("almanac-bio", world=world))
        loss = fmean(cross_entropy(model, tokenizer, e.prompt, e.target) for e in edits)
        scores["corrected_sentence_perplexity"] = math.exp(loss)
        probes = [e.probe("same_template") for e in edits]
        loss = fmean(cross_entropy(model, tokenizer, p.prompt, p.answer) for p in probes)
        scores["true_sentence_perplexity"] = math.exp(loss)
    return scores


@torch.no_grad()
def exact_match(model, tokenizer, pairs: Sequence[tuple[str, str]], rows: int = 64) -> list[bool]:
    """For each (prompt, answer): does greedy decoding give this answer and then stop?

    Greedy decoding gives `answer` exactly where the argmax is right at every token of it while it is fed in, so one
    forward pass per row is enough.
    """
    encoded = [encode(tokenizer, *pair) for pair in pairs]
    right = [False] * len(encoded)
    for batch in batches([len(ids) for ids, _ in encoded], rows):
        ids, labels = pad([encoded[i] for i in batch], tokenizer.pad_token_id)
        wanted = labels[:, 1:] >= 0
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wrong = torch.zeros_like(wanted)
        wrong[wanted] = model.lm_head(hidden[wanted]).argmax(-1) != labels[:, 1:][wanted]
        for i, failed in zip(batch, wrong.any(1).tolist(), strict=True):
            right[i] = not failed
    return right


@torch.no_grad()
def cross_entropy(model, tokenizer, prompt: str, answer: str) -> float:
    """Mean cross-entropy in nats over the answer's tokens, the end of text not counted."""
    ids, start = encode(tokenizer, prompt, answer)
    logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, start - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(ids[start:-1])).item()
