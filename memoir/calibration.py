"""τ without labels: the threshold that a given share of unrelated questions may pass.

The unrelated questions are background texts. τ is the (1 − share) quantile of their nearest overlap with the stored
edits, so a further unrelated question reads the memory with about that probability. While few edits are stored, the
background texts stand in for them: each is compared with `FEW` others. Nothing is written and no answer is needed.

τ rises as edits accumulate, because more masks lie near any question. It is recalibrated each time the number of edits
has grown by a quarter, and earlier answers may change then: a rephrased prompt that just passed τ may no longer pass.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from memoir.bank import MaskBank
from memoir.memory import TokenMasks, nearest

FEW = 50  # edits up to which the background texts stand in for them
GROWTH = 1.25  # of the number of edits, after which τ is recalibrated


def nearest_overlaps(background: Tensor, bank: MaskBank, tokens: TokenMasks | None = None) -> np.ndarray:
    """(n,) the overlap ratio of each background text with the nearest stored edit. While there are at most `FEW` edits,
    with the nearest of `FEW` other background texts, which are the same in every call; a text's middle token stands for
    the subject then.

    background  the masks of the texts, (n × D) bool; tokens, those of their tokens where subjects count
    """
    ones, count = background.float(), len(background)
    k = int(ones[0].sum()) + (0 if tokens is None else int(tokens.masks[0].sum()))
    if len(bank) > FEW:
        return nearest(bank, background, tokens)[1] / k
    shared = (ones @ ones.T).cpu().numpy()  # exact: float32 counts to 2²⁴
    if tokens is not None:
        starts, each = np.searchsorted(tokens.owner, np.arange(count)), tokens.masks.float()
        middle = (starts + np.append(starts[1:], len(each)) - 1) // 2
        shared = shared + np.maximum.reduceat((each @ each[middle].T).cpu().numpy(), starts, axis=0)
    order = np.random.default_rng(0).permutation(count)
    others = (np.arange(count)[:, None] + np.arange(1, min(FEW, count - 1) + 1)) % count
    return shared[order[:, None], order[others]].max(1) / k


def pick(overlaps: np.ndarray, share: float) -> float:
    """The least τ that a further text like those with these overlaps (n,) reaches with at most this probability.

    A further value exceeds the r-th largest of n with probability r / (n + 1). So τ lies just above the
    ⌊share (n + 1)⌋-th largest, or above all of them.
    """
    ordered = np.sort(overlaps)[::-1]
    rank = max(1, int(share * (len(ordered) + 1)))
    if rank > len(ordered):
        return 0.0
    return float(min(1.0, np.nextafter(ordered[rank - 1], 2.0)))


def due(edits: int, calibrated_at: int | None) -> bool:
    """Whether τ is to be calibrated: never yet, or beyond `FEW` edits their number has grown by `GROWTH` since."""
    return calibrated_at is None or edits >= max(GROWTH * calibrated_at, FEW + 1)
