"""The block that a method edits without a preset for the model: the papers' block, at the same relative depth."""

from __future__ import annotations

from memoir.models import LanguageModel


def layer_at(model: LanguageModel, depth: float) -> int:
    """The block at a relative depth: 0 is the first block, 1 the last, and 27 / 32 the paper's block 27 of 32."""
    return round(depth * (len(model.blocks) - 1))


def layer_before_last(model: LanguageModel, depth: float) -> int:
    """The same, but never the last block: for methods whose change reaches later tokens through a later block only."""
    return max(0, min(layer_at(model, depth), len(model.blocks) - 2))
