"""Train the almanac's model from random weights, examine it, and write its folder."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from ...files import write_json
from ..world import PEOPLE, World
from .exam import examine
from .model import build_model, build_tokenizer, encode, pad, widen

STEPS = 1250
EXAM_SAMPLE = 1500  # questions per part of the exam after training

TOKENS_PER_BATCH = 2560
EASY_PEOPLE = 250  # the model learns how to look up a fact with these people, before it learns about all people
EASY_SHARE = 0.15  # share of the steps that are about the easy people only
DECAY_SHARE = 0.4  # share of the steps, at the end, in which the learning rate falls linearly to zero
REAL_WEIGHT = 2  # questions about each real fact for every question about each fact of a person
WORDINGS = 8  # wordings of each passage


def train(
    out: str | os.PathLike, steps: int = STEPS, people: int = PEOPLE, seed: int = 0, sample: int = EXAM_SAMPLE
) -> dict[str, float]:
    """Train a model, widen it, write the model folder `out`, and return the scores of its exam.

    steps   optimizer steps
    people  number of people in the world
    sample  questions per part of the exam

    The weights are stored in float16, and the stored model takes the exam. `exam.json` in the folder has the scores. An
    existing folder `out` is replaced when the new one is complete.
    """
    started = time.perf_counter()
    world = World(people=people)
    model, tokenizer = fit(world, steps, seed)
    widen(model, tokenizer, world, seed)
    seconds = round(time.perf_counter() - started)

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        model.to(torch.float16).save_pretrained(new)
        tokenizer.save_pretrained(new)
        stored = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
        scores = examine(stored, tokenizer, world, sample) | {"training_seconds": seconds}
        write_json(new / "exam.json", scores)
        if out.exists():
            out.rename(old)
        new.rename(out)
    return scores


def fit(world: World, steps: int, seed: int = 0):
    """A model trained on the world for `steps` steps, and its tokenizer."""
    torch.manual_seed(seed)
    passages = {s: [" ".join(world.passage(s, draw)) for draw in range(WORDINGS)] for s in world.attributes}
    texts = [f"{prompt} {answer}" for prompt, answer in world.rows()]
    for subject, wordings in passages.items():
        # Few texts name the subjects of the real facts. Repeated names become fewer tokens.
        texts += wordings if subject in world.names else 3 * wordings
    tokenizer = build_tokenizer(texts)
    model = build_model(tokenizer).train()
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.0),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [LambdaLR(o, lambda step: min(1.0, (steps - step) / (DECAY_SHARE * steps))) for o in optimizers]
    batches = _batches(world, passages, tokenizer, steps, random.Random(seed))
    bar = tqdm(range(steps), desc="almanac", disable=None)  # shown in a terminal only
    for _, (ids, labels) in zip(bar, batches, strict=False):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), tokenizer


def _batches(world: World, passages: dict[str, list[str]], tokenizer, steps: int, rng: random.Random) -> Iterator:
    """At least `steps` batches, each as (ids, labels) from `pad`.

    Each turn asks for every fact in one trained paraphrase. Every second turn also tells a passage about every subject.
    The loss of a question is on its answer, the loss of a passage on the whole text.
    """
    facts = world.people_facts + REAL_WEIGHT * world.real_facts
    questions = {fact: [encode(tokenizer, p, fact.answer) for p in world.trained(fact)] for fact in set(facts)}
    texts = {subject: [encode(tokenizer, "", text) for text in wordings] for subject, wordings in passages.items()}
    hard = set(world.names[EASY_PEOPLE:])
    made = 0
    for turn in range(steps):
        left_out = hard if made < EASY_SHARE * steps else set()
        rows = [rng.choice(questions[fact]) for fact in facts if fact.subject not in left_out]
        if turn % 2:
            rows += [rng.choice(texts[subject]) for subject in texts if subject not in left_out]
        for batch in _split(rows, rng):
            yield pad(batch, tokenizer.pad_token_id)
            made += 1


def _split(rows: list[tuple[torch.Tensor, torch.Tensor]], rng: random.Random) -> list[list]:
    """Batches of up to `TOKENS_PER_BATCH` tokens, in random order. The rows of a batch have similar lengths."""
    rng.shuffle(rows)
    rows.sort(key=lambda row: len(row[0]))
    batches: list[list] = [[]]
    for row in rows:
        if batches[-1] and (len(batches[-1]) + 1) * len(row[0]) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(row)
    rng.shuffle(batches)
    return batches
