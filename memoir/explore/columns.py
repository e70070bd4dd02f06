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
    moved   (n,) after t + 1 edits: ‖(W_t − W_0)[:, S]‖ / ‖W_0[:, S]‖, with S the first edit's columns and W_0 the
            change of the weights just after the first edit
    read    (n,) after t + 1 edits: ‖o_t − o_0‖ / ‖o_0‖, with o the change of the projection's output where the first
            edit's answer is predicted
    """

    energy: np.ndarray
    moved: np.ndarray
    read: np.ndarray

    @property
    def columns(self) -> np.ndarray:
        """(n × D) bool: the columns of each edit."""
        return fewest_columns(self.energy)

    def summary(self) -> dict[str, Any]:
        """Numbers for the report, and the curves of its figures."""
        columns, total = self.columns, self.energy.sum(0)
        counts = columns.sum(0)
        return {
            "columns_per_edit": float(columns.sum(1).mean()),
            "columns_used": int((counts > 0).sum()),
            "gini_energy": gini(total),
            "gini_edits_per_column": gini(counts),
            "top_tenth_energy": float(1 - np.interp(0.9, *lorenz(total))),
            "edits_per_column": np.sort(counts)[::-1].tolist(),
            "shared_with_earlier": shared_with_earlier(columns).tolist(),
            "first_edit_columns_moved": self.moved.tolist(),
            "first_edit_reading_moved": self.read.tolist(),
        }


def column_writes(editor: Editor, edits: Sequence[EditRequest], *, progress: bool = True) -> ColumnWrites:
    """Make edits one by one with a fresh editor, and record what each does to the columns of its one projection."""
    before = residual_weight(editor).clone()
    energy, moved, read = [], [], []
    for edit in tqdm(edits, desc=f"columns, {editor.name}", unit="edit", disable=not progress):
        editor.edit(edit, check=False)
        weight = residual_weight(editor)
        energy.append((weight - before).float().square().sum(0).cpu().numpy())
        before = weight.clone()
        output = _answer_change(editor, edits[0])
        if len(energy) == 1:
            columns = torch.from_numpy(fewest_columns(energy[0][None])[0]).to(weight.device)
            first_weight, first_output = weight[:, columns].clone(), output
        moved.append(_relative_change(weight[:, columns], first_weight))
        read.append(_relative_change(output, first_output))
    return ColumnWrites(np.stack(energy), np.array(moved), np.array(read))


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


def shared_with_earlier(columns: np.ndarray) -> np.ndarray:
    """(n,) the share of each edit's columns (n × D) bool that some earlier edit has too."""
    earlier = np.logical_or.accumulate(columns, axis=0)
    shared = (columns[1:] & earlier[:-1]).sum(1) / np.maximum(columns[1:].sum(1), 1)
    return np.concatenate([[0.0], shared])


def lorenz(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Lorenz curve of n values ≥ 0: share of the items, smallest first, and share of the sum, both (n + 1,)."""
    held = np.concatenate([[0.0], np.sort(np.asarray(values, dtype=float)).cumsum()])
    return np.linspace(0, 1, len(held)), held / held[-1] if held[-1] else held


def gini(values: np.ndarray) -> float:
    """Gini coefficient of values ≥ 0: 0 where all are equal, towards 1 where one item holds everything."""
    share, held = lorenz(values)
    return float(1 - 2 * np.trapezoid(held, share)) if held[-1] else 0.0


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


def _relative_change(now: Tensor, then: Tensor) -> float:
    return float((now - then).norm() / then.norm().clamp(min=1e-12))


def meaning(summaries: Mapping[str, Mapping[str, Any]], width: int) -> str:
    """One claim on the numbers: label → `ColumnWrites.summary()`, and D."""
    drift = {label: summary["first_edit_reading_moved"][-1] for label, summary in summaries.items()}
    steadiest, loosest = min(drift, key=drift.get), max(drift, key=drift.get)
    steady = summaries[steadiest]
    later = len(steady["first_edit_reading_moved"]) - 1
    others = f", most with {loosest}, by {drift[loosest]:.0%}" if loosest != steadiest else ""
    return (
        f"What the first edit reads moves least with {steadiest}, by {drift[steadiest]:.0%} over {later} later "
        f"{'edit' if later == 1 else 'edits'}{others}. Owning columns does not explain it: {steadiest} writes an edit "
        f"into about {steady['columns_per_edit']:.0f} of {width}, and later edits write there, too. Only the first "
        "edit is followed; another one may fare differently."
    )
