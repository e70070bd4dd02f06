"""The panel's small widgets, and what they show: `page` has the macros of panel.html, which escape every text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from memoir.editors import EDITORS
from memoir.editors.config import settings_from
from memoir.panel.session import LOADED_MAX, Session
from memoir.records import EditRequest

FOLDER = Path(__file__).parent
# What `Session.open` takes besides settings of the method; each has its own field, or is the notebook's.
OPENING = {"model", "method", "loaded", "chat", "dtype", "device_map", "background"}


def marked(text: str, other: str) -> list[tuple[str, bool]]:
    """A text in pieces, with whether a piece is not in the other text; word by word."""
    words, others = re.findall(r"\S+|\s+", text), re.findall(r"\S+|\s+", other)
    pieces = difflib.SequenceMatcher(None, others, words, autojunk=False).get_opcodes()
    return [("".join(words[i:j]), tag != "equal") for tag, _, _, i, j in pieces if j > i]


_environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
_environment.globals["marked"] = marked
page = _environment.get_template("panel.html").module


def button(label: str, action: Callable[[], None], style: str = "", tip: str = "") -> widgets.Button:
    made = widgets.Button(description=label, button_style=style, tooltip=tip or None)
    made.on_click(lambda _: action())
    return made


def box(style: str, *children: widgets.Widget) -> widgets.Box:
    made = widgets.Box(children)
    for name in style.split():
        made.add_class(name)
    return made


def show(widget: widgets.Widget, shown: bool) -> None:
    """Show a widget, or take it off the page."""
    widget.layout.display = None if shown else "none"


class Line:
    """Where an action reports, with a Cancel button if it can be cancelled; both keep their space while unused."""

    def __init__(self, cancel: Callable[[], None] | None = None):
        self.text = widgets.HTML().add_class("mm-line")
        self.cancel = button("Cancel", lambda: self.show(page.progress("Cancelling")))
        self.cancel.on_click(lambda _: cancel())
        self.widget = box("mm-outcome", self.text, *([self.cancel] if cancel else []))
        self.show("")

    def show(self, html: str, busy: bool = False) -> None:
        self.text.value = html
        self.cancel.layout.visibility = "visible" if busy else "hidden"


class Row:
    """One line of the list of edits."""

    def __init__(self, ask: Callable[[EditRequest], None], forget: Callable[[EditRequest], None]):
        self.edit: EditRequest | None = None
        self.text = widgets.HTML()
        self.ask = button("Ask", lambda: ask(self.edit))
        self.forget = button("Forget", lambda: forget(self.edit))
        self.widget = box("mm-row", self.text, self.ask, self.forget)

    def show(self, edit: EditRequest | None, session: Session) -> None:
        """Show an edit; without one the row is gone, and all its texts with it."""
        self.edit, self.text.value, self.ask.tooltip, self.forget.tooltip = edit, "", "", ""
        show(self.widget, edit is not None)
        if edit is not None:
            able = session.editor.can_forget
            self.text.value = page.edit(edit, session.status.get(edit.id))
            self.ask.tooltip, self.forget.disabled = f"Ask: {edit.prompt}", not able
            self.forget.tooltip = f"Forget: {edit.prompt}" if able else "This method cannot forget a single edit"


class Drawer:
    """What Change opens: the model, the method and their settings. They take effect when Apply is pressed."""

    def __init__(self, model: str, method: str, apply: Callable[[], None]):
        labels = [(editor.label, name) for name, editor in EDITORS.items()]
        self.model = widgets.Combobox(
            value=model, options=("almanac", "smollm2"), description="Model", continuous_update=False
        )
        self.method = widgets.Dropdown(value=method, options=labels, description="Method")
        self.method.observe(lambda _: self._other_method(), "value")
        self.chat = widgets.Checkbox(description="Chat template", indent=False)
        self.dtype = widgets.Combobox(
            options=("float32", "bfloat16", "float16"), description="Precision", placeholder="automatic"
        )
        self.background = widgets.Text(description="Unrelated texts", placeholder="built in, or a file")
        self.loaded = widgets.BoundedIntText(min=0, max=LOADED_MAX, description="Almanac edits to start with")
        self.tau = widgets.Text(description="τ", placeholder="own, auto, or 0 to 1")
        self.settings = widgets.Textarea(
            description="Settings of the method, one a line", placeholder="k = 512", rows=3, continuous_update=False
        )
        self.apply = button("Apply", apply, "primary")
        self.close = button("Close", lambda: show(self.widget, False))
        self.inforce = widgets.HTML()
        self._followed: dict[widgets.Widget, Any] = {}
        self._texts: Any = None  # background texts that the notebook gave; they stay unless a file is named
        first = box("mm-bar", self.model, self.method, self.dtype, self.chat)
        second = box("mm-bar", self.background, self.tau, self.loaded)
        third = box("mm-bar", self.settings, box("mm-group", self.apply, self.close))
        self.widget = box("mm-card mm-drawer", first, second, third, self.inforce)
        show(self.widget, False)

    def toggle(self, session: Session) -> None:
        """Open it with what is in force, or close it."""
        opening = self.widget.layout.display == "none"
        if opening:
            self._followed = {}
            self.follow(session)
        show(self.widget, opening)

    def follow(self, session: Session) -> None:
        """Refill the fields when the settings in force change; until then keep what the user has typed."""
        if session.editor is None:
            return
        overrides, background = session.overrides, session.options["background"]
        tau = overrides.pop("tau", "")
        self._texts = None if isinstance(background, str) else background
        self.background.placeholder = f"{len(self._texts)} texts given" if self._texts else "built in, or a file"
        values = {
            self.model: session.model_name,
            self.method: session.editor.name,  # another one empties τ and the settings
            self.chat: session.model.chat,
            self.dtype: str(session.options["dtype"] or "").removeprefix("torch."),
            self.background: background if isinstance(background, str) else "",
            self.tau: str(tau),
            self.settings: "\n".join(f"{name} = {value!r}" for name, value in overrides.items()),
        }
        self.inforce.value = page.settings(session.editor)
        if values != self._followed:
            self._followed = values
            for field, value in values.items():
                field.value = value

    def _other_method(self) -> None:
        """The settings of one method are not those of another."""
        self.tau.value = self.settings.value = ""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `Session.open`; ValueError names a setting that cannot be read."""
        lines = [*self.settings.value.splitlines(), *([f"tau = {self.tau.value}"] if self.tau.value.strip() else [])]
        settings = settings_from(filter(str.strip, lines))
        if others := sorted(OPENING & settings.keys()):
            raise ValueError(f"{others[0]} is no setting of the method, expected it in a field of its own")
        return dict(
            chat=self.chat.value,
            dtype=self.dtype.value.strip() or None,
            background=self.background.value.strip() or self._texts,
            **settings,
        )
