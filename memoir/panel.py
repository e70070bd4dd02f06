"""The edit-and-query panel: choose a model and a method, write edits, ask, and see what changed and why.

from memoir.panel import Panel
Panel("almanac", "memoir", loaded=10)

`session.Session` does the work, in one worker thread, so that the kernel stays responsive and Cancel is heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from memoir.editors import EDITORS, EditCancelled, editor_class
from memoir.models import LanguageModel
from memoir.panel_html import CSS, count, edit_html, error_html, note_html, progress_html, reply_html, title_html
from memoir.records import EditReport, EditRequest
from memoir.session import LOADED_MAX, Progress, Reply, Session, request_of

PAGE = 5  # edits shown at a time

log = logging.getLogger(__name__)


class Panel:
    """The edit-and-query panel. Making one opens the model.

    model      a model, or a name for `load_model`
    method     a name in `EDITORS`
    loaded     edits of the almanac made before the first question
    overrides  settings of that method, in place of its preset's
    """

    def __init__(
        self, model: str | LanguageModel = "almanac", method: str = "memoir", loaded: int = 0, **overrides: Any
    ):
        editor_class(method)
        self.session = Session()
        self._given = model if isinstance(model, LanguageModel) else None
        self._overrides = {method: overrides}
        self._echo = Echo()
        self._worker, self._idle, self._cancelled = Worker(), threading.Event(), threading.Event()
        self._idle.set()
        self._page, self._warned = 0, None
        cards = self._build(self._given.name if self._given else str(model), method, loaded)
        self.widget = widgets.VBox(cards).add_class("mm-panel")
        # Before the panel is shown, and so before a page is there: Voilà drops what changes while its page starts.
        self._open()
        self._worker.start()

    def close(self) -> None:
        """Take the panel off the page and its editor off the model, and end the worker."""
        self._cancelled.set()
        self._worker.close()
        if self.session.editor is not None:
            self.session.editor.detach()
        self.widget.close()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs: for scripts. In a notebook it would keep the kernel from showing the outcome."""
        return self._idle.wait(timeout)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget._repr_mimebundle_(**options)

    def _build(self, model: str, method: str, loaded: int) -> tuple[widgets.Widget, ...]:
        self.model = widgets.Combobox(
            value=model, options=("almanac",), description="Model", continuous_update=False, ensure_option=False
        )
        self.method = widgets.Dropdown(value=method, options=tuple(EDITORS), description="Method")
        self.loaded = widgets.BoundedIntText(value=loaded, min=0, max=LOADED_MAX, description="Edits already loaded")
        self.open = _button("Open", self._open, "primary")
        self.opened = Line(self._cancelled.set)

        self.prompt = _text("Prompt", "What is the capital of Australia?")
        self.target = _text("New answer", "Canberra")
        self.rephrase = _text("Rephrase (optional)", "Which city is Australia's capital?")
        self.subject = _text("Subject (optional; ROME, MEMIT and AlphaEdit look it up)", "Australia")
        self.edit = _button("Edit", self._edit, "primary")
        self.edited = Line(self._cancelled.set)
        for field in (self.prompt, self.target, self.rephrase, self.subject):
            self._on_enter(field, self._edit)

        self.question = _text("Question", "What is the chemical symbol of gold?")
        self.ask = _button("Ask", self._ask, "primary")
        self.asked = Line()
        self._on_enter(self.question, self._ask)
        self.reply = widgets.HTML(reply_html(None))

        self.search = widgets.Text(description="Search", placeholder="Words of a prompt or an answer")
        self.search.observe(lambda _: self._turn(-self._page), "value")
        self.count = widgets.HTML().add_class("mm-count")
        self.previous = _button("Previous", lambda: self._turn(-1))
        self.next = _button("Next", lambda: self._turn(1))
        self.rows = [Row(self._ask_again, self._forget) for _ in range(PAGE)]
        self.folder = _text("Folder", "where the memory is to lie", value="memory")
        self.save, self.load = _button("Save", self._save), _button("Load", self._load)
        self.kept = Line()

        self.title = widgets.HTML()
        style = widgets.HTML(f"<style>{CSS}</style>", layout={"display": "none"})
        setup = _bar(self.model, self.method, self.loaded, self.open)
        edit = (_heading("Edit"), self.prompt, self.target, self.rephrase, self.subject, _bar(self.edit))
        ask = (_heading("Ask"), _bar(self.question, self.ask), self.asked.widget, self.reply)
        columns = widgets.Box((_card(*edit, self.edited.widget), _card(*ask))).add_class("mm-columns")
        edits = _card(
            _heading("Edits made"),
            _bar(self.search, _group(self.count, self.previous, self.next)),
            widgets.VBox([row.widget for row in self.rows]).add_class("mm-rows"),
            _bar(self.folder, _group(self.save, self.load)),
            self.kept.widget,
        )
        return style, self.title, _card(setup, self.opened.widget), columns, edits

    def _on_enter(self, field: widgets.Text, action: Callable[[], None]) -> None:
        def entered(widget: widgets.Widget, content: dict[str, Any], buffers: Any) -> None:
            if content.get("event") == "submit":
                self._echo.then(action)

        field.on_msg(entered)

    # Actions ---------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        name, method, loaded = self.model.value, self.method.value, self.loaded.value
        model = self._given if self._given is not None and name == self._given.name else name

        def work() -> int:
            progress, cancelled = self._progress(self.opened, label), self._cancelled.is_set
            return self.session.open(model, method, loaded, progress, cancelled, **self._overrides.get(method, {}))

        def done(made: int) -> None:
            cut = f" Cancelled after {made} of {loaded} edits; those stand." if made < loaded else ""
            self.opened.note(f"{self.session.model.name} is open with {method}.{cut}")
            self.edited.note("")
            self.asked.note("")
            self.kept.note("")
            self.reply.value = reply_html(None)

        label = f"Opening {name} with {method}"
        self._unless_unsaved(self.opened, "Open", lambda: self._run(self.opened, label, work, done))

    def _edit(self) -> None:
        texts = self.prompt.value, self.target.value, self.rephrase.value, self.subject.value

        def work() -> tuple[EditReport, Reply]:
            request = request_of(*texts)
            report = self.session.edit(request, self._cancelled.is_set)
            return report, self.session.ask(request.probes[0].prompt if request.probes else request.prompt)

        def done(outcome: tuple[EditReport, Reply]) -> None:
            report, reply = outcome
            replaced = f" It replaced {count(len(report.replaced), 'earlier edit')}." if report.replaced else ""
            self.edited.note(
                f"Edited in {report.seconds:.2f} s: loss {report.loss_before:.2f} → {report.loss_after:.3f} nats "
                f"per token in {report.iterations} steps.{replaced}"
            )
            self._page = 0
            self._show_reply(reply)

        self._run(self.edited, "Editing", work, done)

    def _ask(self) -> None:
        question = self.question.value
        self._run(self.asked, "Asking", lambda: self.session.ask(question), self._show_reply)

    def _ask_again(self, edit: EditRequest) -> None:
        self.question.value = edit.prompt
        self._ask()

    def _forget(self, edit: EditRequest) -> None:
        def done(_: None) -> None:
            self.kept.note(f"Forgot “{edit.prompt}” → “{edit.target}”.")

        self._run(self.kept, "Forgetting", lambda: self.session.forget(edit.id), done)

    def _save(self) -> None:
        folder = self.folder.value

        def done(path: Path) -> None:
            self.kept.note(f"Saved {count(len(self.session.editor.edits), 'edit')} to {path}.")

        self._run(self.kept, "Saving", lambda: self.session.save(folder), done)

    def _load(self) -> None:
        folder = self.folder.value

        def done(path: Path) -> None:
            self.method.value, self._page = self.session.editor.name, 0
            self.kept.note(f"Loaded {count(len(self.session.editor.edits), 'edit')} from {path}.")

        self._unless_unsaved(
            self.kept, "Load", lambda: self._run(self.kept, "Loading", lambda: self.session.load(folder), done)
        )

    def _unless_unsaved(self, line: Line, verb: str, action: Callable[[], None]) -> None:
        """Do what drops the edits at hand at once where they are saved, else at the second press."""
        if self._idle.is_set() and self.session.unsaved and self._warned != verb:
            line.error(f"{count(self.session.unsaved, 'change')} not saved. Press {verb} again to drop them, or Save.")
            self._warned = verb
        else:
            action()

    # Running ---------------------------------------------------------------------------------------------------------

    def _run(self, line: Line, label: str, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Do `work` in the worker thread, then `done(its result)` here; `line` tells how it goes and went."""
        if not self._idle.is_set():
            line.error("Something else is running: wait for it, or cancel it.")
            return
        self._warned = None
        self._cancelled.clear()
        self._idle.clear()
        self.widget.add_class("mm-busy")
        line.busy(label)

        def finish(result: Any, error: BaseException | None) -> None:
            try:
                if error is not None:
                    raise error
                done(result)
            except EditCancelled:
                line.note("Cancelled. The memory is as it was before.")
            except Exception as failure:
                log.debug("%s failed", label, exc_info=failure)
                line.error(_message(failure))
            finally:
                line.idle()
                self.widget.remove_class("mm-busy")
                self._show_edits()
                self._idle.set()

        self._worker.do(work, finish)

    def _progress(self, line: Line, label: str) -> Progress:
        """For the worker thread: shows progress ten times a second at most."""
        shown = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                self._worker.post(line.progress, label, done, total)

        return progress

    # Showing ---------------------------------------------------------------------------------------------------------

    def _show_reply(self, reply: Reply) -> None:
        self.asked.note(f"Answered in {reply.seconds:.2f} s.")
        self.reply.value = reply_html(reply)

    def _turn(self, pages: int) -> None:
        self._page += pages
        self._show_edits()

    def _show_edits(self) -> None:
        found, editor = self.session.search(self.search.value), self.session.editor
        last = max(0, (len(found) - 1) // PAGE)
        self._page = min(max(self._page, 0), last)
        start = self._page * PAGE
        shown = found[start : start + PAGE]
        for i, row in enumerate(self.rows):
            row.show(shown[i] if i < len(shown) else None, editor is not None and editor.can_forget)
        self.previous.disabled, self.next.disabled = self._page == 0, self._page == last
        if shown:
            self.count.value = f"{start + 1}–{start + len(shown)} of {len(found)}"
        else:
            self.count.value = "None found" if self.search.value.strip() else "None yet"
        self.title.value = title_html(self.session)


class Worker:
    """One thread for what takes time; outcomes are delivered in the kernel's own thread, as widgets' events are.

    Until it is started, everything is done at once. Outside a kernel there is no loop to deliver outcomes, and they are
    handled in the worker's thread.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = False

    def start(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        self._started = True
        threading.Thread(target=self._work, name="memoir-panel", daemon=True).start()

    def do(self, work: Callable[[], Any], finish: Callable[[Any, BaseException | None], None]) -> None:
        """Call `work`, then `finish(its result, None)` or `finish(None, its exception)`."""

        def job() -> None:
            try:
                outcome = work(), None
            except BaseException as error:
                outcome = None, error
            self.post(finish, *outcome)

        self._jobs.put(job) if self._started else job()

    def post(self, action: Callable[..., None], *args: Any) -> None:
        """Have an action called in the kernel's own thread."""
        if self._loop is None:
            action(*args)
        else:
            self._loop.call_soon_threadsafe(action, *args)

    def close(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class Line:
    """Where an action tells how it goes and how it went, and its Cancel button; the room for both is reserved."""

    def __init__(self, cancel: Callable[[], None] | None = None):
        self.text = widgets.HTML().add_class("mm-line")
        self.cancel = _button("Cancel", lambda: self._cancelling(cancel))
        self._cancellable = cancel is not None
        self.widget = widgets.Box((self.text, self.cancel) if cancel else (self.text,)).add_class("mm-outcome")
        self.idle()

    def busy(self, text: str) -> None:
        self.progress(text)
        self.cancel.layout.visibility = "visible" if self._cancellable else "hidden"

    def idle(self) -> None:
        self.cancel.layout.visibility = "hidden"

    def progress(self, text: str, done: int = 0, total: int = 0) -> None:
        self.text.value = progress_html(text, done, total)

    def note(self, text: str) -> None:
        self.text.value = note_html(text)

    def error(self, text: str) -> None:
        self.text.value = error_html(text)

    def _cancelling(self, cancel: Callable[[], None]) -> None:
        self.progress("Cancelling")
        cancel()


class Row:
    """One line of the table of edits."""

    def __init__(self, ask: Callable[[EditRequest], None], forget: Callable[[EditRequest], None]):
        self.edit: EditRequest | None = None
        self.text = widgets.HTML()
        self.ask = _button("Ask", lambda: ask(self.edit))
        self.forget = _button("Forget", lambda: forget(self.edit))
        self.widget = widgets.Box((self.text, self.ask, self.forget)).add_class("mm-row")

    def show(self, edit: EditRequest | None, can_forget: bool) -> None:
        """Show an edit; without one the row keeps its place, unseen."""
        self.edit = edit
        self.widget.layout.visibility = "visible" if edit is not None else "hidden"
        if edit is not None:
            self.text.value = edit_html(edit)
            self.ask.tooltip, self.forget.tooltip = f"Ask: {edit.prompt}", f"Forget: {edit.prompt}"
            self.forget.disabled = not can_forget
            if not can_forget:
                self.forget.tooltip = "This method cannot take a single edit back"


class Echo:
    """Waits until all that the front end has sent so far is here.

    Enter is reported just before the text it enters. So the front end is told a number, which its own link between two
    models sends back, and that answer travels behind the text.
    """

    def __init__(self) -> None:
        self._told, self._heard = widgets.IntText(), widgets.IntText()
        self._link = widgets.jsdlink((self._told, "value"), (self._heard, "value"))
        self._waiting: dict[int, Callable[[], None]] = {}
        self._heard.observe(lambda change: self._arrived(change["new"]), "value")

    def then(self, action: Callable[[], None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            action()
            return
        number = self._told.value + 1
        self._waiting[number] = action
        loop.call_later(2.0, self._arrived, number)  # a front end without links
        self._told.value = number

    def _arrived(self, number: int) -> None:
        if (action := self._waiting.pop(number, None)) is not None:
            action()


def _text(label: str, placeholder: str, *, value: str = "") -> widgets.Text:
    """A labelled field. Its text reaches the kernel when it is left or entered."""
    return widgets.Text(value=value, placeholder=placeholder, description=label, continuous_update=False)


def _button(label: str, action: Callable[[], None], style: str = "") -> widgets.Button:
    button = widgets.Button(description=label, button_style=style)
    button.on_click(lambda _: action())
    return button


def _heading(text: str) -> widgets.HTML:
    return widgets.HTML(f"<h3>{text}</h3>")


def _card(*children: widgets.Widget) -> widgets.VBox:
    return widgets.VBox(children).add_class("mm-card")


def _bar(*children: widgets.Widget) -> widgets.Box:
    return widgets.Box(children).add_class("mm-bar")


def _group(*children: widgets.Widget) -> widgets.Box:
    """Widgets that stay side by side."""
    return widgets.Box(children).add_class("mm-group")


def _message(error: Exception) -> str:
    """What an error says, without the quotes that KeyError puts around it."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__
