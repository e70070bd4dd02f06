"""The registry of methods. One published method is one file; adding its class here makes it available everywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from memoir.editors.base import EditCancelled, EditError, Editor, EditorConfig
from memoir.editors.ft import FT
from memoir.editors.memoir import MEMOIR
from memoir.editors.storage import MemoryFileError, read_memory
from memoir.editors.unedited import Unedited
from memoir.models import LanguageModel
from memoir.presets import preset

EDITORS: dict[str, type[Editor]] = {editor.name: editor for editor in (MEMOIR, FT, Unedited)}

__all__ = [
    "EDITORS",
    "EditCancelled",
    "EditError",
    "Editor",
    "EditorConfig",
    "MemoryFileError",
    "editor_class",
    "load_editor",
    "make_config",
    "make_editor",
]


def editor_class(method: str) -> type[Editor]:
    """The class of a method; ValueError names the ones there are."""
    if method not in EDITORS:
        raise ValueError(f"method {method!r} is unknown; expected one of {', '.join(EDITORS)}")
    return EDITORS[method]


def make_config(method: str, settings: dict[str, Any]) -> EditorConfig:
    """A method's Config from settings by name; an unknown or missing name is a TypeError that lists what there is."""
    config = editor_class(method).Config
    known = {field.name for field in fields(config)}
    if unknown := sorted(set(settings) - known):
        raise TypeError(f"{method} has no setting {', '.join(unknown)}; expected {', '.join(sorted(known))}")
    return config(**settings)


def make_editor(
    method: str, model: LanguageModel, *, background: Sequence[str] | None = None, **overrides: Any
) -> Editor:
    """An editor of that method on a model, by the model's preset with `overrides`.

    background  texts irrelevant to all edits; default: the almanac's own on the almanac, none elsewhere
    """
    config = make_config(method, {**preset(method, model), **overrides})
    if background is None and model.name == "almanac":
        from memoir.almanac import background_prompts

        background = background_prompts()
    return editor_class(method)(model, config, background or ())


def load_editor(folder: str | os.PathLike, model: LanguageModel) -> Editor:
    """The editor that `Editor.save` wrote to a folder, on the same base model; MemoryFileError on any other."""
    header, edits, tensors = read_memory(folder)
    if header["fingerprint"] != model.fingerprint:
        raise MemoryFileError(
            f"{folder} was written on {header['model']} ({header['fingerprint'][:12]}…); "
            f"this model is {model.name} ({model.fingerprint[:12]}…)"
        )
    editor = editor_class(header["method"])(
        model, make_config(header["method"], header["config"]), header["background"]
    )
    editor.restore(edits, tensors)
    return editor
