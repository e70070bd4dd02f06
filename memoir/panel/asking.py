"""What the panel asks of a model and its editor: answers, conflicts before an edit, τ, and the questions on its scale.

Nothing here writes an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from memoir.editors import Editor
from memoir.editors.residual import ResidualEditor
from memoir.memory import TokenMasks
from memoir.models import LanguageModel
from memoir.panel.outcomes import Answer, Clash, Threshold
from memoir.presets import preset
from memoir.records import EditRequest, Explanation

TOP = 5  # next tokens shown beside an answer
PLAIN_TOKENS = 14  # length of an answer, at most, where prompts are plain text
CHAT_TOKENS = 32  # and in a chat, where a model answers in sentences
QUESTIONS = 50  # that the scale of τ shows

Hear = Callable[[Answer], None]  # is given an answer so far, token by token


# Answers -------------------------------------------------------------------------------------------------------------


class Room(NamedTuple):
    """How long an answer may become: tokens at most, and whether it ends with its first line."""

    tokens: int
    one_line: bool


def room_for(model: LanguageModel, *edits: EditRequest) -> Room:
    """A long target needs a long answer, with two more tokens to notice one that goes on. In plain text a model goes on
    to other matters after a line; in a chat, and where a target has several lines, the answer may have them, too."""
    usual = CHAT_TOKENS if model.chat else PLAIN_TOKENS
    tokens = max([usual, *(len(model.tokenizer(edit.target)["input_ids"]) + 2 for edit in edits)])
    return Room(tokens, not model.chat and not any("\n" in edit.target.strip() for edit in edits))


def answer(model: LanguageModel, prompt: str, room: Room, hear: Hear | None = None) -> Answer:
    """A greedy answer, and the tokens most likely to begin it, with their probabilities. `hear` follows it."""
    tokens: tuple[tuple[str, float], ...] = ()
    start = 0

    def listen(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        nonlocal tokens, start
        if not tokens:
            best = logits[0].softmax(-1).topk(min(TOP, logits.shape[1]))
            words = [model.tokenizer.decode([i]) for i in best.indices.tolist()]
            tokens, start = tuple(zip(words, best.values.tolist(), strict=True)), ids.shape[1]
        elif hear is not None:
            text = model.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
            hear(Answer(text=text, whole=text, tokens=tokens, cut=True))
        return logits

    options = dict(max_new_tokens=room.tokens, one_line=room.one_line, logits_processor=[listen])
    whole = model.generate(prompt, **options)
    line, more, _ = whole.partition("\n") if room.one_line else (whole, "", "")
    long = len(model.tokenizer(whole, add_special_tokens=False)["input_ids"]) >= room.tokens
    return Answer(text=line.rstrip(), whole=whole, tokens=tokens, cut=bool(more) or long)


class Answers:
    """A model's answers with its edits and without them. Those without never change, and are kept."""

    def __init__(self) -> None:
        self._unedited: dict[tuple[str, Room], Answer] = {}

    def unedited(self, editor: Editor, prompt: str, room: Room, hear: Hear | None = None) -> Answer:
        if (prompt, room) not in self._unedited:
            with editor.detached() as model:
                self._unedited[prompt, room] = answer(model, prompt, room, hear)
        return self._unedited[prompt, room]

    def edited(
        self, editor: Editor, prompt: str, room: Room, why: Explanation | None = None, hear: Hear | None = None
    ) -> Answer:
        """`why` is what the prompt meets, if that is known. A prompt that reads nothing asks the unedited model."""
        why = why or editor.lookup([prompt])[0]
        if isinstance(editor, ResidualEditor) and not why.fired:
            return self.unedited(editor, prompt, room, hear)
        return answer(editor.model, prompt, room, hear)


# Conflicts -----------------------------------------------------------------------------------------------------------


def clashes(editor: Editor, requests: Sequence[EditRequest]) -> tuple[Clash, ...]:
    """What writing some edits would replace: stored edits, and earlier ones of the same list."""
    if not isinstance(editor, ResidualEditor) or editor.config.on_conflict != "replace":
        return ()
    if not editor.edits and len(requests) == 1:
        return ()
    editor.prepare()
    masks, bits, found = editor.stored_prompts(requests), editor.memory.bits, []
    shared = masks.float() @ masks.float().T / bits  # exact: float32 counts to 2²⁴
    stored = editor.memory.bank.overlaps(masks) / bits if editor.edits else [()] * len(requests)
    for i, request in enumerate(requests):
        near = {editor.edits[edit_id]: float(o) for edit_id, o in zip(editor.memory.bank.ids, stored[i], strict=True)}
        near |= {other: float(shared[i, j]) for j, other in enumerate(requests[:i])}
        contradicted = [(other, o) for other, o in near.items() if editor.contradicts(request, other, o)]
        found += [Clash(new=request, old=other, overlap=overlap) for other, overlap in contradicted]
    return tuple(found)


# τ -------------------------------------------------------------------------------------------------------------------


def by_overlap(editor: Editor | None) -> bool:
    """Whether an editor decides by overlap and τ, so that τ can be moved."""
    return isinstance(editor, ResidualEditor) and editor.tau is not None


def threshold_of(editor: Editor | None) -> Threshold | None:
    """τ as it is, and where it comes from; None for a method that has none to move."""
    if not by_overlap(editor):
        return None
    if editor.config.tau == "auto":
        origin = "calibrated"
    else:
        origin = "preset" if preset(type(editor), editor.model).get("tau") == editor.config.tau else "hand"
    return Threshold(tau=editor.memory.tau, origin=origin)


class Questions:
    """Earlier questions and their masks, by which the scale of τ shows them."""

    def __init__(self) -> None:
        # A mask (D,) bool, and where subjects count those of its tokens (t × D′)
        self._masks: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def add(self, editor: Editor, *prompts: str) -> None:
        """Keep questions with their masks, which one run of the model gives."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._masks]
        if not new or not by_overlap(editor):
            return
        seen = editor.features(new, editor.config.feature)
        for i, (prompt, mask) in enumerate(zip(new, editor.memory.hashed(seen.pooled), strict=True)):
            self._masks[prompt] = mask, None if seen.tokens is None else seen.tokens.masks[seen.tokens.owner == i]
        while len(self._masks) > QUESTIONS:
            del self._masks[next(iter(self._masks))]

    def overlaps(self, editor: ResidualEditor) -> dict[str, float]:
        """Each question's overlap with the nearest stored edit. Those that are an edit's own prompt are left out."""
        own = {edit.prompt for edit in editor.edits.values()}
        known = {prompt: masks for prompt, masks in self._masks.items() if prompt not in own}
        if not known or not len(editor.memory.bank):
            return {}
        masks, tokens = zip(*known.values(), strict=True)
        each = None
        if tokens[0] is not None:
            each = TokenMasks(torch.cat(tokens), np.repeat(np.arange(len(tokens)), [len(some) for some in tokens]))
        _, overlaps = editor.memory.nearest(torch.stack(masks), each)
        return dict(zip(known, overlaps.tolist(), strict=True))
