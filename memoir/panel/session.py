"""What the panel does, without widgets: open a model with an editor, edit, ask, forget, save and load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from memoir.data import load_edits
from memoir.editors import EditCancelled, EditError, Editor, editor_class, load_editor, make_editor
from memoir.models import LanguageModel, load_model
from memoir.records import EditReport, EditRequest, Explanation, Probe

DATASET = "almanac-qa"  # the source of the edits made while opening
LOADED_MAX = 1000  # edits that DATASET has about people whom the model knows
TOP = 5  # next tokens shown beside an answer
ANSWER_TOKENS = 32  # length of an answer, at most


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's greedy answer, and its most likely next tokens with their probabilities."""

    text: str
    tokens: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One question, asked of the model without and with its edits."""

    prompt: str
    before: Answer
    after: Answer
    why: Explanation
    edit: EditRequest | None  # the nearest stored edit; None where the method does not route or nothing is stored
    measure: str  # the name of `why.score`, "overlap" or "distance" for example
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Edited:
    """How an edit went."""

    report: EditReport
    replaced: tuple[EditRequest, ...]  # earlier edits that this one replaced
    answer: str  # to the edit's prompt, after the edit
    learned: bool  # whether the answer is the target, or begins with it (`Editor.says`)
    reply: Reply  # to the edit's rephrase, if it has one, else to its prompt


class Session:
    """A model with an editor on it. When a call fails, the current model and editor stay.

    unsaved  changes made by hand since the editor was opened, saved or loaded
    reply    to the last question; None once other edits than those that answered it are in the memory
    """

    def __init__(
        self,
        progress: Callable[[int, int], None] = lambda made, total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        """progress is called with the edits made and to make while opening; cancelled ends the work once true."""
        self.model: LanguageModel | None = None
        self.editor: Editor | None = None
        self.unsaved = 0
        self.reply: Reply | None = None
        self._model_name = ""
        self._progress, self._cancelled = progress, cancelled

    def open(self, model: str | LanguageModel, method: str, loaded: int = 0, **overrides: Any) -> int:
        """Put a fresh editor on a model and make `loaded` edits of the almanac; returns how many were made.

        model  a LanguageModel, or a name for `load_model`; the model that is open is not loaded again
        Cancelling keeps the edits made so far.
        """
        editor_class(method)  # an unknown method is refused before a model is loaded
        edits = list(load_edits(DATASET, n=loaded)) if loaded else []
        if isinstance(model, LanguageModel):
            name = model.name
        else:
            name, model = model, self._model_named(model)
        editor = make_editor(method, model, **overrides)
        if self.editor is not None:
            self.editor.detach()
        self.model, self.editor, self._model_name = model, editor, name
        self.unsaved, self.reply = 0, None
        size = editor.config.batch_size
        for start in range(0, loaded, size):
            self._progress(start, loaded)
            try:
                editor.edit(edits[start : start + size], cancelled=self._cancelled, check=False)
            except EditCancelled:
                return start
        return loaded

    def edit(self, request: EditRequest) -> Edited:
        """Make one edit, then ask whether it was learned."""
        editor = self._open_editor()
        earlier = dict(editor.edits)
        (report,) = editor.edit([request], cancelled=self._cancelled, check=False)  # asked below
        self.unsaved += 1
        question = request.probes[0].prompt if request.probes else request.prompt
        # A long target needs a long answer, with two tokens more to notice a model that goes on after the target.
        length = max(ANSWER_TOKENS, len(self.model.tokenizer(request.target)["input_ids"]) + 2)
        reply = self.ask(question, length)
        answer = reply.after.text
        if question != request.prompt:
            answer = editor.ask(request.prompt, max_new_tokens=length)
        return Edited(
            report=report,
            replaced=tuple(earlier[edit_id] for edit_id in report.replaced),
            answer=answer,
            learned=editor.says(answer, request.target),
            reply=reply,
        )

    def ask(self, prompt: str, max_new_tokens: int = ANSWER_TOKENS) -> Reply:
        """Ask the model without its edits and with them."""
        editor = self._open_editor()
        began = time.perf_counter()
        with editor.detached():
            before = self._answer(prompt, max_new_tokens)
        after, why = self._answer(prompt, max_new_tokens), editor.explain(prompt)
        self.reply = Reply(
            prompt=prompt,
            before=before,
            after=after,
            why=why,
            edit=editor.edits.get(why.edit_id or ""),
            measure=editor.measure,
            seconds=time.perf_counter() - began,
        )
        return self.reply

    def forget(self, edit: EditRequest) -> None:
        """Take one edit out of the memory."""
        self._open_editor().forget(edit.id)
        self.unsaved += 1
        self.reply = None

    def save(self, folder: str) -> Path:
        """Write the memory to a folder, which may be relative or start with `~`; returns its full path."""
        path = self._open_editor().save(_path(folder)).resolve()
        self.unsaved = 0
        return path

    def load(self, folder: str) -> Path:
        """Replace the editor by one that was saved on this model; returns the folder's full path."""
        self._open_editor()
        path = _path(folder)
        self.editor = load_editor(path, self.model)
        self.unsaved, self.reply = 0, None
        return path.resolve()

    def search(self, text: str) -> list[EditRequest]:
        """Edits whose prompt and answer contain all words of `text`, the newest first."""
        words = text.casefold().split()
        edits = list(self.editor.edits.values()) if self.editor is not None else []
        return [e for e in reversed(edits) if all(w in f"{e.prompt} {e.target}".casefold() for w in words)]

    def _open_editor(self) -> Editor:
        if self.editor is None:
            raise EditError("no model is open; choose one and press Open")
        return self.editor

    def _model_named(self, name: str) -> LanguageModel:
        """The open model, if this is its name; else the model that `load_model` loads."""
        if not name.strip():
            raise ValueError("model is empty, expected almanac, smollm2, a local folder, a GGUF file or a hub id")
        if name == self._model_name:
            return self.model
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # it would appear above the panel
        try:
            return load_model(name)
        finally:
            if bars:
                transformers_logging.enable_progress_bar()

    def _answer(self, prompt: str, max_new_tokens: int) -> Answer:
        text = self.model.generate(prompt, max_new_tokens=max_new_tokens)
        return Answer(text=text, tokens=next_tokens(self.model, prompt))


@torch.no_grad()
def next_tokens(model: LanguageModel, prompt: str, count: int = TOP) -> tuple[tuple[str, float], ...]:
    """The most likely next tokens after a prompt and their probabilities, with the editor that is attached, if any."""
    logits = model.forward(model.encode([prompt]), positions=1)[0, -1].float()
    top = logits.softmax(-1).topk(min(count, len(logits)))
    tokens = [model.tokenizer.decode([i]) for i in top.indices.tolist()]
    return tuple(zip(tokens, top.values.tolist(), strict=True))


def request_of(prompt: str, target: str, rephrase: str = "", subject: str = "") -> EditRequest:
    """The edit that a form describes; ValueError names the field that is empty."""
    prompt, target, rephrase = prompt.strip(), target.strip(), rephrase.strip()
    for name, text in (("prompt", prompt), ("new answer", target)):
        if not text:
            raise ValueError(f"{name} is empty, expected text")
    probes = (Probe(kind="rephrase", prompt=rephrase, answer=target),) if rephrase else ()
    return EditRequest(prompt=prompt, target=target, subject=subject.strip(), probes=probes)


def _path(folder: str) -> Path:
    if not folder.strip():
        raise ValueError("folder is empty, expected the folder of the memory")
    return Path(folder.strip()).expanduser()
