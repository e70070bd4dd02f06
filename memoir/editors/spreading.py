"""What MEMIT, AlphaEdit and RLSEdit share: a value spread over layers, and what holds earlier edits' keys in place."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from memoir.editors.base import EditError, Written
from memoir.editors.depth import nearest
from memoir.editors.keyvalue import KeyValueEditor, edit_value
from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.sites import Patch, Site


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
        self.kept: dict[Site, Tensor] = {}  # B of the edits so far
        return super().build()

    @abstractmethod
    def update(self, site: Site, residual: Tensor, keys: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """ΔW (d × D) for residuals (d × s) at keys (D × s), and B of all keys so far, if earlier edits are to be held.
        `basis` is B of the earlier ones, see `recursive_least_squares`; None: there are none."""

    def write(self, requests: list[EditRequest]) -> list[Written]:
        rows = self.rows(requests)
        tail, keys = self.observe(rows)
        at = rows.at_bare
        stream = tail.stream[at].float()
        delta, first, last, steps = edit_value(self, requests, tail, rows, stream.norm(dim=1))
        sites = self.sites[-1:] if not tail.composes else self.sites
        kept: dict[Site, Tensor | None] = {}
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
        self.kept |= {site: basis for site, basis in kept.items() if basis is not None}
        return [Written(before, after, steps) for before, after in zip(first, last, strict=True)]

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"kept.{site.layer}": basis for site, basis in self.kept.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        names = {site: f"kept.{site.layer}" for site in self.sites}
        self.kept = {site: tensors[name].to(site.device) for site, name in names.items() if name in tensors}
