"""What the panel does, without widgets: open a model with an editor, edit, ask, undo, forget, set τ, save and load."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from memoir.data import load_background, load_edits
from memoir.editors import EditCancelled, EditError, Editor, editor_class, load_editor, make_editor
from memoir.editors.storage import EDITS, READY
from memoir.models import LanguageModel
from memoir.panel.asking import ANSWER_TOKENS, Asking, room_for
from memoir.panel.effort import configured, most_steps
from memoir.panel.opening import load_quietly, with_chat
from memoir.panel.outcomes import Batch, Check, Dot, Edited, Pending, Progress, Reply, Threshold
from memoir.panel.routing import Questions, by_overlap, clashes, set_tau, threshold_of
from memoir.records import EditReport, EditRequest

DATASET = "almanac-qa"  # the source of the edits made while opening
LOADED_MAX = 1000  # edits that DATASET has about people whom the model knows
# An unrelated question for edits that bring none, for the almanac's model and for others.
UNRELATED = {"almanac": "What is the chemical symbol of gold?", "": "The chemical symbol of gold is"}


class WouldOverwrite(ValueError):
    """A folder holds other saved edits."""


@dataclass(frozen=True)
class Snapshot:
    """The edits before an action, for Undo.

    label    what the action was
    tensors  the editor's state, copied
    """

    label: str
    edits: dict[str, EditRequest]
    tensors: dict[str, Tensor]
    status: dict[str, bool]
    unsaved: int


class Session:
    """A model with an editor on it. When a call fails, the current model and editor stay.

    unsaved  changes made by hand since the editor was opened, saved or loaded
    status   by edit, whether the model answered with its target when the edit's prompt was last asked; edits that
             nobody asked about are missing
    reply    to the last question; edited, how the last edit or list of edits went; pending, edits that wait for a
             decision. Each is None once the memory is another one than it speaks of
    """

    def __init__(
        self,
        progress: Callable[[Progress], None] = lambda at: None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        """progress is called while edits are written; cancelled ends the work once true."""
        self.model: LanguageModel | None = None
        self.editor: Editor | None = None
        self.options: dict[str, Any] = {}
        self.overrides: dict[str, Any] = {}
        self._named: tuple = ()
        self._progress, self._cancelled = progress, cancelled
        self._asking = Asking()
        self._begin()

    def _begin(self) -> None:
        """Forget all that was said about an earlier editor."""
        self.unsaved, self.status, self._questions = 0, {}, Questions()
        self._undo: Snapshot | None = None
        self._folder: Path | None = None
        self._clear()

    def _clear(self) -> None:
        self.reply: Reply | None = None
        self.edited: Edited | Batch | None = None
        self.pending: Pending | None = None
        self._last: tuple | None = None  # the arguments of the last single edit

    # Opening ---------------------------------------------------------------------------------------------------------

    def open(
        self,
        model: str | LanguageModel,
        method: str,
        loaded: int = 0,
        *,
        chat: bool | None = None,
        dtype: str | None = None,
        device_map: Any = None,
        background: str | Sequence[str] | None = None,
        **overrides: Any,
    ) -> int:
        """Put a fresh editor on a model and make `loaded` edits of the almanac; returns how many were made.

        model       a LanguageModel, or a name for `load_model`; the model that is open is not loaded again
        chat        whether prompts are rendered with the chat template; None: as the LanguageModel is, or not
        dtype, device_map  of `load_model`
        background  texts, or a file of them for `load_background`; default: `make_editor`'s
        Cancelling keeps the edits made so far.
        """
        editor_class(method)  # an unknown method is refused before a model is loaded
        edits = list(load_edits(DATASET, n=loaded)) if loaded else []
        texts = load_background(background) if isinstance(background, str) and background else background or None
        named = ()
        if not isinstance(model, LanguageModel):
            named = (model, bool(chat), dtype, device_map)
            model = self.model if named == self._named else load_quietly(*named)
        elif chat is not None:
            model = with_chat(model, chat)
        editor = make_editor(method, model, background=texts, **overrides)
        if self.editor is not None:
            self.editor.detach()
        self.model, self.editor, self._named, self.overrides = model, editor, named, overrides
        self.options = dict(chat=model.chat, dtype=dtype, device_map=device_map, background=background)
        self._begin()
        return self._write_all(edits)[0]

    def set_chat(self, chat: bool) -> None:
        """Ask the same model with or without its chat template. Masks depend on the template, so all edits are made
        again; if that fails or is cancelled, everything stays as it was."""
        old, model = self._open_editor(), self.model
        if chat == model.chat:
            return
        fresh = with_chat(model, chat)
        old.detach()
        edits = list(old.edits.values())
        try:
            self.editor = type(old)(fresh, old.config, old.background)
            with configured(self.editor, "keep-both"):
                written, _ = self._write_all(edits)
            if written < len(edits):
                raise EditCancelled("cancelled")
        except BaseException:
            self.editor.detach()
            self.editor = old
            old.attach()
            raise
        self.model, self._named = fresh, self._named and (self._named[0], chat, *self._named[2:])
        self.options["chat"] = chat
        self._begin()
        self.unsaved = len(edits)

    @property
    def model_name(self) -> str:
        """What opens this model again."""
        return self._named[0] if self._named else self.model.name

    @property
    def can_chat(self) -> bool:
        return self.model is not None and bool(self.model.tokenizer.chat_template)

    # Editing ---------------------------------------------------------------------------------------------------------

    def edit(
        self, request: EditRequest, unrelated: str = "", conflict: Literal["replace", "keep-both"] | None = None
    ) -> Edited | Pending:
        """Make one edit, then ask its prompt, its rephrase and an unrelated prompt.

        conflict  what becomes of edits that it contradicts. If it would replace some and this is None, nothing is
                  written, and the edit is `pending`
        """
        editor = self._open_editor()
        if conflict is None and (found := clashes(editor, [request])):
            self.edited, self._last = None, None
            self.pending = Pending(requests=(request,), unrelated=unrelated, clashes=found)
            return self.pending
        snapshot = self._snapshot(f"the edit “{request.prompt}”")
        return self._edit(snapshot, request, unrelated, conflict, 0)

    def retry(self) -> Edited:
        """Take the last edit back and make it again with twice the steps and a tenth of the loss to stop at. If that
        fails or is cancelled, the edit stays as it was."""
        if self._last is None or self._undo is None:
            raise EditError("there is no edit to try again")
        old, said, snapshot = self.editor, self._said(), self._undo
        request, unrelated, conflict, again = self._last
        self.undo()
        try:
            return self._edit(snapshot, request, unrelated, conflict, again + 1)
        except BaseException:
            self.editor = old
            old.attach()
            vars(self).update(said)
            raise

    def edit_all(
        self, requests: Sequence[EditRequest], conflict: Literal["replace", "keep-both"] | None = None
    ) -> Batch | Pending:
        """Make several edits, then ask the prompt of each. Cancelling keeps the edits made so far."""
        editor, requests = self._open_editor(), list(requests)
        for request in requests:
            editor.check(request)
        if conflict is None and (found := clashes(editor, requests)):
            self.edited, self._last = None, None
            self.pending = Pending(requests=tuple(requests), unrelated="", clashes=found)
            return self.pending
        snapshot, began = self._snapshot(f"{len(requests)} edits"), time.perf_counter()
        made, reports = 0, []
        try:
            with configured(editor, conflict):
                made, reports = self._write_all(requests)
        finally:
            if editor.edits != snapshot.edits:  # also where a later edit fails: those before it stand
                self.unsaved += max(1, made)
                self._clear()
                self._undo = snapshot
                self._keep_status()
        written = [r for r in dict.fromkeys(requests[:made]) if r.id in editor.edits]
        learned = editor.learned(written) if written else []
        self.status.update((request.id, known) for request, known in zip(written, learned, strict=True))
        self._questions.add(editor)
        self.edited = Batch(
            made=made,
            asked=len(requests),
            failed=tuple(r for r, known in zip(written, learned, strict=True) if not known),
            replaced=len({i for report in reports for i in report.replaced} & set(snapshot.edits)),
            seconds=time.perf_counter() - began,
        )
        return self.edited

    def decide(self, conflict: Literal["replace", "keep-both"]) -> Edited | Batch | Pending:
        """Make the pending edits."""
        if self.pending is None:
            raise EditError("no edit waits for a decision")
        requests, unrelated = self.pending.requests, self.pending.unrelated
        return self.edit(requests[0], unrelated, conflict) if len(requests) == 1 else self.edit_all(requests, conflict)

    def drop_pending(self) -> None:
        self.pending = None

    def _edit(
        self, snapshot: Snapshot, request: EditRequest, unrelated: str, conflict: str | None, again: int
    ) -> Edited:
        editor, began = self.editor, time.perf_counter()
        total, done = most_steps(editor.config) * 2**again, 0

        def stepped(loss: float) -> None:
            nonlocal done
            done = min(done + 1, total)
            left = (time.perf_counter() - began) / done * (total - done)
            self._progress(Progress(unit="steps", done=done, total=total, loss=loss, left=left))

        with configured(editor, conflict, again):
            (report,) = editor.edit([request], cancelled=self._cancelled, stepped=stepped, check=False)
        self.unsaved += 1
        self._clear()
        self._undo = snapshot
        self._keep_status()
        checks = self._checks(request, unrelated)
        self.edited = Edited(
            request=request,
            report=report,
            replaced=tuple(snapshot.edits[i] for i in report.replaced if i != request.id),
            checks=checks,
            again=again,
        )
        self._last = (request, unrelated, conflict, again)
        return self.edited

    def _checks(self, request: EditRequest, unrelated: str) -> tuple[Check, ...]:
        editor, rephrase, probe = self.editor, request.probe("rephrase"), request.probe("unrelated")
        answer = self.ask(request.prompt).after.text
        checks = [Check(kind="prompt", prompt=request.prompt, answer=answer, passed=self.status[request.id])]
        if rephrase is not None:
            answer = editor.ask(rephrase.prompt, max_new_tokens=room_for(self.model, request.target))
            passed = editor.says(answer, request.target)
            checks.append(Check(kind="rephrase", prompt=rephrase.prompt, answer=answer, passed=passed))
        other = unrelated or (probe.prompt if probe else UNRELATED.get(self.model.name, UNRELATED[""]))
        before, answer = (
            self._asking.before(editor, other, ANSWER_TOKENS),
            editor.ask(other, max_new_tokens=ANSWER_TOKENS),
        )
        checks.append(Check(kind="unrelated", prompt=other, answer=answer, passed=answer == before.text))
        self._questions.add(editor, *(check.prompt for check in checks))
        return tuple(checks)

    def _write_all(self, requests: Sequence[EditRequest]) -> tuple[int, list[EditReport]]:
        """Write edits, `batch_size` at a time: how many, and their reports. Cancelling ends it."""
        reports, began = [], time.perf_counter()
        size = self.editor.config.batch_size
        for start in range(0, len(requests), size):
            left = (time.perf_counter() - began) / start * (len(requests) - start) if start else None
            self._progress(Progress(unit="edits", done=start, total=len(requests), left=left))
            try:
                chunk = requests[start : start + size]
                reports += self.editor.edit(chunk, cancelled=self._cancelled, check=False)
            except EditCancelled:
                break
        return len(reports), reports

    # Taking back -----------------------------------------------------------------------------------------------------

    @property
    def undoable(self) -> str:
        """What `undo` would take back, or nothing."""
        return self._undo.label if self._undo is not None else ""

    def undo(self) -> str:
        """Bring the edits back that were there before the last edit, list of edits or Forget; returns what it was."""
        snapshot, old = self._undo, self._open_editor()
        if snapshot is None:
            raise EditError("there is nothing to undo")
        try:
            editor = type(old)(self.model, old.config, old.background)
            editor.edits = dict(snapshot.edits)
            editor.load_state(_copied(snapshot.tensors))
        except BaseException:
            old.attach()
            raise
        if by_overlap(editor) and editor.config.tau != "auto":
            editor.memory.tau = editor.config.tau  # moved since
        self.editor, self._undo = editor, None
        self._clear()
        self.status, self.unsaved = dict(snapshot.status), snapshot.unsaved
        return snapshot.label

    def forget(self, edit: EditRequest) -> None:
        """Take one edit out of the memory."""
        editor = self._open_editor()
        snapshot = self._snapshot(f"forgetting “{edit.prompt}”")
        editor.forget(edit.id)
        self.unsaved += 1
        self._clear()
        self._undo = snapshot
        self._keep_status()

    def _snapshot(self, label: str) -> Snapshot:
        editor = self.editor
        return Snapshot(label, dict(editor.edits), _copied(editor.state()), dict(self.status), self.unsaved)

    def _keep_status(self) -> None:
        """Drop what is known of edits that are gone."""
        self.status = {i: known for i, known in self.status.items() if i in self.editor.edits}

    def _said(self) -> dict[str, Any]:
        names = ("unsaved", "status", "reply", "edited", "pending", "_last", "_undo")
        return {name: getattr(self, name) for name in names}

    # Asking ----------------------------------------------------------------------------------------------------------

    def ask(self, prompt: str) -> Reply:
        """Ask the model without its edits and with them."""
        if not prompt.strip():
            raise ValueError("the question is empty, expected text")
        editor = self._open_editor()
        own = [edit for edit in editor.edits.values() if edit.prompt == prompt]
        length = max([ANSWER_TOKENS, *(room_for(self.model, edit.target) for edit in own)])
        self.reply = self._asking.reply(editor, prompt, length)
        self.status.update((edit.id, editor.says(self.reply.after.text, edit.target)) for edit in own)
        self._questions.add(editor, prompt)
        return self.reply

    # τ ---------------------------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> Threshold | None:
        return threshold_of(self.editor)

    def dots(self, tau: float | None = None) -> tuple[Dot, ...]:
        """Earlier questions by their overlap with the nearest edit, against τ or another value of it."""
        return self._questions.dots(self.editor, self.threshold.tau if tau is None else tau) if self.threshold else ()

    def set_tau(self, tau: float | Literal["auto"]) -> None:
        """Move τ, or measure it on unrelated texts ("auto"). The reply stays if it is decided as before."""
        if self.threshold is None:
            raise EditError(f"{self._open_editor().label} has no τ to set")
        set_tau(self.editor, tau)
        reply, now = self.reply, self.editor.memory.tau
        self._clear()
        if reply is not None and (reply.why.score is None or reply.why.fired == (reply.why.score >= now)):
            self.reply = replace(reply, why=replace(reply.why, threshold=now))

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str, overwrite: bool = False) -> Path:
        """Write the memory to a folder, which may be relative or start with `~`; returns its full path. WouldOverwrite
        if it holds saved edits, unless they were saved or loaded here."""
        editor, path = self._open_editor(), _path(folder).resolve()
        if not overwrite and _has_edits(path) and path != self._folder:
            raise WouldOverwrite(f"{path} holds other saved edits.")
        editor.save(path)
        self.unsaved, self._folder = 0, path
        if self._undo is not None:
            self._undo = replace(self._undo, unsaved=1)
        return path

    def load(self, folder: str) -> Path:
        """Replace the editor by one that was saved on this model; returns the folder's full path."""
        self._open_editor()
        path = _path(folder).resolve()
        if not _has_edits(path):
            raise FileNotFoundError(f"no saved edits in {path}, expected a folder that Save has written")
        self.editor = load_editor(path, self.model)
        self._begin()
        self.overrides, self._folder = {}, path
        return path

    def search(self, text: str) -> list[EditRequest]:
        """Edits whose prompt and answer contain all words of `text`, the newest first."""
        words = text.casefold().split()
        edits = list(self.editor.edits.values()) if self.editor is not None else []
        return [e for e in reversed(edits) if all(w in f"{e.prompt} {e.target}".casefold() for w in words)]

    def _open_editor(self) -> Editor:
        if self.editor is None:
            raise EditError("no model is open; choose one under Change")
        return self.editor


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def _has_edits(path: Path) -> bool:
    """Whether a folder looks like one that Save has written, perhaps not to its end."""
    return (path / EDITS).exists() or (path / READY).exists()


def _path(folder: str) -> Path:
    if not folder.strip():
        raise ValueError("the folder is empty, expected where the edits are saved")
    return Path(folder.strip()).expanduser()
