"""Train the almanac's model from nothing: `python -m memoir.almanac`."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from ..records import write_json
from .exam import examine
from .model import build_model, build_tokenizer, encode, pad
from .muon import Muon
from .widen import widen
from .world import PEOPLE, World

STEPS = 1250
EXAM_SAMPLE = 1500  # questions per part of the exam after training; a slow test asks them all

TOKENS_PER_BATCH = 2560
EASY_PEOPLE = 250  # known by heart first: the model learns how to look people up before it learns all of them
EASY_SHARE = 0.15  # of the steps
DECAY_SHARE = 0.4  # of the steps, at the end, with the learning rate falling linearly to zero
REAL_WEIGHT = 2  # real facts are asked this often while those about people are asked once
WORDINGS = 8  # draws of each passage's wording


def train(
    out: str | os.PathLike,
    steps: int = STEPS,
    people: int = PEOPLE,
    seed: int = 0,
    sample: int = EXAM_SAMPLE,
    progress: bool = True,
) -> dict[str, float]:
    """Train, widen and examine a model, write it to the folder `out` in one step, and return its scores.

    Weights are stored in float16; the exam, of `sample` questions per part, is taken with them as stored.
    """
    start = time.perf_counter()
    world = World(people=people)
    model, tokenizer = fit(world, steps, seed, progress)
    widen(model, tokenizer, world, seed=seed)
    return save(model, tokenizer, out, world, sample, training_seconds=round(time.perf_counter() - start))


def save(
    model, tokenizer, out: str | os.PathLike, world: World, sample: int = EXAM_SAMPLE, **notes
) -> dict[str, float]:
    """Write the model folder `out` in one step, with the scores (and `notes`) in its `exam.json`; return these."""
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
    """A model trained on the world, and its tokenizer."""
    keep_freed_memory()
    torch.manual_seed(seed)
    people = set(world.names)
    texts = [f"{prompt} {answer}" for prompt, answer in world.rows()]
    for subject, wordings in training_passages(world).items():
        # Few texts have the names of the real domain; said more often, they become short, too.
        texts += wordings if subject in people else 3 * wordings
    tokenizer = build_tokenizer(texts)
    model = build_model(tokenizer).train()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers" not in name]
    optimizers = [Muon(matrices, lr=5e-3), torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (steps - step) / (DECAY_SHARE * steps)))
        for o in optimizers
    ]
    stream = _batches(world, tokenizer, steps, random.Random(seed))
    bar = tqdm(range(steps), desc="almanac", disable=not progress)
    mean_loss = mean_right = None
    for _ in bar:
        ids, labels = next(stream)
        loss, right = answer_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        mean_loss = loss.item() if mean_loss is None else 0.95 * mean_loss + 0.05 * loss.item()
        mean_right = right if mean_right is None else 0.95 * mean_right + 0.05 * right
        bar.set_postfix(loss=f"{mean_loss:.3f}", token_accuracy=f"{mean_right:.3f}")
    return model.eval(), tokenizer


def answer_loss(model, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Cross-entropy and accuracy over the labelled tokens; the head runs on those only."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    wanted = labels >= 0
    logits = model.lm_head(hidden[wanted])
    loss = torch.nn.functional.cross_entropy(logits, labels[wanted])
    return loss, (logits.detach().argmax(-1) == labels[wanted]).float().mean().item()


def training_passages(world: World) -> dict[str, list[str]]:
    """Subject -> its passage in several wordings."""
    return {
        subject: [" ".join(world.passage(subject, draw)) for draw in range(WORDINGS)] for subject in world.attributes
    }


def _batches(
    world: World, tokenizer, steps: int, random_: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels): pass after pass over all facts, each in one trained paraphrase, and over the passages.

    A question's loss is on its answer, a passage's on all of it.
    """
    facts = world.people_facts + REAL_WEIGHT * world.real_facts
    questions = {fact: [encode(tokenizer, p, fact.answer) for p in world.trained(fact)] for fact in set(facts)}
    texts = {
        subject: [(encode(tokenizer, "", text)[0], 1) for text in wordings]
        for subject, wordings in training_passages(world).items()
    }
    hard = set(world.names[EASY_PEOPLE:])
    given = 0
    for turn in range(steps):
        easy = given < EASY_SHARE * steps
        rows = [random_.choice(questions[fact]) for fact in facts if not (easy and fact.subject in hard)]
        if turn % 2:
            rows += [random_.choice(texts[subject]) for subject in texts if not (easy and subject in hard)]
        for batch in _mixed(rows, random_):
            yield pad(batch, tokenizer.pad_token_id)
            given += 1


def _mixed(rows: list, random_: random.Random) -> Iterator[list]:
    """Batches of about TOKENS_PER_BATCH tokens, each of rows of like length, in random order."""
    random_.shuffle(rows)
    rows.sort(key=lambda row: len(row[0]))
    made, batch = [], []
    for row in rows:
        if batch and (len(batch) + 1) * len(row[0]) > TOKENS_PER_BATCH:
            made.append(batch)
            batch = []
        batch.append(row)
    made.append(batch)
    random_.shuffle(made)
    yield from made


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed instead of returning it to the system: five times faster for small tensors."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # not glibc: only slower
