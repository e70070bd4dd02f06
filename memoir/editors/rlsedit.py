"""RLSEdit: soft recursive least squares for lifelong editing (Wang, Lyu, Gu, Huang, Lu, Cui, Chang, IJCAI-ECAI 2026,
arXiv 2601.15686), and with μ = 0 the recursion of SimIE (Guo et al., "Towards Lifelong Model Editing via Simulating
Ideal Editor", ICML 2025).

Where this differs from the authors' code:
- C is kept from edit to edit, as the paper has it; the released evaluation begins anew with every batch.
- The step asks for the residual that is missing, V − K W. The code subtracts the present output from it once more.
- λ = μ = 0 is refused. The code then inverts a matrix of nothing but jitter.
SimIE takes its targets from a base editor and its keys at every token; both are RLSEdit's here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memoir.editors.config import Layers, NonNegative, Positive, Rate
from memoir.editors.keyvalue import KeyValueConfig, whitener
from memoir.editors.spreading import SpreadingEditor
from memoir.memory import recursive_least_squares
from memoir.sites import Site


def recursive_update(
    residual: Tensor, keys: Tensor, root: Tensor | float, basis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ΔW = R Kᵀ C_t with C_t = (C₀⁻¹ + Σ_{s≤t} K_s K_sᵀ)⁻¹ (RLSEdit's recursion, C_t = C − C K (I + KᵀCK)⁻¹ KᵀC).

    Repeated for each edit, with R = V_t − W K_t for the W so far, this is the solution of
    min Σ_s ‖W K_s − V_s‖² + λ²‖W − W₀‖² + μ²‖(W − W₀) K₀‖² over all edits, written alone or in batches.
    With SᵀS = C₀ it is the ridge solution over the keys S K_s with λ = 1, times S.

    residual  R (d × n), what ΔW K should be
    keys      K (D × n), the new keys
    root      S (D × D), a root of C₀ = (λ²I + μ²K₀K₀ᵀ)⁻¹; a number stands for that multiple of I
    basis     B of the keys S K_s of earlier edits, see `recursive_least_squares`; None: there are none
    returns   ΔW (d × D), and B for the next call
    """
    dense = isinstance(root, Tensor)
    G, basis = recursive_least_squares(keys.T.to(root) @ root.T if dense else keys.T * root, 1.0, basis)
    G = G.to(root) @ root if dense else G * root
    return residual.to(G) @ G, basis


class RLSEdit(SpreadingEditor):
    """MEMIT's values and their spread over layers, written as the ridge solution over every edit so far: towards W₀
    with weight λ², and towards the outputs of ordinary keys K₀ with weight μ², where K₀K₀ᵀ = w E[kkᵀ] (RLSEdit).

    With λ = 0 and μ = 1 it is MEMIT with earlier edits' keys held in place. With μ = 0 it needs no second moments.
    """

    name: ClassVar[str] = "rlsedit"
    colour: ClassVar[str] = "#a6761d"
    marker: ClassVar[str] = "<"

    @dataclass(frozen=True, kw_only=True)
    class Config(KeyValueConfig):
        layers: Layers  # blocks of the edited down-projections; RLSEdit: 4 to 8 of LLaMA-3, 3 to 8 of GPT-J
        lam: NonNegative = 0.0  # λ, the pull towards W₀; RLSEdit: 0, with SimIE's λ as λ²: 1 to 10
        mu: NonNegative = 1.0  # μ, the hold on ordinary keys; RLSEdit: 1, SimIE: 0
        moment_weight: Positive = 15_000.0  # w, how many ordinary keys E[kkᵀ] stands for; RLSEdit: 15000
        value_rate: Rate = 0.1  # of Adam on δ; RLSEdit: 0.1 on LLaMA-3, 0.5 on GPT-J
        clamp: Positive = 0.75  # ‖δ‖ is kept below this × ‖h‖; RLSEdit: 0.75

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.lam and not self.mu:
                raise ValueError("lam = 0.0 and mu = 0.0, expected one of them greater than 0")

    config: Config

    def factor_of(self, site: Site) -> Tensor | float:
        lam, mu, w = self.config.lam, self.config.mu, self.config.moment_weight

        def root(C: Tensor) -> Tensor:
            inverse = mu**2 * w * C
            inverse.diagonal().add_(lam**2)
            return whitener(inverse)

        return self.factor("anchored", site, root, lam=lam, mu=mu, w=w) if mu else 1 / lam

    def update(self, site: Site, residual: Tensor, keys: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
        return recursive_update(residual, keys, self.factors[site], basis)
