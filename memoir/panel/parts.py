"""The panel's small widgets: buttons, fields, lines that report, rows of the list of edits, and the drawer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from memoir.editors import EDITORS
from memoir.panel.html import page
from memoir.panel.inputs import settings_of
from memoir.panel.session import LOADED_MAX, Session
from memoir.records import EditRequest

DTYPES = {"automatic": None, "float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


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
        self.cancel = button("Cancel", self._cancelling)
        self.cancel.on_click(lambda _: cancel())
        self.widget = box("mm-outcome", self.text, *([self.cancel] if cancel else []))
        self.show("")

    def show(self, html: str, busy: bool = False) -> None:
        self.text.value = html
        self.cancel.layout.visibility = "visible" if busy else "hidden"

    def _cancelling(self) -> None:
        self.show(page.progress("Cancelling"))


class Row:
    """One line of the list of edits."""

    def __init__(self, ask: Callable[[EditRequest], None], forget: Callable[[EditRequest], None]):
        self.edit: EditRequest | None = None
        self.text = widgets.HTML()
        self.ask = button("Ask", lambda: ask(self.edit))
        self.forget = button("Forget", lambda: forget(self.edit))
        self.widget = box("mm-row", self.text, self.ask, self.forget)

    def show(self, edit: EditRequest | None, learned: bool | None, can_forget: bool) -> None:
        """Show an edit; without one the row is gone."""
        self.edit = edit
        show(self.widget, edit is not None)
        if edit is None:
            self.text.value = ""
        else:
            self.text.value, self.ask.tooltip = page.edit(edit, learned), f"Ask: {edit.prompt}"
            self.forget.disabled = not can_forget
            self.forget.tooltip = f"Forget: {edit.prompt}" if can_forget else "This method cannot forget a single edit"


class Drawer:
    """What Change opens: the model, the method and their settings. They hold once Apply is pressed."""

    def __init__(self, model: str, method: str, apply: Callable[[], None]):
        labels = [(editor.label, name) for name, editor in EDITORS.items()]
        self.model = widgets.Combobox(
            value=model, options=("almanac", "smollm2"), description="Model", continuous_update=False
        )
        self.method = widgets.Dropdown(value=method, options=labels, description="Method")
        self.method.observe(lambda _: self._other_method(), "value")
        self.chat = widgets.Checkbox(description="Chat template", indent=False)
        self.dtype = widgets.Dropdown(options=list(DTYPES), description="Precision")
        self.background = widgets.Text(description="Unrelated texts", placeholder="built in, or a file")
        self.loaded = widgets.BoundedIntText(min=0, max=LOADED_MAX, description="Almanac edits to start with")
        self.tau = widgets.Text(description="τ", placeholder="the model's own; auto, or 0 to 1")
        self.settings = widgets.Textarea(
            description="Settings of the method, one a line", placeholder="k = 512", rows=3, continuous_update=False
        )
        self.apply = button("Apply", apply, "primary")
        self.close = button("Close", lambda: show(self.widget, False))
        self.inforce = widgets.HTML()
        first = box("mm-bar", self.model, self.method, self.dtype, self.chat)
        second = box("mm-bar", self.background, self.tau, self.loaded)
        third = box("mm-bar", self.settings, box("mm-group", self.apply, self.close))
        self.widget = box("mm-card mm-drawer", first, second, third, self.inforce)
        show(self.widget, False)

    def toggle(self, session: Session) -> None:
        """Open it with what is in force, or close it."""
        opening = self.widget.layout.display == "none"
        if opening:
            self.follow(session)
        show(self.widget, opening)

    def follow(self, session: Session) -> None:
        """Show what is in force."""
        if session.editor is None:
            return
        overrides = dict(session.overrides)
        self.model.value, self.method.value = session.model_name, session.editor.name
        self.chat.value = session.model.chat
        dtype = str(session.options.get("dtype") or "automatic").removeprefix("torch.")
        self.dtype.options = list(dict.fromkeys([*DTYPES, dtype]))
        self.dtype.value = dtype
        background = session.options.get("background")
        self.background.value = background if isinstance(background, str) else ""
        self.tau.value = str(overrides.pop("tau", ""))
        self.settings.value = "\n".join(f"{name} = {value!r}" for name, value in overrides.items())
        self.inforce.value = page.settings(session.editor)

    def _other_method(self) -> None:
        """The settings of one method are not those of another."""
        self.tau.value = self.settings.value = ""

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `Session.open`; ValueError names a setting that cannot be read."""
        tau = {"tau": self.tau.value} if self.tau.value.strip() else {}
        return dict(
            chat=self.chat.value,
            dtype=DTYPES.get(self.dtype.value, self.dtype.value),
            background=self.background.value.strip() or None,
            **settings_of(self.settings.value),
            **{name: settings_of(f"{name} = {value}")[name] for name, value in tau.items()},
        )
