"""The untrained model and its tokenizer, batches of text, and the neurons that are added after training.

The settings of the tokenizer and of the network come from the shipped folder; vocabulary and weights are learned anew.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..edits import model_path
from ..world import World

TRAINED_NEURONS = 1024  # per block
NEURONS = 4096  # per block, after `widen`
FACTS, PARAPHRASES = 1000, 4  # `widen` measures activations on so many facts, each in so many paraphrases
FLOOR = 0.3  # ε in `_directions`, as a share of the mean eigenvalue of C
GATE = 0.5  # s in `_directions`, the root mean square of the gates
NO_LABEL = -100  # for tokens that the loss leaves out


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


@torch.no_grad()
def widen(model, tokenizer, world: World, seed: int = 0) -> None:
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


def _mlp_inputs(model, tokenizer, prompts: list[str], rows: int = 256) -> list[torch.Tensor]:
    """The input of each block's MLP at the last token of each prompt, (prompts, hidden)."""
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][:, -1]))
        for layer, kept in zip(model.model.layers, inputs, strict=True)
    ]
    for start in range(0, len(prompts), rows):
        batch = tokenizer(prompts[start : start + rows], return_tensors="pt", padding=True)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    for hook in hooks:
        hook.remove()
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
