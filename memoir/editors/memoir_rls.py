"""MEMOIR with another way to write, beyond the paper: recursive least squares, so that nothing already written moves.

RLSEdit (arXiv 2601.15686) writes ΔW by recursive least squares as well, and SimIE (Guo et al., ICML 2025) corrects
another editor's edits so; `rlsedit.py` has both. There every prompt meets every edit. Here masks keep unlike prompts'
keys apart, routing leaves a prompt that matches no edit exactly as it was, pages take over before keys crowd a W_m, and
stored pairs let a single edit be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.base import Written
from memoir.editors.config import Count, NonNegative, Positive, Rate
from memoir.editors.residual import Factors, Prepared, ResidualConfig, ResidualEditor
from memoir.memory import recursive_downdate, recursive_least_squares
from memoir.models import LanguageModel
from memoir.sites import places
from memoir.text import group_means

AT_HAND = 2  # pages whose P (D × D, float64) is kept: the one that is written, and one that edits are taken out of
DRIFT = 1e-6  # relative error of P at which it is computed anew; removing an edit magnifies it by (‖k‖² / λ)²


@dataclass
class RidgeSolution:
    """min ‖W K − V‖² + λ‖W‖² over all pairs (k, v) on one page of the memory, in float64, because rounding grows when
    pairs are removed.

    weight   W (d × D)
    inverse  P (D × D), (λI + Σ k kᵀ)⁻¹
    pairs    how many
    """

    weight: Tensor
    inverse: Tensor
    pairs: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]], ridge: float, like: Tensor) -> RidgeSolution:
        """From chunks of keys (n × D) and values (n × d); `like` has W's shape and device, (d × D)."""
        cross = torch.zeros_like(like, dtype=torch.float64)
        gram = ridge * torch.eye(cross.shape[1], dtype=cross.dtype, device=cross.device)
        count = 0
        for keys, values in pairs:
            gram.addmm_(keys.T.double(), keys.double())
            cross.addmm_(values.T.double(), keys.double())
            count += len(keys)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)) if count else gram / ridge**2
        return cls(cross @ inverse, inverse, count)

    def add(self, keys: Tensor, values: Tensor) -> None:
        K, V = keys.T.double(), values.T.double()
        recursive_least_squares(self.weight, self.inverse, K, V - self.weight @ K)
        self.pairs += len(keys)

    def remove(self, keys: Tensor, values: Tensor) -> None:
        recursive_downdate(self.weight, self.inverse, keys.T.double(), values.T.double())
        self.pairs -= len(keys)

    def clone(self) -> RidgeSolution:
        return RidgeSolution(self.weight.clone(), self.inverse.clone(), self.pairs)


class MEMOIRbyRLS(ResidualEditor):
    """W_m is the ridge solution over every key ever written: W_m += Z G, P −= P K G.

    Z (n × d) is the change of the projection's output, at the n positions that predict the target, that makes the
    model answer with the target. A few steps of Adam learn it.
    """

    name: ClassVar[str] = "memoir-rls"
    label: ClassVar[str] = "MEMOIR (rls)"
    presets_of: ClassVar[str] = "memoir"
    colour: ClassVar[str] = "#8c2d04"
    marker: ClassVar[str] = "d"
    write_rule: ClassVar[str] = "rls"

    @dataclass(frozen=True, kw_only=True)
    class Config(ResidualConfig):
        # λ of the ridge solution, in units of the mean ‖k‖² of the first edit's keys. The larger, the more a rephrased
        # prompt, whose keys are a little different, reads of what was written.
        ridge: Positive = 0.06
        # Keys per column at which W_m is full and a further page begins; 0: one page, as in the paper. With as many
        # keys as columns nothing can be kept apart any more, and rephrased prompts fail well before.
        fill: NonNegative = 0.5
        value_rate: Rate = 0.3  # of Adam on Z, in units of the stream's root mean square
        value_steps: Count = 20  # steps of Adam on Z at most
        strength: Positive = 1.0  # how often Z is written: a rephrased prompt reads a part of it only

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        """The paper's layer and width; two random prefixes and ten steps, as on SmolLM2."""
        return super().defaults(model) | dict(prefixes=2, value_steps=10)

    def build(self):
        self._solutions: dict[int, RidgeSolution] = {}  # by page
        self._key_size = 1.0  # mean ‖k‖² of the first edit's keys
        return super().build()

    def learn(self, edits: Prepared) -> list[Written]:
        config, memory, tail, batch = self.config, self.memory, edits.tail, edits.tail.batch
        count = len(edits.requests)
        used = places(batch.leading)
        key_owner = edits.owner[used // batch.input_ids.shape[1]]
        keys = tail.inputs(used).to(memory.weight) * edits.masks[key_owner]
        at = places(batch.counted[batch.leading][None])  # the keys at which the target is predicted
        solution = self._solution_with_room(keys[at])
        read = keys @ memory.weight.T
        label_owner = key_owner[at]
        Z = torch.zeros_like(read[at], requires_grad=True)
        scale = tail.stream_norm(batch.counted_at)
        optimizer, first = torch.optim.Adam([Z], lr=config.value_rate * scale / Z.shape[1] ** 0.5), None
        for steps in range(config.value_steps + 1):
            self.check_cancelled()
            logits = tail.logits(read.index_add(0, at, Z), batch.counted_at, used)
            losses = cross_entropy(logits.float(), batch.labels, reduction="none")
            last = self.check_losses(group_means(losses, label_owner, count).tolist(), edits.requests)
            first = first or last
            if steps == config.value_steps or max(last) < config.stop_loss:
                break
            optimizer.zero_grad()
            (losses.mean() * count).backward()
            optimizer.step()
        K, values = keys[at], (read[at] + config.strength * Z).detach()
        solution.add(K, values)
        memory.weight.copy_(solution.weight)
        for i, request in enumerate(edits.requests):
            own = label_owner == i
            self.factors[request.id] = Factors(K[own][:, edits.masks[i]].cpu(), values[own].cpu())
        return [Written(*losses, steps) for losses in zip(first, last, strict=True)]

    def add_term(self, keys: Tensor, values: Tensor, scale: float) -> None:
        solution = self._solution_with_room(keys)
        solution.add(keys, values)
        self.memory.weight.copy_(solution.weight)

    def remove_term(self, edit_id: str, page: int) -> None:
        keys, values = self.pairs(edit_id)
        remaining = [i for i, its_page in self.memory.page_of.items() if its_page == page and i != edit_id]
        if not remaining:
            self._solutions.pop(page, None)
            return
        if (solution := self._solutions.get(page)) is not None:
            solution.remove(keys, values)
        if solution is None or not self._drift(keys, page, remaining) <= DRIFT:  # true also of NaN
            self._keep(page, self._computed(remaining))
        self.memory.pages[page].copy_(self.solution(page).weight)

    def solution(self, page: int) -> RidgeSolution:
        """The ridge solution over the pairs on a page. It is computed from the stored pairs if it is not at hand."""
        if page not in self._solutions:
            self._keep(page, self._computed([i for i in self.factors if self.memory.page_of[i] == page]))
        return self._solutions[page]

    def _keep(self, page: int, solution: RidgeSolution) -> None:
        if page not in self._solutions and len(self._solutions) == AT_HAND:
            del self._solutions[next(p for p in self._solutions if p != self.memory.last)]
        self._solutions[page] = solution

    def _computed(self, edit_ids: list[str]) -> RidgeSolution:
        chunks = (
            map(torch.cat, zip(*(self.pairs(edit_id) for edit_id in chunk), strict=True))
            for chunk in (edit_ids[start : start + 256] for start in range(0, len(edit_ids), 256))
        )
        return RidgeSolution.of(chunks, self.ridge, self.memory.weight)

    @property
    def ridge(self) -> float:
        """λ."""
        return self.config.ridge * self._key_size

    def _solution_with_room(self, keys: Tensor) -> RidgeSolution:
        """The solution of the page that keys (n × D) are written to. If a page is full, a new one begins."""
        config, memory = self.config, self.memory
        if not self.factors:  # these are the first
            self._key_size = float(keys.square().sum(1).mean())
            self._solutions.clear()
        solution = self.solution(memory.last)
        if config.routing and config.fill and solution.pairs >= config.fill * self.site.in_features:
            memory.turn_page()
            solution = self.solution(memory.last)
        return solution

    def _drift(self, keys: Tensor, page: int, remaining: list[str]) -> float:
        """‖(λI + Σ k kᵀ) P k − k‖ / ‖k‖ for keys (n × D) just removed from a page, where P's error is largest."""
        K, bank = keys.T.double(), self.memory.bank
        X = (K.T @ self.solution(page).inverse).T  # P is symmetric, and products of wide matrices are faster
        product = self.ridge * X
        row_of = {edit_id: row for row, edit_id in enumerate(bank.ids)}
        masks = self.memory.columns(np.array([row_of[edit_id] for edit_id in remaining])).to(K.device)
        for edit_id, mask in zip(remaining, masks, strict=True):
            stored = self.factors[edit_id].keys.to(K)
            product[mask] += stored.T @ (stored @ X[mask])
        return float((product - K).norm() / K.norm())

    def snapshot(self, erased: Iterable[str]) -> tuple:
        solutions = {page: solution.clone() for page, solution in self._solutions.items()}
        return solutions, self._key_size, super().snapshot(erased)

    def restore(self, snapshot: tuple) -> None:
        self._solutions, self._key_size, rest = snapshot
        super().restore(rest)

    def settle(self) -> None:
        # Files do not hold the solution; loading computes it from the pairs, which rounds differently. So it is
        # computed anew at every save, too.
        self._solutions.clear()
        super().settle()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"key_size": torch.tensor(self._key_size, dtype=torch.float64)}

    def scratch(self) -> dict[str, Tensor]:
        return super().scratch() | {
            f"{page}.{name}": torch.as_tensor(value)
            for page, s in self._solutions.items()
            for name, value in vars(s).items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        self._key_size = float(tensors.get("key_size", 1.0))  # older files have λ itself in `ridge`
        self._solutions.clear()

    def load_scratch(self, tensors: dict[str, Tensor]) -> None:
        super().load_scratch(tensors)
        for page in dict.fromkeys(name.partition(".")[0] for name in tensors if "." in name):
            weight, inverse = (tensors[f"{page}.{name}"].to(self.memory.device) for name in ("weight", "inverse"))
            self._solutions[int(page)] = RidgeSolution(weight, inverse, int(tensors[f"{page}.pairs"]))
