"""WISE: "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models" (Wang, Li, Zhang,
Xu, Yao, Jiang, Xie, Huang, Chen, NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from memoir.editors.base import EditError, Editor, Written, target_losses
from memoir.editors.config import Count, EditorConfig, Layer, Natural, NonNegative, Positive, PositiveShare, Rate
from memoir.editors.depth import layer_before_last
from memoir.editors.prompts import augmented
from memoir.models import LanguageModel
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, Span, Tail, input_of, watching
from memoir.text import group_means


def routing_score(moved: Tensor, prompt: Tensor) -> Tensor:
    """Δ_act(x) = ‖A(x) · (W_v' − W_v)‖₂, the mean over the prompt's tokens (WISE, equation 3).

    moved   (B × T × d) what the side memory adds to the output, (W_v' − W_v) a
    prompt  (B × T) bool, the prompt's tokens: neither padding nor answer
    returns (B,)
    """
    weights = prompt.to(moved)
    return (moved.norm(dim=-1) * weights).sum(1) / weights.sum(1)


def margin_loss(edits: Tensor, irrelevant: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """L_a = max(0, Δ(x_i) − α) + max(0, β − Δ(x_e)) + max(0, γ − (Δ(x_e) − Δ(x_i))) (WISE, equation 5).

    The mean over all pairs of an edit and an irrelevant prompt, given their routing scores (B,) and (n,).
    """
    apart = edits[:, None] - irrelevant[None]
    return (irrelevant - alpha).relu().mean() + (beta - edits).relu().mean() + (gamma - apart).relu().mean()


def merge(shifts: Sequence[Tensor], density: float) -> Tensor:
    """W_v' − W_v = Ties(τ_1 … τ_k) (WISE, equation 8; Yadav et al., "TIES-Merging", NeurIPS 2023, algorithm 1).

    Keep the largest entries of each shift τ_i, a share `density`. For each entry, take the sign of the shifts' sum and
    average the shifts that have this sign. shifts (k of them, d × D); returns (d × D).
    """
    trimmed = [_trim(shift, density) for shift in shifts]
    if len(trimmed) == 1:
        return trimmed[0]
    elected = torch.where(sum(trimmed) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for shift in trimmed:
        agrees = shift.sign() == elected
        total += shift * agrees
        count += agrees
    return total / count.clamp(min=1)


def _trim(shift: Tensor, density: float) -> Tensor:
    keep = int(density * shift.numel())
    if int(shift.count_nonzero()) <= keep:
        return shift
    flat = shift.flatten()
    largest = flat.abs().topk(keep).indices
    return torch.zeros_like(flat).scatter(0, largest, flat[largest]).view_as(shift)


@dataclass
class Shard:
    """One subspace of a side memory (WISE, equation 7).

    mask   M_i (d × D) bool, the entries that its edits may change
    delta  τ_i = W_v'ⁱ − W_v (d × D) float32, zero outside of the mask
    edits  how many it holds
    """

    mask: Tensor
    delta: Tensor
    edits: int = 0


class SideMemories:
    """y' = W_v' a where Δ_act(x) > ε, else y = W_v a (WISE, equation 6), with ΔW = W_v' − W_v kept apart.

    All shards are merged into one side memory (WISE-Merge), or every `shards_per_memory` of them into one of several;
    a prompt then reads the memory with the largest score (WISE-Retrieve). The prompt is routed once, and the result
    holds for the whole sequence.

    shards      in the order of editing; the last one is being filled
    thresholds  ε of each side memory, the least Δ_act of its edits
    """

    def __init__(self, ratio: float, density: float, shards_per_memory: int | None):
        self.ratio, self.density, self.shards_per_memory = ratio, density, shards_per_memory
        self.set([], [])

    def set(self, shards: list[Shard], thresholds: list[float]) -> None:
        """Replace shards and thresholds; they are merged at the next forward call."""
        self.shards, self.thresholds = shards, thresholds
        self._merged: list[Tensor] | None = None

    def memory_of(self, shard: int) -> int:
        """The number of the side memory that a shard, by number, is merged into."""
        return shard // self.shards_per_memory if self.shards_per_memory else 0

    @property
    def merged(self) -> list[Tensor]:
        """ΔW (d × D) of each side memory."""
        if self._merged is None:
            groups: list[list[Tensor]] = [[] for _ in self.thresholds]
            for i, shard in enumerate(self.shards):
                groups[self.memory_of(i)].append(shard.delta)
            self._merged = [merge(group, self.density) for group in groups]
        return self._merged

    def route(self, a: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each row of a (B × T × D): the side memory with the largest score, that score and its ε, each (B,)."""
        scores = torch.stack([routing_score(_moved(delta, a), prompt.to(delta.device)) for delta in self.merged])
        score, memory = scores.max(dim=0)
        return memory, score, score.new_tensor(self.thresholds)[memory] * self.ratio

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if not span.decoding and self.shards:
            memory, score, threshold = self.route(a, span.prompt)
            chosen = torch.where(score > threshold, memory, -1).to(a.device)
            rows_of = {i: (chosen == i).nonzero()[:, 0] for i in range(len(self.merged))}
            span.memo[self] = {i: rows for i, rows in rows_of.items() if len(rows)}
        for memory, rows in span.memo.get(self, {}).items():
            edited = y[rows].float() + _moved(self.merged[memory], a[rows]).to(y.device)
            y = y.index_copy(0, rows, edited.to(y.dtype))
        return y


def _moved(delta: Tensor, a: Tensor) -> Tensor:
    """(W_v' − W_v) a in float32: delta (d × D), a (… × D)."""
    return a.to(delta) @ delta.T


class WISE(Editor):
    """Edits live in a side copy of one down-projection; a prompt reads it if it changes the prompt's outputs enough."""

    name: ClassVar[str] = "wise"
    colour: ClassVar[str] = "#029e73"
    marker: ClassVar[str] = "s"
    measure: ClassVar[str] = "routing score"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: Layer  # block of the edited down-projection; paper: 27 of LLaMA and Mistral, 21 of GPT-J
        mask_ratio: PositiveShare = 0.2  # ρ, share of a shard's entries that learn; paper: 0.2
        edits_per_shard: Count = 500  # after so many edits another shard begins; paper: T / k, with k = 2 and T = 1000
        retrieve: bool = False  # WISE-Retrieve: a side memory for every `shards_per_memory` shards; False: WISE-Merge
        shards_per_memory: Count = 2  # k of WISE-Retrieve; paper: 2
        density: PositiveShare = 0.53  # share of a shift's entries that TIES keeps; EasyEdit: 0.53
        alpha: NonNegative = 5.0  # α, largest score that irrelevant prompts should have; paper: 5
        beta: NonNegative = 20.0  # β, least score that edits should have; paper: 20
        gamma: NonNegative = 10.0  # γ, least distance between the two; paper: 10
        # Unit of α, β, γ. absolute: as published; output: the mean ‖W_v a‖ of the background prompts
        margin_unit: Literal["absolute", "output"] = "absolute"
        threshold_ratio: Positive = 0.88  # the threshold, × ε; EasyEdit: 0.88
        irrelevant: Count = 1  # background prompts drawn for each edit; EasyEdit: 1
        iterations: Count = 70  # gradient steps per edit at most; EasyEdit: 70
        learning_rate: Rate = 1.0  # of SGD; paper: 1.0
        # constant: the paper's; relative: learning_rate × ‖h‖² / (ρ ‖a‖²), with h the stream after the block
        step_rule: Literal["constant", "relative"] = "constant"
        weight_decay: NonNegative = 1e-5  # of SGD, on τ; EasyEdit: 1e-5, on W_v + τ and outside of the mask too
        norm_limit: NonNegative = 1.0  # largest absolute value of an entry of τ, 0: no limit; EasyEdit: 1.0
        stop_loss: NonNegative = 0.02  # loss, margins included, at which an edit is done, 0: never; EasyEdit: 0.02
        prefixes: Natural = 10  # copies of the prompt behind random prefixes; paper: 10
        prefix_tokens: Count = 10  # tokens in a random prefix; paper: 10

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        # On SmolLM2, whose outputs have size 88 and where a relative rate of 1 is one of 1600, these are the published
        # margins and rate.
        margins = dict(margin_unit="output", alpha=0.06, beta=0.23, gamma=0.11)
        return dict(layer=layer_before_last(model, 27 / 31), step_rule="relative", learning_rate=6e-4, **margins)

    def build(self) -> dict[Site, Patch]:
        config = self.config
        self.site = self.model.site(config.layer)
        shards_per_memory = config.shards_per_memory if config.retrieve else None
        self.memories = SideMemories(config.threshold_ratio, config.density, shards_per_memory)
        self._unit: Tensor | None = None
        self._prefixes: list[str] | None = None
        return {self.site: self.memories}

    def prepare(self) -> None:
        """Sample the random prefixes, and measure the unit of α, β and γ; once."""
        if not self.background:
            raise EditError("wise needs background prompts for its margins: make_editor(..., background=[texts])")
        if self._prefixes is None:
            self._prefixes = self.sample_texts(self.config.prefixes, self.config.prefix_tokens)
        if self._unit is None and self.config.margin_unit == "absolute":
            self._unit = torch.ones((), dtype=torch.float64)
        elif self._unit is None:
            self._unit = self.model.shared(("output", self.site.name, *self.background), self._output_size)

    @torch.no_grad()
    def _output_size(self) -> Tensor:
        """The mean of ‖W_v a‖ over the tokens of the background prompts, () float64."""
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(self.background), 32):
            with self.detached() as model, watching(self.site) as calls:
                batch = model.encode(self.background[start : start + 32])
                model.forward(batch, positions=1)
            total += routing_score(calls[0][1].float(), batch.prompt_mask).double().cpu().sum()
        return total / len(self.background)

    def write(self, requests: list[EditRequest]) -> list[Written]:
        shards, thresholds = list(self.memories.shards), list(self.memories.thresholds)
        if not shards or shards[-1].edits >= self.config.edits_per_shard:
            shards.append(self._new_shard(len(shards)))
        shard, memory = shards[-1], self.memories.memory_of(len(shards) - 1)
        prompts, targets, owner = augmented(requests, self._prefixes)
        with self.detached() as model:
            irrelevant = self._irrelevant(seed=sum(s.edits for s in shards))
            tail = model.tail(self.site, model.encode(prompts, targets, end=self.config.learn_stop))
            delta, outcomes = self._learn(requests, tail, torch.tensor(owner), shard, irrelevant)
        # ε = min(ε, Δ_act(x_e)) over the bare prompts, as they will be asked (WISE, algorithm 1).
        bare = slice(None, None, len(prompts) // len(requests))
        scores = routing_score(_moved(delta, tail.a[bare]), tail.batch.prompt_mask[bare].to(delta.device))
        thresholds[memory:] = [min([float(scores.min()), *thresholds[memory:]])]
        shards[-1] = Shard(shard.mask, delta, shard.edits + len(requests))
        self.memories.set(shards, thresholds)
        return outcomes

    def _new_shard(self, number: int) -> Shard:
        """An empty shard with its own random mask, drawn by seed and number."""
        shape = (self.site.out_features, self.site.in_features)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
        mask = (torch.rand(shape, generator=generator) < self.config.mask_ratio).to(self.site.device)
        return Shard(mask, torch.zeros(shape, device=mask.device))

    @torch.no_grad()
    def _irrelevant(self, seed: int) -> tuple[Tensor, Tensor]:
        """The projection's inputs a (n × T × D) on randomly drawn background prompts, and their tokens (n × T) bool."""
        draw = np.random.default_rng([self.config.seed, seed])
        chosen = draw.choice(len(self.background), min(self.config.irrelevant, len(self.background)), replace=False)
        batch = self.model.encode([self.background[i] for i in chosen])
        return input_of(self.site, lambda: self.model.forward(batch, positions=1)), batch.prompt_mask

    def _learn(
        self, requests: list[EditRequest], tail: Tail, owner: Tensor, shard: Shard, irrelevant: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, list[Written]]:
        """SGD on the shard's own entries: L_edit = −log P(y_e | x_e) + L_a (WISE, section 2.3.2). Returns τ (d × D).

        owner  (B,) int64, the request that each row of the tail belongs to
        """
        config, batch, unit = self.config, tail.batch, float(self._unit)
        at = batch.leading.nonzero(as_tuple=True)
        delta, owner, first = shard.delta, owner.to(tail.y.device), None
        keys, (others, others_prompt) = tail.a[at].to(delta), (tensor.to(delta.device) for tensor in irrelevant)
        rate = config.learning_rate
        if config.step_rule == "relative":
            rate *= tail.stream_norm(batch.counted_at) ** 2 / (config.mask_ratio * float(keys.square().sum(1).mean()))
        for steps in range(config.iterations + 1):
            self.check_cancelled()
            delta = delta.detach().requires_grad_()
            moved = torch.zeros_like(tail.y, dtype=torch.float32)
            moved = moved.index_put(at, _moved(delta, keys).to(tail.y.device))
            losses = group_means(target_losses(tail, moved), owner, len(requests))
            own = routing_score(moved, batch.prompt_mask).to(delta.device) / unit
            other = routing_score(_moved(delta, others), others_prompt) / unit
            loss = losses.mean().to(delta.device) + margin_loss(own, other, config.alpha, config.beta, config.gamma)
            # One transfer for all numbers: each one makes the CPU wait for the GPU.
            *values, total = torch.cat([losses.detach(), loss.detach()[None].to(losses)]).tolist()
            last = self.check_losses(values, requests)
            first = first or last
            if steps == config.iterations or total < config.stop_loss:
                break
            (gradient,) = torch.autograd.grad(loss * len(requests), delta)
            # Decay and step leave τ zero outside of the mask.
            delta = (1 - rate * config.weight_decay) * delta.detach() - rate * (shard.mask * gradient)
            if config.norm_limit:
                delta.clamp_(-config.norm_limit, config.norm_limit)
        return delta.detach(), [Written(*losses, steps) for losses in zip(first, last, strict=True)]

    @torch.no_grad()
    def lookup(self, prompts: Sequence[str]) -> list[Explanation]:
        """The routing score, and ε × threshold_ratio as `threshold`. A memory holds many edits, so none is named."""
        found = [Explanation()] * len(prompts)
        for numbers, a, prompt in self.model.site_inputs(self.site, prompts) if self.memories.shards else ():
            _, scores, thresholds = self.memories.route(a, prompt)
            for i, score, threshold in zip(numbers, scores.tolist(), thresholds.tolist(), strict=True):
                found[i] = Explanation(score=score, threshold=threshold, fired=score > threshold)
        return found

    def state(self) -> dict[str, Tensor]:
        shards = self.memories.shards
        tensors = {
            "edits": torch.tensor([shard.edits for shard in shards], dtype=torch.int64),
            "thresholds": torch.tensor(self.memories.thresholds, dtype=torch.float64),
        }
        if self._unit is not None:
            tensors["unit"] = self._unit
        for i, shard in enumerate(shards):
            tensors[f"mask.{i}"] = torch.from_numpy(np.packbits(shard.mask.cpu().numpy()))
            tensors[f"values.{i}"] = shard.delta[shard.mask]
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        shape, device = (self.site.out_features, self.site.in_features), self.site.device
        shards = []
        for i, edits in enumerate(tensors["edits"].tolist()):
            bits = np.unpackbits(tensors[f"mask.{i}"].numpy(), count=shape[0] * shape[1])
            mask = torch.from_numpy(bits.astype(bool)).view(shape).to(device)
            delta = torch.zeros(shape, device=device).masked_scatter(mask, tensors[f"values.{i}"].to(device))
            shards.append(Shard(mask, delta, edits))
        self.memories.set(shards, tensors["thresholds"].tolist())
        self._unit = tensors["unit"].reshape(()) if "unit" in tensors else None
