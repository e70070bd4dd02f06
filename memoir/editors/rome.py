"""ROME: rank-one model editing (Meng, Bau, Andonian, Belinkov, "Locating and Editing Factual Associations in GPT",
NeurIPS 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memoir.editors.base import Written
from memoir.editors.config import Layer, Natural
from memoir.editors.depth import layer_at
from memoir.editors.keyvalue import KeyValueConfig, KeyValueEditor, edit_value
from memoir.models import LanguageModel
from memoir.records import EditRequest


def rank_one_update(residual: Tensor, key: Tensor, whitening: Tensor) -> Tensor:
    """ΔW = Λ (C⁻¹k*)ᵀ with Λ = (v* − W k*) / (C⁻¹k*)ᵀk*: of all W' with W' k* = v*, the nearest to W in the norm of C
    (ROME, equation 2).

    residual v* − W k* (d,); key k* (D,); whitening S (D × D) with SᵀS = C⁻¹; returns (d × D).
    """
    white = whitening @ key.to(whitening)
    return torch.outer(residual.to(white) / (white @ white), white @ whitening)


class ROME(KeyValueEditor):
    """W' k* = v* by one rank-one update per edit: min ‖W'K − V‖² subject to W' k* = v* (ROME, equation 2)."""

    name: ClassVar[str] = "rome"
    colour: ClassVar[str] = "#332288"
    marker: ClassVar[str] = "X"

    @dataclass(frozen=True, kw_only=True)
    class Config(KeyValueConfig):
        layer: Layer  # block of the edited down-projection; ROME: 5 of GPT-J, EasyEdit: 5 of LLaMA and Mistral
        prefixes: Natural = 20  # copies of the prompt behind random prefixes, averaged over; ROME: 20

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        return dict(layer=layer_at(model, 5 / 31))

    def write(self, requests: list[EditRequest]) -> list[Written]:
        with self.all_or_nothing():
            return [self._write_one(request) for request in requests]

    def _write_one(self, request: EditRequest) -> Written:
        (site,), rows = self.sites, self.rows([request])
        tail, keys = self.observe(rows)
        value = tail.y[rows.at_bare].float()
        delta, (first,), (last,), steps = edit_value(self, [request], tail, rows, value.norm(dim=1))
        # The projection is linear: its output for the mean key k* is the mean of its outputs.
        residuals = value + delta - rows.mean(tail.y)
        before = self.deltas[site].delta
        for residual, key in zip(residuals, keys[site], strict=True):
            # Earlier pairs of this edit may already have moved the output for this key.
            moved = (self.deltas[site].delta - before) @ key
            self.add(site, rank_one_update(residual - moved, key, self.factors[site]))
        return Written(first, last, steps)
