"""Where edits are written: which columns of the projection each edit changes, and what later edits do to the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from memoir.editors.base import Editor
from memoir.memory import ResidualMemory
from memoir.records import EditRequest
from memoir.sites import DeltaWeight, watching


@dataclass(frozen=True)
class ColumnWrites:
    """A sequence of n edits, column by column of the edited projection.

    energy  (n × D) ‖ΔW_i[:, j]‖², the change that edit i made to column j
    read    (n,) after t + 1 edits: ‖o_t − o_0‖ / ‖o_0‖, with o the change of the projection's output where the first
            edit's answer is predicted
    """

    energy: np.ndarray
    read: np.ndarray

    @property
    def columns(self) -> np.ndarray:
        """(n × D) bool: the columns of each edit."""
        return fewest_columns(self.energy)

    def summary(self) -> dict[str, Any]:
        """Numbers for the report, and the curves of its figures."""
        columns = self.columns
        return {
            "columns_per_edit": float(columns.sum(1).mean()),
            "edits_per_column": np.sort(columns.sum(0))[::-1].tolist(),
            "first_edit_reading_moved": self.read.tolist(),
        }


def column_writes(editor: Editor, edits: Sequence[EditRequest], *, progress: bool = True) -> ColumnWrites:
    """Make edits one by one with a fresh editor, and record what each does to the columns of its one projection."""
    before = residual_weight(editor).clone()
    energy, read, first = [], [], None
    for edit in tqdm(edits, desc=f"columns, {editor.name}", unit="edit", disable=not progress):
        editor.edit(edit, check=False)
        weight = residual_weight(editor)
        energy.append((weight - before).float().square().sum(0).cpu().numpy())
        before = weight.clone()
        output = _answer_change(editor, edits[0])
        first = output if first is None else first
        read.append(float((output - first).norm() / first.norm().clamp(min=1e-12)))
    return ColumnWrites(np.stack(energy), np.array(read))


def residual_weight(editor: Editor) -> Tensor:
    """(d × D) the change of weights in an editor's one projection; ValueError for an editor without one."""
    patches = list(editor.patches.values())
    if len(patches) == 1 and isinstance(patches[0], ResidualMemory):
        return patches[0].weight
    if len(patches) == 1 and isinstance(patches[0], DeltaWeight):
        return patches[0].delta
    raise ValueError(f"{editor.name} does not write into the columns of one projection; memoir and ft do")


def fewest_columns(energy: np.ndarray, share: float = 0.99) -> np.ndarray:
    """(n × D) bool: the fewest columns that hold `share` of each row's energy (n × D)."""
    order = np.argsort(-energy, axis=1, kind="stable")
    held = np.take_along_axis(energy, order, 1).cumsum(1)
    needed = (held < share * held[:, -1:]).sum(1) + 1
    rank = np.argsort(order, axis=1, kind="stable")
    return (rank < needed[:, None]) & (energy > 0)


@torch.no_grad()
def _answer_change(editor: Editor, edit: EditRequest) -> Tensor:
    """(n × d) the editor's change of its projection's output at the n positions where the edit's answer is
    predicted."""
    (site,) = editor.patches
    batch = editor.encode_edits([edit])
    with watching(site) as edited:
        editor.model.forward(batch, positions=1)
    with editor.detached() as model, watching(site) as plain:
        model.forward(batch, positions=1)
    return (edited[0][1] - plain[0][1])[batch.counted].float()


def meaning(summaries: Mapping[str, Mapping[str, Any]], width: int) -> str:
    """One claim on the numbers: label → `ColumnWrites.summary()`, and D."""
    drift = {label: summary["first_edit_reading_moved"][-1] for label, summary in summaries.items()}
    steadiest, loosest = min(drift, key=drift.get), max(drift, key=drift.get)
    steady = summaries[steadiest]
    later = len(steady["first_edit_reading_moved"]) - 1
    others = f", most under {loosest}, by {drift[loosest]:.0%}" if loosest != steadiest else ""
    return (
        f"The output that the first edit reads drifts least under {steadiest}, by {drift[steadiest]:.0%} over {later} "
        f"later {'edit' if later == 1 else 'edits'}{others}. Owning columns does not explain it: {steadiest} writes an "
        f"edit into about {steady['columns_per_edit']:.0f} of {width}, and later edits write there, too. Only the "
        "first edit is followed; another one may fare differently."
    )
