"""The unedited model in the place of a method: what a table's numbers are worth is seen beside it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.base import Editor, EditorConfig, Written
from memoir.models import predicting
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site


class Unedited(Editor):
    """No patch, no edit: `write` only measures how far the model is from the target."""

    name: ClassVar[str] = "unedited"
    Config = EditorConfig

    def build(self) -> dict[Site, Patch]:
        return {}

    @torch.no_grad()
    def write(self, requests: list[EditRequest]) -> list[Written]:
        batch = self.encode_edits(requests)
        logits = self.model.forward(batch).float()
        losses = [
            float(cross_entropy(row[predicting(learn[None])[0]], tokens[learn]))
            for row, learn, tokens in zip(logits, batch.learn_mask, batch.input_ids, strict=True)
        ]
        return [Written(loss, loss, 0) for loss in losses]

    def explain(self, prompt: str) -> Explanation:
        return Explanation(edit_id=None, overlap=None, tau=None, fired=False, contribution=0.0)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            raise ValueError(f"the unedited model has no tensors, but the file holds {', '.join(sorted(tensors))}")
