"""The unedited model in the place of a method: the baseline of every table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from memoir.editors.base import Editor, Written
from memoir.editors.config import EditorConfig
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site


class Unedited(Editor):
    """No patch, no edit: `write` only measures the model's loss on the target."""

    name: ClassVar[str] = "unedited"
    colour: ClassVar[str] = "#949494"
    marker: ClassVar[str] = "p"
    changes_model: ClassVar[bool] = False
    Config = EditorConfig

    def build(self) -> dict[Site, Patch]:
        return {}

    def write(self, requests: list[EditRequest]) -> list[Written]:
        return [Written(loss, loss, 0) for loss in self.losses(requests)]

    def lookup(self, prompts: Sequence[str]) -> list[Explanation]:
        return [Explanation()] * len(prompts)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            raise ValueError(f"the unedited model has no tensors, but the file holds {', '.join(sorted(tensors))}")
