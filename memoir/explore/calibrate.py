"""Which τ a model needs: the overlaps of unrelated texts with stored prompts, as a histogram. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memoir import calibration
from memoir.editors.base import Editor
from memoir.editors.residual import ResidualEditor
from memoir.records import EditRequest

BINS = np.linspace(0, 1, 21)
WIDTH = 50  # characters of the longest bar


def first_look(editor: Editor) -> str:
    """Where a fresh editor writes and what it reads by, before anything is written."""
    sites = list(editor.patches)
    blocks = ", ".join(str(site.layer) for site in sites) or "none"
    where = f"{editor.label} on {editor.model.name}: block {blocks} of {len(editor.model.blocks)}."
    if not isinstance(editor, ResidualEditor) or editor.tau is None:
        return where
    editor.prepare()
    memory, config = editor.memory, editor.config
    masks, tokens = editor.unrelated
    overlaps = calibration.nearest_overlaps(masks, memory.bank, tokens)
    share, median = (overlaps >= memory.tau).mean(), np.median(overlaps)
    return (
        f"{where} A prompt reads the memory if its mask ({memory.k} of {editor.site.in_features} columns, feature "
        f"{config.feature}) overlaps a stored one by τ = {memory.tau:.3f} or more. Of {len(overlaps)} unrelated texts "
        f"{share:.1%} reach τ with another background text; the median overlap is {median:.2f}."
    )


def measured_tau(editor: ResidualEditor, edits: Sequence[EditRequest] = ()) -> dict[str, Any]:
    """τ of a fresh editor with the prompts of some edits stored, and what would read them.

    returns  tau, edits, and overlaps: kind of prompt → (n,) its overlap ratios with the nearest stored prompt; with at
             most `calibration.FEW` edits, those of the background texts are with other background texts
    """
    editor.prepare()
    memory = editor.memory
    if edits:
        memory.bank.add([edit.id for edit in edits], editor.stored_prompts(edits))
    tau = editor.calibrate()
    masks, tokens = editor.unrelated
    overlaps = {"background": calibration.nearest_overlaps(masks, memory.bank, tokens)}
    for kind in dict.fromkeys(probe.kind for edit in edits for probe in edit.probes):
        prompts = [probe.prompt for edit in edits for probe in edit.probes if probe.kind == kind]
        seen = editor.features(prompts, editor.config.feature)
        _, overlaps[kind] = memory.nearest(memory.hashed(seen.pooled), seen.tokens)
    return {"tau": tau, "edits": len(edits), "overlaps": overlaps}


def histogram(overlaps: Mapping[str, np.ndarray], tau: float) -> str:
    """A text histogram of each kind's overlaps, with the share at or above τ."""
    lines = []
    for kind, ratios in overlaps.items():
        counts, _ = np.histogram(ratios, BINS)
        lines.append(
            f"{kind.replace('_', ' ')}: {(ratios >= tau).mean():.1%} of {len(ratios)} at or above τ = {tau:.3f}"
        )
        for low, count in zip(BINS, counts, strict=False):
            if count:
                mark = "τ" if low <= tau < low + BINS[1] else " "
                lines.append(f"  {low:.2f} {mark} {'█' * max(1, round(WIDTH * count / counts.max()))} {count}")
    return "\n".join(lines)
