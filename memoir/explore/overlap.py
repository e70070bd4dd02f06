"""Which prompts masks tell apart, and the choice of the threshold τ on validation prompts. Neither needs a write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from memoir.bank import MaskBank
from memoir.editors.recognition import RecognisingEditor
from memoir.editors.residual import ResidualEditor
from memoir.evaluation import PROBE_SCORES, Evaluation
from memoir.memory import tophash
from memoir.plots import KINDS
from memoir.records import PROBE_KINDS, EditRequest


@dataclass(frozen=True)
class Overlaps:
    """R_match of every prompt of an edit set, once all its edits are stored.

    ratio  prompt kind → (n,) R_match; "edited" and the probe kinds that the data has
    right  prompt kind → (n,) bool, whether the nearest stored edit is the prompt's own
    """

    ratio: dict[str, np.ndarray]
    right: dict[str, np.ndarray]

    @property
    def wanted(self) -> np.ndarray:
        """(n,) R_match of rephrased prompts; 0 where the nearest edit is another one, which no τ can mend."""
        return np.where(self.right["rephrase"], self.ratio["rephrase"], 0.0)

    @property
    def unwanted(self) -> dict[str, np.ndarray]:
        """Kind of prompt that must not read an edit → (n,) R_match."""
        return {kind: ratios for kind, ratios in self.ratio.items() if kind not in ("edited", "rephrase")}

    def summary(self) -> dict[str, Any]:
        return {
            "top1": float(self.right["rephrase"].mean()),
            "auroc": {kind: auroc(self.wanted, ratios) for kind, ratios in self.unwanted.items()},
            "range": {
                kind: dict(zip(("low", "median", "high"), np.quantile(ratios, (0, 0.5, 1)).tolist(), strict=True))
                for kind, ratios in self.ratio.items()
            },
        }


def prompts_of(edits: Sequence[EditRequest]) -> list[tuple[str, int, str]]:
    """(kind, number of the edit, prompt) of every edited prompt and probe; kinds in the order of `PROBE_KINDS`."""
    edited = [("edited", i, edit.prompt) for i, edit in enumerate(edits)]
    probes = ((probe.kind, i, probe.prompt) for i, edit in enumerate(edits) for probe in edit.probes)
    return edited + sorted(probes, key=lambda row: PROBE_KINDS.index(row[0]))


def prompt_features(editor: RecognisingEditor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Each feature of `memory.FEATURES` of every prompt, (n × D) float32; "mean_centred" only where there are
    background texts. The edits of the editor make no difference."""
    features = {name: editor.features(prompts, name).pooled for name in ("mean", "last")}
    if editor.background:
        features["mean_centred"] = features["mean"] - editor.background_features("mean").pooled.mean(0)
    return features


def overlaps(edits: Sequence[EditRequest], features: Tensor, k: int) -> Overlaps:
    """R_match of all prompts of `prompts_of(edits)`, from their features (n × D)."""
    masks = tophash(features, k)
    bank = MaskBank(features.shape[1])
    bank.add([edit.id for edit in edits], masks[: len(edits)])
    rows, shared = bank.nearest(masks)
    return _by_kind(edits, rows, shared / k)


def fingerprints(editor: RecognisingEditor, edits: Sequence[EditRequest]) -> dict[str, Overlaps]:
    """R_match by the prompt's own mask, as published, and by that mask joined with the subject's. One pass of the
    prompts gives both. Nothing is written.

    editor  a fresh one with a `subject_layer`
    """
    editor.prepare()
    memory = editor.memory
    seen = editor.features([prompt for *_, prompt in prompts_of(edits)], editor.config.feature)
    memory.bank.add([edit.id for edit in edits], editor.stored_prompts(edits))
    joined = memory.nearest(memory.hashed(seen.pooled), seen.tokens)
    return {"prompt": overlaps(edits, seen.pooled, memory.k), "prompt and subject": _by_kind(edits, *joined)}


def _by_kind(edits: Sequence[EditRequest], rows: np.ndarray, ratios: np.ndarray) -> Overlaps:
    """From the number of the nearest edit and R_match, (n,) each, of all prompts of `prompts_of(edits)`."""
    kinds, owners = _kinds_and_owners(edits)
    names = list(dict.fromkeys(kinds.tolist()))
    if "rephrase" not in names:
        raise ValueError("the edits have no rephrase probes, expected some: τ must let rephrased prompts through")
    return Overlaps(
        ratio={name: ratios[kinds == name] for name in names},
        right={name: (rows == owners)[kinds == name] for name in names},
    )


def _kinds_and_owners(edits: Sequence[EditRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Kind, and number of the edit, of every prompt of `prompts_of(edits)`."""
    kinds, owners, _ = zip(*prompts_of(edits), strict=True)
    return np.array(kinds), np.array(owners)


def trade(found: Overlaps) -> tuple[np.ndarray, np.ndarray]:
    """What each τ trades, from the highest on: the share of the other prompts that read, each kind counting alike, and
    the share of the rephrased ones that read their own edit."""
    ratios = np.unique(np.concatenate([found.wanted, *found.unwanted.values()]))
    taus = ratios[ratios > 0][::-1]
    read = [np.mean([(others >= tau).mean() for others in found.unwanted.values()]) for tau in taus]
    return np.array(read), np.array([(found.wanted >= tau).mean() for tau in taus])


def read_at(found: Mapping[str, Overlaps], share: float = 0.05) -> dict[str, float]:
    """For each fingerprint the most rephrased prompts, of all, that can read their own edit while at most this share of
    the others read."""
    traded = {name: trade(overlaps) for name, overlaps in found.items()}
    return {name: float(right[others <= share].max(initial=0.0)) for name, (others, right) in traded.items()}


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive value exceeds a negative one, ties counting half (Mann and Whitney's U)."""
    ordered = np.sort(negative)
    below, upto = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + upto).mean() / 2 / len(negative))


def balanced_accuracy(tau: float, wanted: np.ndarray, unwanted: Mapping[str, np.ndarray]) -> float:
    """½ (share of rephrased prompts that read + share of the others that do not, each kind counting alike)."""
    spared = [float((ratios < tau).mean()) for ratios in unwanted.values()]
    return float((wanted >= tau).mean() + np.mean(spared)) / 2


def pick_tau(
    wanted: np.ndarray, unwanted: Mapping[str, np.ndarray], *, generalization: float | None = None
) -> tuple[float, float]:
    """τ by a stated rule, and its balanced accuracy.

    By default the τ of best balanced accuracy: the middle of the widest interval that attains it. With a
    `generalization` g in 0…1, the largest τ at which a share g of the rephrased prompts still read, which is the τ of
    highest locality among these. ValueError where no τ reads so many.
    """
    if not unwanted:
        raise ValueError("the edits have no locality probes, so τ cannot be chosen; expected at least one")
    if generalization is not None:
        ordered = np.sort(wanted)[::-1]
        needed = max(1, int(np.ceil(generalization * len(ordered) - 1e-9)))
        if not 0 < generalization <= 1 or ordered[needed - 1] <= 0:
            most = float((wanted > 0).mean())
            raise ValueError(f"generalization = {generalization}, expected more than 0 and at most {most:.3f} here")
        tau = float(ordered[needed - 1])
        return tau, balanced_accuracy(tau, wanted, unwanted)
    # Between two neighbouring observed ratios every τ decides alike; a ratio itself still reads its own prompt.
    edges = np.unique(np.concatenate([[0.0, 1.0], wanted, *unwanted.values()]))
    accuracy = np.array([balanced_accuracy(high, wanted, unwanted) for high in edges[1:]])
    best = np.flatnonzero(accuracy == accuracy.max())
    runs = np.split(best, np.flatnonzero(np.diff(best) > 1) + 1)  # neighbouring intervals that are equally good
    low, high = max(((edges[run[0]], edges[run[-1] + 1]) for run in runs), key=lambda run: run[1] - run[0])
    return float((low + high) / 2), float(accuracy.max())


def scores_by_tau(
    editor: ResidualEditor, edits: Sequence[EditRequest], taus: Sequence[float]
) -> dict[str, list[float]]:
    """Means of rel, gen and the localities of these edits, already written, for each τ.

    A prompt reads the memory or not, whatever the other prompts do. So two evaluations, one in which all prompts read
    and one in which none does, hold the answer for every τ. What was written must not depend on τ:
    `on_conflict="keep-both"`.
    """
    evaluation, memory = Evaluation(editor, generate=False), editor.memory
    chosen = memory.tau
    try:
        memory.tau = 0.0
        read = evaluation.scores(edits)
        memory.tau = float("inf")
        spared = evaluation.scores(edits)
    finally:
        memory.tau = chosen
    kinds, owners = _kinds_and_owners(edits)
    ratio = np.zeros(len(kinds))
    for rows, route in editor.decisions([prompt for _, _, prompt in prompts_of(edits)]):
        ratio[rows] = route.overlaps
    fired = ratio >= np.asarray(taus, dtype=float)[:, None]
    curves = {}
    for kind in dict.fromkeys(kinds.tolist()):
        name = "rel" if kind == "edited" else PROBE_SCORES[kind]
        of_kind = kinds == kind
        on, off = (np.array([scores[name][i] for i in owners[of_kind]], dtype=float) for scores in (read, spared))
        curves[name] = np.where(fired[:, of_kind], on, off).mean(1).tolist()
    return curves


def meaning(record: Mapping[str, Any]) -> str:
    """One claim on the record that the notebook leaves."""
    chosen, medians = record["chosen"], {kind: row["median"] for kind, row in record["range"].items()}
    rephrased = medians["rephrase"]
    nearest = max((kind for kind in medians if kind not in ("edited", "rephrase")), key=medians.get)
    return (
        f"At τ = {chosen['tau']:.2f} masks are right about {chosen['balanced_accuracy']:.0%} of these prompts, each "
        f"kind counting alike. The hardest are of the kind “{KINDS[nearest][0]}”: they overlap an edit by "
        f"{medians[nearest]:.2f} in the median, rephrased ones by {rephrased:.2f}. Another model, block, k or feature "
        "needs a τ of its own."
    )


def fingerprints_meaning(found: Mapping[str, Mapping[str, Overlaps]]) -> str:
    """One claim on two fingerprints: edit set → what `fingerprints` returns."""
    parts = []
    for name, overlaps in found.items():
        alone, joined = read_at(overlaps).values()
        parts.append(f"from {alone:.0%} to {joined:.0%} on {name}")
    return (
        f"With the subject's mask beside the prompt's, the rephrased prompts that read their own edit while 5 % of the "
        f"others read go {', '.join(parts)}. These are features only: whether the answer comes out is another matter."
    )
