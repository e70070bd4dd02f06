"""MEMOIR's heart: fingerprints of prompts, and the residual memory that they select."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor

from memoir import kernels
from memoir.bank import make_bank
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
        if a.device.type == "cpu":
            return torch.from_numpy(kernels.last(_floats(a), prompt.contiguous().numpy()))
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
    if feature.device.type == "cpu":
        return torch.from_numpy(kernels.largest(_floats(feature), k, _places(permutation, feature.shape[-1])))
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


@dataclass(eq=False)
class Route:
    """What the memory decided for a batch of prompts.

    decisions  (B × (3 + k)) int64 on the CPU, of each sequence what the properties below say; without columns where
               none reads any
    k          columns in a mask
    pages      the pages of W_m that are read
    gates      by page, once they were asked for, which sequences read it, (r,) int64 or all (...), and their masks
               (r × 1 × D) bool, both where W_m is
    """

    decisions: Tensor
    k: int
    pages: tuple[int, ...]
    gates: dict[int, tuple[Tensor | EllipsisType, Tensor]] | None = None

    @property
    def rows(self) -> np.ndarray:
        """(B,) int64, the nearest stored edit of each; -1: none."""
        return self.decisions[:, kernels.ROW].numpy()

    @property
    def shared(self) -> np.ndarray:
        """(B,) int64, how many columns their masks share."""
        return self.decisions[:, kernels.SHARED].numpy()

    @property
    def page(self) -> np.ndarray:
        """(B,) int64, the page of W_m that each reads; -1: none."""
        return self.decisions[:, kernels.PAGE].numpy()

    @property
    def columns(self) -> np.ndarray:
        """(B × k) int64, those of W_m that a sequence reads, if it does."""
        return self.decisions[:, kernels.COLUMNS :].numpy()

    @property
    def overlaps(self) -> np.ndarray:
        """(B,) R_match, the overlap ratios."""
        return self.shared / self.k

    @property
    def fired(self) -> np.ndarray:
        """(B,) bool, whether a sequence reads the memory: R_match ≥ τ."""
        return self.page >= 0


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
        approximate: bool = False,
    ):
        if not 0 < k <= site.in_features:
            raise ValueError(f"k = {k}, expected 1 to the {site.in_features} columns of {site.name}")
        self.site, self.k, self.tau, self.feature = site, k, tau, feature
        self.routing, self.random = routing, random
        self.device = torch.device(device)
        self.pages: list[Tensor] = []
        self.page_of: dict[str, int] = {}
        self.turn_page()
        self.permutation = None if permutation is None else permutation.to(device)
        self._on_cpu = self.device.type == "cpu"
        # At hand for questions on a CPU: where π puts each column, and of fewer than how many tokens they are asked in
        # one call.
        at_once = self._on_cpu and feature == "last" and routing and not random
        self._places = _places(self.permutation, site.in_features) if at_once else None
        self._few = kernels.FEW_PRODUCTS // (k * site.out_features) if at_once else 0
        self.background: Tensor | None = None
        self.bank = make_bank(site.in_features, device, approximate=approximate)
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
        if self.muted or not self.bank.ids:
            return y
        if span.decoding:
            route = span.memo.get(self)
            return y if route is None else self.forward(a, y, route)  # None: nothing was stored at the prefill
        span.memo[self], found = self._ask(a, y, span.prompt)
        return found

    def fingerprint(self, a: Tensor, prompt: Tensor) -> Tensor:
        """(B × D) bool: the mask of each prompt, from inputs a (B × T × D) and the prompt's tokens (B × T) bool."""
        feature = pool_prompt(a.to(self.device), prompt, self.feature, self.background)
        return random_mask(feature, self.k) if self.random else tophash(feature, self.k, self.permutation)

    def _ask(self, a: Tensor, y: Tensor, prompt: Tensor) -> tuple[Route, Tensor]:
        """The `route` of the prompts' masks, some edit being stored, and what `forward` makes of y along it. On a CPU
        the usual settings find both in one compiled call."""
        few = prompt.numel() < self._few and len(self.bank.ids) <= self.bank.block and len(self.pages) == 1
        plain = a.dtype is y.dtype is torch.float32 and not (a.requires_grad or y.requires_grad)
        if not (few and plain):
            route = self.route(self.fingerprint(a, prompt))
            return route, self.forward(a, y, route)
        a, prompt, found = a.contiguous(), prompt.cpu().contiguous(), _copied(y)
        asked = a, prompt, self.k, self._places, self.bank.packed, float(self.tau), found, self.pages[0]
        decisions, reading = kernels.ask(*asked)
        return Route(decisions, self.k, (0,) if reading else ()), found if reading else y

    def route(self, masks: Tensor) -> Route:
        """R_match = ‖M ∧ M_match‖₁ / k against τ, for masks (B × D) bool; without routing, each its own mask."""
        rows, shared = self.bank.nearest(masks)
        if not self.routing:
            pages, columns = np.zeros_like(rows), masks.cpu().nonzero()[:, 1].view(len(masks), -1).numpy()
        else:
            fired, pages = (shared / self.k >= self.tau) & (rows >= 0), np.full(len(rows), -1)
            pages[fired] = [self.page_of.get(self.bank.ids[row], 0) for row in rows[fired]]
            columns = self.bank.columns(rows, self.k) if fired.any() else np.empty((len(rows), 0), dtype=np.int64)
        decisions = torch.from_numpy(np.column_stack((rows, shared, pages, columns)))
        return Route(decisions, self.k, tuple(sorted({*pages.tolist()} - {-1})))

    def forward(self, a: Tensor, y: Tensor, route: Route) -> Tensor:
        """y + W_m (M ⊙ a) where the route fired: a (B × T × D), y = W0 a + b (B × T × d)."""
        if not route.pages:
            return y
        if not self._on_cpu or a.requires_grad or y.requires_grad:
            for page, (rows, masks) in self._gates(route).items():
                read = self.read(a[rows], masks, page).to(y)
                y = y + read if rows is ... else y.index_add(0, rows, read)
            return y
        # Nothing else of W_m is touched than the columns that are read: k/D of the arithmetic, and of the bytes.
        whole, a = y.dtype == torch.float32, a.float().contiguous()
        found = _copied(y) if whole else torch.zeros(y.shape)
        for page in route.pages:
            kernels.add(found, a, route.decisions, page, self.pages[page])
        return found if whole else (y + found).to(y.dtype)

    def _gates(self, route: Route) -> dict[int, tuple[Tensor | EllipsisType, Tensor]]:
        """`Route.gates`, found once: decoding steps go on with them, as what a GPU is handed makes the host wait."""
        if route.gates is None:
            route.gates = {}
            for page in route.pages:
                rows = np.flatnonzero(route.page == page)
                masks = torch.zeros(len(rows), 1, self.bank.width, dtype=torch.bool)
                masks.scatter_(2, torch.from_numpy(route.columns[rows])[:, None], True)
                some = ... if len(rows) == len(route.decisions) else torch.from_numpy(rows).to(self.device)
                route.gates[page] = some, masks.to(self.device)
        return route.gates

    def read(self, a: Tensor, mask: Tensor, page: int = -1) -> Tensor:
        """W_m (M ⊙ a) in float32 from one page: a (… × D), mask broadcastable to it, bool."""
        return (a.to(self.device).float() * mask.to(self.device)) @ self.pages[page].T

    def product(self, keys: Tensor, columns: Tensor) -> Tensor:
        """(n × d) W_m A of the page that is written, for keys A (n × c) in some columns (c,) int64."""
        if self._in_one_call(keys):
            return kernels.product(keys, columns, self.weight)
        return keys @ self.weight.T.index_select(0, columns)

    def update(self, columns: Tensor, keys: Tensor, G: Tensor) -> None:
        """W_m += Gᵀ A, in place: keys A (n × c) in some columns (c,) int64, G (n × d)."""
        if self._in_one_call(keys):
            kernels.update(self.weight, columns, keys, G)
        else:
            self.weight.T.index_add_(0, columns, keys.T @ G)

    def _in_one_call(self, keys: Tensor) -> bool:
        """Whether keys (n × c) meet W_m on one thread of a CPU."""
        return self._on_cpu and keys.numel() * self.site.out_features < kernels.FEW_PRODUCTS


def _places(permutation: Tensor | None, width: int) -> np.ndarray:
    """(D,) int64: where π puts each of the D columns."""
    return np.arange(width) if permutation is None else permutation.numpy()


def _copied(tensor: Tensor) -> Tensor:
    """A copy in one piece, to be changed."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _floats(tensor: Tensor) -> np.ndarray:
    """A tensor on the CPU as contiguous float32, without a copy where it is that already."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        tensor = tensor.float().contiguous()
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()


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
