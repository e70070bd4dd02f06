"""AlphaEdit: null-space constrained knowledge editing (Fang, Jiang, Wang, Ma, Jie, Wang, He, Chua, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memoir.editors.base import EditError
from memoir.editors.config import Layers, Positive
from memoir.editors.keyvalue import KeyValueConfig
from memoir.editors.spreading import SpreadingEditor
from memoir.memory import recursive_least_squares
from memoir.sites import Site


def null_space_projector(C: Tensor, threshold: float) -> Tensor:
    """P = Û Ûᵀ, Û the eigenvectors of C = E[k kᵀ] whose eigenvalues lie below the threshold (AlphaEdit, section 3.2).

    An update times P does not change the outputs for the keys that C is made of. C (D × D); returns (D × D) like C.
    EditError where there are none: then no update would change anything.
    """
    values, vectors = torch.linalg.eigh(C.double())
    null = vectors[:, values < threshold]
    if not null.shape[1]:
        raise EditError(
            f"null_threshold = {threshold:g}, but the eigenvalues of C lie between {values[0]:.2g} and "
            f"{values[-1]:.2g}, half of them below {values.median():.2g}: nothing could be written; raise it"
        )
    return (null @ null.T).to(C)


def projected_update(
    residual: Tensor, keys: Tensor, projector: Tensor, ridge: float, basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ΔW = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λI)⁻¹ (AlphaEdit, equation 14).

    P is an orthogonal projector, so this is the ridge solution over the projected keys P [K_p K], written recursively.

    residual   R (d × n), what ΔW K should be
    keys       K (D × n), the new keys
    projector  P (D × D)
    ridge      λ > 0
    basis      B of the projected keys of earlier edits, see `recursive_least_squares`; None: there are none
    returns    ΔW (d × D), and B for the next call
    """
    G, basis = recursive_least_squares(keys.T.to(projector) @ projector.T, ridge, basis)
    return residual.to(G) @ G, basis


class AlphaEdit(SpreadingEditor):
    """MEMIT's spread of a value over layers, written into the null space of C with earlier edits' keys held in place
    (AlphaEdit, equation 14)."""

    name: ClassVar[str] = "alphaedit"
    colour: ClassVar[str] = "#0173b2"
    marker: ClassVar[str] = "^"

    @dataclass(frozen=True, kw_only=True)
    class Config(KeyValueConfig):
        layers: Layers  # blocks of the edited down-projections; AlphaEdit: 4 to 8 of LLaMA-3, 3 to 8 of GPT-J
        null_threshold: Positive = 2e-2  # eigenvalues of C below this count as null; AlphaEdit: 2e-2
        ridge: Positive = 10.0  # λ; AlphaEdit: 10
        clamp: Positive = 0.75  # ‖δ‖ is kept below this × ‖h‖; AlphaEdit: 0.75

    config: Config

    def factor_of(self, site: Site) -> Tensor:
        limit = self.config.null_threshold
        return self.factor("null-space", site, lambda C: null_space_projector(C, limit), null_threshold=limit)

    def update(self, site: Site, residual: Tensor, keys: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
        return projected_update(residual, keys, self.factors[site], self.config.ridge, basis)
