"""The residual core that both forms of MEMOIR share: masks, routing, conflicts, forgetting, merging, saving.

A form (`memoir.py` as published, `memoir_rls.py` by recursive least squares) says how edits are learned and how one
edit's term is added to W_m and taken out again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from memoir.editors.base import EditError, Written
from memoir.editors.config import Count, Natural, NonNegative, Share
from memoir.editors.depth import layer_at
from memoir.editors.prompts import augmented, opened
from memoir.editors.recognition import RecognisingEditor, RecognitionConfig
from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.sites import Patch, Site, Tail
from memoir.text import Batch

GROUP = 16  # edits per forward call of a look-ahead


@dataclass(frozen=True, kw_only=True)
class ResidualConfig(RecognitionConfig):
    """Settings of both forms of MEMOIR."""

    stop_loss: NonNegative = 0.01  # nats per token at which an edit is done; 0: never; paper: early stopping
    prefixes: Natural = 10  # copies of the prompt behind random prefixes; paper: 10
    prefix_tokens: Count = 10  # tokens in a random prefix, as in ROME's shorter ones
    # sampled: drawn from the model, as in ROME; opened: as in the authors' release, see `prompts.OPENINGS`
    prefix_style: Literal["sampled", "opened"] = "sampled"
    ahead: Count = 32  # edits of a list whose prompts run through the model before the first of them is written
    # An earlier edit that answers the same question differently: replace it, keep both, or raise EditError.
    on_conflict: Literal["replace", "keep-both", "raise"] = "replace"
    # Least overlap ratio at which two prompts are one question; equal prompts always are. On SmolLM2 different prompts
    # of the validation sets overlap by at most 0.79 (QAEdit), 0.76 (CounterFact) and 0.954 (SelfCheckGPT's passages).
    same_question: Share = 0.96


@dataclass
class Factors:
    """One edit's term in the memory. It lies on the CPU: only forgetting and saving need it, and thousands of terms
    would fill a GPU.

    keys    (n × k) the masked keys, in the mask's columns
    values  (n × d) what was written on them: MEMOIR's G, its part of W_m being Gᵀ keys; or V, the values that the
            ridge solution fits
    """

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Prepared:
    """n edits that are written together, with B prompts, random prefixes included.

    tail    the prompts with their targets, recorded at the site
    stored  (n × D or wider) bool, the masks as the bank stores them
    masks   (n × D) bool
    owner   (B,) int64, the edit that each prompt belongs to
    """

    requests: list[EditRequest]
    tail: Tail
    stored: Tensor

    @property
    def masks(self) -> Tensor:
        return self.stored[:, : self.tail.a.shape[-1]]

    @property
    def owner(self) -> Tensor:
        copies = len(self.tail.batch) // len(self.requests)
        return torch.arange(len(self.tail.batch), device=self.stored.device) // copies

    def first(self, count: int) -> Prepared:
        """The first edits of these."""
        prompts = count * (len(self.tail.batch) // len(self.requests))
        return Prepared(self.requests[:count], self.tail.of(slice(prompts)), self.stored[:count])


class ResidualEditor(RecognisingEditor):
    """FFN(a) = W0 a + W_m (M ⊙ a): edits live in masked columns of a residual memory, which matching prompts read."""

    can_forget: ClassVar[bool] = True
    write_rule: ClassVar[str]  # "sgd" or "rls", the setting `write` of users
    config: ResidualConfig

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        """The paper's block and width, at the same relative depth and share."""
        return {"layer": layer_at(model, 27 / 31), "k": max(1, model.site(model.dense[0]).in_features * 2 // 7)}

    def build(self) -> dict[Site, Patch]:
        patches, config = super().build(), self.config
        self.ahead = config.ahead
        self.factors: dict[str, Factors] = {}
        self.scales = np.ones(0)  # by the bank's rows: how far weight decay has faded an edit since it was written
        self._recorded: dict[EditRequest, Prepared] = {}
        self._prefixes: list[str] | None = None
        return patches

    # What a form defines ---------------------------------------------------------------------------------------------

    @abstractmethod
    def learn(self, edits: Prepared) -> list[Written]:
        """Learn some edits, write them into W_m and keep their `factors`; the editor is detached meanwhile."""

    @abstractmethod
    def add_term(self, keys: Tensor, values: Tensor, scale: float) -> None:
        """Add an edit's term to the page that is written: keys (n × D), values (n × d), scale 1 if never faded."""

    @abstractmethod
    def remove_terms(self, edit_ids: Sequence[str], page: int) -> None:
        """Take some edits' terms out of a page of W_m. Their masks and factors are still there."""

    # Before the first edit --------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Sample the random prefixes from the unedited model, as ROME does; centre features; set τ. Once."""
        config = self.config
        if self._prefixes is None and config.prefix_style == "sampled":
            self._prefixes = [f"{text}. " for text in self.sample_texts(config.prefixes, config.prefix_tokens)]
        elif self._prefixes is None:
            with self.detached() as model:
                self._prefixes = opened(model, config.prefixes, config.prefix_tokens, config.seed)
        if config.feature == "mean_centred" and self.memory.background is None:
            self._measure_background()
        self.calibrate_if_due()

    # Writing ---------------------------------------------------------------------------------------------------------

    def look_ahead(self, requests: list[EditRequest]) -> None:
        """Run the prompts of several edits through the model together. Nothing that these edits write changes what
        leads up to the site. Batches of edits share one call anyway, so they do not look ahead."""
        self._recorded = {}
        if len(requests) == 1 or self.config.batch_size > 1:
            return
        try:
            batch = self._encoded(requests)
        except ValueError:
            return  # `write` names the edit that is wrong when its turn comes
        copies, length = len(batch) // len(requests), batch.attention_mask.sum(1)
        longest = length.view(-1, copies).amax(1).tolist()
        by_length = sorted(range(len(requests)), key=longest.__getitem__)  # little padding within a group
        with self.detached():
            for start in range(0, len(by_length), GROUP):
                group = by_length[start : start + GROUP]
                rows = [i * copies + copy for i in group for copy in range(copies)]
                some = self._prepared([requests[i] for i in group], batch[rows, -max(longest[i] for i in group) :])
                for place, request in enumerate(some.requests):
                    tail = some.tail.of(slice(place * copies, (place + 1) * copies))
                    self._recorded[request] = Prepared([request], tail, some.stored[place : place + 1])

    def write(self, requests: list[EditRequest]) -> list[Written]:
        edits = self._recorded.pop(requests[0], None) if len(requests) == 1 else None
        if edits is None:
            with self.detached():
                edits = self._prepared(requests, self._encoded(requests))
        edits = edits.first(self._compatible(edits))
        conflicts = self.conflicts(edits.requests, edits.stored)
        replaced = self.replaced(edits.requests, conflicts)
        outdated = list(dict.fromkeys(edit_id for ids in replaced for edit_id in ids))  # ordered, for equal rounding
        before = self.snapshot(outdated) if outdated else None
        try:
            self.erase(outdated)
            with self.detached():
                written = self.learn(edits)
        except BaseException:
            if before is not None:
                self.restore(before)
            raise
        self.enter([request.id for request in edits.requests], edits.stored)
        self.calibrate_if_due()
        return [
            replace(outcome, replaced=tuple(ids), conflicts=tuple(against))
            for outcome, ids, against in zip(written, replaced, conflicts, strict=True)
        ]

    def _encoded(self, requests: list[EditRequest]) -> Batch:
        """Each prompt with its target, bare and behind each random prefix."""
        prompts, targets, _ = augmented(requests, self._prefixes, joint="")
        return self.model.encode(prompts, targets, end=self.config.learn_stop)

    def _prepared(self, requests: list[EditRequest], batch: Batch) -> Prepared:
        """Record the edits' prompts. The mask comes from the bare prompt, as in a query; its copies share the mask."""
        copies = len(batch) // len(requests)
        with self._early_inputs() as early:
            tail = self.model.tail(self.site, batch)
        first = early[-1][0][::copies] if early else None
        return Prepared(requests, tail, self.stored(requests, tail.a[::copies], first, batch[::copies]))

    def enter(self, ids: Sequence[str], masks: Tensor, scale: float = 1.0) -> None:
        """Let queries find edits that were just written, masks as the bank stores them."""
        self.memory.bank.add(ids, masks)
        self.scales = np.append(self.scales, [scale] * len(ids))
        self.memory.page_of |= dict.fromkeys(ids, self.memory.last)

    # Conflicts -------------------------------------------------------------------------------------------------------

    def _compatible(self, edits: Prepared) -> int:
        """How many of these edits, from the first one on, can be written together: until two contradict each other or
        have the same id."""
        requests = edits.requests
        if len(requests) == 1:
            return 1
        masks = edits.stored.float()
        overlaps = (masks @ masks.T / self.memory.bits).tolist()  # exact: float32 counts to 2²⁴
        for i, request in enumerate(requests):
            for other, overlap in zip(requests[:i], overlaps[i], strict=False):
                if request.id == other.id or self.contradicts(request, other, overlap):
                    return i
        return len(requests)

    def contradicts(self, request: EditRequest, other: EditRequest, overlap: float) -> bool:
        """Whether two edits give one question different answers."""
        same = overlap >= self.config.same_question or request.question == other.question
        return same and other.target != request.target and other.id != request.id

    def conflicts(self, requests: Sequence[EditRequest], masks: Tensor) -> list[list[str]]:
        """For each request, with masks as the bank stores them, the stored edits that it contradicts. EditError if none
        may be."""
        conflicts: list[list[str]] = [[] for _ in requests]
        if not len(self.memory.bank):
            return conflicts
        overlaps = self.memory.bank.overlaps(masks) / self.memory.bits
        for request, ids, ratios in zip(requests, conflicts, overlaps, strict=True):
            for edit_id, ratio in zip(self.memory.bank.ids, ratios, strict=True):
                other = self.edits[edit_id]
                if not self.contradicts(request, other, ratio):
                    continue
                if self.config.on_conflict == "raise":
                    raise EditError(
                        f"edit {request.id!r} conflicts with edit {other.id!r}: {request.prompt!r} and "
                        f"{other.prompt!r} are one question (overlap {ratio:.2f}), but {request.target!r} is not "
                        f"{other.target!r}; forget that edit, or choose on_conflict"
                    )
                ids.append(other.id)
        return conflicts

    def replaced(self, requests: Sequence[EditRequest], conflicts: list[list[str]]) -> list[list[str]]:
        """For each request, the stored edits that it replaces: those it contradicts, and one of its own id."""
        again = [[request.id] if request.id in self.edits else [] for request in requests]
        if self.config.on_conflict != "replace":
            return again
        return [ids + own for ids, own in zip(conflicts, again, strict=True)]

    # Forgetting -------------------------------------------------------------------------------------------------------

    def forget(self, edit_id: str) -> None:
        """Take exactly one edit out: W_m loses its term (sgd), or becomes the ridge solution over the others (rls)."""
        if edit_id not in self.edits:
            raise KeyError(f"no edit {edit_id!r} in this editor; it holds {len(self.edits)}")
        self.erase([edit_id])
        del self.edits[edit_id]

    def erase(self, edit_ids: Sequence[str]) -> None:
        """Take some edits out of the memory, each page at once; `edits` still has them."""
        memory = self.memory
        for page in dict.fromkeys(memory.page_of[edit_id] for edit_id in edit_ids):
            own = [edit_id for edit_id in edit_ids if memory.page_of.get(edit_id) == page]
            self.remove_terms(own, page)
            for edit_id in own:
                self.scales = np.delete(self.scales, memory.bank.remove(edit_id))
                del self.factors[edit_id], memory.page_of[edit_id]
            if page not in memory.page_of.values():
                memory.pages[page].zero_()  # also of what rounding left

    def pairs(self, edit_id: str) -> tuple[Tensor, Tensor]:
        """An edit's keys in all columns (n × D) and its values (n × d), float32, on the memory's device."""
        factors, weight = self.factors[edit_id], self.memory.weight
        row = np.array([self.memory.bank.ids.index(edit_id)])
        keys = weight.new_zeros(len(factors.keys), self.site.in_features)
        keys[:, self.memory.columns(row)[0].to(weight.device)] = factors.keys.to(weight.device)
        return keys, factors.values.to(weight.device)

    def snapshot(self, erased: Iterable[str]) -> tuple:
        """The state that `restore` brings back after some edits were erased and others written."""
        memory = self.memory
        pages = {memory.page_of[edit_id] for edit_id in erased} | {memory.last}
        weights = {page: memory.pages[page].clone() for page in pages}
        bank = (list(memory.bank.ids), memory.bank.packed.copy())
        return weights, dict(memory.page_of), dict(self.factors), self.scales.copy(), bank

    def restore(self, snapshot: tuple) -> None:
        weights, self.memory.page_of, self.factors, self.scales, bank = snapshot
        for page, weight in weights.items():
            self.memory.pages[page].copy_(weight)
        self.memory.bank.replace(*bank)

    # Saving ----------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        # A last page without edits is not saved.
        del self.memory.pages[1 + max(self.memory.page_of.values(), default=0) :]

    def scratch(self) -> dict[str, Tensor]:
        return {"pages": torch.tensor(len(self.memory.pages))}

    def load_scratch(self, tensors: dict[str, Tensor]) -> None:
        while len(self.memory.pages) < int(tensors.get("pages", 0)):
            self.memory.turn_page()

    def state(self) -> dict[str, Tensor]:
        memory, factors = self.memory, [self.factors[edit_id] for edit_id in self.memory.bank.ids]
        weight = torch.cat(memory.pages, dim=1)
        columns = weight.any(0).nonzero()[:, 0]
        empty = weight.new_zeros(0)
        number = {edit_id: i for i, edit_id in enumerate(self.edits)}
        tensors = {
            "columns": columns,
            "weight": weight[:, columns],
            "masks": torch.from_numpy(memory.bank.packed.view(np.int64).copy()),
            "order": torch.tensor([number[i] for i in memory.bank.ids], dtype=torch.int64),
            "factor_rows": torch.tensor([len(f.keys) for f in factors], dtype=torch.int64),
            "factor_scales": torch.from_numpy(self.scales.copy()),
            "factor_keys": torch.cat([f.keys for f in factors]) if factors else empty,
            "factor_values": torch.cat([f.values for f in factors]) if factors else empty,
        }
        if len(memory.pages) > 1:
            tensors["pages"] = torch.tensor([memory.page_of[edit_id] for edit_id in memory.bank.ids])
        if memory.permutation is not None:
            tensors["permutation"] = memory.permutation
        if memory.background is not None:
            tensors["background"] = memory.background
        if self._calibrated_at is not None:
            tensors |= {
                "tau": torch.tensor(memory.tau, dtype=torch.float64),
                "calibrated_at": torch.tensor(self._calibrated_at),
            }
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        memory, device, width = self.memory, self.memory.device, self.site.in_features
        edit_ids = list(self.edits)
        if memory.permutation is not None:
            memory.permutation = tensors["permutation"].to(device)
            if memory.permutation.sort().values.tolist() != list(range(width)):
                raise ValueError(f"permutation does not hold each of the {width} columns once")
        if "background" in tensors:
            memory.background = tensors["background"].to(device)
        if "tau" in tensors:
            memory.tau, self._calibrated_at = float(tensors["tau"]), int(tensors["calibrated_at"])
        memory.bank.replace([edit_ids[i] for i in tensors["order"]], tensors["masks"].numpy().view(np.uint64))
        if wrong := int((np.bitwise_count(memory.bank.packed).sum(1) != memory.bits).sum()):
            raise ValueError(f"{wrong} masks have another number of columns than k = {memory.k}")
        pages = tensors["pages"].tolist() if "pages" in tensors else [0] * len(edit_ids)
        memory.page_of = dict(zip(memory.bank.ids, pages, strict=True))
        for _ in range(max(pages, default=0)):
            memory.turn_page()
        page, column = tensors["columns"] // width, tensors["columns"] % width
        for i, weight in enumerate(memory.pages):
            weight[:, column[page == i].to(device)] = tensors["weight"][:, page == i].to(device)
        rows = tensors["factor_rows"].tolist()
        keys, values = tensors["factor_keys"].split(rows), tensors["factor_values"].split(rows)
        self.factors = {i: Factors(*pair) for i, *pair in zip(memory.bank.ids, keys, values, strict=True)}
        self.scales = tensors["factor_scales"].double().numpy().copy()
        if self.scales.shape != (len(edit_ids),):
            raise ValueError(f"{self.scales.shape} scales, expected those of {len(edit_ids)} edits")
