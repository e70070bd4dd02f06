"""The block that a method edits without a preset for the model: the papers' block, at the same relative depth."""

from __future__ import annotations

from memoir.models import LanguageModel


def layer_at(model: LanguageModel, depth: float) -> int:
    """The block at a relative depth: 0 is the first block, 1 the last, so the papers' block 27 of 0 to 31 is 27 / 31.
    In a model with mixtures of experts, the nearest dense block."""
    return nearest(model.dense, depth * (len(model.blocks) - 1))


def layer_before_last(model: LanguageModel, depth: float) -> int:
    """The same, but never the last block: for methods whose change reaches later tokens through a later block only."""
    earlier = [layer for layer in model.dense if layer < len(model.blocks) - 1]
    return nearest(earlier or model.dense, depth * (len(model.blocks) - 1))


def nearest(layers: list[int], place: float) -> int:
    return min(layers, key=lambda layer: abs(layer - round(place)))
