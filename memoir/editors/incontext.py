"""In-context retrieval: the matching edit is put in front of the prompt, and no weight changes. A baseline: what is
possible without editing (compare IKE, Zheng et al., EMNLP 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from memoir.bank import MaskBank
from memoir.editors.base import Editor, Written
from memoir.editors.config import Count, EditorConfig, Layer, Share
from memoir.editors.depth import layer_at
from memoir.memory import pool_prompt, tophash
from memoir.models import LanguageModel
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site


class InContext(Editor):
    """Retrieves edits by the masks that MEMOIR routes with; asks "edit prompt, new answer, line break, prompt"."""

    name: ClassVar[str] = "incontext"
    colour: ClassVar[str] = "#000000"
    marker: ClassVar[str] = "h"
    changes_model: ClassVar[bool] = False
    can_forget: ClassVar[bool] = True
    routes: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: Layer  # block whose down-projection's input makes the mask
        k: Count  # columns in a mask, 1…D
        tau: Share = 0.7  # least overlap ratio that retrieves

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        return dict(layer=layer_at(model, 27 / 31), k=max(1, model.site(model.dense[0]).in_features * 2 // 7))

    def build(self) -> dict[Site, Patch]:
        self.site = self.model.site(self.config.layer)
        self.bank = MaskBank(self.site.in_features)
        return {}

    def write(self, requests: list[EditRequest]) -> list[Written]:
        before = self.losses(requests)
        last = {request.id: request for request in requests}  # of one id twice, the later edit holds
        masks = self._masks([request.prompt for request in last.values()])
        for edit_id in last.keys() & set(self.bank.ids):
            self.bank.remove(edit_id)
        self.bank.add(list(last), masks)
        return [Written(loss, loss, 0) for loss in before]

    def forget(self, edit_id: str) -> None:
        self.bank.remove(edit_id)
        del self.edits[edit_id]

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt after the edit that it retrieves, or unchanged."""
        retrieved = [self.edits[edit_id] if edit_id else None for edit_id in self.matches(prompts)]
        return [
            f"{edit.prompt} {edit.target}\n{prompt}" if edit else prompt
            for edit, prompt in zip(retrieved, prompts, strict=True)
        ]

    def lookup(self, prompts: Sequence[str]) -> list[Explanation]:
        tau = self.config.tau
        if not len(self.bank):
            return [Explanation(threshold=tau)] * len(prompts)
        rows, shared = self.bank.nearest(self._masks(prompts))
        found = zip((self.bank.ids[row] for row in rows), (shared / self.config.k).tolist(), strict=True)
        return [Explanation(edit_id=i, score=overlap, threshold=tau, fired=overlap >= tau) for i, overlap in found]

    @property
    def tau(self) -> float:
        return self.config.tau

    @torch.no_grad()
    def _masks(self, prompts: Sequence[str]) -> Tensor:
        """(n × D) bool, the masks of bare prompts."""
        masks = torch.zeros(len(prompts), self.site.in_features, dtype=torch.bool)
        with self.detached():
            for rows, a, prompt in self.model.site_inputs(self.site, prompts):
                masks[rows] = tophash(pool_prompt(a, prompt, "last"), self.config.k).cpu()
        return masks

    def state(self) -> dict[str, Tensor]:
        place = {edit_id: i for i, edit_id in enumerate(self.edits)}
        return {
            "masks": torch.from_numpy(self.bank.packed.view(np.int64).copy()),
            "order": torch.tensor([place[edit_id] for edit_id in self.bank.ids], dtype=torch.int64),
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        edit_ids = list(self.edits)
        self.bank.replace([edit_ids[i] for i in tensors["order"]], tensors["masks"].numpy().view(np.uint64))
