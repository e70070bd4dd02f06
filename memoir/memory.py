"""MEMOIR's heart: fingerprints of prompts, the bank that compares them, and the residual memory they select."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

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
    prompt = prompt.to(a.device)
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
    columns = feature.abs().topk(k, dim=-1, sorted=False).indices
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

    # Words compared at a time, 1 MB: a block comes from memory once, and is in cache for all that is asked of it.
    _BLOCK_WORDS = 1 << 17
    # Words from which faiss counts, where it is installed: half a megabyte is scanned before a call to it has paid.
    _FAISS_WORDS = 1 << 16

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        """width: D, bits in a mask; device: where the masks lie and are compared."""
        self.width = width
        self.ids: list[str] = []
        self._words = torch.zeros(0, -(-width // 64), dtype=torch.int64, device=device)
        self._ones = torch.zeros(0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def packed(self) -> np.ndarray:
        """(n × ⌈D/64⌉) uint64, one row per edit."""
        return self._words[: len(self.ids)].cpu().numpy().view(np.uint64)

    def add(self, ids: Sequence[str], masks: Tensor) -> None:
        """Append masks (n × D) bool under the edits' ids."""
        self._append(ids, self._pack(masks))

    def remove(self, edit_id: str) -> None:
        """Forget one edit's mask; KeyError where there is none."""
        if edit_id not in self.ids:
            raise KeyError(f"no mask of edit {edit_id!r} in the bank")
        row, total = self.ids.index(edit_id), len(self.ids)
        for kept in (self._words, self._ones):
            kept[row : total - 1] = kept[row + 1 : total].clone()
        self.ids.pop(row)

    def replace(self, ids: Sequence[str], packed: np.ndarray) -> None:
        """Take over ids and packed masks (n × ⌈D/64⌉) uint64."""
        if packed.shape != (len(ids), self._words.shape[1]):
            raise ValueError(f"packed masks have shape {packed.shape}, expected {(len(ids), self._words.shape[1])}")
        self.ids = []
        self._append(ids, torch.from_numpy(packed.view(np.int64)))

    def nearest(self, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For each mask (B × D) bool: the row of the nearest stored one, and their overlap in bits.

        Rows are -1 and overlaps 0 while the bank is empty.
        """
        queries, total = self._pack(masks), len(self.ids)
        if not total:
            return np.full(len(queries), -1), np.zeros(len(queries), dtype=np.int64)

        def best(start: int, end: int) -> Tensor:
            # Overlap and row as one number: the largest has the largest overlap and, of equals, is the newest.
            rows = torch.arange(start, end, device=queries.device)
            return torch.add(rows, self._shared(queries, start, end), alpha=total).amax(1)

        found = torch.stack(self._by_block(best)).amax(0).cpu().numpy()
        return found % total, found // total

    def overlaps(self, masks: Tensor) -> np.ndarray:
        """(B × n) int64, the overlap in bits of each mask (B × D) bool with every stored one."""
        queries = self._pack(masks)
        none = queries.new_zeros(len(queries), 0)
        blocks = self._by_block(lambda start, end: self._shared(queries, start, end))
        return torch.cat([none, *blocks], dim=1).cpu().numpy()

    def masks(self, rows: np.ndarray) -> Tensor:
        """(n × D) bool, the stored masks of those rows."""
        words = self._words[torch.from_numpy(rows)].cpu().numpy()
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=self.width, bitorder="little")
        return torch.from_numpy(bits.view(bool)).to(self._words.device)

    def _append(self, ids: Sequence[str], rows: Tensor) -> None:
        made, needed = len(self.ids), len(self.ids) + len(rows)
        if needed > len(self._words):
            words, ones = self._words, self._ones
            self._words = words.new_zeros(max(64, needed, 2 * made), words.shape[1])
            self._ones = ones.new_zeros(len(self._words))
            self._words[:made], self._ones[:made] = words[:made], ones[:made]
        self._words[made:needed] = rows
        for some, into in zip(rows.split(1024), self._ones[made:needed].split(1024), strict=True):
            into.copy_(count_bits(some).sum(1))
        self.ids.extend(ids)

    def _shared(self, queries: Tensor, start: int, end: int) -> Tensor:
        """‖M ∧ M'‖₁ (B × m) int64 of packed queries (B × W) int64 with the stored masks from `start` to `end`.

        By what is fastest where the masks lie: on a GPU torch, else faiss for many and NumPy for few.
        """
        stored = self._words[start:end]
        if stored.device.type != "cpu":
            return shared_bits(stored, queries)
        if len(self.ids) * stored.shape[1] >= self._FAISS_WORDS and has_faiss():
            return (self._ones[start:end] + count_bits(queries).sum(1)[:, None] - hamming(stored, queries)) // 2
        stored, queries = stored.numpy().view(np.uint64), queries.numpy().view(np.uint64)
        summing = np.ones(stored.shape[1], dtype=np.float32)  # as a product, exact up to 2²⁴ and faster than a sum
        counts = [np.bitwise_count(stored & query) @ summing for query in queries]
        return torch.from_numpy(np.stack(counts)).long()

    def _by_block(self, work: Callable[[int, int], Tensor]) -> list[Tensor]:
        """work(start, end) for the stored rows, a block at a time.

        On a CPU on as many threads as torch may use; but for faiss, which does not let go of the interpreter.
        """
        step = max(1, self._BLOCK_WORDS // self._words.shape[1])
        blocks = [(start, min(start + step, len(self.ids))) for start in range(0, len(self.ids), step)]
        alone = self._words.device.type != "cpu" or has_faiss()
        threads = 1 if alone else min(torch.get_num_threads(), len(blocks))
        if threads <= 1:
            return [work(*block) for block in blocks]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda block: work(*block), blocks))

    def _pack(self, masks: Tensor) -> Tensor:
        """(n × ⌈D/64⌉) int64 on the bank's device."""
        if masks.shape[-1] != self.width:
            raise ValueError(f"masks have {masks.shape[-1]} bits, expected {self.width}")
        packed = np.packbits(masks.cpu().numpy(), axis=1, bitorder="little")
        padded = np.zeros((len(packed), 8 * self._words.shape[1]), dtype=np.uint8)
        padded[:, : packed.shape[1]] = packed
        return torch.from_numpy(padded.view(np.int64)).to(self._words.device)


def count_bits(words: Tensor) -> Tensor:
    """Ones in each int64 of a tensor, int64 of its shape: sums of neighbouring bits, pairs, nibbles, then bytes."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    return (words + (words >> 4) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101 >> 56


def shared_bits(stored: Tensor, queries: Tensor) -> Tensor:
    """‖M ∧ M'‖₁ (B × n) int64 of packed masks in torch alone: stored (n × W) int64, queries (B × W) int64."""
    return torch.stack([count_bits(stored & query).sum(1) for query in queries])


@functools.cache
def has_faiss() -> bool:
    """Whether the extra "search" is installed."""
    return importlib.util.find_spec("faiss") is not None


def hamming(stored: Tensor, queries: Tensor) -> Tensor:
    """d_H (B × n) int32 of packed masks by faiss: stored (n × W) int64, queries (B × W) int64, contiguous, on a CPU."""
    import faiss  # only now: it brings a mathematical library of its own

    distances = np.empty((len(queries), len(stored)), dtype=np.int32)
    first, second = (faiss.swig_ptr(words.numpy().view(np.uint8)) for words in (queries, stored))
    faiss.hammings(first, second, len(queries), len(stored), 8 * stored.shape[1], faiss.swig_ptr(distances))
    return torch.from_numpy(distances)


class Route:
    """What the memory decided for a batch of prompts.

    rows, overlaps  (B,) int64 numpy: the nearest stored edit (-1: none) and R_match, the overlap ratio
    fired           (B,) bool numpy: whether R_match ≥ τ
    masks           (B × D) bool: the columns that a sequence reads
    pages           (B,) int64 numpy: the page of W_m that a sequence reads
    """

    def __init__(self, rows: np.ndarray, overlaps: np.ndarray, fired: np.ndarray, masks: Tensor, pages: np.ndarray):
        self.rows, self.overlaps, self.fired, self.masks, self.pages = rows, overlaps, fired, masks, pages

    @functools.cached_property
    def readers(self) -> list[tuple[int, Tensor]]:
        """Each page that is read, with the sequences that read it, (n,) int64."""
        read = [(int(page), np.flatnonzero(self.fired & (self.pages == page))) for page in np.unique(self.pages)]
        return [(page, torch.from_numpy(rows).to(self.masks.device)) for page, rows in read if len(rows)]

    @functools.cached_property
    def columns(self) -> dict[int, Tensor]:
        """For each sequence that fired, the columns it reads, (k,) int64."""
        return {int(row): self.masks[row].nonzero()[:, 0] for row in np.flatnonzero(self.fired)}


class ResidualMemory:
    """FFN(a) = W0 a + W_m (M ⊙ a) on sequences whose prompt matches a stored edit (MEMOIR, equations 3 to 7).

    A memory of D columns holds no more than D independent keys. As a query reads only what its match wrote, a full W_m
    can be left as it is and a further one begun: a page. The paper has one.

    pages        W_m (d × D) float32 each, zero at first; the last is written
    page_of      by edit, the page it was written on; the first where it names none
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
        self.device = torch.device(device)
        self.pages: list[Tensor] = []
        self.page_of: dict[str, int] = {}
        self.turn_page()
        self.permutation = None if permutation is None else permutation.to(device)
        self.background: Tensor | None = None
        self.bank = MaskBank(site.in_features, device)
        self.muted = False

    @property
    def weight(self) -> Tensor:
        """W_m (d × D) of the page that is written."""
        return self.pages[-1]

    @property
    def last(self) -> int:
        """The page that is written."""
        return len(self.pages) - 1

    def turn_page(self) -> None:
        """Begin a further page."""
        site = self.site
        # A column of W_m lies in one piece: masks pick columns.
        self.pages.append(torch.zeros(site.in_features, site.out_features, device=self.device).T)

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
        feature = pool_prompt(a.to(self.device), prompt.to(self.device), self.feature, self.background)
        return random_mask(feature, self.k) if self.random else tophash(feature, self.k, self.permutation)

    def route(self, masks: Tensor) -> Route:
        """R_match = ‖M ∧ M_match‖₁ / k against τ, for masks (B × D) bool; without routing, each its own mask."""
        rows, counts = self.bank.nearest(masks)
        overlaps = counts / self.k
        pages = np.zeros(len(rows), dtype=np.int64)
        if not self.routing:
            return Route(rows, overlaps, np.ones(len(masks), dtype=bool), masks, pages)
        fired = (overlaps >= self.tau) & (rows >= 0)
        if len(self.bank):
            masks = self.bank.masks(rows).to(masks.device)
            pages[:] = [self.page_of.get(self.bank.ids[row], 0) for row in rows]
        return Route(rows, overlaps, fired, masks, pages)

    def forward(self, a: Tensor, y: Tensor, route: Route) -> Tensor:
        """y + W_m (M ⊙ a) where the route fired: a (B × T × D), y = W0 a + b (B × T × d)."""
        for page, rows in route.readers:
            if self.device.type == "cpu":
                # Of W_m only the mask's columns are touched: k/D of the arithmetic, and of the bytes.
                read = torch.stack([self._read_columns(a[i], route.columns[i], page) for i in rows.tolist()])
            else:
                read = self.read(a[rows.to(a.device)], route.masks[rows][:, None], page)
            y = y.index_add(0, rows.to(y.device), read.to(y))
        return y

    def read(self, a: Tensor, mask: Tensor, page: int = -1) -> Tensor:
        """W_m (M ⊙ a) in float32 from one page: a (… × D), mask broadcastable to it, bool."""
        return (a.to(self.device).float() * mask.to(self.device)) @ self.pages[page].T

    def _read_columns(self, a: Tensor, columns: Tensor, page: int) -> Tensor:
        """The same for one sequence a (T × D) and the columns of its mask (k,), (T × d) float32."""
        return a[:, columns].to(self.pages[page]) @ self.pages[page].T.index_select(0, columns)


def gain(inverse: Tensor, keys: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
    """P K (D × n) and G = (I ± KᵀPK)⁻¹ KᵀP (n × D), with which P becomes P ∓ P K G once keys K (D × n) are among those
    that P (D × D) is the regularised inverse of (sign 1), or no longer are (sign −1) (Woodbury)."""
    PK = (keys.T @ inverse).T  # P is symmetric, and tall thin products are slow
    system = torch.eye(keys.shape[1], dtype=inverse.dtype, device=inverse.device) + sign * (keys.T @ PK)
    return PK, torch.linalg.solve(system, PK.T)


def recursive_least_squares(weight: Tensor, inverse: Tensor, keys: Tensor, change: Tensor) -> None:
    """W += Z G, P −= P K G with the `gain` G, in place.

    Kept up from edit to edit it is the ridge solution min ‖W K_all − V_all‖² + λ‖W‖² over every key ever written.

    weight   W (d × D)
    inverse  P (D × D) float64, (λI + Σ k kᵀ)⁻¹ over the keys so far
    keys     K (D × n) the new keys
    change   Z (d × n) how far W K is from the new values V: Z = V − W K
    """
    PK, G = gain(inverse, keys)
    weight += (change.to(G.dtype) @ G).to(weight.dtype)
    inverse.addmm_(PK, G, alpha=-1)  # in place: D × D is large


def recursive_downdate(weight: Tensor, inverse: Tensor, keys: Tensor, values: Tensor) -> None:
    """Take keys out again, in place: the ridge solution over the remaining ones. The inverse of the update above.

    W += (W K − V) H, P += P K H with H the `gain` of taking keys out.

    weight W (d × D), inverse P (D × D) float64, keys K (D × n), values V (d × n) as they were written.
    """
    PK, H = gain(inverse, keys, sign=-1)
    excess = weight.to(H.dtype) @ keys - values
    weight += (excess @ H).to(weight.dtype)
    inverse.addmm_(PK, H)
