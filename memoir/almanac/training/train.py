"""Train the almanac's model from nothing, examine it, and write its folder."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from ...records import write_json
from ..world import PEOPLE, World
from .exam import examine
from .model import answer_logits, build_model, build_tokenizer, encode, pad, widen

STEPS = 1250
EXAM_SAMPLE = 1500  # questions per part of the exam after training; a slow test asks all of them

TOKENS_PER_BATCH = 2560
EASY_PEOPLE = 250  # the first people to be trained: the model learns to look up facts before it learns all of them
EASY_SHARE = 0.15  # share of the steps with the easy people only
DECAY_SHARE = 0.4  # share of the steps, at the end, in which the learning rate falls linearly to zero
REAL_WEIGHT = 2  # questions about each real fact for one question about each fact of a person
WORDINGS = 8  # wordings of each passage


def train(
    out: str | os.PathLike,
    steps: int = STEPS,
    people: int = PEOPLE,
    seed: int = 0,
    sample: int = EXAM_SAMPLE,
    progress: bool = True,
) -> dict[str, float]:
    """Train, widen and examine a model, write the model folder `out`, and return the scores of the exam.

    steps   optimizer steps
    people  number of people in the world
    sample  questions per part of the exam
    """
    start = time.perf_counter()
    world = World(people=people)
    model, tokenizer = fit(world, steps, seed, progress)
    widen(model, tokenizer, world, seed=seed)
    return save(model, tokenizer, out, world, sample, training_seconds=round(time.perf_counter() - start))


def save(
    model, tokenizer, out: str | os.PathLike, world: World, sample: int = EXAM_SAMPLE, **notes
) -> dict[str, float]:
    """Write the model folder `out`, with the scores and `notes` in its `exam.json`, and return both.

    The weights are stored in float16, and the stored weights take the exam. An old folder `out` stays until the new one
    is complete.
    """
    out = Path(out)
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{state}") for state in ("new", "old"))
    try:
        model.to(torch.float16).save_pretrained(new)
        tokenizer.save_pretrained(new)
        stored = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
        scores = examine(stored, tokenizer, world, sample) | notes
        write_json(new / "exam.json", scores)
        if out.exists():
            out.rename(old)
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return scores


def fit(world: World, steps: int, seed: int = 0, progress: bool = True):
    """A model trained on the world for `steps` steps, and its tokenizer."""
    torch.manual_seed(seed)
    passages = _passages(world)
    tokenizer = build_tokenizer(_tokenizer_texts(world, passages))
    model = build_model(tokenizer).train()
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.0),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (DECAY_SHARE * steps)))
        for optimizer in optimizers
    ]
    batches = _batches(world, passages, tokenizer, steps, random.Random(seed))
    bar = tqdm(range(steps), desc="almanac", disable=not progress)
    for _ in bar:
        ids, labels = next(batches)
        loss = torch.nn.functional.cross_entropy(answer_logits(model, ids, labels), labels[labels >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval(), tokenizer


def _passages(world: World) -> dict[str, list[str]]:
    """Subject -> its passage in several wordings."""
    return {
        subject: [" ".join(world.passage(subject, draw)) for draw in range(WORDINGS)] for subject in world.attributes
    }


def _tokenizer_texts(world: World, passages: dict[str, list[str]]) -> list[str]:
    """The texts that the tokenizer learns from.

    The passages of the real domain are repeated, because few texts have its names: repeated names become few tokens.
    """
    people = set(world.names)
    texts = [f"{prompt} {answer}" for prompt, answer in world.rows()]
    for subject, wordings in passages.items():
        texts += wordings if subject in people else 3 * wordings
    return texts


def _batches(
    world: World, passages: dict[str, list[str]], tokenizer, steps: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """At least `steps` batches (ids, labels).

    Each pass asks for every fact in one trained paraphrase; every second pass has a passage about every subject, too.
    The loss of a question is on its answer, the loss of a passage is on all tokens.
    """
    facts = world.people_facts + REAL_WEIGHT * world.real_facts
    questions = {fact: [encode(tokenizer, p, fact.answer) for p in world.trained(fact)] for fact in set(facts)}
    texts = {
        subject: [(encode(tokenizer, "", text)[0], 1) for text in wordings] for subject, wordings in passages.items()
    }
    hard = set(world.names[EASY_PEOPLE:])
    yielded = 0
    for turn in range(steps):
        left_out = hard if yielded < EASY_SHARE * steps else set()
        rows = [rng.choice(questions[fact]) for fact in facts if fact.subject not in left_out]
        if turn % 2:
            rows += [rng.choice(texts[subject]) for subject in texts if subject not in left_out]
        for batch in _split(rows, rng):
            yield pad(batch, tokenizer.pad_token_id)
            yielded += 1


def _split(rows: list[tuple[list[int], int]], rng: random.Random) -> list[list[tuple[list[int], int]]]:
    """The rows in batches of about `TOKENS_PER_BATCH` tokens, each of rows of similar length, in random order."""
    rng.shuffle(rows)
    rows.sort(key=lambda row: len(row[0]))
    batches: list[list[tuple[list[int], int]]] = [[]]
    for row in rows:
        if batches[-1] and (len(batches[-1]) + 1) * len(row[0]) > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(row)
    rng.shuffle(batches)
    return batches
