"""Which part of MEMOIR does what: its variants, with one thing changed at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memoir.editors.memoir import MEMOIR
from memoir.editors.memoir_rls import MEMOIRbyRLS
from memoir.editors.rlsedit import RLSEdit
from memoir.memory import FEATURES
from memoir.models import LanguageModel

LAYERS = 5  # tried in a model of more dense blocks
# The rows of the paper's table of ablations, under its names.
PAPER_ABLATIONS = {
    "full": {},
    "no permutation": {"permute": False},
    "random mask instead of top-k": {"random_mask": True},
    "no conditional routing": {"routing": False},
}


def ablations(config: MEMOIR.Config, model: LanguageModel) -> list[tuple[str, str, dict[str, Any]]]:
    """(group, label, overrides) of every variant: first the paper's own (group "part"), then k from a quarter to twice
    its value, the features, and the layers: all dense blocks of a shallow model, else `LAYERS` spread over the depth
    and its own."""
    width = model.site(config.layer).in_features
    widths = sorted({max(1, min(width, round(config.k * factor))) for factor in (0.25, 0.5, 1, 2)})
    blocks = len(model.dense)
    spread = [model.dense[i] for i in np.linspace(0, blocks - 1, min(blocks, LAYERS)).round().astype(int)]
    return [
        *(("part", label, overrides) for label, overrides in PAPER_ABLATIONS.items()),
        *(("k", str(k), {"k": k}) for k in widths),
        *(("feature", feature, {"feature": feature}) for feature in FEATURES),
        *(("layer", str(layer), {"layer": layer}) for layer in sorted({*spread, config.layer})),
    ]


def recursions(layer: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label → method and settings: recursive least squares in one block, with MEMOIR's masks and routing and without.

    Both write at the tokens that predict the target. λ is that of MEMOIR (rls), whose ridge is λ².
    """
    plain = {"layers": (layer,), "where": "target", "lam": MEMOIRbyRLS.Config.ridge**0.5, "mu": 0.0}
    return {MEMOIRbyRLS.label: (MEMOIRbyRLS.name, {"layer": layer}), RLSEdit.label: (RLSEdit.name, plain)}


def meaning(rows: Sequence[Mapping[str, Any]], paper: Sequence[Mapping[str, Any]]) -> str:
    """One claim on the rows of all variants, beside the paper's rows."""
    last = max(row["T"] for row in rows)
    ours = {row["label"]: row["avg"] for row in rows if row["group"] == "part" and row["T"] == last}
    theirs = {row["variant"]: row["avg"] for row in paper}
    worst = min(ours, key=ours.get)
    caveat = "One thing changes at a time, with one seed, so small differences mean little."
    if worst == "full":
        return f"After {last} edits no variant averages less than MEMOIR itself ({ours[worst]:.2f}). {caveat}"
    return (
        f"After {last} edits the variant “{worst}” loses most: its average of reliability, generalization and locality "
        f"is {ours[worst]:.2f} instead of {ours['full']:.2f}. In the paper, on ZsRE and LLaMA-3-8B-Instruct after "
        f"{paper[0]['T']} edits, it is {theirs[worst]:.2f} instead of {theirs['full']:.2f}. {caveat}"
    )
