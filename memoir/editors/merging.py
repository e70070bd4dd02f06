"""Merging two memories of MEMOIR into one."""

from __future__ import annotations

import numpy as np

from memoir.editors.base import EditError
from memoir.editors.residual import ResidualEditor


def absorb(editor: ResidualEditor, other: ResidualEditor) -> None:
    """Take over another memory's edits, written on the same base model with the same settings. All, or none if that
    fails.

    An edit that both memories hold is taken from the other. Contradicting edits are subject to `on_conflict`, as if
    the other memory's edits were made now.
    """
    check_mergeable(editor, other)
    if not other.edits:
        return
    memory, requests, bank = editor.memory, list(other.edits.values()), other.memory.bank
    row_of = {edit_id: row for row, edit_id in enumerate(bank.ids)}
    outdated: dict[str, None] = {}
    for some in (requests[start : start + 256] for start in range(0, len(requests), 256)):
        masks = bank.masks(np.array([row_of[request.id] for request in some]))
        replaced = editor.replaced(some, editor.conflicts(some, masks))
        outdated |= dict.fromkeys(edit_id for ids in replaced for edit_id in ids)
    before, edits, pages = editor.snapshot(outdated), dict(editor.edits), len(memory.pages)
    try:
        editor.erase(list(outdated))
        for edit_id in outdated:
            del editor.edits[edit_id]
        for request in requests:
            scale = float(other.scales[row_of[request.id]])
            editor.add_term(*other.pairs(request.id), scale)
            editor.enter([request.id], bank.masks(np.array([row_of[request.id]])), scale)
            editor.factors[request.id] = other.factors[request.id]
            editor.edits[request.id] = request
    except BaseException:
        del memory.pages[pages:]
        editor.restore(before)
        editor.edits = edits
        raise
    if not edits:
        editor.background, memory.background, editor._unrelated = other.background, other.memory.background, None
    editor.calibrate_if_due()


def check_mergeable(editor: ResidualEditor, other: ResidualEditor) -> None:
    """EditError that says why two memories cannot be merged."""
    if other.model.fingerprint != editor.model.fingerprint:
        raise EditError("memories of two base models cannot be merged")
    if other.model.chat != editor.model.chat:
        raise EditError("a memory written with chat=True and one without cannot be merged")
    if type(other) is not type(editor) or other.config != editor.config:
        mine, theirs = ({**vars(e.config), "write": e.write_rule} for e in (editor, other))
        differing = [name for name, value in mine.items() if theirs.get(name) != value]
        raise EditError(f"memories with different settings cannot be merged; they differ in {', '.join(differing)}")
    centre, other_centre = editor.memory.background, other.memory.background
    # Two machines round the same mean differently, by far less than a thousandth.
    both = editor.edits and other.edits and centre is not None
    if both and (other_centre.to(centre) - centre).norm() > 1e-3 * centre.norm():
        raise EditError(
            "memories centred on different background prompts cannot be merged: their masks are not comparable; "
            "make both editors with the same background"
        )
