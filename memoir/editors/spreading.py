"""What MEMIT, AlphaEdit and RLSEdit share: a value spread over layers, and the keys of earlier edits held in place."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from memoir.editors.base import EditError, Written
from memoir.editors.depth import nearest
from memoir.editors.keyvalue import KeyValueEditor, edit_value
from memoir.memory import gain
from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.sites import Patch, Site


@dataclass(frozen=True)
class Keys:
    """The keys written so far, as a method transforms them, and a factor of their Gram matrix.

    A new edit needs only the rows of its own n keys in (H Hᵀ + μI)⁻¹ H, which equal those of H (HᵀH + μI)⁻¹. The
    first form solves a system as large as the number of keys, the second one of the fixed size D. So few keys are kept
    with a Cholesky factor of the first, and many with the inverse of the second.

    H        (m × D) float64, one transformed key per row: all keys, or beside an inverse the newest
    factor   (m × m) float64, lower Cholesky factor of H Hᵀ + μI; None beside an inverse
    inverse  (D × D) float64, (HᵀH + μI)⁻¹ over all keys, once they number more than D / 2; None before
    """

    H: Tensor
    factor: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, new: Tensor, mu: float, earlier: Keys | None = None) -> Keys:
        """The earlier keys followed by the new ones (n × D)."""
        new = new.double()
        n, D = new.shape
        if earlier is not None and (earlier.inverse is not None or len(earlier.H) + n > D // 2):
            inverse = earlier.inverse
            if inverse is None:
                gram = earlier.H.T @ earlier.H
                gram.diagonal().add_(mu)
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            PK, G = gain(inverse, new.T)
            return cls(new, inverse=torch.addmm(inverse, PK, G, alpha=-1))
        corner = new @ new.T
        corner.diagonal().add_(mu)
        if earlier is None:
            return cls(new, torch.linalg.cholesky(corner))
        m = len(earlier.H)
        border = torch.linalg.solve_triangular(earlier.factor, earlier.H @ new.T, upper=False).T
        factor = corner.new_zeros(m + n, m + n)
        factor[:m, :m], factor[m:, :m] = earlier.factor, border
        factor[m:, m:] = torch.linalg.cholesky(corner - border @ border.T)
        return cls(torch.cat([earlier.H, new]), factor)

    def newest(self, n: int) -> Tensor:
        """(n × D), the rows of the newest n keys: an edit's residuals (d × n) times these is its update."""
        if self.inverse is not None:
            return (self.inverse @ self.H[-n:].T).T
        unit = self.H.new_zeros(len(self.H), n)
        unit[-n:].fill_diagonal_(1.0)
        half = torch.linalg.solve_triangular(self.factor, unit, upper=False)
        return torch.linalg.solve_triangular(self.factor.T, half, upper=True).T @ self.H


class SpreadingEditor(KeyValueEditor):
    """Spreads every value over several layers, as MEMIT does and AlphaEdit after it (MEMIT, section 4.3, algorithm 1).

    The stream after the last edited block is to become z = h + δ. From the first layer on, each one writes its share of
    the difference that is left, r^l = (z − h) / (L − l + 1), and then h is measured again. In families whose blocks
    change the MLP's output before they add it, that share would not arrive, so only the last layer is written.

    A method defines `update`.
    """

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        blocks = len(model.blocks)  # blocks 4 to 8 of 32, as published
        published = range(blocks * 4 // 32, blocks * 8 // 32 + 1)
        return dict(
            layers=tuple(layer for layer in published if layer in model.dense) or (nearest(model.dense, published[0]),)
        )

    def build(self) -> dict[Site, Patch]:
        self.kept: dict[Site, Keys] = {}  # the keys that `update` returned for the edits so far
        return super().build()

    @abstractmethod
    def update(self, site: Site, residual: Tensor, keys: Tensor, earlier: Keys | None) -> tuple[Tensor, Keys | None]:
        """ΔW (d × D) for residuals (d × s) at keys (D × s), and the keys that later edits are to see, or None."""

    def write(self, requests: list[EditRequest]) -> list[Written]:
        rows = self.rows(requests)
        tail, keys = self.observe(rows)
        at = rows.at_bare
        stream = tail.stream[at].float()
        delta, first, last, steps = edit_value(self, requests, tail, rows, stream.norm(dim=1))
        sites = self.sites[-1:] if not tail.composes else self.sites
        kept: dict[Site, Keys | None] = {}
        with self.all_or_nothing():
            for i, site in enumerate(sites):
                if i:
                    self.check_cancelled()
                    tail, keys = self.observe(rows)
                missing = stream + delta - tail.stream[at].float()
                residual = (missing / (len(sites) - i)).T.to(site.device)
                try:
                    update, kept[site] = self.update(site, residual, keys[site].T, self.kept.get(site))
                except torch.linalg.LinAlgError as error:
                    raise EditError(f"{self.name}: the update of {site.name} cannot be solved: {error}") from None
                self.add(site, update)
        self.kept |= {site: keys for site, keys in kept.items() if keys is not None}
        return [Written(before, after, steps) for before, after in zip(first, last, strict=True)]

    def state(self) -> dict[str, Tensor]:
        tensors = super().state()
        for site, keys in self.kept.items():
            parts = {f"kept.{site.layer}.{part}": tensor for part, tensor in vars(keys).items()}
            tensors |= {name: tensor for name, tensor in parts.items() if tensor is not None}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        self.kept = {}
        for site in self.sites:
            names = {part.name: f"kept.{site.layer}.{part.name}" for part in fields(Keys)}
            parts = {part: tensors[name].to(site.device) for part, name in names.items() if name in tensors}
            if parts:
                self.kept[site] = Keys(**parts)
