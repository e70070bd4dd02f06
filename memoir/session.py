"""What the panel does, without widgets: open a model with an editor, edit, ask, forget, save and load."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from memoir.almanac import background_prompts
from memoir.data import load_edits
from memoir.editors import EditCancelled, EditError, Editor, editor_class, load_editor, make_editor
from memoir.models import LanguageModel, load_model
from memoir.records import EditReport, EditRequest, Explanation, Probe

DATASET = "almanac-qa"  # where edits already loaded come from
LOADED_MAX = 1000  # as many as it has about people whom the model knows
TOP = 5  # next tokens of an answer

Progress = Callable[[int, int], None]  # (done, total)
Cancelled = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answers: its greedy text, and its most likely next tokens with their probabilities."""

    text: str
    tokens: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One question, asked of the model without and with its edits.

    why      which stored edit the question meets
    edit     that edit, None where the method does not route or nothing is stored
    measure  what the method holds against its threshold
    """

    prompt: str
    before: Answer
    after: Answer
    why: Explanation
    edit: EditRequest | None
    measure: str
    seconds: float


class Session:
    """A model with an editor on it. Where a call fails, the model and the editor at hand stay.

    unsaved  changes made by hand since the editor was opened, saved or loaded
    """

    def __init__(self) -> None:
        self.model: LanguageModel | None = None
        self.editor: Editor | None = None
        self.unsaved = 0
        self._opened = ""

    def open(
        self,
        model: str | LanguageModel,
        method: str,
        loaded: int,
        progress: Progress,
        cancelled: Cancelled,
        **overrides: Any,
    ) -> int:
        """Put a fresh editor on a model and make `loaded` edits of the almanac; returns how many were made.

        model  a name for `load_model`, loaded anew only where it is another one, or a model at hand
        Cancelling keeps the edits made so far.
        """
        editor_class(method)
        if isinstance(model, str) and not model.strip():
            raise ValueError("model is empty, expected almanac, a local folder or a hub id")
        edits = list(load_edits(DATASET, n=loaded)) if loaded else []
        if isinstance(model, LanguageModel):
            found, name = model, model.name
        elif self.model is not None and model == self._opened:
            found, name = self.model, model
        else:
            with _no_bars():
                found, name = load_model(model), model
        with self._keeping_editor():
            # Texts that no edit is about: plain questions about real facts serve every model.
            editor = make_editor(method, found, background=background_prompts(), **overrides)
        if self.editor is not None and self.model is not found:
            self.editor.detach()
        self.model, self.editor, self.unsaved, self._opened = found, editor, 0, name
        size = editor.config.batch_size
        for start in range(0, loaded, size):
            progress(start, loaded)
            try:
                editor.edit(edits[start : start + size], cancelled=cancelled)
            except EditCancelled:
                return start
        return loaded

    def edit(self, request: EditRequest, cancelled: Cancelled) -> EditReport:
        """Make one edit."""
        (report,) = self._ready().edit([request], cancelled=cancelled)
        self.unsaved += 1
        return report

    def ask(self, prompt: str) -> Reply:
        """Ask the model without its edits and with them."""
        editor = self._ready()
        began = time.perf_counter()
        with editor.detached() as model:
            before = Answer(text=editor.ask(prompt), tokens=next_tokens(model, prompt))
        after = Answer(text=editor.ask(prompt), tokens=next_tokens(editor.model, prompt))
        why = editor.explain(prompt)
        return Reply(
            prompt=prompt,
            before=before,
            after=after,
            why=why,
            edit=editor.edits.get(why.edit_id or ""),
            measure=editor.measure,
            seconds=time.perf_counter() - began,
        )

    def forget(self, edit_id: str) -> None:
        self._ready().forget(edit_id)
        self.unsaved += 1

    def save(self, folder: str) -> Path:
        """Write the memory to a folder, `~` and relative paths included; returns where it is."""
        path = self._ready().save(_folder(folder)).resolve()
        self.unsaved = 0
        return path

    def load(self, folder: str) -> Path:
        """Replace the editor by one that was saved on this model."""
        path = _folder(folder)
        self._ready()
        with self._keeping_editor():
            self.editor = load_editor(path, self.model)
        self.unsaved = 0
        return path.resolve()

    def search(self, text: str) -> list[EditRequest]:
        """Edits that hold all words of `text` in prompt or answer, the newest first."""
        words = text.casefold().split()
        edits = list(self.editor.edits.values()) if self.editor is not None else []
        return [e for e in reversed(edits) if all(w in f"{e.prompt} {e.target}".casefold() for w in words)]

    def _ready(self) -> Editor:
        if self.editor is None:
            raise EditError("no model is open; choose one and press Open")
        return self.editor

    @contextlib.contextmanager
    def _keeping_editor(self) -> Iterator[None]:
        """Where making another editor fails, the one at hand is attached again."""
        try:
            yield
        except BaseException:
            if self.editor is not None:
                self.editor.attach()
            raise


@torch.no_grad()
def next_tokens(model: LanguageModel, prompt: str, count: int = TOP) -> tuple[tuple[str, float], ...]:
    """The likeliest next tokens behind a prompt and their probabilities, under whatever editor is attached."""
    logits = model.forward(model.encode([prompt]), positions=1)[0, -1].float()
    found = logits.softmax(-1).topk(min(count, len(logits)))
    return tuple(
        (model.tokenizer.decode([i]), p) for i, p in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Text bars of transformers would end up below the panel."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def request_of(prompt: str, target: str, rephrase: str = "", subject: str = "") -> EditRequest:
    """The edit that a form describes; ValueError names the field that is empty."""
    prompt, target, rephrase = prompt.strip(), target.strip(), rephrase.strip()
    for name, text in (("prompt", prompt), ("new answer", target)):
        if not text:
            raise ValueError(f"{name} is empty, expected text")
    probes = (Probe(kind="rephrase", prompt=rephrase, answer=target),) if rephrase else ()
    return EditRequest(prompt=prompt, target=target, subject=subject.strip(), probes=probes)


def _folder(text: str) -> Path:
    if not text.strip():
        raise ValueError("folder is empty, expected where the memory is to lie")
    return Path(text.strip()).expanduser()
