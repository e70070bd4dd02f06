"""Room for edits: random neurons that read the stream and, as the model comes, write nothing.

A model this small, trained on nothing but its world, answers each prompt with some fifteen firing neurons out of a
thousand. Its own activations span too few directions to tell a thousand edits apart: what one edit writes into the
down-projection, others read. A large language model has that room; this one is given it. `widen` appends neurons with
random gate and up weights to every block, and zero down weights: the model's function stays the same to rounding, while
the input of each down-projection becomes a dense random-feature code of the prompt. These neurons know nothing. They
are the empty pages of the almanac.

The directions they read are drawn relative to how the stream varies: with m its mean and C its covariance (last prompt
tokens, after the norm),

    gate, up = s R (C + εI)^(-1/2) (I - m mᵀ/mᵀm),   R standard normal

so that all directions in which prompts differ count about alike; plain normal weights gave half the dimensions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from .model import batches
from .world import World

NEURONS = 4096  # per block, the trained ones included
FACTS, PARAPHRASES = 1000, 4  # prompts that the random directions are measured on
FLOOR = 0.3  # ε, as a share of the mean eigenvalue of C
GATE = 0.5  # s, the root mean square of the gates


@torch.no_grad()
def last_token_inputs(model, tokenizer, prompts: Sequence[str], path: str, rows: int = 256) -> list[torch.Tensor]:
    """For each block, the (prompts, width) input of its submodule `path` at the last token of each prompt."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    lengths = [len(ids) for ids in encoded]
    seen: dict[int, torch.Tensor] = {}
    layers = model.model.layers
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(lambda _, args, i=i: seen.__setitem__(i, args[0]))
        for i, layer in enumerate(layers)
    ]
    found: list[list[torch.Tensor]] = [[None] * len(prompts) for _ in layers]
    try:
        for batch in batches(lengths, rows):
            ids = torch.full((len(batch), max(lengths[i] for i in batch)), tokenizer.pad_token_id)
            for row, i in enumerate(batch):
                ids[row, : lengths[i]] = torch.tensor(encoded[i])
            model.model(input_ids=ids, use_cache=False)
            for block, values in enumerate(found):
                for row, i in enumerate(batch):
                    values[i] = seen[block][row, lengths[i] - 1].float()
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.stack(values) for values in found]


def effective_dimension(features: torch.Tensor, centred: bool = True) -> float:
    """Participation ratio (Σλ)² / Σλ² of the second moments of features (samples, width)."""
    x = features.double()
    if centred:
        x = x - x.mean(0)
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    return (gram.trace() ** 2 / (gram**2).sum()).item()


def overlap(a: torch.Tensor, b: torch.Tensor, k: int) -> torch.Tensor:
    """Share of the top k entries by magnitude that a and b (samples, width) have in common, row by row."""
    masks = [torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.abs().topk(k).indices, True) for x in (a, b)]
    return (masks[0] & masks[1]).sum(1) / k


def widen(model, tokenizer, world: World, neurons: int = NEURONS, seed: int = 0) -> None:
    """Append random neurons to every block, up to `neurons`, in place, with activations as large as the trained."""
    facts = world.people_facts
    facts = random.Random(seed).sample(facts, min(FACTS, len(facts)))
    prompts = [prompt for fact in facts for prompt in world.trained(fact)[:PARAPHRASES]]
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for stream, code in zip(
        last_token_inputs(model, tokenizer, prompts, "mlp"),
        last_token_inputs(model, tokenizer, prompts, "mlp.down_proj"),
        strict=True,
    ):
        directions = _directions(stream)
        shape = (neurons - code.shape[1], stream.shape[1])
        gate, up = (torch.randn(shape, generator=generator) @ directions for _ in range(2))
        size = torch.nn.functional.silu(stream @ gate.T).mul_(stream @ up.T).pow(2).mean().sqrt()
        weights.append((gate, up * code.pow(2).mean().sqrt() / size))
    append_neurons(model, weights)


@torch.no_grad()
def append_neurons(model, weights: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Append neurons with these (gate, up) weights, (neurons, hidden) each, block by block, and zero down weights."""
    for layer, (gate, up) in zip(model.model.layers, weights, strict=True):
        mlp = layer.mlp
        for linear, new, dim in (
            (mlp.gate_proj, gate, 0),
            (mlp.up_proj, up, 0),
            (mlp.down_proj, torch.zeros_like(gate).T, 1),
        ):
            linear.weight = torch.nn.Parameter(torch.cat([linear.weight, new.to(linear.weight.dtype)], dim))
            linear.out_features, linear.in_features = linear.weight.shape
        mlp.intermediate_size = mlp.gate_proj.out_features
    model.config.intermediate_size = mlp.intermediate_size


def _directions(stream: torch.Tensor) -> torch.Tensor:
    """(hidden, hidden) map of the docstring above, for stream (prompts, hidden)."""
    mean = stream.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(stream.T))
    whiten = vectors @ torch.diag((values + FLOOR * values.mean()).rsqrt()) @ vectors.T
    off_mean = torch.eye(len(mean)) - torch.outer(mean, mean) / (mean @ mean)
    directions = whiten @ off_mean
    return directions * GATE / (stream @ directions.T).pow(2).sum(1).mean().sqrt()
