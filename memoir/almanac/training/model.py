"""The almanac's model, a four-block Llama, with its tokenizer, its batches, and its room for edits.

A model this small, trained on nothing but its world, answers each prompt with about fifteen active neurons of a thousand.
Its activations span too few directions to tell a thousand edits apart: the text of one edit would be read by others. A
large language model has enough directions. `widen` gives them to this model: each block gets neurons with random gate
and up weights, and zero down weights. The function of the model stays the same to rounding, and the input of each
down-projection becomes a dense random code of the prompt.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..world import World

VOCABULARY = 3072
BOS, EOS, PAD = "<s>", "</s>", "<pad>"

TRAINED_NEURONS = 1024  # per block
NEURONS = 4096  # per block after `widen`
FACTS, PARAPHRASES = 1000, 4  # prompts that `widen` measures activations on: so many facts, so many questions each
FLOOR = 0.3  # ε in `_directions`, as a share of the mean eigenvalue of C
GATE = 0.5  # s in `_directions`, the root mean square of the gates


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens, learned from `texts`. It puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, not yet widened."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=TRAINED_NEURONS,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> tuple[list[int], int]:
    """Token ids of BOS, prompt, answer and EOS, and the number of tokens before the answer."""
    start = tokenizer(prompt)["input_ids"]
    end = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    return [*start, *end, tokenizer.eos_token_id], len(start)


def pad(rows: Sequence[tuple[list[int], int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, tokens) ids padded on the right, and labels, which are -100 on the prompt and on the padding.

    Attention is causal, so padding on the right needs no mask.
    """
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return ids, labels


def answer_logits(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits, (tokens, vocabulary), that predict the tokens `labels[labels >= 0]`, for ids and labels from `pad`.

    The head runs on these tokens only.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][labels[:, 1:] >= 0])


@torch.no_grad()
def widen(model, tokenizer: PreTrainedTokenizerFast, world: World, neurons: int = NEURONS, seed: int = 0) -> None:
    """Add random neurons to every block of the model, in place, up to `neurons` per block.

    Their activations are as large as those of the trained neurons, in root mean square over prompts of the world.
    """
    facts = world.people_facts
    facts = random.Random(seed).sample(facts, min(FACTS, len(facts)))
    prompts = [prompt for fact in facts for prompt in world.trained(fact)[:PARAPHRASES]]
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for layer, inputs in zip(model.model.layers, _mlp_inputs(model, tokenizer, prompts), strict=True):
        trained = _activations(inputs, layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        directions = _directions(inputs)
        shape = (neurons - trained.shape[1], inputs.shape[1])
        gate, up = (torch.randn(shape, generator=generator) @ directions for _ in range(2))
        added = _activations(inputs, gate, up)
        weights.append((gate, up * trained.pow(2).mean().sqrt() / added.pow(2).mean().sqrt()))
    append_neurons(model, weights)


@torch.no_grad()
def append_neurons(model, weights: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Append neurons with zero down weights. `weights` has (gate, up), (neurons, hidden) each, for each block."""
    for layer, (gate, up) in zip(model.model.layers, weights, strict=True):
        mlp = layer.mlp
        _append(mlp.gate_proj, gate, dim=0)
        _append(mlp.up_proj, up, dim=0)
        _append(mlp.down_proj, torch.zeros_like(gate).T, dim=1)
        mlp.intermediate_size = mlp.gate_proj.out_features
    model.config.intermediate_size = mlp.intermediate_size


def _append(linear: torch.nn.Linear, weight: torch.Tensor, dim: int) -> None:
    linear.weight = torch.nn.Parameter(torch.cat([linear.weight, weight.to(linear.weight.dtype)], dim))
    linear.out_features, linear.in_features = linear.weight.shape


def _activations(inputs: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The activations, (prompts, neurons), of an MLP with these weights, (neurons, hidden), on inputs (prompts, hidden)."""
    return torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)


def _mlp_inputs(model, tokenizer: PreTrainedTokenizerFast, prompts: list[str], rows: int = 256) -> list[torch.Tensor]:
    """For each block, the input of its MLP at the last token of each prompt, (prompts, hidden)."""
    inputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][:, -1]))
        for layer, kept in zip(model.model.layers, inputs, strict=True)
    ]
    try:
        for start in range(0, len(prompts), rows):
            batch = tokenizer(prompts[start : start + rows], return_tensors="pt", padding=True)
            model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept) for kept in inputs]


def _directions(inputs: torch.Tensor) -> torch.Tensor:
    """The (hidden, hidden) map from standard normal rows to gate and up weights, for MLP inputs (prompts, hidden).

    With m the mean of the inputs, C their covariance, and R standard normal rows, the weights are

        s R (C + εI)^(-1/2) (I - m mᵀ/mᵀm)

    so that all directions in which prompts differ count about alike. Plain normal weights give activations with half
    the effective dimension.
    """
    mean = inputs.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(inputs.T))
    whiten = vectors @ torch.diag((values + FLOOR * values.mean()).rsqrt()) @ vectors.T
    directions = whiten @ (torch.eye(len(mean)) - torch.outer(mean, mean) / (mean @ mean))
    return directions * GATE / (inputs @ directions.T).pow(2).sum(1).mean().sqrt()
