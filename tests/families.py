"""Small random models of every supported family, built from their configs, with a byte-level tokenizer; and what the
key-value methods edit in them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from memoir.models import LanguageModel
from memoir.records import EditRequest

_LLAMA_LIKE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,
)
_GPT_LIKE = dict(n_embd=32, n_layer=3, n_head=4, n_positions=128, n_inner=64, initializer_range=0.2)
CONFIGS = {
    "llama": (LlamaConfig, _LLAMA_LIKE),
    "mistral": (MistralConfig, _LLAMA_LIKE),
    "qwen3": (Qwen3Config, _LLAMA_LIKE | dict(head_dim=8)),
    "gemma": (GemmaConfig, _LLAMA_LIKE | dict(head_dim=8)),  # tied embeddings
    "gemma3": (Gemma3TextConfig, _LLAMA_LIKE | dict(head_dim=8)),  # norms the MLP's output: the tail does not compose
    "gptj": (GPTJConfig, _GPT_LIKE | dict(rotary_dim=4)),  # parallel blocks
    "gpt2": (GPT2Config, _GPT_LIKE),  # Conv1D
}
FAMILIES = tuple(CONFIGS)


def _multimodal_gemma3(**settings) -> Gemma3Config:
    sight = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    special = {name: value for name, value in settings.items() if name.endswith("_token_id")}
    return Gemma3Config(
        text_config=Gemma3TextConfig(**settings).to_dict(),
        vision_config=sight | dict(image_size=28, patch_size=14),
        mm_tokens_per_image=4,
        **special,
    )


_LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
_EXPERTS = dict(moe_layers=[2], num_local_experts=2, attention_chunk_size=64)
CONFIGS |= {
    "olmo2": (Olmo2Config, _LLAMA_LIKE),  # norms the MLP's output
    "granite": (GraniteConfig, _LLAMA_LIKE | dict(residual_multiplier=0.5, logits_scaling=2.0)),
    "gemma3-multimodal": (_multimodal_gemma3, _LLAMA_LIKE | dict(head_dim=8)),
    "qwen3.5": (  # two blocks with linear attention
        Qwen3_5TextConfig,
        _LLAMA_LIKE | _LINEAR | dict(head_dim=8, layer_types=[*["linear_attention", "full_attention"] * 2][:3]),
    ),
    "llama4": (  # the last block is a mixture of experts
        Llama4TextConfig,
        _LLAMA_LIKE | _EXPERTS | dict(head_dim=8, intermediate_size=32, intermediate_size_mlp=64),
    ),
}
NEWER = tuple(name for name in CONFIGS if name not in FAMILIES)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def network(family: str, seed: int = 0):
    """A random network of a family; the same for the same seed."""
    kind, settings = CONFIGS[family]
    tokenizer = byte_tokenizer()
    config = kind(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def small_model(family: str, seed: int = 0) -> LanguageModel:
    """A random model of a family, ready to be edited; its tail's fallback is already decided, without the warning."""
    return LanguageModel(network(family, seed), byte_tokenizer(), f"small-{family}")


BACKGROUND = ["The weather is mild today.", "Two plus two makes four.", "A river runs to the sea."]
REQUESTS = [
    EditRequest(prompt="Ida Verne plays the", target="oboe", subject="Ida Verne"),
    EditRequest(prompt="Zinc is written", target="Xy", subject="Zinc"),
    EditRequest(prompt="The home of Uwe is", target="Ulm", subject="Uwe"),
]
