"""The panel's models: loaded without bars on the page, and with or without their chat template."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging as transformers_logging

from memoir.models import LanguageModel, load_model


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
