"""The unedited model in the place of a method: what a table's numbers are worth is seen beside it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from memoir.editors.base import Editor, EditorConfig, Written
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site


class Unedited(Editor):
    """No patch, no edit: `write` only measures how far the model is from the target."""

    changes_model: ClassVar[bool] = False
    name: ClassVar[str] = "unedited"
    Config = EditorConfig

    def build(self) -> dict[Site, Patch]:
        return {}

    def write(self, requests: list[EditRequest]) -> list[Written]:
        return [Written(loss, loss, 0) for loss in self.losses(requests)]

    def explain(self, prompt: str) -> Explanation:
        return Explanation(edit_id=None, score=None, threshold=None, fired=False, contribution=0.0)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            raise ValueError(f"the unedited model has no tensors, but the file holds {', '.join(sorted(tensors))}")
