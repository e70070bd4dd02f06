"""MEMOIR's heart: fingerprints of prompts, the bank that compares them, and the residual memory they select."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from memoir.sites import Site, Span

FEATURES = ("mean", "mean_centred", "last")


def pool_prompt(a: Tensor, prompt: Tensor, feature: str, background: Tensor | None = None) -> Tensor:
    """Prompt feature ā(x), optionally centred on irrelevant prompts (MEMOIR, section 3.2).

    a           (B × T × D) inputs of the edited projection
    prompt      (B × T) bool, the prompt's tokens: neither padding nor answer
    feature     "mean": over the prompt's tokens; "mean_centred": that minus `background`; "last": the last token's
    background  (D,) mean of the mean features of irrelevant prompts, for "mean_centred"
    returns     (B × D) float32
    """
    if feature not in FEATURES:
        raise ValueError(f"feature {feature!r} is unknown; expected one of {', '.join(FEATURES)}")
    if feature == "last":
        places = torch.arange(prompt.shape[1], device=prompt.device)
        last = (prompt * places).amax(dim=1)
        return a[torch.arange(len(a), device=a.device), last].float()
    weights = prompt.to(torch.float32)
    pooled = torch.einsum("bt,btd->bd", weights, a.float()) / weights.sum(1, keepdim=True)
    if feature == "mean":
        return pooled
    if background is None:
        raise ValueError("feature 'mean_centred' needs the mean feature of background prompts")
    return pooled - background


def tophash(feature: Tensor, k: int, permutation: Tensor | None = None) -> Tensor:
    """M(a) = π(T(a)), T(a)_j = 1[|a_j| among the k largest] (MEMOIR, TopHash).

    feature (B × D) float; permutation (D,) int64 or None for the identity; returns (B × D) bool with k ones a row.
    """
    if not 0 < k <= feature.shape[-1]:
        raise ValueError(f"k = {k} columns, expected 1 to {feature.shape[-1]}")
    columns = feature.abs().topk(k, dim=-1).indices
    if permutation is not None:
        columns = permutation[columns]
    return torch.zeros(feature.shape, dtype=torch.bool, device=feature.device).scatter_(-1, columns, True)


def random_mask(feature: Tensor, k: int) -> Tensor:
    """The ablation's mask: k columns drawn at random for every prompt, again the same for the same prompt.

    The draw is seeded by which 16 entries of the feature are largest. feature (B × D); returns (B × D) bool.
    """
    strongest = feature.abs().topk(min(16, feature.shape[-1]), dim=-1).indices.sort(dim=-1).values.cpu()
    mask = torch.zeros(feature.shape, dtype=torch.bool)
    for row, seeds in zip(mask, strongest.numpy(), strict=True):
        row[torch.from_numpy(np.random.default_rng(seeds).permutation(len(row))[:k].copy())] = True
    return mask.to(feature.device)


class MaskBank:
    """Masks of the edits made so far, packed to bits; overlaps are counted exactly, in integers.

    x_match = argmin d_H(M(a(x)), M(a(x'))) (MEMOIR, informed retention). All masks have k ones, so the nearest in
    Hamming distance is the one with the largest overlap; of equals the newest wins.
    """

    # Words compared at a time: a block of them and its bit counts stay in a core's cache.
    _BLOCK_WORDS = 1 << 15

    def __init__(self, width: int):
        """width: D, bits in a mask."""
        self.width = width
        self.ids: list[str] = []
        self._words = np.zeros((0, -(-width // 64)), dtype=np.uint64)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def packed(self) -> np.ndarray:
        """(n × ⌈D/64⌉) uint64, one row per edit."""
        return self._words[: len(self.ids)]

    def add(self, ids: Sequence[str], masks: Tensor) -> None:
        """Append masks (n × D) bool under the edits' ids."""
        rows = self._pack(masks)
        needed = len(self.ids) + len(rows)
        if needed > len(self._words):
            grown = np.zeros((max(64, 2 * needed), self._words.shape[1]), dtype=np.uint64)
            grown[: len(self.ids)] = self.packed
            self._words = grown
        self._words[len(self.ids) : needed] = rows
        self.ids.extend(ids)

    def remove(self, edit_id: str) -> None:
        """Forget one edit's mask; KeyError where there is none."""
        if edit_id not in self.ids:
            raise KeyError(f"no mask of edit {edit_id!r} in the bank")
        row = self.ids.index(edit_id)
        self._words[row : len(self.ids) - 1] = self._words[row + 1 : len(self.ids)]
        self.ids.pop(row)

    def replace(self, ids: Sequence[str], packed: np.ndarray) -> None:
        """Take over ids and packed masks (n × ⌈D/64⌉) uint64."""
        if packed.shape != (len(ids), self._words.shape[1]):
            raise ValueError(f"packed masks have shape {packed.shape}, expected {(len(ids), self._words.shape[1])}")
        self.ids, self._words = list(ids), packed.copy()

    def nearest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For each mask (B × D) bool: the row of the nearest stored one, and their overlap in bits.

        Rows are -1 and overlaps 0 while the bank is empty.
        """
        queries = self._pack(masks)
        best = np.full(len(queries), -1)
        overlap = np.zeros(len(queries), dtype=np.int64)
        step = max(1, self._BLOCK_WORDS // self._words.shape[1])
        for start in range(0, len(self.ids), step):
            stored = self.packed[start : start + step]
            for i, query in enumerate(queries):
                counts = np.bitwise_count(stored & query).sum(axis=1, dtype=np.int64)
                found = len(counts) - 1 - int(counts[::-1].argmax())
                if best[i] < 0 or counts[found] >= overlap[i]:
                    best[i], overlap[i] = start + found, counts[found]
        return best, overlap

    def overlaps(self, masks: Tensor) -> np.ndarray:
        """(B × n) int64, the overlap in bits of each mask (B × D) bool with every stored one."""
        return np.stack(
            [np.bitwise_count(self.packed & query).sum(axis=1, dtype=np.int64) for query in self._pack(masks)]
        )

    def masks(self, rows: np.ndarray) -> Tensor:
        """(n × D) bool, the stored masks of those rows."""
        bits = np.unpackbits(self._words[rows].view(np.uint8), axis=1, count=self.width, bitorder="little")
        return torch.from_numpy(bits.astype(bool))

    def _pack(self, masks: Tensor) -> np.ndarray:
        if masks.shape[-1] != self.width:
            raise ValueError(f"masks have {masks.shape[-1]} bits, expected {self.width}")
        packed = np.packbits(masks.cpu().numpy(), axis=1, bitorder="little")
        padding = self._words.shape[1] * 8 - packed.shape[1]
        return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, padding)))).view(np.uint64)


class Route:
    """What the memory decided for a batch of prompts.

    rows, overlaps  (B,) int64 numpy: the nearest stored edit (-1: none) and R_match, the overlap ratio
    fired           (B,) bool numpy: whether R_match ≥ τ
    masks           (B × D) bool: the columns that a sequence reads
    """

    def __init__(self, rows: np.ndarray, overlaps: np.ndarray, fired: np.ndarray, masks: Tensor):
        self.rows, self.overlaps, self.fired, self.masks = rows, overlaps, fired, masks
        self.where = torch.from_numpy(np.flatnonzero(fired)).to(masks.device)


class ResidualMemory:
    """FFN(a) = W0 a + W_m (M ⊙ a) on sequences whose prompt matches a stored edit (MEMOIR, equations 3 to 7).

    weight       W_m (d × D) float32, zero at first
    permutation  π (D,) int64, fixed; None: identity
    bank         the masks of the edits
    """

    def __init__(
        self,
        site: Site,
        *,
        k: int,
        tau: float,
        feature: str,
        permutation: Tensor | None,
        device: torch.device | str,
        routing: bool = True,
        random: bool = False,
    ):
        self.site, self.k, self.tau, self.feature = site, k, tau, feature
        self.routing, self.random = routing, random
        self.weight = torch.zeros(site.out_features, site.in_features, dtype=torch.float32, device=device)
        self.permutation = None if permutation is None else permutation.to(device)
        self.background: Tensor | None = None
        self.bank = MaskBank(site.in_features)
        self.muted = False

    @contextlib.contextmanager
    def mute(self) -> Iterator[None]:
        """Calls inside see the projection without the memory."""
        before, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = before

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if self.muted or not len(self.bank):
            return y
        if span.decoding:
            route = span.memo.get(self)
            if route is None:
                return y  # nothing was stored when this sequence was prefilled
        else:
            route = span.memo[self] = self.route(self.fingerprint(a, span.prompt))
        return self.forward(a, y, route)

    def fingerprint(self, a: Tensor, prompt: Tensor) -> Tensor:
        """(B × D) bool: the mask of each prompt, from inputs a (B × T × D) and the prompt's tokens (B × T) bool."""
        feature = pool_prompt(a.to(self.weight.device), prompt.to(self.weight.device), self.feature, self.background)
        return random_mask(feature, self.k) if self.random else tophash(feature, self.k, self.permutation)

    def route(self, masks: Tensor) -> Route:
        """R_match = ‖M ∧ M_match‖₁ / k against τ, for masks (B × D) bool; without routing, each its own mask."""
        rows, counts = self.bank.nearest(masks)
        overlaps = counts / self.k
        if not self.routing:
            return Route(rows, overlaps, np.ones(len(masks), dtype=bool), masks)
        fired = (overlaps >= self.tau) & (rows >= 0)
        stored = self.bank.masks(rows).to(masks.device) if len(self.bank) else masks
        return Route(rows, overlaps, fired, stored)

    def forward(self, a: Tensor, y: Tensor, route: Route) -> Tensor:
        """y + W_m (M ⊙ a) where the route fired: a (B × T × D), y = W0 a + b (B × T × d)."""
        if not len(route.where):
            return y
        where = route.where.to(a.device)
        read = self.read(a[where], route.masks[route.where][:, None])
        return y.index_add(0, where, read.to(y.dtype))

    def read(self, a: Tensor, mask: Tensor) -> Tensor:
        """W_m (M ⊙ a) in float32: a (… × D), mask broadcastable to it, bool."""
        return (a.to(self.weight).float() * mask.to(self.weight.device)) @ self.weight.T


def recursive_least_squares(weight: Tensor, inverse: Tensor, keys: Tensor, change: Tensor) -> None:
    """W += Z G, P −= P K G with G = (I + KᵀPK)⁻¹ KᵀP, in place.

    Kept up from edit to edit it is the ridge solution min ‖W K_all − V_all‖² + λ‖W‖² over every key ever written.

    weight   W (d × D)
    inverse  P (D × D) float64, (λI + Σ k kᵀ)⁻¹ over the keys so far
    keys     K (D × n) the new keys
    change   Z (d × n) how far W K is from the new values V: Z = V − W K
    """
    PK = inverse @ keys
    system = torch.eye(keys.shape[1], dtype=inverse.dtype, device=inverse.device) + keys.T @ PK
    G = torch.linalg.solve(system, PK.T)
    weight += (change.to(G.dtype) @ G).to(weight.dtype)
    inverse -= PK @ G


def recursive_downdate(weight: Tensor, inverse: Tensor, keys: Tensor, values: Tensor) -> None:
    """Take keys out again, in place: the ridge solution over the remaining ones. The inverse of the update above.

    H = (I − KᵀPK)⁻¹ KᵀP, W += (W K − V) H, P += P K H.

    weight W (d × D), inverse P (D × D) float64, keys K (D × n), values V (d × n) as they were written.
    """
    PK = inverse @ keys
    system = torch.eye(keys.shape[1], dtype=inverse.dtype, device=inverse.device) - keys.T @ PK
    H = torch.linalg.solve(system, PK.T)
    excess = weight.to(H.dtype) @ keys - values
    weight += (excess @ H).to(weight.dtype)
    inverse += PK @ H
