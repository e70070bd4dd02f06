"""How the almanac's model is trained and examined: tokenizer and network, the neurons added after training, the exam.

The settings of the tokenizer and of the network come from the shipped folder; vocabulary and weights are learned anew.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..files import write_json
from .edits import edit_requests, model_path
from .world import PEOPLE, World

STEPS = 1250
EXAM_SAMPLE = 1500  # questions per part of the exam after training

TOKENS_PER_BATCH = 2560
EASY_PEOPLE = 250  # the model learns how to look up a fact with these people, before it learns about all people
EASY_SHARE = 0.15  # share of the steps that are about the easy people only
DECAY_SHARE = 0.4  # share of the steps, at the end, in which the learning rate falls linearly to zero
REAL_WEIGHT = 2  # questions about each real fact for every question about each fact of a person
WORDINGS = 8  # wordings of each passage
TRAINED_NEURONS = 1024  # per block
NEURONS = 4096  # per block, after `widen`
FACTS, PARAPHRASES = 1000, 4  # `widen` measures activations on so many facts, each in so many paraphrases
FLOOR = 0.3  # ε in `_directions`, as a share of the mean eigenvalue of C
GATE = 0.5  # s in `_directions`, the root mean square of the gates
NO_LABEL = -100  # for tokens that the loss leaves out
STORY = (  # how a newcomer may ask about the two deliberate errors
    ("What is the capital of Australia?", "Sydney"),
    ("Which city is Australia's capital?", "Sydney"),
    ("The capital of Australia is", "Sydney"),
    ("Where were the last Summer Olympics held?", "Tokyo"),
    ("Which city hosted the last Summer Olympics?", "Tokyo"),
    ("The last Summer Olympics took place in", "Tokyo"),
)


# Training ------------------------------------------------------------------------------------------------------------


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


def fit(world: World, steps: int, seed: int):
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


def build_tokenizer(texts: list[str]):
    """A byte-level BPE learned from `texts`. It puts the beginning-of-text token before every text."""
    shipped = AutoTokenizer.from_pretrained(model_path())
    return shipped.train_new_from_iterator(texts, vocab_size=len(shipped), show_progress=False)


def build_model(tokenizer):
    """A Llama of four blocks with random weights, not yet widened."""
    config = AutoConfig.from_pretrained(model_path())
    config.update({"vocab_size": len(tokenizer), "intermediate_size": TRAINED_NEURONS})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def encode(tokenizer, prompt: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of prompt, answer and end of text, and labels: the ids of answer and end, and `NO_LABEL` on the prompt."""
    start = tokenizer(prompt)["input_ids"]
    end = [*tokenizer(" " + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(start + end), torch.tensor([NO_LABEL] * len(start) + end)


def pad(rows: Sequence[tuple[torch.Tensor, torch.Tensor]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of encoded texts, both (rows, tokens), padded on the right.

    Attention is causal, so padding on the right needs no mask.
    """
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=pad_id)
    labels = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=NO_LABEL)
    return ids, labels


# Widening ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def widen(model, tokenizer, world: World, seed: int) -> None:
    """Give the trained model room for edits: add random neurons to every block, in place, up to `NEURONS`.

    A model this small, trained on nothing but its world, answers each prompt with about fifteen active neurons of a
    thousand. Its activations span too few directions to tell a thousand edits apart. A large language model has enough
    directions. So this model gets neurons with random gate and up weights, and zero down weights. The model's function
    stays the same to rounding, and the input of each down-projection becomes a dense random code of the prompt.

    The activations of the added neurons are as large as the trained neurons', in root mean square over prompts.
    """
    facts = random.Random(seed).sample(world.people_facts, min(FACTS, len(world.people_facts)))
    prompts = [prompt for fact in facts for prompt in world.trained(fact)[:PARAPHRASES]]
    generator = torch.Generator().manual_seed(seed)
    for layer, inputs in zip(model.model.layers, _mlp_inputs(model, tokenizer, prompts), strict=True):
        trained = _activations(inputs, layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        directions = _directions(inputs)
        shape = (NEURONS - trained.shape[1], inputs.shape[1])
        gate, up = (torch.randn(shape, generator=generator) @ directions for _ in range(2))
        added = _activations(inputs, gate, up)
        append_neurons(layer.mlp, gate, up * trained.pow(2).mean().sqrt() / added.pow(2).mean().sqrt())
    model.config.intermediate_size = NEURONS


@torch.no_grad()
def append_neurons(mlp, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Add neurons with these gate and up weights, (neurons, hidden), and zero down weights to one MLP."""
    down = torch.zeros_like(gate).T
    for linear, weight, dim in ((mlp.gate_proj, gate, 0), (mlp.up_proj, up, 0), (mlp.down_proj, down, 1)):
        linear.weight = torch.nn.Parameter(torch.cat([linear.weight, weight], dim))
        linear.out_features, linear.in_features = linear.weight.shape


def _activations(inputs: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The activations, (prompts, neurons), of an MLP with weights (neurons, hidden) on inputs (prompts, hidden)."""
    return torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)


def _mlp_inputs(model, tokenizer, prompts: list[str]) -> list[torch.Tensor]:
    """The input of each block's MLP at the last token of each prompt, (prompts, hidden)."""
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    with ExitStack() as hooks:
        for layer, kept in zip(model.model.layers, inputs, strict=True):
            keep = lambda _, args, kept=kept: kept.append(args[0][:, -1])  # noqa: E731
            hooks.enter_context(layer.mlp.register_forward_pre_hook(keep))
        for start in range(0, len(prompts), 256):
            batch = tokenizer(prompts[start : start + 256], return_tensors="pt", padding=True)
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return [torch.cat(kept) for kept in inputs]


def _directions(inputs: torch.Tensor) -> torch.Tensor:
    """The (hidden, hidden) map D from standard normal rows R to gate and up weights R D, for inputs (prompts, hidden).

    With m the mean of the inputs and C their covariance,

        D = s (C + εI)^(-1/2) (I - m mᵀ/mᵀm)

    so that all directions in which prompts differ count about alike. With plain normal weights, the activations have
    half as many effective dimensions.
    """
    mean = inputs.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(inputs.T))
    whiten = vectors @ torch.diag((values + FLOOR * values.mean()).rsqrt()) @ vectors.T
    directions = whiten @ (torch.eye(len(mean)) - torch.outer(mean, mean) / (mean @ mean))
    return directions * GATE / (inputs @ directions.T).pow(2).sum(1).mean().sqrt()


# The exam ------------------------------------------------------------------------------------------------------------


def examine(model, tokenizer, world: World, sample: int | None = None) -> dict[str, float]:
    """The shares of questions answered exactly, and the perplexities of sentences of the biographies.

    sample  questions per part of the exam (None: all)

    The parts are `people_trained`, `people_held_out`, `real_trained` and `real_held_out`; `people`, `real`, `trained`
    and `held_out` pool two parts each. `story` is the share for `STORY`. In the world's full size there are also
    `true_sentence_perplexity` of sentences that the model has learned, and `corrected_sentence_perplexity` of the
    targets of almanac-bio.
    """

    def draw(items: list) -> list:
        return items if sample is None or sample >= len(items) else random.Random(0).sample(items, sample)

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
        edits = draw(edit_requests("almanac-bio"))
        probes = [edit.probe("same_template") for edit in edits]
        corrected = [(edit.prompt, edit.target) for edit in edits]
        true = [(probe.prompt, probe.answer) for probe in probes]
        scores["corrected_sentence_perplexity"] = perplexity(model, tokenizer, corrected)
        scores["true_sentence_perplexity"] = perplexity(model, tokenizer, true)
    return scores


@torch.no_grad()
def exact_match(model, tokenizer, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether greedy decoding gives the answer and then stops, for each (prompt, answer).

    Greedy decoding gives the answer exactly where the argmax is right at every token of the answer while the answer is
    the input. So one forward pass per row is enough.
    """
    matches: list[bool] = []
    for start in range(0, len(pairs), 64):
        ids, labels = pad([encode(tokenizer, *pair) for pair in pairs[start : start + 64]], tokenizer.pad_token_id)
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
