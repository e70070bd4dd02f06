"""AlphaEdit: null-space constrained knowledge editing (Fang, Jiang, Wang, Ma, Jie, Wang, He, Chua, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memoir.editors.keyvalue import Keys, KeyValueConfig, SpreadingEditor, check_layers
from memoir.sites import Patch, Site


def null_space_projector(C: Tensor, threshold: float) -> Tensor:
    """P = Û Ûᵀ, Û the eigenvectors of C = E[k kᵀ] whose eigenvalues lie below the threshold (AlphaEdit, section 3.2).

    What is written through P leaves the outputs for the keys that make up C alone. C (D × D); returns (D × D) like C.
    """
    values, vectors = torch.linalg.eigh(C.double())
    null = vectors[:, values < threshold]
    return (null @ null.T).to(C)


def projected_update(
    residual: Tensor, keys: Tensor, projector: Tensor, ridge: float, earlier: Keys | None = None
) -> tuple[Tensor, Keys]:
    """ΔW = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λI)⁻¹ (AlphaEdit, equation 14).

    P is an orthogonal projector, so with rows H = (P [K_p K])ᵀ this is R [0 I] (H Hᵀ + λI)⁻¹ H.

    residual   R (d × n), what ΔW K should come to
    keys       K (D × n), the new keys
    projector  P (D × D)
    ridge      λ > 0
    earlier    the keys K_p of earlier edits, as returned with them; None: none
    returns    ΔW (d × D), and all keys for the next edit
    """
    known = Keys.of(keys.T.to(projector) @ projector.T, ridge, earlier)
    weights = known.newest(keys.shape[1])
    return residual.to(weights) @ weights, known


class AlphaEdit(SpreadingEditor):
    """MEMIT's spread of a value over layers, written into the null space of C with earlier edits' keys held in place
    (AlphaEdit, equation 14)."""

    name: ClassVar[str] = "alphaedit"

    @dataclass(frozen=True, kw_only=True)
    class Config(KeyValueConfig):
        layers: tuple[int, ...]  # blocks of the edited down-projections; AlphaEdit: 4 to 8 of LLaMA-3, 3 to 8 of GPT-J
        null_threshold: float = 2e-2  # eigenvalues of C below this count as null, > 0; AlphaEdit: 2e-2
        ridge: float = 10.0  # λ, > 0; AlphaEdit: 10
        clamp: float = 0.75  # ‖δ‖ is kept below this × ‖h‖, > 0; AlphaEdit: 0.75

        def __post_init__(self) -> None:
            super().__post_init__()
            check_layers(self)
            self.require(self.null_threshold > 0, "null_threshold", "more than 0")
            self.require(self.ridge > 0, "ridge", "more than 0")

    config: Config

    def build(self) -> dict[Site, Patch]:
        self._projectors: dict[Site, Tensor] = {}
        return super().build()

    def prepare(self) -> None:
        super().prepare()
        threshold = self.config.null_threshold
        for site in self.sites:
            if site not in self._projectors:
                self._projectors[site] = self.factor(
                    "null-space", site, lambda C: null_space_projector(C, threshold), null_threshold=threshold
                )

    def update(self, site: Site, residual: Tensor, keys: Tensor, earlier: Keys | None) -> tuple[Tensor, Keys]:
        return projected_update(residual, keys, self._projectors[site], self.config.ridge, earlier)
