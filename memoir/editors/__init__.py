"""The registry of methods. One published method is one file; adding its class here makes it available everywhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from memoir import texts
from memoir.almanac import background_prompts as almanac_background
from memoir.editors.alphaedit import AlphaEdit
from memoir.editors.base import EditCancelled, EditError, Editor, EditorConfig, check_base
from memoir.editors.defer import DEFER
from memoir.editors.ft import FT
from memoir.editors.grace import GRACE
from memoir.editors.hub import pull
from memoir.editors.incontext import InContext
from memoir.editors.memit import MEMIT
from memoir.editors.memoir import MEMOIR
from memoir.editors.memoir_rls import MEMOIRbyRLS
from memoir.editors.merging import absorb
from memoir.editors.residual import ResidualEditor
from memoir.editors.rlsedit import RLSEdit
from memoir.editors.rome import ROME
from memoir.editors.storage import MemoryFileError, read_header, refusing
from memoir.editors.ultraedit import UltraEdit
from memoir.editors.unedited import Unedited
from memoir.editors.wise import WISE
from memoir.models import LanguageModel
from memoir.presets import NAMED_PRESETS, preset

# In the order of the tables.
EDITORS: dict[str, type[Editor]] = {
    editor.name: editor
    for editor in (
        Unedited,
        InContext,
        FT,
        ROME,
        MEMIT,
        DEFER,
        GRACE,
        WISE,
        AlphaEdit,
        UltraEdit,
        RLSEdit,
        MEMOIR,
        MEMOIRbyRLS,
    )
}

__all__ = [
    "EDITORS",
    "EditCancelled",
    "EditError",
    "Editor",
    "EditorConfig",
    "MemoryFileError",
    "configured",
    "editor_class",
    "from_hub",
    "load_editor",
    "make_config",
    "make_editor",
    "merge_memories",
    "resolved",
]


def editor_class(method: str) -> type[Editor]:
    """The class of a method. ValueError lists the methods."""
    if method not in EDITORS:
        raise ValueError(f"method {method!r} is unknown; expected one of {', '.join(EDITORS)}")
    return EDITORS[method]


def resolved(method: str, settings: Mapping[str, Any]) -> tuple[type[Editor], dict[str, Any]]:
    """The class of a method, and its settings. Two of them are not its Config's: MEMOIR's `write` names one of its two
    forms, so `memoir` with write="rls" is `memoir-rls`; and `preset` names settings that the others are added to."""
    editor, settings = editor_class(method), dict(settings)
    if issubclass(editor, ResidualEditor) and "write" in settings:
        forms = {form.write_rule: form for form in EDITORS.values() if issubclass(form, ResidualEditor)}
        if (write := settings.pop("write")) not in forms:
            raise ValueError(f"write = {write!r}, expected {' or '.join(map(repr, forms))}")
        editor = forms[write]
    if "preset" in settings:
        named = {name: values for (method, name), values in NAMED_PRESETS.items() if method == editor.name}
        if (name := settings.pop("preset")) not in named:
            raise ValueError(f"preset = {name!r}, expected one that {editor.name} has: {', '.join(named) or 'none'}")
        settings = named[name] | settings
    return editor, settings


def make_config(method: str, settings: Mapping[str, Any]) -> EditorConfig:
    """A method's Config from settings by name. TypeError lists the settings if a name is unknown or missing."""
    editor, settings = resolved(method, settings)
    known = {field.name for field in fields(editor.Config)}
    if unknown := sorted(set(settings) - known):
        raise TypeError(f"{method} has no setting {', '.join(unknown)}; expected {', '.join(sorted(known))}")
    return editor.Config(**settings)


def configured(
    method: str, model: LanguageModel, overrides: Mapping[str, Any], dataset: str | None = None
) -> EditorConfig:
    """A method's Config for a model: its preset with overrides."""
    editor, overrides = resolved(method, overrides)
    return make_config(editor.name, {**preset(editor, model, dataset), **overrides})


def make_editor(
    method: str,
    model: LanguageModel,
    *,
    background: Sequence[str] | None = None,
    dataset: str | None = None,
    **overrides: Any,
) -> Editor:
    """An editor of a method on a model, with the model's preset and `overrides`.

    background  texts irrelevant to all edits; default: the almanac's own on the almanac, elsewhere `texts.background`,
                or `texts.answered` for preset="paper"
    dataset     the data set to be edited, for presets that differ by data set
    """
    editor, _ = resolved(method, overrides)
    config = configured(method, model, overrides, dataset)
    if background is None:
        ours = texts.answered() if overrides.get("preset") == "paper" else texts.background()
        background = almanac_background() if model.name == "almanac" else ours
    return editor(model, config, background)


def load_editor(folder: str | os.PathLike, model: LanguageModel, *, allow_dtype: bool = False) -> Editor:
    """The editor that `Editor.save` wrote to a folder, on the same base model. MemoryFileError on any other model.

    allow_dtype  take the same weights in another dtype, too; answers then agree up to rounding
    """
    header = read_header(folder)
    # The model is compared first: on another one the settings might not even make an editor.
    check_base(folder, header, model, allow_dtype)
    with _or_as_before(model):
        with refusing(f"{folder} holds settings that make no editor here"):
            config = make_config(header["method"], header["config"])
            editor = editor_class(header["method"])(model, config, header["background"])
        editor.resume(folder, allow_dtype=allow_dtype)
    return editor


def from_hub(
    repo_id: str,
    model: LanguageModel,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_dtype: bool = False,
) -> Editor:
    """The editor that `Editor.push_to_hub` uploaded, checked like any other memory file."""
    return load_editor(pull(repo_id, revision=revision, token=token), model, allow_dtype=allow_dtype)


def merge_memories(model: LanguageModel, *folders: str | os.PathLike) -> Editor:
    """One MEMOIR editor with the edits of several memory files of the same base model and settings, later ones last."""
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} memory files to merge, expected at least 2")
    with _or_as_before(model):
        merged, *others = (load_editor(folder, model) for folder in folders)
        for editor in (merged, *others):
            if not isinstance(editor, ResidualEditor):
                raise EditError(f"only memories of memoir can be merged, but one is of {editor.name}")
        for other in others:
            absorb(merged, other)
        merged.attach()
    return merged


@contextlib.contextmanager
def _or_as_before(model: LanguageModel) -> Iterator[None]:
    """If the code inside fails, attach the editor that the model had before."""
    before = model.editor
    try:
        yield
    except BaseException:
        if model.editor is not None:
            model.editor.detach()
        if before is not None:
            before.attach()
        raise
