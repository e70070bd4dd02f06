"""The panel's widgets. A `Session` does the work in a thread, so that the kernel stays responsive and hears Cancel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from memoir.editors import EDITORS, EditCancelled, editor_class
from memoir.models import LanguageModel
from memoir.panel.html import CSS, page
from memoir.panel.asking import TOP
from memoir.panel.inputs import request_of
from memoir.panel.session import LOADED_MAX, Session
from memoir.records import EditRequest

ROWS = 5  # edits shown at a time
ENTER_DELAY = 0.1  # seconds between Enter and its action

log = logging.getLogger(__name__)


class Panel:
    """The edit-and-query panel. Making one opens the model.

    model      a LanguageModel, or a name for `load_model`
    method     a name in `EDITORS`
    loaded     edits of the almanac made before the first question
    overrides  settings of that method, in place of its preset's
    """

    def __init__(
        self, model: str | LanguageModel = "almanac", method: str = "memoir", loaded: int = 0, **overrides: Any
    ):
        editor_class(method)
        self._idle, self._cancelled = threading.Event(), threading.Event()
        self._idle.set()
        self.session = Session(self._progress, self._cancelled.is_set)
        self._models = {model.name: model} if isinstance(model, LanguageModel) else {}
        self._overrides = {method: overrides}
        self._page, self._warned, self._progress_shown = 0, "", 0.0
        self.widget = self._build(next(iter(self._models), model), method, loaded)
        # The first model is opened in this thread, before the page shows: Voilà loses changes made while a page starts.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open()
        with contextlib.suppress(RuntimeError):  # a script has no event loop
            self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Take the panel off the page and its editor off the model, and stop what runs."""
        self._cancelled.set()
        if self.session.editor is not None:
            self.session.editor.detach()
        self.widget.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs: for scripts. In a notebook, it would keep the kernel from showing the outcome."""
        return self._idle.wait(timeout)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget._repr_mimebundle_(**options)

    def _build(self, model: str, method: str, loaded: int) -> widgets.Widget:
        self.model = widgets.Combobox(
            value=model, options=("almanac",), description="Model", continuous_update=False, ensure_option=False
        )
        self.method = widgets.Dropdown(value=method, options=tuple(EDITORS), description="Method")
        self.method.observe(lambda _: self._method_changed(), "value")
        self.loaded = widgets.BoundedIntText(value=loaded, min=0, max=LOADED_MAX, description="Edits already loaded")
        self.open, self.opened = _button("Open", self._open, "primary"), Line(self._cancelled.set)

        self.prompt = self._field("Prompt", "What is the capital of Australia?", self._edit)
        self.target = self._field("New answer", "Canberra", self._edit)
        self.rephrase = self._field("Rephrase (optional)", "Which city is Australia's capital?", self._edit)
        self.subject = self._field("Subject (optional; ROME, MEMIT and AlphaEdit look it up)", "Australia", self._edit)
        self.edit, self.edited = _button("Edit", self._edit, "primary"), Line(self._cancelled.set)

        self.question = self._field("Question", "What is the chemical symbol of gold?", self._ask)
        self.ask, self.asked = _button("Ask", self._ask, "primary"), Line()
        self.reply = widgets.HTML()

        self.search = widgets.Text(description="Search", placeholder="Words of a prompt or an answer")
        self.search.observe(lambda _: self._turn_to(0), "value")
        self.count = widgets.HTML().add_class("mm-count")
        self.previous = _button("Previous", lambda: self._turn_to(self._page - 1))
        self.next = _button("Next", lambda: self._turn_to(self._page + 1))
        self.rows = [Row(self._ask_again, self._forget) for _ in range(ROWS)]
        self.folder = widgets.Text(value="memory", description="Folder", continuous_update=False)
        self.save, self.load, self.kept = _button("Save", self._save), _button("Load", self._load), Line()

        self.title = widgets.HTML()
        style = widgets.HTML(f"<style>{CSS}</style>", layout={"display": "none"})
        setup = _box("mm-card", _box("mm-bar", self.model, self.method, self.loaded, self.open), self.opened.widget)
        fields = self.prompt, self.target, self.rephrase, self.subject
        edit = _box("mm-card", widgets.HTML("<h3>Edit</h3>"), *fields, _box("mm-bar", self.edit), self.edited.widget)
        question = _box("mm-bar", self.question, self.ask)
        ask = _box("mm-card", widgets.HTML("<h3>Ask</h3>"), question, self.asked.widget, self.reply)
        edits = _box(
            "mm-card",
            widgets.HTML("<h3>Edits made</h3>"),
            _box("mm-bar", self.search, _box("mm-group", self.count, self.previous, self.next)),
            _box("mm-rows", *(row.widget for row in self.rows)),
            _box("mm-bar", self.folder, _box("mm-group", self.save, self.load)),
            self.kept.widget,
        )
        return _box("mm-panel", style, self.title, setup, _box("mm-columns", edit, ask), edits)

    def _field(self, label: str, example: str, on_enter: Callable[[], None]) -> widgets.Text:
        """A text field. Its text reaches the kernel when the user leaves it or presses Enter."""
        field = widgets.Text(placeholder=example, description=label, continuous_update=False)

        def message(_: widgets.Widget, content: dict[str, Any], buffers: Any) -> None:
            if content.get("event") == "submit":
                # The browser sends Enter just before the text that it enters. JupyterLab's messages arrive in a thread.
                self._loop.call_soon_threadsafe(self._loop.call_later, ENTER_DELAY, on_enter)

        field.on_msg(message)
        return field

    def _open(self) -> None:
        name, method, loaded = self.model.value, self.method.value, self.loaded.value

        def work() -> str:
            made = self.session.open(self._models.get(name, name), method, loaded, **self._overrides.get(method, {}))
            return page.opened(self.session, made, loaded)

        self._unless_unsaved(self.opened, "Open", f"Opening {name} with {method}", work)

    def _edit(self) -> None:
        texts = self.prompt.value, self.target.value, self.rephrase.value, self.subject.value
        self._page = 0
        self._run(self.edited, "Editing", lambda: page.edited(self.session.edit(request_of(*texts))))

    def _ask(self) -> None:
        question = self.question.value
        self._run(self.asked, "Asking", lambda: page.answered(self.session.ask(question)))

    def _ask_again(self, edit: EditRequest) -> None:
        self.question.value = edit.prompt
        self._ask()

    def _forget(self, edit: EditRequest) -> None:
        def work() -> str:
            self.session.forget(edit)
            return page.forgotten(edit)

        self._run(self.kept, "Forgetting", work)

    def _save(self) -> None:
        folder = self.folder.value
        self._run(self.kept, "Saving", lambda: page.saved(self.session.save(folder), self.session))

    def _load(self) -> None:
        folder = self.folder.value
        self._unless_unsaved(self.kept, "Load", "Loading", lambda: page.loaded(self.session.load(folder), self.session))

    def _unless_unsaved(self, line: Line, button: str, label: str, work: Callable[[], str]) -> None:
        """Run what drops the current edits: at once if they are saved, else when the button is pressed again."""
        if self._idle.is_set() and self.session.unsaved and self._warned != button:
            line.show(page.unsaved(self.session, button))
            self._warned = button
        else:
            self._run(line, label, work)

    def _run(self, line: Line, label: str, work: Callable[[], str]) -> None:
        """Do `work` in a thread, or at once if there is no event loop, and show in `line` the HTML that it returns."""
        if not self._idle.is_set():
            line.show(page.error("Something else is running: wait for it, or cancel it."))
            return
        self._idle.clear()
        self._cancelled.clear()
        self._warned = ""
        self.widget.add_class("mm-busy")
        for other in (self.opened, self.edited, self.asked, self.kept):
            other.show("")
        line.show(page.progress(label), busy=True)

        def finish(outcome: str) -> None:
            line.show(outcome)
            self.widget.remove_class("mm-busy")
            if self.session.editor is not None:
                self.method.value = self.session.editor.name
            self._idle.set()
            self._show_session()

        def thread() -> None:
            self._loop.call_soon_threadsafe(finish, _outcome(work))

        if self._loop is None:
            finish(_outcome(work))
        else:
            threading.Thread(target=thread, daemon=True).start()

    def _progress(self, made: int, total: int) -> None:
        """Show how many edits are made, ten times a second at most."""
        if self._loop is not None and time.monotonic() - self._progress_shown > 0.1:
            self._progress_shown = time.monotonic()
            self._loop.call_soon_threadsafe(self.opened.show, page.progress("Opening", made, total), True)

    def _method_changed(self) -> None:
        if self.session.editor is not None and self._idle.is_set():
            self.session.reply = None
            self.opened.show(page.method_changed(self.session, self.method.value))
            self._show_session()

    def _turn_to(self, number: int) -> None:
        self._page = number
        self._show_session()

    def _show_session(self) -> None:
        """Show the session's state: title, reply, and one page of its edits."""
        edits, editor = self.session.search(self.search.value), self.session.editor
        last = max(0, (len(edits) - 1) // ROWS)
        self._page = min(max(self._page, 0), last)
        start = self._page * ROWS
        shown = edits[start : start + ROWS]
        for i, row in enumerate(self.rows):
            row.show(shown[i] if i < len(shown) else None, editor is not None and editor.can_forget)
        self.previous.disabled, self.next.disabled = self._page == 0, self._page == last
        self.count.value = page.position(start, len(shown), len(edits), self.search.value)
        self.title.value, self.reply.value = page.title(self.session), page.reply(self.session.reply, TOP)


class Line:
    """Where an action reports, with a Cancel button if it can be cancelled; both keep their space while unused."""

    def __init__(self, cancel: Callable[[], None] | None = None):
        self.text = widgets.HTML().add_class("mm-line")
        self.cancel = _button("Cancel", self._cancelling)
        self.cancel.on_click(lambda _: cancel())
        self.widget = _box("mm-outcome", self.text, *([self.cancel] if cancel else []))
        self.show("")

    def show(self, html: str, busy: bool = False) -> None:
        self.text.value = html
        self.cancel.layout.visibility = "visible" if busy else "hidden"

    def _cancelling(self) -> None:
        self.show(page.progress("Cancelling"))


class Row:
    """One line of the table of edits."""

    def __init__(self, ask: Callable[[EditRequest], None], forget: Callable[[EditRequest], None]):
        self.edit: EditRequest | None = None
        self.text = widgets.HTML()
        self.ask = _button("Ask", lambda: ask(self.edit))
        self.forget = _button("Forget", lambda: forget(self.edit))
        self.widget = _box("mm-row", self.text, self.ask, self.forget)

    def show(self, edit: EditRequest | None, can_forget: bool) -> None:
        """Show an edit; without one the row is hidden, but keeps its place."""
        self.edit = edit
        self.widget.layout.visibility = "visible" if edit is not None else "hidden"
        if edit is not None:
            self.text.value, self.ask.tooltip = page.edit(edit), f"Ask: {edit.prompt}"
            self.forget.disabled = not can_forget
            self.forget.tooltip = f"Forget: {edit.prompt}" if can_forget else "This method cannot forget a single edit"


def _button(label: str, action: Callable[[], None], style: str = "") -> widgets.Button:
    button = widgets.Button(description=label, button_style=style)
    button.on_click(lambda _: action())
    return button


def _box(style: str, *children: widgets.Widget) -> widgets.Box:
    return widgets.Box(children).add_class(style)


def _outcome(work: Callable[[], str]) -> str:
    """What `work` returns, or its error, as HTML."""
    try:
        return work()
    except EditCancelled:
        return page.note("Cancelled. The memory is as it was before.")
    except Exception as error:
        log.debug("an action of the panel failed", exc_info=error)
        # str(KeyError) is the message in quotes.
        return page.error(error.args[0] if isinstance(error, KeyError) else str(error) or type(error).__name__)
