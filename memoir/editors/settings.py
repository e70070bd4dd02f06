"""The meaning of each setting, read from the comments in a method's Config."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from memoir.editors.base import Editor

_FIELD = re.compile(r" *(\w+): ([^#=]+?)(?: = [^#]+?)?(?:  # (.+))?")


class Setting(NamedTuple):
    """A setting of a method: its default, None where the preset or the model gives one, and its meaning."""

    name: str
    default: Any
    meaning: str


def settings_of(editor: type[Editor]) -> list[Setting]:
    """The settings of a method in the order of their definition; the meaning is the comment beside or above a field."""
    meanings: dict[str, str] = {}
    for part in reversed(editor.Config.__mro__[:-1]):
        above: list[str] = []
        for line in inspect.getsource(part).splitlines():
            if line.strip().startswith("# "):
                above.append(line.strip()[2:])
            elif found := _FIELD.fullmatch(line):
                meanings[found[1]] = found[3] or " ".join(above)
                above = []
            else:
                above = []
    return [
        Setting(field.name, None if field.default is MISSING else field.default, meanings.get(field.name, ""))
        for field in fields(editor.Config)
    ]
