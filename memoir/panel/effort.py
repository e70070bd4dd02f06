"""Settings for one action: what becomes of conflicts, and more effort for an edit that is tried again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from memoir.editors import Editor, EditorConfig

STEPS = ("iterations", "value_steps")  # what the methods call their most steps


def most_steps(config: EditorConfig) -> int:
    return next((getattr(config, name) for name in STEPS if hasattr(config, name)), 1)


def harder(config: EditorConfig, again: int) -> dict[str, Any]:
    """Settings for an edit that is tried again: twice the steps and a tenth of the loss to stop at, each time."""
    names = {field.name for field in fields(config)} if again else set()
    changes = {name: getattr(config, name) * 2**again for name in STEPS if name in names}
    return changes | ({"stop_loss": config.stop_loss / 10**again} if "stop_loss" in names else {})


@contextlib.contextmanager
def configured(editor: Editor, conflict: str | None = None, again: int = 0) -> Iterator[EditorConfig]:
    """Within it the editor has these settings: conflict "replace" or "keep-both", None for its own."""
    config = editor.config
    conflicts = {"on_conflict": conflict} if conflict and hasattr(config, "on_conflict") else {}
    editor.config = replace(config, **conflicts, **harder(config, again))
    try:
        yield editor.config
    finally:
        editor.config = config
