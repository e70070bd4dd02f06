"""In-context retrieval: the matching edit is put in front of the prompt; no weight changes. A row that keeps tables
honest: what could be had without editing at all (compare IKE, Zheng et al., EMNLP 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from memoir.bank import MaskBank
from memoir.editors.base import Editor, EditorConfig, Written
from memoir.memory import pool_prompt, tophash
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, input_of


class InContext(Editor):
    """Retrieves by the masks that MEMOIR routes with; answers from "edit prompt, new answer, line break, prompt"."""

    changes_model: ClassVar[bool] = False
    name: ClassVar[str] = "incontext"
    can_forget: ClassVar[bool] = True
    routes: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: int  # block whose down-projection's input is the fingerprint
        k: int  # columns in a mask, 1…D
        tau: float = 0.7  # least overlap ratio that retrieves, 0…1
        feature: str = "last"  # prompt feature: mean or last

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.k >= 1, "k", "at least 1")
            self.require(0 <= self.tau <= 1, "tau", "an overlap ratio, 0 to 1")
            self.require(self.feature in ("mean", "last"), "feature", "mean or last")

    config: Config

    def build(self) -> dict[Site, Patch]:
        self.site = self.model.site(self.config.layer)
        self.bank = MaskBank(self.site.in_features)
        return {}

    def write(self, requests: list[EditRequest]) -> list[Written]:
        before = self.losses(requests)
        masks = self._masks([r.prompt for r in requests])
        for request in requests:
            if request.id in self.bank.ids:
                self.bank.remove(request.id)
        self.bank.add([r.id for r in requests], masks)
        return [Written(loss, loss, 0) for loss in before]

    def forget(self, edit_id: str) -> None:
        self.bank.remove(edit_id)
        del self.edits[edit_id]

    def rewrite(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt behind the edit that it retrieves, or as it is."""
        read = self.matches(prompts)
        found = [self.edits[edit_id] if edit_id else None for edit_id in read]
        return [
            f"{edit.prompt} {edit.target}\n{prompt}" if edit else prompt
            for edit, prompt in zip(found, prompts, strict=True)
        ]

    def matches(self, prompts: Sequence[str]) -> list[str | None]:
        rows, overlaps = self._nearest(prompts)
        near = overlaps >= self.config.tau
        return [self.bank.ids[row] if fired else None for row, fired in zip(rows, near, strict=True)]

    def explain(self, prompt: str) -> Explanation:
        (row,), (ratio,) = self._nearest([prompt])
        if row < 0:
            return Explanation(edit_id=None, score=None, threshold=self.config.tau, fired=False, contribution=0.0)
        return Explanation(
            edit_id=self.bank.ids[row],
            score=float(ratio),
            threshold=self.config.tau,
            fired=bool(ratio >= self.config.tau),
            contribution=0.0,  # no projection is patched
        )

    def _nearest(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not len(self.bank):
            return np.full(len(prompts), -1), np.full(len(prompts), -1.0)
        rows, counts = self.bank.nearest(self._masks(prompts))
        return rows, counts / self.config.k

    @torch.no_grad()
    def _masks(self, prompts: Sequence[str]) -> Tensor:
        """(n × D) bool, the masks of bare prompts."""
        masks = torch.zeros(len(prompts), self.site.in_features, dtype=torch.bool)
        with self.detached():
            for rows, batch in self.batches(prompts):
                a = input_of(self.site, lambda batch=batch: self.model.forward(batch))
                masks[rows] = tophash(pool_prompt(a, batch.prompt_mask, self.config.feature), self.config.k).cpu()
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
