"""What the exploring notebooks look at, as arrays and records. No figures here: `plots` draws what this returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from memoir.editors.base import Editor
from memoir.editors.memoir import MEMOIR
from memoir.memory import FEATURES, ResidualMemory
from memoir.models import LanguageModel, predicting
from memoir.records import EditRequest
from memoir.run import Evaluation
from memoir.sites import DeltaWeight, watching

# Columns: what each edit writes, and what later edits do to it -------------------------------------------------------


@dataclass(frozen=True)
class ColumnWrites:
    """A sequence of edits, column by column of the edited projection.

    energy  (n × D) ‖ΔW_i[:, j]‖², the change that edit i made to column j
    moved   (n,) once t + 1 edits are made: ‖(W_t − W_0)[:, S]‖ / ‖W_0[:, S]‖, S the first edit's columns, W_0 the
            change of the weights as the first edit left it
    read    (n,) once t + 1 edits are made: ‖o_t − o_0‖ / ‖o_0‖, o what the change adds to the projection's output
            where the first edit's answer is predicted
    """

    energy: np.ndarray
    moved: np.ndarray
    read: np.ndarray

    @property
    def columns(self) -> np.ndarray:
        """(n × D) bool: the columns of each edit."""
        return fewest_columns(self.energy)

    @property
    def total(self) -> np.ndarray:
        """(D,) energy that all edits together have written into each column."""
        return self.energy.sum(0)

    @property
    def lorenz(self) -> tuple[np.ndarray, np.ndarray]:
        """The Lorenz curve of that energy."""
        return lorenz(self.total)

    @property
    def shared(self) -> np.ndarray:
        """(n,) the share of each edit's columns that some earlier edit has too."""
        return shared_with_earlier(self.columns)

    def summary(self) -> dict[str, Any]:
        """Figures for the report, and the curves that are drawn from them."""
        columns = self.columns
        counts = columns.sum(0)
        return {
            "columns_per_edit": float(columns.sum(1).mean()),
            "columns_used": int((counts > 0).sum()),
            "gini_energy": gini(self.total),
            "gini_edits_per_column": gini(counts),
            "top_tenth_energy": float(1 - np.interp(0.9, *self.lorenz)),
            "edits_per_column": np.sort(counts)[::-1].tolist(),
            "shared_with_earlier": self.shared.tolist(),
            "first_edit_columns_moved": self.moved.tolist(),
            "first_edit_reading_moved": self.read.tolist(),
        }


def column_writes(editor: Editor, edits: Sequence[EditRequest], *, progress: bool = True) -> ColumnWrites:
    """Make edits one by one with a fresh editor and see what each does to the columns of its one projection."""
    before = residual_weight(editor).clone()
    energy, moved, read = [], [], []
    for edit in tqdm(edits, desc=f"columns, {editor.name}", unit="edit", disable=not progress):
        editor.edit(edit)
        weight = residual_weight(editor)
        energy.append((weight - before).float().square().sum(0).cpu().numpy())
        before = weight.clone()
        output = _answer_change(editor, edits[0])
        if len(energy) == 1:
            columns = torch.from_numpy(fewest_columns(energy[0][None])[0]).to(weight.device)
            first, first_output = weight[:, columns].clone(), output
        moved.append(_relative_change(weight[:, columns], first))
        read.append(_relative_change(output, first_output))
    return ColumnWrites(np.stack(energy), np.array(moved), np.array(read))


def residual_weight(editor: Editor) -> Tensor:
    """(d × D) what an editor adds to the weights of its one projection; ValueError for one that works otherwise."""
    patches = list(editor.patches.values())
    if len(patches) == 1 and isinstance(patches[0], ResidualMemory):
        return patches[0].weight
    if len(patches) == 1 and isinstance(patches[0], DeltaWeight):
        return patches[0].delta
    raise ValueError(f"{editor.name} does not write into the columns of one projection; memoir and ft do")


def fewest_columns(energy: np.ndarray, share: float = 0.99) -> np.ndarray:
    """(n × D) bool: the fewest columns that hold that share of each row's energy (n × D)."""
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
    """Gini coefficient of values ≥ 0: 0 where all are equal, towards 1 where one holds everything."""
    share, held = lorenz(values)
    return float(1 - 2 * np.trapezoid(held, share)) if held[-1] else 0.0


@torch.no_grad()
def _answer_change(editor: Editor, edit: EditRequest) -> Tensor:
    """(n × d) what the editor adds to its projection's output at the n places where an edit's answer is predicted."""
    (site,) = editor.patches
    batch = editor.encode_edits([edit])
    with watching(site) as edited:
        editor.model.forward(batch, positions=1)
    with editor.detached() as model, watching(site) as plain:
        model.forward(batch, positions=1)
    return (edited[0][1] - plain[0][1])[batch.counted].float()


def _relative_change(now: Tensor, then: Tensor) -> float:
    return float((now - then).norm() / then.norm().clamp(min=1e-12))


# Retention: who forgets what, when -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retention:
    """A sequence of edits, each edit looked at again at every checkpoint after it.

    at       (c,) edits made at each checkpoint
    rel      (c × n) reliability of each edit, NaN before it was made
    margin   (c × n) its answer's logit margin, NaN before it was made
    """

    at: np.ndarray
    rel: np.ndarray
    margin: np.ndarray

    @property
    def drift(self) -> np.ndarray:
        """(c × n) how far each margin has moved since the edit's first checkpoint."""
        first = np.argmax(~np.isnan(self.margin), axis=0)
        return self.margin - self.margin[first, np.arange(self.margin.shape[1])]

    def by_age(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (c × n) against the number of later edits: (c,) mean age of each group, and its mean value.

        Group g holds the edits that were first looked at g checkpoints ago.
        """
        first = np.searchsorted(self.at, np.arange(1, values.shape[1] + 1))
        passed = np.arange(len(self.at))[:, None] - first[None]
        age = self.at[:, None] - np.arange(1, values.shape[1] + 1)[None]
        groups = [passed == g for g in range(len(self.at))]
        return np.array([age[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])

    def summary(self) -> dict[str, Any]:
        """Curves over age, and how the first tenth of the edits stands at the end."""
        first = max(1, self.rel.shape[1] // 10)
        later, rel = self.by_age(self.rel)
        return {
            "later_edits": later.tolist(),
            "rel": rel.tolist(),
            "margin_drift": self.by_age(self.drift)[1].tolist(),
            "first_edits_rel": float(self.rel[-1, :first].mean()),
            "first_edits_margin_drift": float(self.drift[-1, :first].mean()),
            "last_rel": self.rel[-1].tolist(),
            "last_margin": self.margin[-1].tolist(),
        }


def retention(
    editor: Editor, edits: Sequence[EditRequest], checkpoints: Iterable[int], *, progress: bool = True
) -> Retention:
    """Make edits in a row, and look at all made so far at every checkpoint; the last edit always is one."""
    edits = [replace(edit, probes=()) for edit in edits]
    at = sorted({*checkpoints, len(edits)})
    if at[0] < 1 or at[-1] > len(edits):
        raise ValueError(f"checkpoints {at} do not fit {len(edits)} edits, expected 1 to {len(edits)}")
    evaluation = Evaluation(editor, generate=False)
    rel, margin = np.full((2, len(at), len(edits)), np.nan)
    with tqdm(total=len(edits), desc=f"retention, {editor.name}", unit="edit", disable=not progress) as bar:
        for row, (made, stop) in enumerate(zip([0, *at], at, strict=False)):
            editor.edit(edits[made:stop])
            rel[row, :stop] = evaluation.checkpoint(edits[:stop]).per_edit["rel"]
            margin[row, :stop] = margins(editor, edits[:stop])
            bar.update(stop - made)
    return Retention(np.array(at), rel, margin)


@torch.no_grad()
def margins(editor: Editor, edits: Sequence[EditRequest]) -> np.ndarray:
    """(n,) logit margin of each edit's answer: the least lead of an answer token over the best other token;
    negative where the answer is not the model's own under teacher forcing."""
    found = np.zeros(len(edits))
    order = sorted(range(len(edits)), key=lambda i: len(edits[i].prompt))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = editor.model.encode([edits[i].prompt for i in rows], [edits[i].target for i in rows])
        last = int(batch.target_mask.sum(1).max()) + 1
        logits = editor.model.forward(batch, positions=last).float()
        target = batch.target_mask[:, -last:]
        for row, i in enumerate(rows):
            own = logits[row, predicting(target)[row]]
            expected = batch.input_ids[row, -last:][target[row]][:, None]
            lead = own.gather(1, expected)[:, 0] - own.scatter(1, expected, -torch.inf).amax(1)
            found[i] = float(lead.min())
    return found


# Ablations -----------------------------------------------------------------------------------------------------------


# The paper's table of ablations, by its names of the rows.
PAPER_ABLATIONS = {
    "full": {},
    "no permutation": {"permute": False},
    "random mask instead of top-k": {"random_mask": True},
    "no conditional routing": {"routing": False},
}


def ablations(config: MEMOIR.Config, model: LanguageModel) -> list[tuple[str, str, dict[str, Any]]]:
    """(what is changed, label, overrides) of every variant, one thing changed at a time; first the paper's own, then
    k from a quarter to twice its value, the features, and all layers."""
    width = model.site(config.layer).in_features
    widths = sorted({max(1, min(width, round(config.k * factor))) for factor in (0.25, 0.5, 1, 2)})
    return [
        *(("part", label, overrides) for label, overrides in PAPER_ABLATIONS.items()),
        *(("k", str(k), {"k": k}) for k in widths),
        *(("feature", feature, {"feature": feature}) for feature in FEATURES),
        *(("layer", str(layer), {"layer": layer}) for layer in range(len(model.blocks))),
    ]
