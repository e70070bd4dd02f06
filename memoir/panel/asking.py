"""One question, asked of a model without and with its edits."""

from __future__ import annotations

import time

import torch

from memoir.editors import Editor
from memoir.editors.residual import ResidualEditor
from memoir.models import LanguageModel
from memoir.panel.outcomes import Answer, Reply

TOP = 5  # next tokens shown beside an answer
ANSWER_TOKENS = 32  # length of an answer, at most


class Asking:
    """Asks, and keeps the answers of the unedited model, which never change."""

    def __init__(self) -> None:
        self._model: LanguageModel | None = None
        self._befores: dict[tuple[str, int], Answer] = {}

    def reply(self, editor: Editor, prompt: str, length: int) -> Reply:
        began = time.perf_counter()
        before, why = self.before(editor, prompt, length), editor.explain(prompt)
        # Where the memory is not read, the model is the unedited one.
        unread = isinstance(editor, ResidualEditor) and not why.fired
        return Reply(
            prompt=prompt,
            before=before,
            after=before if unread else answer(editor.model, prompt, length),
            why=why,
            edit=editor.edits.get(why.edit_id or ""),
            measure=editor.measure,
            seconds=time.perf_counter() - began,
        )

    def before(self, editor: Editor, prompt: str, length: int) -> Answer:
        """The unedited model's answer."""
        if editor.model is not self._model:
            self._model, self._befores = editor.model, {}
        if (prompt, length) not in self._befores:
            with editor.detached() as model:
                self._befores[prompt, length] = answer(model, prompt, length)
        return self._befores[prompt, length]


def answer(model: LanguageModel, prompt: str, length: int) -> Answer:
    """A greedy answer of `length` tokens at most."""
    text = model.generate(prompt, max_new_tokens=length)
    cut = len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) >= length
    return Answer(text=text, tokens=next_tokens(model, prompt), cut=cut)


def room_for(model: LanguageModel, target: str) -> int:
    """Tokens of an answer, at most: a long target needs a long one, with two more to notice one that goes on."""
    return max(ANSWER_TOKENS, len(model.tokenizer(target)["input_ids"]) + 2)


@torch.no_grad()
def next_tokens(model: LanguageModel, prompt: str, count: int = TOP) -> tuple[tuple[str, float], ...]:
    """The most likely next tokens after a prompt and their probabilities, with the editor that is attached, if any."""
    logits = model.forward(model.encode([prompt]), positions=1)[0, -1].float()
    top = logits.softmax(-1).topk(min(count, len(logits)))
    tokens = [model.tokenizer.decode([i]) for i in top.indices.tolist()]
    return tuple(zip(tokens, top.values.tolist(), strict=True))
