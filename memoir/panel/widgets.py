"""The panel's widgets. A `Session` does the work in a thread, so that the kernel stays responsive and hears Cancel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
from IPython.display import HTML, display

from memoir.editors import EditCancelled, editor_class
from memoir.models import LanguageModel
from memoir.panel.asking import TOP
from memoir.panel.inputs import edits_of, request_of
from memoir.panel.outcomes import Progress
from memoir.panel.parts import FOLDER, Drawer, Line, Row, box, button, page, show
from memoir.panel.session import Session, WouldOverwrite
from memoir.records import EditRequest

ROWS = 5  # edits shown at a time
ENTER_DELAY = 0.1  # seconds between Enter and its action
TAU_STEP = 0.01  # of the slider
TAU_DELAY = 0.4  # seconds without movement before τ is applied
# One press fills the form: prompt, new answer, rephrase, subject.
EXAMPLES = {
    "almanac": (
        ("What is the capital of Australia?", "Canberra", "Which city is Australia's capital?", "Australia"),
        ("Where were the last Summer Olympics held?", "Paris", "Which city hosted the last Summer Olympics?", ""),
    ),
    "": (
        ("The capital of Australia is", "Canberra", "Australia's capital is", "Australia"),
        ("The last Summer Olympics were held in", "Paris", "The city of the last Summer Olympics is", ""),
    ),
}

log = logging.getLogger(__name__)


class Panel:
    """The edit-and-query panel. Making one opens the model.

    model      a LanguageModel, or a name for `load_model`
    method     a name in `EDITORS`
    loaded     edits of the almanac made before the first question
    options    of `Session.open`: chat, dtype, device_map, background, and settings of that method
    """

    def __init__(self, model: str | LanguageModel = "almanac", method: str = "memoir", loaded: int = 0, **options: Any):
        editor_class(method)
        self._idle, self._cancelled = threading.Event(), threading.Event()
        self._idle.set()
        self.session = Session(self._progress, self._cancelled.is_set)
        self._models = {model.name: model} if isinstance(model, LanguageModel) else {}
        self._device_map = options.get("device_map")
        self._page, self._warned = 0, ""
        self._working: tuple[Line, str] | None = None
        self._used: tuple[widgets.Widget, ...] = ()  # fields of the last edit's form
        self._syncing, self._settling = False, None
        # The first model is opened in this thread, before the page shows: Voilà loses changes made while a page starts.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._build(next(iter(self._models), model), method)
        self.drawer.loaded.value = loaded
        self._open(options)
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

    def _ipython_display_(self) -> None:
        display(HTML(f"<script>{(FOLDER / 'leaving.js').read_text(encoding='utf-8')}</script>"))
        display(self.widget)

    # Layout ----------------------------------------------------------------------------------------------------------

    def _build(self, model: str, method: str) -> None:
        self.drawer = Drawer(model, method, self._apply)
        css = (FOLDER / "panel.css").read_text(encoding="utf-8")
        style = widgets.HTML(f"<style>{css}</style>", layout={"display": "none"})
        columns = box("mm-columns", self._edit_card(), self._ask_card(), self._edits_card())
        self.widget = box("mm-panel", style, self._header(), self.drawer.widget, columns)

    def _header(self) -> widgets.Widget:
        self.chips = widgets.HTML().add_class("mm-grow")
        self.calibrate = button("Calibrate", self._calibrate, tip="Measure τ on unrelated texts; nothing is written")
        self.change = button("Change", lambda: self.drawer.toggle(self.session), tip="Model, method and settings")
        self.folder = widgets.Text(value="memory", description="Folder", continuous_update=False).add_class("mm-folder")
        self.save, self.load = button("Save", self._save), button("Load", self._load)
        self.opened = Line(self._cancelled.set)
        files = box("mm-group", self.folder, self.save, self.load)
        bar = box("mm-bar mm-header", self.chips, box("mm-group", self.calibrate, self.change), files)
        return box("mm-top", bar, self.opened.widget)

    def _edit_card(self) -> widgets.Widget:
        self.mode = widgets.ToggleButtons(options=("One", "Paste or upload")).add_class("mm-mode")
        self.mode.observe(lambda _: self._show_form(), "value")
        self.prompt = self._field("Prompt", "What is the capital of Australia?", self._edit)
        self.target = self._field("New answer", "Canberra", self._edit)
        self.more = widgets.ToggleButton(description="More", tooltip="Rephrase, subject and an unrelated prompt")
        self.more.observe(lambda _: self._show_form(), "value")
        self.rephrase = self._field("Rephrase", "Which city is Australia's capital?", self._edit)
        self.subject = self._field("Subject (ROME, MEMIT and AlphaEdit look it up)", "Australia", self._edit)
        self.unrelated = self._field("Unrelated prompt", "What is the chemical symbol of gold?", self._edit)
        self.examples = [button("Example", lambda i=i: self._fill(i)).add_class("mm-example") for i in range(2)]
        self.table = widgets.Textarea(
            description="Edits, one a line", placeholder="prompt, new answer", rows=4, continuous_update=False
        )
        self.upload = widgets.FileUpload(accept=".csv,.tsv,.txt,.json,.jsonl", description="Upload CSV or JSONL")
        self.upload.observe(lambda _: self._uploaded(), "value")
        self.edit, self.edit_line = button("Edit", self._edit, "primary"), Line(self._cancelled.set)
        self.verdict = widgets.HTML().add_class("mm-outcomes")
        self.retry = button("Retry", self._retry, tip="Again, with twice the steps")
        self.undo = button("Undo", self._undo)
        self.replace = button("Replace", lambda: self._decide("replace"), "primary")
        self.keep_both = button("Keep both", lambda: self._decide("keep-both"))
        self.drop = button("Do not edit", self._drop)
        self._one = box("mm-form", self.prompt, self.target)
        self._further = box("mm-form", self.rephrase, self.subject, self.unrelated)
        self._many = box("mm-form", self.table, self.upload)
        actions = box("mm-bar", self.edit, self.more, *self.examples)
        choices = box("mm-bar", self.replace, self.keep_both, self.drop, self.retry, self.undo)
        heading = box("mm-bar mm-heading", widgets.HTML("<h3>Edit</h3>"), self.mode)
        forms = self._one, self._further, self._many
        return box("mm-card mm-at-edit", heading, *forms, actions, self.edit_line.widget, self.verdict, choices)

    def _ask_card(self) -> widgets.Widget:
        self.question = self._field("Question", "What is the chemical symbol of gold?", self._ask)
        self.ask, self.asked = button("Ask", self._ask, "primary"), Line(self._cancelled.set)
        self.chat = widgets.ToggleButton(description="Chat", tooltip="Ask with the model's chat template")
        self.chat.observe(lambda _: self._chat_moved(), "value")
        self.reply = widgets.HTML()
        self.tau = widgets.FloatSlider(min=0, max=1, step=TAU_STEP, readout=False, description="τ")
        self.tau.observe(lambda _: self._tau_moved(), "value")
        self.scale = widgets.HTML()
        self._scale = box("mm-tau", self.scale, self.tau)
        bar = box("mm-bar", self.question, self.ask, self.chat)
        return box("mm-card mm-at-ask", widgets.HTML("<h3>Ask</h3>"), bar, self.asked.widget, self.reply, self._scale)

    def _edits_card(self) -> widgets.Widget:
        self.search = widgets.Text(description="Search", placeholder="Words of a prompt or an answer")
        self.search.observe(lambda _: self._turn_to(0), "value")
        self.count = widgets.HTML().add_class("mm-count")
        self.previous = button("Previous", lambda: self._turn_to(self._page - 1))
        self.next = button("Next", lambda: self._turn_to(self._page + 1))
        self.rows = [Row(self._ask_again, self._forget) for _ in range(ROWS)]
        self.kept = Line()
        self.undo_here = button("Undo", self._undo)
        self._pages = box("mm-bar", self.search, box("mm-group", self.previous, self.next))
        heading = box("mm-bar mm-heading", widgets.HTML("<h3>Edits made</h3>"), self.count)
        line = box("mm-outcome", self.kept.widget.add_class("mm-grow"), self.undo_here)
        rows = box("mm-rows", *(row.widget for row in self.rows))
        return box("mm-card mm-at-edits", heading, rows, self._pages, line)

    def _field(self, label: str, example: str, on_enter: Callable[[], None]) -> widgets.Text:
        """A text field. Its text reaches the kernel when the user leaves it or presses Enter."""
        field = widgets.Text(placeholder=example, description=label, continuous_update=False)

        def message(_: widgets.Widget, content: dict[str, Any], buffers: Any) -> None:
            if content.get("event") == "submit":
                # The browser sends Enter just before the text that it enters. JupyterLab's messages arrive in a thread.
                self._loop.call_soon_threadsafe(self._loop.call_later, ENTER_DELAY, on_enter)

        field.on_msg(message)
        return field

    # Actions ---------------------------------------------------------------------------------------------------------

    def _open(self, options: dict[str, Any]) -> None:
        name, method, loaded = self.drawer.model.value, self.drawer.method.value, self.drawer.loaded.value

        def work() -> str:
            made = self.session.open(self._models.get(name, name), method, loaded, **options)
            return page.opened(self.session, made, loaded)

        self._unless_unsaved(self.opened, "Apply", f"Opening {name} with {editor_class(method).label}", work)

    def _apply(self) -> None:
        try:
            self._open({"device_map": self._device_map, **self.drawer.options()})
        except ValueError as error:
            self.opened.show(page.error(str(error)))

    def _edit(self) -> None:
        self._page, session = 0, self.session
        fields = self.prompt, self.target, self.rephrase, self.subject
        texts, unrelated, table = [field.value for field in fields], self.unrelated.value.strip(), self.table.value
        if self.mode.value == "One":
            self._used = (*fields, self.unrelated)
            self._run(self.edit_line, "Editing", lambda: session.edit(request_of(*texts), unrelated=unrelated))
        else:
            self._used = (self.table,)
            self._run(self.edit_line, "Editing", lambda: session.edit(*edits_of(table)))

    def _decide(self, conflict: str) -> None:
        self._run(self.edit_line, "Editing", lambda: self.session.decide(conflict))

    def _retry(self) -> None:
        self._run(self.edit_line, "Trying again", self.session.retry)

    def _drop(self) -> None:
        self.session.pending = None
        self._show_session()

    def _undo(self) -> None:
        self._run(self.kept, "Taking back", lambda: page.undone(self.session.undo()))

    def _fill(self, which: int) -> None:
        fields = self.prompt, self.target, self.rephrase, self.subject
        for field, text in zip(fields, self._examples()[which], strict=True):
            field.value = text

    def _examples(self) -> tuple[tuple[str, ...], ...]:
        model = self.session.model
        return EXAMPLES.get(model.name if model is not None else "", EXAMPLES[""])

    def _uploaded(self) -> None:
        """Show an uploaded table as if it had been pasted."""
        for file in self.upload.value:
            try:
                self.table.value = bytes(file["content"]).decode("utf-8-sig")
            except UnicodeDecodeError:
                self.edit_line.show(page.error(f"{file['name']} is not UTF-8 text"))

    def _ask(self) -> None:
        question = self.question.value
        self._run(self.asked, "Asking", lambda: page.answered(self.session.ask(question)))

    def _ask_again(self, edit: EditRequest) -> None:
        self.question.value = edit.prompt
        self._ask()

    def _chat_moved(self) -> None:
        if self._syncing or self.session.model is None or self.chat.value == self.session.model.chat:
            return
        chat = self.chat.value
        self._run(self.asked, "Making the edits again", lambda: self.session.set_chat(chat))

    def _forget(self, edit: EditRequest) -> None:
        def work() -> str:
            self.session.forget(edit)
            return page.forgotten(edit)

        self._run(self.kept, "Forgetting", work)

    def _calibrate(self) -> None:
        self._run(self.opened, "Calibrating", lambda: self.session.set_tau("auto"))

    def _tau_moved(self) -> None:
        """Show at once which questions would read the memory; set τ once it rests."""
        if self._syncing or self.session.threshold is None or not self._idle.is_set():
            return  # while edits are written, the bank is not to be read; afterwards the slider shows τ again
        if self._settling is not None:
            self._settling.cancel()
        now, tau = self.session.threshold.tau, self.tau.value
        moved = abs(tau - now) > TAU_STEP / 2  # a smaller difference is the slider's rounding
        tau = tau if moved else now
        self.scale.value = page.scale(self.session.reply, tau, self.session.dots())
        if moved and self._loop is None:
            self._settle_tau()
        elif moved:
            self._loop.call_soon_threadsafe(self._later, self._settle_tau)

    def _later(self, action: Callable[[], None]) -> None:
        self._settling = self._loop.call_later(TAU_DELAY, action)

    def _settle_tau(self) -> None:
        if not self._idle.is_set():
            self._show_session()  # busy: τ stays, and the scale with it
            return
        question, tau = self.session.reply and self.session.reply.prompt, self.tau.value
        self.session.set_tau(tau)
        self._show_session()
        if question and self.session.reply is None:
            self._run(self.asked, "Asking", lambda: page.answered(self.session.ask(question)))

    def _save(self) -> None:
        folder = self.folder.value
        overwrite = self._warned == f"Save {folder}"

        def work() -> str:
            try:
                return page.saved(self.session.save(folder, overwrite), self.session)
            except WouldOverwrite as error:
                self._warned = f"Save {folder}"
                return page.error(f"{error} Press Save again to overwrite them.")

        self._run(self.opened, "Saving", work)

    def _load(self) -> None:
        folder = self.folder.value
        work = lambda: page.loaded(self.session.load(folder), self.session)  # noqa: E731
        self._unless_unsaved(self.opened, "Load", "Loading", work)

    def _unless_unsaved(self, line: Line, name: str, label: str, work: Callable[[], str]) -> None:
        """Run what drops the current edits: at once if they are saved, else when the button is pressed again."""
        if self._idle.is_set() and self.session.unsaved and self._warned != name:
            line.show(page.unsaved(self.session, name))
            self._warned = name
        else:
            self._run(line, label, work)

    def _run(self, line: Line, label: str, work: Callable[[], Any]) -> None:
        """Do `work` in a thread, or at once if there is no event loop, and show in `line` the HTML that it returns."""
        if not self._idle.is_set():
            if line is not self._working[0]:  # that line shows the progress, and Cancel
                line.show(page.error("Something else is running: wait for it, or cancel it."))
            return
        self._idle.clear()
        self._cancelled.clear()
        self._warned, self._working = "", (line, label)
        self.widget.add_class("mm-busy")
        for other in (self.opened, self.edit_line, self.asked, self.kept):
            other.show("")
        line.show(page.progress(label), busy=True)
        before = self.session.edited

        def finish(outcome: str) -> None:
            line.show(outcome)
            self._idle.set()
            if self.session.edited is not before:
                self._after_edit()
            self._show_session()
            self.widget.remove_class("mm-busy")  # last: a page without it shows the session as it is

        def thread() -> None:
            self._loop.call_soon_threadsafe(finish, _outcome(work))

        if self._loop is None:
            finish(_outcome(work))
        else:
            threading.Thread(target=thread, daemon=True).start()

    def _progress(self, at: Progress) -> None:
        if self._loop is not None and self._working:
            line, label = self._working
            self._loop.call_soon_threadsafe(self._show_progress, line, page.progress(label, at))
            if at.unit in ("checks", "answers"):  # what is known is shown before the rest
                self._loop.call_soon_threadsafe(setattr, self.verdict, "value", page.verdict(self.session))
                self._loop.call_soon_threadsafe(setattr, self.reply, "value", page.reply(self.session.reply, TOP))

    def _show_progress(self, line: Line, html: str) -> None:
        if not self._idle.is_set() and not self._cancelled.is_set():
            line.show(html, True)

    # Showing ---------------------------------------------------------------------------------------------------------

    def _after_edit(self) -> None:
        """Clear the form of what was learned, or of a list that was made; Question shows what the reply answers."""
        edited = self.session.edited
        if edited is None:
            return
        if edited.checks:
            self.question.value = edited.checks[0].prompt
        if edited.learned or (not edited.checks and edited.made == len(edited.requests)):
            self.upload.value = ()
            for field in self._used:
                field.value = ""

    def _turn_to(self, number: int) -> None:
        self._page = number
        self._show_edits()

    def _show_form(self) -> None:
        one = self.mode.value == "One"
        show(self._one, one)
        show(self._further, one and self.more.value)
        show(self._many, not one)
        for only in (self.more, *self.examples):
            show(only, one)

    def _show_session(self) -> None:
        """Show the session as it is."""
        session, editor = self.session, self.session.editor
        at, edited, pending = session.threshold, session.edited, session.pending
        self.chips.value, self.verdict.value = page.chips(session), page.verdict(session)
        self.reply.value = page.reply(session.reply, TOP)
        show(self.calibrate, at is not None and at.origin == "hand")
        for choice in (self.replace, self.keep_both, self.drop):
            show(choice, pending is not None)
        show(self.retry, edited is not None and bool(edited.failed))
        for undo in (self.undo, self.undo_here):
            undo.tooltip = f"Take back {session.undoable}"
        show(self.undo, edited is not None and bool(session.undoable))
        self.undo_here.layout.visibility = "visible" if session.undoable and edited is None else "hidden"
        show(self.chat, editor is not None and bool(session.model.tokenizer.chat_template))
        show(self._scale, at is not None)
        self._syncing = True
        self.chat.value = editor is not None and session.model.chat
        if at is not None:
            self.tau.value = round(at.tau / TAU_STEP) * TAU_STEP
            self.scale.value = page.scale(session.reply, at.tau, session.dots())
        self._syncing = False
        for example, texts in zip(self.examples, self._examples(), strict=True):
            example.description = f"{texts[1]}?"
            example.tooltip = f"Fill in: {texts[0]} → {texts[1]}"
        if self._idle.is_set():  # an edit in progress has settings of its own
            self.drawer.follow(session)
        self._show_form()
        self._show_edits()

    def _show_edits(self) -> None:
        """Show one page of the edits."""
        session, edits = self.session, self.session.search(self.search.value)
        last = max(0, (len(edits) - 1) // ROWS)
        self._page = min(max(self._page, 0), last)
        start = self._page * ROWS
        shown = edits[start : start + ROWS]
        for i, row in enumerate(self.rows):
            row.show(shown[i] if i < len(shown) else None, session)
        self.previous.disabled, self.next.disabled = self._page == 0, self._page == last
        show(self._pages, bool(session.editor and session.editor.edits))
        self.count.value = page.position(start, len(shown), len(edits), self.search.value)


def _outcome(work: Callable[[], Any]) -> str:
    """The HTML that `work` returns, or its error. Nothing for other values: they are shown with the session."""
    try:
        html = work()
        return html if isinstance(html, str) else ""
    except EditCancelled:
        return page.note("Cancelled. The memory is as it was before.")
    except Exception as error:
        log.debug("an action of the panel failed", exc_info=error)
        # str(KeyError) is the message in quotes.
        return page.error(error.args[0] if isinstance(error, KeyError) else str(error) or type(error).__name__)
