"""A model and an editor as the panel opens them: loaded without bars, with or without a chat template, τ measured."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging as transformers_logging

from memoir.editors import Editor
from memoir.models import LanguageModel, load_model
from memoir.panel.asking import by_overlap


def prepare(editor: Editor) -> None:
    """Measure τ where it is to be, so that it is known from the start and the first edit is as quick as any other."""
    if by_overlap(editor):
        editor.prepare()


def keep_tau(old: Editor, fresh: Editor) -> None:
    """An editor that takes the place of another one keeps a τ that was moved or measured there."""
    if by_overlap(fresh) and fresh.config.tau != "auto":
        fresh.memory.tau = fresh.config.tau
    elif by_overlap(fresh) and old.calibrated and not fresh.calibrated:
        fresh.calibrate()


def load_quietly(name: str, chat: bool, dtype: str | None, device_map: Any) -> LanguageModel:
    """What `load_model` loads; its bars would appear above the panel."""
    if not name.strip():
        raise ValueError("model is empty, expected almanac, smollm2, a local folder, a GGUF file or a hub id")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        return load_model(name, chat=chat, dtype=dtype, device_map=device_map)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def with_chat(model: LanguageModel, chat: bool) -> LanguageModel:
    """The same network with or without its chat template."""
    if chat == model.chat:
        return model
    other = LanguageModel(model.network, model.tokenizer, model.name, chat=chat)
    other.weights = model.weights
    return other
