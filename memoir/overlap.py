"""Which prompts a fingerprint tells apart, and the threshold τ that is picked on validation prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memoir.bank import MaskBank
from memoir.editors.memoir import MEMOIR
from memoir.memory import FEATURES, pool_prompt, tophash
from memoir.models import LanguageModel
from memoir.records import PROBE_KINDS, EditRequest
from memoir.run import Evaluation
from memoir.sites import Site, input_of

# Overlap: which prompts a fingerprint tells apart --------------------------------------------------------------------


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
        """Negative kind → (n,) R_match."""
        return {kind: found for kind, found in self.ratio.items() if kind not in ("edited", "rephrase")}

    def summary(self) -> dict[str, Any]:
        return {
            "top1": float(self.right["rephrase"].mean()),
            "auroc": {kind: auroc(self.wanted, found) for kind, found in self.unwanted.items()},
            "range": {
                kind: dict(zip(("low", "median", "high"), np.quantile(found, (0, 0.5, 1)).tolist(), strict=True))
                for kind, found in self.ratio.items()
            },
        }


def prompts_of(edits: Sequence[EditRequest]) -> list[tuple[str, int, str]]:
    """(kind, number of the edit, prompt) of every edited prompt and probe; kinds in the order of `PROBE_KINDS`."""
    asked = [("edited", i, edit.prompt) for i, edit in enumerate(edits)]
    probes = ((probe.kind, i, probe.prompt) for i, edit in enumerate(edits) for probe in edit.probes)
    return asked + sorted(probes, key=lambda row: PROBE_KINDS.index(row[0]))


@torch.no_grad()
def prompt_features(
    model: LanguageModel, layer: int, prompts: Sequence[str], background: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Each feature of `FEATURES` of every prompt at a block's projection, (n × D) float32; "mean_centred" only where
    there are background prompts."""
    site = model.site(layer)
    usual = _pooled(model, site, background, "mean").mean(0) if background else None
    found = {name: _pooled(model, site, prompts, name) for name in FEATURES if name != "mean_centred"}
    return found if usual is None else {**found, "mean_centred": found["mean"] - usual}


def overlaps(edits: Sequence[EditRequest], features: Tensor, k: int) -> Overlaps:
    """R_match of all prompts of `prompts_of(edits)`, from their features (n × D)."""
    asked = prompts_of(edits)
    masks = tophash(features, k)
    bank = MaskBank(features.shape[1])
    bank.add([str(i) for i in range(len(edits))], masks[: len(edits)])
    rows, counts = bank.nearest(masks)
    kinds, own = np.array([kind for kind, _, _ in asked]), np.array([i for _, i, _ in asked])
    names = list(dict.fromkeys(kinds.tolist()))
    if missing := {"rephrase"} - set(names):
        raise ValueError(f"the edits have no {', '.join(missing)} probes, so there is nothing that overlap must find")
    return Overlaps(
        ratio={name: counts[kinds == name] / k for name in names},
        right={name: (rows == own)[kinds == name] for name in names},
    )


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive value exceeds a negative one, ties counting half (Mann and Whitney's U)."""
    ordered = np.sort(negative)
    below, upto = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + upto).mean() / 2 / len(negative))


def roc(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, (m,) each, as the threshold goes down through all values from above them all."""
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([positive, negative]))[::-1]])
    return tuple((values[None] >= thresholds[:, None]).mean(1) for values in (negative, positive))


def _pooled(model: LanguageModel, site: Site, prompts: Sequence[str], feature: str) -> Tensor:
    pooled = torch.zeros(len(prompts), site.in_features)
    for rows, a, mask in _inputs(model, site, prompts):
        pooled[rows] = pool_prompt(a, mask, feature).cpu()
    return pooled


def _inputs(model: LanguageModel, site: Site, prompts: Sequence[str]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(row numbers, a (B × T × D), prompt tokens (B × T) bool) of the prompts, in batches of similar length."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), 32):
        rows = order[start : start + 32]
        batch = model.encode([prompts[i] for i in rows])
        yield rows, input_of(site, lambda batch=batch: model.forward(batch)), batch.prompt_mask


# τ: the threshold, picked on validation prompts ----------------------------------------------------------------------


def balanced_accuracy(tau: float, wanted: np.ndarray, unwanted: Mapping[str, np.ndarray]) -> float:
    """½ (share of rephrased prompts read + share of the other prompts not read), each negative kind counting alike."""
    spared = [float((found < tau).mean()) for found in unwanted.values()]
    return float((wanted >= tau).mean() + np.mean(spared)) / 2


def pick_tau(
    wanted: np.ndarray, unwanted: Mapping[str, np.ndarray], *, generalization: float | None = None
) -> tuple[float, float]:
    """τ by a stated rule, and its balanced accuracy.

    By default the τ of best balanced accuracy: the middle of the widest interval that attains it. With a
    `generalization` g in 0…1, the τ of highest locality among those that read a share g of the rephrased prompts: the
    largest of them. ValueError where none does.
    """
    if not unwanted:
        raise ValueError("no prompts that an edit must not reach, so every τ is as good as 0; expected probes")
    if generalization is not None:
        ordered = np.sort(wanted)[::-1]
        needed = max(1, int(np.ceil(generalization * len(ordered) - 1e-9)))
        if not 0 < generalization <= 1 or ordered[needed - 1] <= 0:
            best = float((wanted > 0).mean())
            raise ValueError(f"generalization = {generalization}, expected more than 0 and at most {best:.3f} here")
        tau = float(ordered[needed - 1])
        return tau, balanced_accuracy(tau, wanted, unwanted)
    # Between two neighbouring observed values every τ decides alike; a value itself still reads its own prompt.
    edges = np.unique(np.concatenate([[0.0, 1.0], wanted, *unwanted.values()]))
    accuracy = [balanced_accuracy(high, wanted, unwanted) for high in edges[1:]]
    best = max(accuracy)
    runs, start = [], None
    for i, value in enumerate([*accuracy, -1.0]):
        if value == best and start is None:
            start = i
        elif value != best and start is not None:
            runs.append((edges[start], edges[i]))
            start = None
    low, high = max(runs, key=lambda run: run[1] - run[0])
    return float((low + high) / 2), best


def scores_by_tau(
    editor: MEMOIR, edits: Sequence[EditRequest], taus: Sequence[float], **options: Any
) -> dict[str, list[float]]:
    """Means of rel, gen and the localities of all these edits, made before, for each τ.

    A prompt reads the memory or not, and no other prompt has a say in it: two evaluations, one in which all prompts
    read and one in which none does, hold the answer for every τ. What was written must not depend on τ, which
    `on_conflict="keep-both"` sees to.
    """
    evaluation = Evaluation(editor, generate=False, **options)
    chosen = editor.memory.tau
    try:
        editor.memory.tau = 0.0
        read = evaluation.scores(edits)
        editor.memory.tau = float("inf")
        spared = evaluation.scores(edits)
    finally:
        editor.memory.tau = chosen
    asked = prompts_of(edits)
    ratio = np.zeros(len(asked))
    with torch.no_grad():
        for rows, a, mask in _inputs(editor.model, editor.site, [prompt for _, _, prompt in asked]):
            ratio[rows] = editor.memory.route(editor.memory.fingerprint(a, mask)).overlaps
    kinds, own = np.array([kind for kind, _, _ in asked]), np.array([i for _, i, _ in asked])
    names = {"edited": "rel", "rephrase": "gen", "unrelated": "loc"} | {
        kind: f"loc_{kind}" for kind in ("same_subject", "same_template")
    }
    curves = {}
    for kind, name in names.items():
        if not (kinds == kind).any():
            continue
        mine = own[kinds == kind]
        on, off = (np.array([scores[name][i] for i in mine], dtype=float) for scores in (read, spared))
        fired = ratio[kinds == kind][None] >= np.asarray(taus, dtype=float)[:, None]
        curves[name] = np.where(fired, on, off).mean(1).tolist()
    return curves
