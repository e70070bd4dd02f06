"""The heart of MEMOIR: the masks of prompts, and the residual memory whose columns they select."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memoir.bank import MaskBank
from memoir.sites import Site, Span

FEATURES = ("mean", "mean_centred", "last")


def pool_prompt(a: Tensor, prompt: Tensor, feature: str, background: Tensor | None = None) -> Tensor:
    """Prompt feature ā(x), optionally centred on irrelevant prompts (MEMOIR, section 3.2).

    a           (B × T × D) inputs of the edited projection
    prompt      (B × T) bool, the prompt's tokens: neither padding nor answer
    feature     "mean": over the prompt's tokens; "mean_centred": the mean minus `background`; "last": the last token
    background  (D,) mean of the mean features of irrelevant prompts, for "mean_centred"
    returns     (B × D) float32
    """
    if feature not in FEATURES:
        raise ValueError(f"feature {feature!r} is unknown; expected one of {', '.join(FEATURES)}")
    prompt = prompt.to(a.device)
    if feature == "last":
        positions = torch.arange(prompt.shape[1], device=prompt.device)
        last = (prompt * positions).amax(dim=1)
        return a[torch.arange(len(a), device=a.device), last].float()
    weights = prompt.to(torch.float32)
    pooled = torch.einsum("bt,btd->bd", weights, a.float()) / weights.sum(1, keepdim=True)
    if feature == "mean":
        return pooled
    if background is None:
        raise ValueError("feature 'mean_centred' needs the mean feature of background prompts")
    return pooled - background


def tophash(feature: Tensor, k: int, permutation: Tensor | None = None) -> Tensor:
    """M(a) = π(T(a)), T(a)_j = 1[|a_j| is among the k largest] (MEMOIR, TopHash). Of equal entries the first are taken.

    feature (B × D) float; permutation (D,) int64 or None for the identity; returns (B × D) bool with k ones a row.
    """
    if not 0 < k <= feature.shape[-1]:
        raise ValueError(f"k = {k} columns, expected 1 to {feature.shape[-1]}")
    size = feature.abs()
    least = size.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    larger, equal = size > least, size == least
    mask = larger | (equal & (equal.cumsum(-1) <= k - larger.sum(-1, keepdim=True)))
    if permutation is None:
        return mask
    permuted = torch.empty_like(mask)
    permuted[..., permutation] = mask
    return permuted


def random_mask(feature: Tensor, k: int) -> Tensor:
    """The ablation's mask (B × D) bool: k random columns for every prompt's feature (B × D), the same whenever the same
    prompt is asked. The 16 largest entries seed the draw."""
    strongest = feature.abs().topk(min(16, feature.shape[-1]), dim=-1).indices.sort(dim=-1).values.cpu()
    mask = torch.zeros(feature.shape, dtype=torch.bool)
    for row, seeds in zip(mask, strongest.numpy(), strict=True):
        row[torch.from_numpy(np.random.default_rng(seeds).permutation(len(row))[:k].copy())] = True
    return mask.to(feature.device)


@dataclass(frozen=True, eq=False)
class TokenMasks:
    """The masks of some prompts' tokens."""

    masks: Tensor  # (m × D′) bool
    owner: np.ndarray  # (m,) int64, ascending: the prompt of each token


@dataclass(frozen=True, eq=False)
class Features:
    """The features of n prompts."""

    pooled: Tensor  # (n × D) float32
    tokens: TokenMasks | None = None  # where subjects count


class Subjects:
    """Beyond the paper: an early block tells subjects apart where a prompt's own feature sees little but its template.

    Beside its prompt's mask an edit has a mask of its subject's last token: the `bits` largest inputs of an early
    block's projection there. A query has such a mask for each of its tokens, and the one that is nearest counts. No
    further pass is needed: as a patch this changes nothing, it keeps the inputs until the memory asks for them.
    """

    def __init__(self, site: Site, bits: int):
        self.site, self.bits = site, min(bits, site.in_features)
        self.name = f"{self.bits} of {site.name}"

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if not span.decoding:
            span.memo[self] = a
        return y

    def masks(self, a: Tensor, prompt: Tensor) -> TokenMasks:
        """The masks of the prompts' tokens (B × T) bool, from inputs a (B × T × D′)."""
        at = prompt.to(a.device)
        return TokenMasks(tophash(a[at].float(), self.bits), at.nonzero()[:, 0].cpu().numpy())


def nearest(bank: MaskBank, masks: Tensor, tokens: TokenMasks | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For each of B prompts, masks (B × D) bool: the row of the nearest stored edit and the bits that both have, (B,).

    tokens  where subjects count: a prompt's mask is joined with that of each of its tokens, and the best of them counts
    """
    if tokens is None:
        return bank.nearest(masks)
    owner = tokens.owner
    rows, shared = bank.nearest(torch.cat([masks[owner], tokens.masks.to(masks.device)], dim=1))
    order = np.lexsort((rows, shared, owner))
    best = order[np.flatnonzero(np.diff(owner[order], append=-1))]
    return rows[best], shared[best]


@dataclass(frozen=True, eq=False)
class Route:
    """What the memory decided for a batch of B prompts."""

    rows: np.ndarray  # (B,) int64, the nearest stored edit; -1: none
    overlaps: np.ndarray  # (B,) R_match, the overlap ratio with it
    pages: np.ndarray  # (B,) int64, the page of W_m that is read; -1: none
    readers: dict[int, tuple[Tensor, Tensor]]  # by page: who reads it, (r,) int64, and which columns, (r × 1 × D) bool

    @property
    def fired(self) -> np.ndarray:
        """(B,) bool, whether a prompt reads the memory: R_match ≥ τ."""
        return self.pages >= 0


class ResidualMemory:
    """FFN(a) = W0 a + W_m (M ⊙ a) for sequences whose prompt matches a stored edit (MEMOIR, equations 3 to 7).

    A memory of D columns holds at most D independent keys. A query reads only what its match wrote, so a full W_m can
    be closed and a further one begun: a page. The paper has one page.

    pages        W_m (d × D) float32 each, zero at first; edits are written to the last
    page_of      by edit, the page that it was written to
    permutation  π (D,) int64, fixed; None: identity
    bank         the masks of the edits, each followed by that of its subject where there are `subjects`
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
        subjects: Subjects | None = None,
    ):
        if not 0 < k <= site.in_features:
            raise ValueError(f"k = {k}, expected 1 to the {site.in_features} columns of {site.name}")
        self.site, self.k, self.tau, self.feature = site, k, tau, feature
        self.routing, self.random, self.subjects = routing, random, subjects
        self.device = torch.device(device)
        self.pages: list[Tensor] = []
        self.page_of: dict[str, int] = {}
        self.turn_page()
        self.permutation = None if permutation is None else permutation.to(device)
        self.background: Tensor | None = None
        self.bank = MaskBank(site.in_features + (subjects.site.in_features if subjects else 0), device)

    @property
    def bits(self) -> int:
        """Ones in a stored mask: k, and those of the subject."""
        return self.k + (self.subjects.bits if self.subjects else 0)

    @property
    def weight(self) -> Tensor:
        """W_m (d × D) of the page that is written."""
        return self.pages[-1]

    @property
    def last(self) -> int:
        """The number of the page that is written."""
        return len(self.pages) - 1

    def turn_page(self) -> None:
        """Begin a further page."""
        # Transposed, because masks select columns: each column is contiguous.
        self.pages.append(torch.zeros(self.site.in_features, self.site.out_features, device=self.device).T)

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if not len(self.bank):
            return y
        if not span.decoding:
            tokens = self.tokens(span.memo.pop(self.subjects), span.prompt) if self.subjects else None
            span.memo[self] = self.route(self.fingerprint(a, span.prompt), tokens)
        route = span.memo.get(self)
        return y if route is None else self.forward(a, y, route)  # None: nothing was stored at the prefill

    def fingerprint(self, a: Tensor, prompt: Tensor) -> Tensor:
        """(B × D) bool, the mask of each prompt, from inputs a (B × T × D) and the prompt's tokens (B × T) bool."""
        return self.hashed(pool_prompt(a.to(self.device), prompt, self.feature, self.background))

    def tokens(self, early: Tensor, prompt: Tensor) -> TokenMasks:
        """`Subjects.masks` on this memory's device."""
        return self.subjects.masks(early.to(self.device), prompt)

    def hashed(self, feature: Tensor) -> Tensor:
        """(n × D) bool, the masks of prompt features (n × D)."""
        return random_mask(feature, self.k) if self.random else tophash(feature, self.k, self.permutation)

    def columns(self, rows: np.ndarray) -> Tensor:
        """(n × D) bool, the columns that some stored edits, by their rows in the bank, are written to."""
        return self.bank.masks(rows)[:, : self.site.in_features]

    def nearest(self, masks: Tensor, tokens: TokenMasks | None = None) -> tuple[np.ndarray, np.ndarray]:
        """For masks (B × D) bool: the row of the nearest stored edit, -1 without one, and the overlap ratio, (B,)."""
        rows, shared = nearest(self.bank, masks, tokens)
        return rows, shared / self.bits

    def route(self, masks: Tensor, tokens: TokenMasks | None = None) -> Route:
        """R_match = ‖M ∧ M_match‖₁ / k against τ, for masks (B × D) bool. Without routing, each prompt reads by its own
        mask."""
        rows, overlaps = self.nearest(masks, tokens)
        pages, readers = np.zeros_like(rows), {}
        if self.routing:
            fired = (overlaps >= self.tau) & (rows >= 0)
            pages[~fired] = -1
            pages[fired] = [self.page_of.get(self.bank.ids[row], 0) for row in rows[fired]]
        for page in sorted({*pages.tolist()} - {-1}):
            reading = np.flatnonzero(pages == page)
            columns = self.columns(rows[reading]) if self.routing else masks[reading]
            readers[page] = torch.from_numpy(reading).to(self.device), columns.to(self.device)[:, None]
        return Route(rows, overlaps, pages, readers)

    def forward(self, a: Tensor, y: Tensor, route: Route) -> Tensor:
        """y + W_m (M ⊙ a) for the sequences that read: a (B × T × D), y = W0 a + b (B × T × d).

        The sum is taken in float32 and rounded once, to y's type.
        """
        for page, (rows, masks) in route.readers.items():
            summed = y[rows].float() + self.read(a[rows], masks, page).to(y.device)
            y = y.index_copy(0, rows, summed.to(y.dtype))
        return y

    def read(self, a: Tensor, mask: Tensor, page: int = -1) -> Tensor:
        """W_m (M ⊙ a) in float32 from one page: a (… × D), mask broadcastable to it, bool."""
        return (a.to(self.device).float() * mask.to(self.device)) @ self.pages[page].T


def recursive_least_squares(keys: Tensor, ridge: float, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """G = (I + K P Kᵀ)⁻¹ K P for new keys, and B with these keys added.

    After W += Zᵀ G, with Z = V − K Wᵀ the change that the new values V ask for, W is the ridge solution
    min ‖K_all Wᵀ − V_all‖² + λ‖W‖² over every key ever written. P = (λI + Σ k kᵀ)⁻¹ over the keys so far is kept as
    (I − BᵀB) / λ, which takes as much room as the keys.

    keys     K (n × D)
    ridge    λ > 0
    basis    B (m × D) float64, a row for each key so far; None: these are the first
    returns  G (n × D) and B, float64
    """
    K = keys.double()
    if basis is None:
        basis = K.new_zeros(0, K.shape[1])
    elif len(basis) > 1.25 * K.shape[1]:  # more rows than columns say nothing more; the slack makes this rare
        basis = torch.linalg.qr(basis, mode="r").R  # of the same BᵀB
    free = K - (K @ basis.T) @ basis  # λ K P
    system = free @ K.T
    system.diagonal().add_(ridge)
    root = torch.linalg.cholesky(system)
    half = torch.linalg.solve_triangular(root, free, upper=False)
    return torch.linalg.solve_triangular(root.T, half, upper=True), torch.cat([basis, half])
