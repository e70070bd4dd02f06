"""How many edits a residual memory holds, from the geometry of its keys.

The keys of an edit are the masked inputs of the edited projection where its answer is predicted. G holds the inner
products of all keys (n × n). Let L be its part on and below the diagonal blocks, one block an edit. Answers are taken
to be random and to be written to within a ridge λ, by either write:

    sgd  each edit corrects what it reads, and so replaces a part of earlier ones: the error of an answer is (G − L − λ)
         (L + λ)⁻¹ of all answers; this is one sweep of Kaczmarz's method
    rls  W_m is the ridge solution over all keys: the error is −λ (G + λ)⁻¹ of all answers

Which error an answer bears is the one number that the keys do not tell. It is fitted to a few short runs (`bearable`).
Weight decay is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memoir.editors.memoir_rls import MEMOIRbyRLS
from memoir.editors.residual import ResidualEditor
from memoir.evaluation import Evaluation
from memoir.records import EditRequest
from memoir.run import run_edits
from memoir.sites import input_of
from memoir.text import similar_lengths


@torch.no_grad()
def edit_keys(editor: ResidualEditor, edits: Sequence[EditRequest]) -> list[Tensor]:
    """Each edit's masked keys (p_i × D) float32 where its answer is predicted. Nothing is written."""
    editor.prepare()  # a fresh editor has not centred its features yet
    keys: dict[int, Tensor] = {}
    for rows in similar_lengths([f"{edit.prompt} {edit.target}" for edit in edits], 32):
        batch = editor.encode_edits([edits[i] for i in rows])
        a = input_of(editor.site, lambda batch=batch: editor.model.forward(batch, positions=1))
        masks = editor.memory.fingerprint(a, batch.prompt_mask)
        for row, i in enumerate(rows):
            keys[i] = (a[row, batch.counted[row]] * masks[row]).float().cpu()
    return [keys[i] for i in range(len(edits))]


@dataclass(frozen=True)
class Geometry:
    """Of the keys of a sequence of edits, what is needed to predict how many fit.

    gram   G (n × n) float32, in units of a key's mean squared length
    owner  (n,) int64, ascending, the edit of each key
    write  "sgd" or "rls"
    ridge  λ in the units of `gram`
    """

    gram: Tensor
    owner: Tensor
    write: str
    ridge: float = MEMOIRbyRLS.Config.ridge

    @classmethod
    def of(cls, keys: Sequence[Tensor], write: str, room: float = 0.0) -> Geometry:
        """From the keys of each edit, (p_i × D).

        room  keys after which a new page begins, as in `MEMOIRbyRLS`; 0: one page
        """
        sizes = [len(key) for key in keys]
        page, used = [0], 0
        for size in sizes[:-1]:
            used += size
            full = room and used >= room
            page.append(page[-1] + bool(full))
            used = 0 if full else used
        owner = torch.repeat_interleave(torch.arange(len(keys)), torch.tensor(sizes))
        page_of = torch.tensor(page)[owner]
        stacked = torch.cat(list(keys))
        gram = stacked @ stacked.T / stacked.square().sum(1).mean()
        return cls(gram * (page_of[:, None] == page_of), owner, write)

    def first(self, edits: int) -> Geometry:
        """Of the first edits."""
        n = int((self.owner < edits).sum())
        return replace(self, gram=self.gram[:n, :n], owner=self.owner[:n])

    def widened(self, factor: int) -> Geometry:
        """Of a layer that is `factor` times as wide, with the same k/D: as many layers like this one side by side, each
        of which sees other edits with as many keys. What all overlaps have in common remains, the rest averages out."""
        rng, gram = np.random.default_rng(0), self.gram.clone()
        sizes = torch.bincount(self.owner).numpy()
        starts = np.cumsum(sizes) - sizes
        for _ in range(factor - 1):
            other = np.arange(len(sizes))
            for size in np.unique(sizes):
                other[sizes == size] = rng.permutation(other[sizes == size])
            order = torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i] + sizes[i]) for i in other]))
            gram += self.gram[order[:, None], order]
        return replace(self, gram=gram / factor)

    def errors(self) -> np.ndarray:
        """(n,) E‖W k − v‖² / ‖v‖² of each key after the last edit, for random answers v of equal size."""
        written = self.gram + self.ridge * torch.eye(len(self.gram))
        if self.write == "rls":
            return (self.ridge * torch.cholesky_inverse(torch.linalg.cholesky(written))).square().sum(1).numpy()
        lower = written.masked_fill(self.owner[:, None] < self.owner, 0.0)
        return torch.linalg.solve(lower, self.gram - lower, left=False).square().sum(1).numpy()

    def reliability(self, bearable: float, unedited: float, errors: np.ndarray | None = None) -> float:
        """Mean over edits of the share of answer tokens whose error is bearable; of the other tokens as many are right
        as on the unedited model."""
        kept = (self.errors() if errors is None else errors) <= bearable
        answered = np.bincount(self.owner, kept) / np.bincount(self.owner)
        return float(unedited + (1 - unedited) * answered.mean())


def bearable(runs: Sequence[tuple[Geometry, float, float]]) -> float:
    """The error up to which answers survive, by least squares: of each run its geometry, and the reliability of the
    unedited model and after the last edit."""
    known = [(geometry, geometry.errors(), *scores) for geometry, *scores in runs]
    candidates = np.quantile(np.concatenate([errors for _, errors, *_ in known]), np.linspace(0, 1, 201))
    losses = [
        sum((geometry.reliability(at, before, errors) - after) ** 2 for geometry, errors, before, after in known)
        for at in candidates
    ]
    best = candidates[np.isclose(losses, min(losses))]
    return float((best[0] + best[-1]) / 2)


def unedited(editor: ResidualEditor, edits: Sequence[EditRequest]) -> float:
    """Reliability of edits that a fresh editor has not made yet."""
    bare = [replace(edit, probes=()) for edit in edits]
    return float(np.mean(Evaluation(editor, generate=False, texts=()).scores(bare)["rel"]))


def measured(editor: ResidualEditor, edits: Sequence[EditRequest], at: Iterable[int]) -> dict[int, float]:
    """Make edits with a fresh editor: number of edits → reliability of all so far."""
    bare = [replace(edit, probes=()) for edit in edits]
    result = run_edits(editor, bare, checkpoints=at, generate=False, texts=())
    return {checkpoint.edits: checkpoint.scores["rel"] for checkpoint in result.checkpoints}


def lost(fitted: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the short runs, rows with reliability, lost any answer. Where they did not, `bearable` is a lower
    bound."""
    return min(row["reliability"] for row in fitted) < 0.99


def fit_meaning(limit: float, fitted: Sequence[Mapping[str, Any]]) -> str:
    """What the short runs say: the error that answers bear, and rows with reliability."""
    if lost(fitted):
        return f"The answer at a token survives an error of up to {limit:.2f} times its squared length."
    return (
        f"The short runs lost no answer. So an answer survives an error of at least {limit:.2f} times its squared "
        "length, and the predictions below are lower bounds."
    )


def meaning(
    checks: Sequence[Mapping[str, Any]],
    widths: Sequence[Mapping[str, Any]],
    fitted: Sequence[Mapping[str, Any]],
    level: float = 0.9,
) -> str:
    """One claim on the checked predictions, and one on the width that so many edits need.

    checks  rows with reliability, which is None where no run was made, and reliability_predicted
    widths  rows with write, D, T and reliability_predicted, D rising
    fitted  rows with reliability, of the short runs
    """
    known = [row for row in checks if row["reliability"] is not None]
    gap = max((abs(row["reliability"] - row["reliability_predicted"]) for row in known), default=None)
    claim = f"The keys predict the reliability in {len(known)} checks to within {gap:.2f}. " if known else ""
    needs, needs_more = ("needs", "needs more") if lost(fitted) else ("needs at most", "may need more")
    widest, holds = widths[-1]["D"], []
    for write in dict.fromkeys(row["write"] for row in widths):
        enough = [row["D"] for row in widths if row["write"] == write and row["reliability_predicted"] >= level]
        short = f"{write} {needs_more} than D = {widest:,}, the widest tried"
        holds.append(f"{write} {needs} D = {enough[0]:,}" if enough else short)
    return (
        f"{claim}To hold {widths[0]['T']:,} edits at a reliability of {level:g}, {' and '.join(holds)}. A wider layer "
        "is imagined as several like this one that see other prompts; prompts that look alike in all of them need more."
    )
