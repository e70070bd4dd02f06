"""MEMOIR with another way to write, beyond the paper: recursive least squares, so that nothing already written moves.

RLSEdit (arXiv 2601.15686) writes ΔW by recursive least squares as well, and SimIE (Guo et al., ICML 2025) corrects
another editor's edits so; `rlsedit.py` has both. There every prompt meets every edit. Here masks keep unlike prompts'
keys apart, routing leaves a prompt that matches no edit exactly as it was, pages take over before keys crowd a W_m, and
stored pairs let a single edit be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.base import Written
from memoir.editors.config import Count, NonNegative, Positive, Rate
from memoir.editors.residual import Factors, Prepared, ResidualConfig, ResidualEditor
from memoir.memory import recursive_least_squares
from memoir.models import LanguageModel
from memoir.sites import places
from memoir.text import group_means


class MEMOIRbyRLS(ResidualEditor):
    """W_m is the ridge solution over every key ever written: W_m += Zᵀ G.

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
        # B of the page that is written, see `recursive_least_squares`; None: the stored pairs give it when needed.
        self._basis: Tensor | None = None
        self._key_size = 1.0  # mean ‖k‖² of the first edit's keys
        return super().build()

    def learn(self, edits: Prepared) -> list[Written]:
        config, memory, tail, batch = self.config, self.memory, edits.tail, edits.tail.batch
        count = len(edits.requests)
        used = places(batch.leading)
        key_owner = edits.owner[used // batch.input_ids.shape[1]]
        keys = tail.inputs(used).to(memory.weight) * edits.masks[key_owner]
        at = places(batch.counted[batch.leading][None])  # the keys at which the target is predicted
        self._make_room(keys[at])
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
        K, change = keys[at], config.strength * Z.detach()
        values, terms = read[at] + change, {}
        for i, request in enumerate(edits.requests):
            own = label_owner == i
            terms[request.id] = Factors(K[own][:, edits.masks[i]].cpu(), values[own].cpu())
        self._write(K, change)
        self.factors |= terms
        return [Written(*losses, steps) for losses in zip(first, last, strict=True)]

    def add_term(self, keys: Tensor, values: Tensor, scale: float) -> None:
        self._make_room(keys)
        self._write(keys, values - keys @ self.memory.weight.T)

    def remove_terms(self, edit_ids: Sequence[str], page: int) -> None:
        weight, basis = self._solved(page, without=edit_ids)
        self.memory.pages[page].copy_(weight)
        if page == self.memory.last:
            self._basis = basis

    def _write(self, keys: Tensor, change: Tensor) -> None:
        """Change what W_m gives for some keys (n × D) by `change` (n × d), and for the earlier ones as little as can
        be."""
        if self._basis is None:
            _, self._basis = self._solved(self.memory.last)
        G, self._basis = recursive_least_squares(keys, self.ridge, self._basis)
        self.memory.weight.add_(change.to(G).T @ G)

    def _solved(self, page: int, without: Sequence[str] = ()) -> tuple[Tensor, Tensor | None]:
        """The ridge solution (d × D) over the pairs on a page, but those of some edits, and B, None without pairs; both
        float64."""
        edit_ids = [i for i, its_page in self.memory.page_of.items() if its_page == page and i not in without]
        weight = torch.zeros_like(self.memory.pages[page], dtype=torch.float64)
        basis = None
        for start in range(0, len(edit_ids), 256):
            pairs = [self.pairs(edit_id) for edit_id in edit_ids[start : start + 256]]
            keys, values = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
            G, basis = recursive_least_squares(keys, self.ridge, basis)
            weight += (values - keys @ weight.T).T @ G
        return weight, basis

    @property
    def ridge(self) -> float:
        """λ."""
        return self.config.ridge * self._key_size

    def _make_room(self, keys: Tensor) -> None:
        """Begin a further page if the last one is full. The first edit's keys (n × D) set the unit of λ."""
        config, memory = self.config, self.memory
        if not self.factors:
            self._key_size, self._basis = float(keys.square().sum(1).mean()), None
        pairs = sum(len(self.factors[i].keys) for i, page in memory.page_of.items() if page == memory.last)
        if config.routing and config.fill and pairs >= config.fill * self.site.in_features:
            memory.turn_page()
            self._basis = None

    def snapshot(self, erased: Iterable[str]) -> tuple:
        return self._basis, self._key_size, super().snapshot(erased)

    def restore(self, snapshot: tuple) -> None:
        self._basis, self._key_size, rest = snapshot
        super().restore(rest)

    def settle(self) -> None:
        # Files do not hold B; loading computes it from the pairs, which rounds differently. So every save does, too.
        self._basis = None
        super().settle()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"key_size": torch.tensor(self._key_size, dtype=torch.float64)}

    def scratch(self) -> dict[str, Tensor]:
        return super().scratch() | ({} if self._basis is None else {"basis": self._basis})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        self._key_size, self._basis = float(tensors["key_size"]), None

    def load_scratch(self, tensors: dict[str, Tensor]) -> None:
        super().load_scratch(tensors)
        self._basis = tensors["basis"].to(self.memory.device) if "basis" in tensors else None
