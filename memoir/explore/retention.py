"""Who forgets what, and when: every edit asked again after more and more later ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from memoir.editors.base import Editor
from memoir.evaluation import Evaluation, answer_logits
from memoir.records import EditRequest
from memoir.text import similar_lengths


@dataclass(frozen=True)
class Retention:
    """A sequence of n edits, each asked again at every one of c checkpoints after it.

    at      (c,) edits made at each checkpoint
    rel     (c × n) reliability of each edit, NaN before it was made
    margin  (c × n) logit margin of its answer, NaN before it was made
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

        Group g holds the edits whose first checkpoint was g checkpoints ago.
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
    """Make edits in a row, and ask all edits so far at every checkpoint; the last edit always is a checkpoint."""
    edits = [replace(edit, probes=()) for edit in edits]
    at = sorted({*checkpoints, len(edits)})
    if at[0] < 1 or at[-1] > len(edits):
        raise ValueError(f"checkpoints {at} do not fit {len(edits)} edits, expected 1 to {len(edits)}")
    evaluation = Evaluation(editor, generate=False, texts=())
    rel, margin = np.full((2, len(at), len(edits)), np.nan)
    with tqdm(total=len(edits), desc=f"retention, {editor.name}", unit="edit", disable=not progress) as bar:
        for row, (made, stop) in enumerate(zip([0, *at], at, strict=False)):
            editor.edit(edits[made:stop], check=False)
            rel[row, :stop] = evaluation.checkpoint(edits[:stop]).per_edit["rel"]
            margin[row, :stop] = margins(editor, edits[:stop])
            bar.update(stop - made)
    return Retention(np.array(at), rel, margin)


def margins(editor: Editor, edits: Sequence[EditRequest]) -> np.ndarray:
    """(n,) logit margin of each edit's answer under teacher forcing: the least lead of an answer token over the best
    other token. A margin is negative where some answer token is not the model's own choice."""
    result = np.zeros(len(edits))
    pairs = [(edit.prompt, edit.target) for edit in edits]
    chunks = similar_lengths([prompt for prompt, _ in pairs], 32)
    for i, tokens, logits in answer_logits(editor.model, pairs, chunks):
        own = tokens[:, None]
        lead = logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).amax(1)
        result[i] = float(lead.min())
    return result


def meaning(summaries: Mapping[str, Mapping[str, Any]], edits: int) -> str:
    """One claim on the numbers: label → `Retention.summary()`, and the number of edits made."""
    kept = {label: summary["first_edits_rel"] for label, summary in summaries.items()}
    drift = {label: summary["first_edits_margin_drift"] for label, summary in summaries.items()}
    weakest, drifting = min(kept, key=kept.get), min(drift, key=drift.get)
    whole = [label for label, rel in kept.items() if rel == 1]
    if len(whole) == len(kept):
        claim = f"After {edits} edits every method still gives all answers of the first tenth of its edits."
    else:
        claim = (
            f"After {edits} edits {len(whole)} of {len(kept)} methods still give all answers of the first tenth of "
            f"their edits; {weakest} keeps the fewest, {kept[weakest]:.0%}."
        )
    caveat = "The answers are asked with the target before them token by token, which is kinder than a free answer."
    if drift[drifting] >= 0:
        return f"{claim} No method's answers lose any of their lead over the best other token. {caveat}"
    return (
        f"{claim} The lead of an answer over the best other token shows forgetting earlier: with {drifting} it has "
        f"shrunk most, by {-drift[drifting]:.1f} logits on average. {caveat}"
    )
