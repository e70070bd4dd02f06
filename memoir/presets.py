"""Which value for which model: (method, model) → settings, each row with its source.

A model is recognised by its shape, so that a local folder of any name finds its row. A model without a row gets the
method's settings for an unknown model, with layers placed at the same relative depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memoir.models import LanguageModel


@dataclass(frozen=True)
class Shape:
    """What tells one published model from another: family, blocks, d, D and vocabulary."""

    family: str
    blocks: int
    d: int
    D: int
    vocabulary: int


SHAPES = {
    "almanac": Shape("llama", 4, 128, 4096, 3072),
    "llama-3-8b": Shape("llama", 32, 4096, 14336, 128256),
    "llama-2-7b": Shape("llama", 32, 4096, 11008, 32000),
    "mistral-7b": Shape("mistral", 32, 4096, 14336, 32000),
    "gpt-j-6b": Shape("gptj", 28, 4096, 16384, 50400),
}

PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("memoir", "almanac"): dict(layer=2, k=1024, tau=0.7, feature="last"),
    # MEMOIR, section 4.1 and appendix: block 27, k = 4096, rate 1, τ = 0.4 on ZsRE.
    ("memoir", "llama-3-8b"): dict(layer=27, k=4096),
    ("memoir", "llama-2-7b"): dict(layer=27, k=4096),
    ("memoir", "mistral-7b"): dict(layer=27, k=4096),
    ("memoir", "gpt-j-6b"): dict(layer=21, k=4096),
    ("ft", "almanac"): dict(layer=2, learning_rate=1e-3),
    # EasyEdit, hparams/FT/*.yaml: block 21, 25 steps of Adam at 5e-4, no norm constraint.
    ("ft", "llama-3-8b"): dict(layer=21),
    ("ft", "llama-2-7b"): dict(layer=21),
    ("ft", "mistral-7b"): dict(layer=21),
    ("ft", "gpt-j-6b"): dict(layer=21),
}


def known_model(model: LanguageModel) -> str | None:
    """The name in `SHAPES` that a model's shape answers to, or None."""
    site = model.site(0)
    rows = model.network.get_input_embeddings().weight.shape[0]
    shape = Shape(model.family, len(model.blocks), site.out_features, site.in_features, rows)
    return next((name for name, known in SHAPES.items() if known == shape), None)


def preset(method: str, model: LanguageModel) -> dict[str, Any]:
    """The settings of a method for a model: its row, or the defaults for a model that has none."""
    row = PRESETS.get((method, known_model(model) or ""))
    return dict(row) if row is not None else unknown_model(method, model)


def unknown_model(method: str, model: LanguageModel) -> dict[str, Any]:
    """Settings for a model without a row: the paper's layers and widths at the same relative depth and share."""
    blocks, width = len(model.blocks), model.site(0).in_features
    return {
        "memoir": dict(layer=round(27 / 32 * (blocks - 1)), k=max(1, width * 2 // 7)),
        "ft": dict(layer=round(21 / 32 * (blocks - 1))),
    }.get(method, {})
