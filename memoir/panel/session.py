"""What the panel does, without widgets: open a model with an editor, edit, ask, undo, forget, set τ, save and load."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from memoir.data import load_background, load_edits
from memoir.editors import EditCancelled, EditError, Editor, editor_class, load_editor, make_editor
from memoir.editors import configured as settings_for
from memoir.models import LanguageModel
from memoir.panel.asking import Answers, Questions, Room, clashes, room_for, threshold_of
from memoir.panel.inputs import folder_of
from memoir.panel.opening import keep_tau, load_quietly, prepare, with_chat
from memoir.panel.outcomes import Answer, Check, Edited, Pending, Progress, Reply, Threshold
from memoir.records import EditReport, EditRequest, Explanation

DATASET = "almanac-qa"  # the source of the edits made while opening
LOADED_MAX = 1000  # edits that DATASET has about people whom the model knows
# An unrelated question for edits that bring none, for the almanac's model and for others.
UNRELATED = {"almanac": "What is the chemical symbol of gold?", "": "The chemical symbol of gold is"}
STEPS = ("iterations", "value_steps")  # what the methods call their most steps
HARDER = dict.fromkeys(STEPS, 2) | {"stop_loss": 0.1}  # by what these settings are multiplied for another try

Conflict = Literal["replace", "keep-both"]


class WouldOverwrite(ValueError):
    """A folder holds other saved edits."""


@dataclass(frozen=True)
class Snapshot:
    """The edits before an action, for Undo."""

    label: str  # what the action was
    edits: dict[str, EditRequest]
    tensors: dict[str, Tensor]  # the editor's state, copied
    status: dict[str, bool]
    unsaved: int


class Session:
    """A model with an editor on it. When a call fails, the current model and editor stay.

    unsaved  edits made or forgotten by hand since the editor was opened, saved or loaded
    status   by edit, whether the model answered with its target when the edit's prompt was last asked; edits that
             nobody asked about are missing
    reply    to the last question; edited, how the last edit or list of edits went; pending, edits that wait for a
             decision. Each is reset to None when the memory changes
    """

    def __init__(self, progress: Callable[[Progress], None] = lambda at: None, cancelled=lambda: False):
        """progress is called while edits are written; cancelled() ends the work once true."""
        self.model: LanguageModel | None = None
        self.editor: Editor | None = None
        self.options: dict[str, Any] = {}
        self._named, self._preset = (), {}
        self._progress, self._cancelled = progress, cancelled
        self._begin()

    def _begin(self) -> None:
        """Forget all that was said about an earlier editor."""
        self.unsaved, self.status, self._questions = 0, {}, Questions()
        self._answers = Answers()
        self._undo: Snapshot | None = None
        self._folder: Path | None = None
        self._clear()

    def _clear(self) -> None:
        self.reply: Reply | None = None
        self.edited: Edited | None = None
        self.pending: Pending | None = None

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
        self._take(editor)
        self.model, self._named = model, named
        self._preset = {name: overrides[name] for name in ("preset",) if name in overrides}
        self.options = dict(dtype=dtype, background=background)
        self._begin()
        return len(self._write_all(edits, []))

    def _take(self, editor: Editor) -> None:
        """Let an editor take the place of the current one, once it is ready."""
        try:
            prepare(editor)
        except BaseException:
            editor.detach()
            if self.editor is not None:
                self.editor.attach()
            raise
        if self.editor is not None:
            self.editor.detach()
        self.editor = editor

    def set_chat(self, chat: bool) -> None:
        """Ask the same model with or without its chat template. Masks depend on the template, so all edits are made
        again; if that fails or is cancelled, everything stays as it was."""
        old, edits = self._open_editor(), list(self.editor.edits.values())
        if chat == self.model.chat:
            return
        fresh = with_chat(self.model, chat)
        old.detach()
        try:
            self.editor = type(old)(fresh, old.config, old.background)
            prepare(self.editor)
            with configured(self.editor, "keep-both"):
                written = len(self._write_all(edits, []))
            if written < len(edits):
                raise EditCancelled("cancelled")
            keep_tau(old, self.editor)
        except BaseException:
            self.editor.detach()
            self.editor = old
            old.attach()
            raise
        self.model, self._named = fresh, self._named and (self._named[0], chat, *self._named[2:])
        self._begin()
        self.unsaved = len(edits)

    @property
    def model_name(self) -> str:
        """What opens this model again."""
        return self._named[0] if self._named else self.model.name

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings in force that are not the model's own."""
        own = settings_for(self.editor.name, self.model, self._preset)
        return self._preset | {n: v for n, v in vars(self.editor.config).items() if v != getattr(own, n)}

    # Editing ---------------------------------------------------------------------------------------------------------

    def edit(self, *requests: EditRequest, unrelated: str = "", conflict: Conflict | None = None) -> Edited | Pending:
        """Make one edit, then ask its prompt, its rephrase and an unrelated prompt; or several, then ask the prompt of
        each. Cancelling keeps the edits made so far; EditCancelled if there are none.

        conflict  what becomes of edits that they contradict. If they would replace some and this is None, nothing is
                  written, and the edits are `pending`
        """
        editor = self._open_editor()
        for request in requests:
            editor.check(request)
        if conflict is None and (found := clashes(editor, requests)):
            self.edited = None
            self.pending = Pending(requests=requests, unrelated=unrelated, clashes=found)
            return self.pending
        label = f"the edit “{requests[0].prompt}”" if len(requests) == 1 else f"{len(requests)} edits"
        plan = Edited(requests=requests, made=0, failed=requests, replaced=(), reports=())
        return self._edit(self._snapshot(label), plan, unrelated, conflict)

    def retry(self) -> Edited:
        """Make what was not learned again in its place, with twice the steps and a tenth of the loss to stop at. What
        is cancelled stays as it was."""
        last = self.edited
        if last is None or not last.failed:
            raise EditError("there is no edit to try again")
        unrelated = last.checks[-1].prompt if last.checks else ""
        # What was to be replaced is gone.
        return self._edit(self._undo, replace(last, again=last.again + 1), unrelated, "keep-both")

    def decide(self, conflict: Conflict) -> Edited:
        """Make the pending edits."""
        if self.pending is None:
            raise EditError("no edit waits for a decision")
        return self.edit(*self.pending.requests, unrelated=self.pending.unrelated, conflict=conflict)

    def _edit(self, snapshot: Snapshot, plan: Edited, unrelated: str, conflict: Conflict | None) -> Edited:
        """Write what `plan` calls failed, and ask. The snapshot is of before the first try."""
        editor, reports = self.editor, []
        try:
            with configured(editor, conflict, plan.again):
                self._write_all(plan.failed, reports)
        finally:
            if reports:  # also where a later edit fails: those before it stand
                self._changed(snapshot, 0 if plan.again else len(reports))
        if not reports:
            raise EditCancelled("cancelled")
        plan = replace(
            plan,
            made=plan.made if plan.again else len(reports),
            replaced=tuple(edit for i, edit in snapshot.edits.items() if i not in editor.edits),
            reports=tuple(reports),
            checks=(),
        )
        if len(plan.requests) == 1:
            total = 2 + (plan.requests[0].probe("rephrase") is not None)
            for check in self._checks(*plan.requests, unrelated):
                checks = (*plan.checks, check)
                self.edited = plan = replace(plan, failed=() if checks[0].passed else plan.requests, checks=checks)
                self._progress(Progress(unit="checks", done=len(checks), total=total))
        else:
            written = [r for r in dict.fromkeys(plan.failed[: len(reports)]) if r.id in editor.edits]
            self.status.update(zip((r.id for r in written), editor.learned(written), strict=True))
            failed = [r for r in (plan.failed if plan.again else written) if self.status.get(r.id) is False]
            self.edited = replace(plan, failed=tuple(failed))
        return self.edited

    def _checks(self, request: EditRequest, unrelated: str) -> Iterator[Check]:
        """Ask the edit's own prompt, its rephrase and an unrelated prompt. The model's answer without its edits, which
        may be long, comes after that."""
        editor, answers = self.editor, self._answers
        rephrase, probe = request.probe("rephrase"), request.probe("unrelated")
        other = unrelated or (probe.prompt if probe else UNRELATED.get(self.model.name, UNRELATED[""]))
        room, usual, began = self._room(request.prompt), room_for(self.model), time.perf_counter()
        (why,) = editor.lookup([request.prompt])
        after = answers.edited(editor, request.prompt, room, why)
        passed = editor.says(after.whole, request.target)
        yield Check(kind="prompt", prompt=request.prompt, answer=after.text, passed=passed)
        if rephrase is not None:
            said = answers.edited(editor, rephrase.prompt, room)
            passed = editor.says(said.whole, request.target)
            yield Check(kind="rephrase", prompt=rephrase.prompt, answer=said.text, passed=passed)
        said = answers.edited(editor, other, usual)
        passed = said.text == answers.unedited(editor, other, usual).text
        yield Check(kind="unrelated", prompt=other, answer=said.text, passed=passed)
        self._reply(request.prompt, room, after, why, began)
        self._questions.add(editor, request.prompt, *([rephrase.prompt] if rephrase else []), other)

    def _write_all(self, requests: Sequence[EditRequest], reports: list[EditReport]) -> list[EditReport]:
        """Write edits, `batch_size` at a time, and add to `reports`. Cancelling ends it."""
        began, total, size = time.perf_counter(), len(requests), self.editor.config.batch_size
        stepped = self._steps() if total == 1 else None
        for start in range(0, total, size):
            if total > 1:
                left = (time.perf_counter() - began) / start * (total - start) if start else None
                self._progress(Progress(unit="edits", done=start, total=total, left=left))
            some = requests[start : start + size]
            try:
                reports += self.editor.edit(some, cancelled=self._cancelled, stepped=stepped, check=False)
            except EditCancelled:
                break
        return reports

    def _steps(self) -> Callable[[float], None]:
        """What tells the steps of one edit, with their loss."""
        config, began, count = self.editor.config, time.perf_counter(), itertools.count(1)
        total = next((getattr(config, name) for name in STEPS if hasattr(config, name)), 1)

        def stepped(loss: float) -> None:
            done = min(next(count), total)
            left = (time.perf_counter() - began) / done * (total - done)
            self._progress(Progress(unit="steps", done=done, total=total, loss=loss, left=left))

        return stepped

    # Taking back -----------------------------------------------------------------------------------------------------

    @property
    def undoable(self) -> str:
        """What `undo` would take back, or nothing."""
        return self._undo.label if self._undo is not None else ""

    def undo(self) -> str:
        """Restore the edits as they were before the last edit, list of edits or Forget; returns what that was."""
        snapshot, old = self._undo, self._open_editor()
        if snapshot is None:
            raise EditError("there is nothing to undo")
        try:
            editor = type(old)(self.model, old.config, old.background)
            editor.edits = dict(snapshot.edits)
            editor.load_state(snapshot.tensors)
            keep_tau(old, editor)
        except BaseException:
            old.attach()
            raise
        self.editor, self._undo = editor, None
        self._clear()
        self.status, self.unsaved = dict(snapshot.status), snapshot.unsaved
        return snapshot.label

    def forget(self, edit: EditRequest) -> None:
        """Take one edit out of the memory."""
        snapshot = self._snapshot(f"forgetting “{edit.prompt}”")
        self.editor.forget(edit.id)
        self._changed(snapshot, 1)

    def _snapshot(self, label: str) -> Snapshot:
        editor = self._open_editor()
        tensors = {name: value.clone() for name, value in editor.state().items()}
        return Snapshot(label, dict(editor.edits), tensors, dict(self.status), self.unsaved)

    def _changed(self, snapshot: Snapshot, edits: int) -> None:
        """Drop what is known of edits and answers that are gone."""
        self.unsaved = max(self.unsaved + edits, 1)
        self._clear()
        self._undo = snapshot
        self.status = {i: known for i, known in self.status.items() if i in self.editor.edits}

    # Asking ----------------------------------------------------------------------------------------------------------

    def ask(self, prompt: str) -> Reply:
        """Ask the model with its edits and without them. The reply grows with the first answer."""
        if not prompt.strip():
            raise ValueError("the question is empty, expected text")
        editor, room, began = self._open_editor(), self._room(prompt), time.perf_counter()
        (why,) = editor.lookup([prompt])
        hear = lambda so_far: self._begin_reply(prompt, so_far, why, began)  # noqa: E731
        try:
            reply = self._reply(prompt, room, self._answers.edited(editor, prompt, room, why, hear), why, began)
        except BaseException:
            self.reply = None  # leave no partial answer behind
            raise
        self._questions.add(editor, prompt)
        return reply

    def _room(self, prompt: str) -> Room:
        return room_for(self.model, *(edit for edit in self.editor.edits.values() if edit.prompt == prompt))

    def _reply(self, prompt: str, room: Room, after: Answer, why: Explanation, began: float) -> Reply:
        """Reply with the answer that is there, and then with the one of the unedited model, which may ramble."""
        self._begin_reply(prompt, after, why, began, done=1)
        before = self._answers.unedited(self.editor, prompt, room)
        self.reply = replace(self.reply, before=before, seconds=time.perf_counter() - began)
        own = [edit for edit in self.editor.edits.values() if edit.prompt == prompt]
        self.status.update((edit.id, self.editor.says(after.whole, edit.target)) for edit in own)
        return self.reply

    def _begin_reply(self, prompt: str, after: Answer, why: Explanation, began: float, done: int = 0) -> None:
        """Show the answer with the edits, as far as it is there."""
        edit, measure = self.editor.edits.get(why.edit_id or ""), self.editor.measure
        fields = dict(edit=edit, measure=measure, seconds=time.perf_counter() - began)
        self.reply = Reply(prompt=prompt, before=None, after=after, why=why, **fields)
        self._progress(Progress(unit="answers", done=done, total=2))

    # τ ---------------------------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> Threshold | None:
        return threshold_of(self.editor)

    def dots(self) -> dict[str, float]:
        """Earlier questions with their overlaps with the nearest edit: those at or above τ read it."""
        return self._questions.overlaps(self.editor) if self.threshold else {}

    def set_tau(self, tau: float | Literal["auto"]) -> None:
        """Move τ, or measure it on unrelated texts ("auto"). The reply stays if it is decided as before."""
        if self.threshold is None:
            raise EditError(f"{self._open_editor().label} has no τ to set")
        self.editor.config = replace(self.editor.config, tau=tau)  # a setting, so saving keeps it
        if tau == "auto":
            self.editor.calibrate()
        else:
            self.editor.memory.tau = self.editor.config.tau
        reply, now = self.reply, self.editor.memory.tau
        self.reply = self.edited = None
        if reply is not None and (reply.why.score is None or reply.why.fired == (reply.why.score >= now)):
            self.reply = replace(reply, why=replace(reply.why, threshold=now))

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, folder: str, overwrite: bool = False) -> Path:
        """Write the memory to a folder, which may be relative or start with `~`; returns its full path. WouldOverwrite
        if it holds saved edits, unless they were saved or loaded here."""
        editor, (path, holds_edits) = self._open_editor(), folder_of(folder)
        if holds_edits and not overwrite and path != self._folder:
            raise WouldOverwrite(f"{path} holds other saved edits.")
        editor.save(path)
        self.unsaved, self._folder = 0, path
        if self._undo is not None:
            self._undo = replace(self._undo, unsaved=1)
        return path

    def load(self, folder: str) -> Path:
        """Replace the editor by one that was saved on this model; returns the folder's full path."""
        self._open_editor()
        path, holds_edits = folder_of(folder)
        if not holds_edits:
            raise FileNotFoundError(f"no saved edits in {path}, expected a folder that Save has written")
        self._take(load_editor(path, self.model))
        self._begin()
        self._preset, self._folder = {}, path
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


@contextlib.contextmanager
def configured(editor: Editor, conflict: Conflict | None = None, again: int = 0) -> Iterator[None]:
    """Within it the editor does with conflicts what is said, and tries `again` times as hard."""
    config = editor.config
    changes = {name: getattr(config, name) * by**again for name, by in HARDER.items() if hasattr(config, name)}
    if conflict and hasattr(config, "on_conflict"):
        changes["on_conflict"] = conflict
    editor.config = replace(config, **changes)
    try:
        yield
    finally:
        editor.config = config
