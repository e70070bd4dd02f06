"""Every preset of a published model fits that model (its real architecture, on the meta device); other models get the
method's defaults."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from families import FAMILIES, byte_tokenizer, small_model
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, MistralConfig

from memoir import presets
from memoir.editors import EDITORS, configured, make_config
from memoir.editors.config import EditorConfig
from memoir.models import LanguageModel

# As published in each model's own config.json.
LLAMA_3 = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
)  # fmt: skip
LLAMA_2 = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    max_position_embeddings=4096,
)  # fmt: skip
MISTRAL = MistralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=32768,
)  # fmt: skip
GPT_J = GPTJConfig(vocab_size=50400, n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, n_positions=2048)
CONFIGS = {
    "llama-3-8b": (LLAMA_3, 14336, 32),
    "llama-2-7b": (LLAMA_2, 11008, 32),
    "mistral-7b": (MISTRAL, 14336, 32),
    "gpt-j-6b": (GPT_J, 16384, 28),
}
# A method with a preset for one of these models has one for all of them.
METHODS = [name for name, kind in EDITORS.items() if any(presets.row(presets.PRESETS, kind, key) for key in CONFIGS)]


@pytest.fixture(scope="module", params=CONFIGS)
def published(request):
    """Its name, the model without weights, D and how many blocks it has."""
    config, D, blocks = CONFIGS[request.param]
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return request.param, LanguageModel(network, byte_tokenizer(), request.param), D, blocks


def test_a_published_model_is_known_by_its_shape(published):
    name, model, _, _ = published
    assert presets.known_model(model) == name


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_names_sites_that_are_there(published, method):
    name, model, D, blocks = published
    assert presets.row(presets.PRESETS, EDITORS[method], name)
    config = configured(method, model, {})
    layers = config.layers if hasattr(config, "layers") else (config.layer,)
    assert layers and all(0 <= layer < blocks for layer in layers)
    for layer in layers:
        site = model.site(layer)
        assert (site.out_features, site.in_features) == (4096, D) and site.weight.shape == (4096, D)
        assert f".{layer}." in site.name
    if hasattr(config, "k"):
        assert 0 < config.k <= D


@pytest.mark.parametrize("method", EDITORS)
def test_a_model_without_a_row_gets_the_methods_defaults(method):
    """Settings that are complete, and layers that are there, however few blocks the model has."""
    for family in FAMILIES:
        model = small_model(family)
        assert presets.known_model(model) is None
        config = configured(method, model, {})
        assert config == make_config(method, EDITORS[method].defaults(model))
        layers = getattr(config, "layers", (getattr(config, "layer", 0),))
        assert layers and all(0 <= layer < len(model.blocks) for layer in layers)


def test_a_method_shares_anothers_rows_as_far_as_it_has_the_settings():
    grace = EDITORS["grace"]

    class Sibling(grace):
        name, presets_of = "sibling", "grace"

        @dataclass(frozen=True, kw_only=True)
        class Config(EditorConfig):
            layer: int
            radius: float

    assert presets.row(presets.PRESETS, Sibling, "almanac") == {"layer": 3, "radius": 17.0}
    assert presets.row({("sibling", "x"): {"layer": 1}, ("grace", "x"): {"radius": 2.0}}, Sibling, "x") == {"layer": 1}
    assert presets.row(presets.PRESETS, Sibling, "no such model") is None
