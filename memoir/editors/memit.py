"""MEMIT: mass-editing memory in a transformer (Meng, Sharma, Andonian, Belinkov, Bau, ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memoir.editors.config import Layers, Positive
from memoir.editors.keyvalue import KeyValueConfig
from memoir.editors.spreading import SpreadingEditor
from memoir.memory import recursive_least_squares
from memoir.sites import Site


def least_squares_update(residual: Tensor, keys: Tensor, whitening: Tensor, weight: float) -> Tensor:
    """ΔW = R Kᵀ (λC + K Kᵀ)⁻¹ = argmin ‖ΔW K − R‖² + λ tr(ΔW C ΔWᵀ) (MEMIT, equation 14).

    With SᵀS = C⁻¹ it is the ridge solution over the keys S K, times S.

    residual   R (d × n), what ΔW K should be
    keys       K (D × n), the new keys
    whitening  S (D × D)
    weight     λ
    returns    ΔW (d × D)
    """
    G, _ = recursive_least_squares(keys.T.to(whitening) @ whitening.T, weight)
    G = G.to(whitening) @ whitening
    return residual.to(G) @ G


class MEMIT(SpreadingEditor):
    """ΔW^l = R^l K^lᵀ (λC^l + K^l K^lᵀ)⁻¹ over several layers, one edit or many at once (MEMIT, equations 14, 20)."""

    name: ClassVar[str] = "memit"
    colour: ClassVar[str] = "#56b4e9"
    marker: ClassVar[str] = "P"

    @dataclass(frozen=True, kw_only=True)
    class Config(KeyValueConfig):
        layers: Layers  # blocks of the edited down-projections; MEMIT: 3 to 8 of GPT-J, EasyEdit: 4 to 8 of LLaMA
        moment_weight: Positive = 15_000.0  # λ, how many ordinary keys C stands for; MEMIT: 15000 on GPT-J
        clamp: Positive = 0.75  # ‖δ‖ is kept below this × ‖h‖; MEMIT: 0.75

    config: Config

    def update(self, site: Site, residual: Tensor, keys: Tensor, basis: None) -> tuple[Tensor, None]:
        return least_squares_update(residual, keys, self.factors[site], self.config.moment_weight), None
