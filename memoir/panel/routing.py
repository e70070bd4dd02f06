"""Which stored edits a question is near: conflicts before an edit, the dots on the scale of τ, and τ itself.

All of it reads stored masks; nothing here is written to W_m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from memoir.editors import Editor
from memoir.editors.residual import ResidualEditor
from memoir.memory import TokenMasks
from memoir.panel.outcomes import Clash, Dot, Threshold
from memoir.presets import preset
from memoir.records import EditRequest

QUESTIONS = 50  # that the scale of τ shows


def by_overlap(editor: Editor | None) -> bool:
    """Whether an editor decides by overlap and τ, so that τ can be moved."""
    return isinstance(editor, ResidualEditor) and editor.tau is not None


def masks_of(editor: ResidualEditor, prompts: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Each prompt's mask (D,) bool, and where subjects count those of its tokens (t × D′), by one run of the model."""
    seen = editor.features(prompts, editor.config.feature)
    masks, tokens = editor.memory.hashed(seen.pooled), seen.tokens
    return [(mask, None if tokens is None else tokens.masks[tokens.owner == i]) for i, mask in enumerate(masks)]


def can_mask(editor: Editor) -> bool:
    """Whether a prompt has a mask yet: features that are centred need the background's mean first."""
    if not by_overlap(editor):
        return False
    return editor.config.feature != "mean_centred" or editor.memory.background is not None


class Questions:
    """Earlier questions and their masks, by which the scale of τ shows them."""

    def __init__(self) -> None:
        # As `masks_of` gives them; None as long as they cannot be taken
        self._masks: dict[str, tuple[torch.Tensor, torch.Tensor | None] | None] = {}

    def add(self, editor: Editor, *prompts: str) -> None:
        """Keep questions, and take the masks that are missing."""
        for prompt in prompts:
            self._masks.setdefault(prompt, None)
        while len(self._masks) > QUESTIONS:
            del self._masks[next(iter(self._masks))]
        missing = [prompt for prompt, mask in self._masks.items() if mask is None]
        if missing and can_mask(editor):
            self._masks.update(zip(missing, masks_of(editor, missing), strict=True))

    def dots(self, editor: ResidualEditor, tau: float) -> tuple[Dot, ...]:
        """The questions against the edits that are stored now. Those that are an edit's own prompt are left out."""
        own = {edit.prompt for edit in editor.edits.values()}
        known = {prompt: masks for prompt, masks in self._masks.items() if masks is not None and prompt not in own}
        if not known or not len(editor.memory.bank):
            return ()
        masks, tokens = zip(*known.values(), strict=True)
        each = None
        if tokens[0] is not None:
            each = TokenMasks(torch.cat(tokens), np.repeat(np.arange(len(tokens)), [len(some) for some in tokens]))
        _, overlaps = editor.memory.nearest(torch.stack(masks), each)
        return tuple(
            Dot(prompt=prompt, overlap=float(overlap), fired=bool(overlap >= tau))
            for prompt, overlap in zip(known, overlaps, strict=True)
        )


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


def threshold_of(editor: Editor | None) -> Threshold | None:
    """τ as it is, and where it comes from; None for a method that has none to move."""
    if not by_overlap(editor):
        return None
    if editor.config.tau == "auto":
        origin = "calibrated" if editor.calibrated else "unset"
    else:
        origin = "preset" if preset(type(editor), editor.model).get("tau") == editor.config.tau else "hand"
    return Threshold(tau=editor.memory.tau, origin=origin)


def set_tau(editor: ResidualEditor, tau: float | Literal["auto"]) -> None:
    """Set τ by hand, or by measuring it on unrelated texts ("auto"). It is a setting, so saving keeps it."""
    editor.config = replace(editor.config, tau=tau)
    if tau == "auto":
        editor.calibrate()
    else:
        editor.memory.tau = editor.config.tau
