"""WISE: "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing of Large Language Models" (Wang, Li, Zhang,
Xu, Yao, Jiang, Xie, Huang, Chen, NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from memoir.editors.base import EditError, Editor, EditorConfig, Written, target_losses
from memoir.models import group_means
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, Span, Tail, input_of, watching

MARGIN_UNITS = ("absolute", "output")


def routing_score(moved: Tensor, prompt: Tensor) -> Tensor:
    """Δ_act(x) = ‖A(x) · (W_v' − W_v)‖₂, the mean over the prompt's tokens (WISE, equation 3).

    moved   (B × T × d) what the side memory adds to the output, (W_v' − W_v) a
    prompt  (B × T) bool, the prompt's tokens: neither padding nor answer
    returns (B,)
    """
    weights = prompt.to(moved)
    return (moved.norm(dim=-1) * weights).sum(1) / weights.sum(1)


def margin_loss(edits: Tensor, irrelevant: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    """L_a = max(0, Δ(x_i) − α) + max(0, β − Δ(x_e)) + max(0, γ − (Δ(x_e) − Δ(x_i))) (WISE, equation 5), a mean over all
    pairs of edits (B,) and irrelevant prompts (n,), which are routing scores and need not come in equal numbers."""
    apart = edits[:, None] - irrelevant[None]
    return (irrelevant - alpha).relu().mean() + (beta - edits).relu().mean() + (gamma - apart).relu().mean()


def merge(shifts: Sequence[Tensor], density: float) -> Tensor:
    """W_v' − W_v = Ties(τ_1 … τ_k) (WISE, equation 8; Yadav et al., "TIES-Merging", NeurIPS 2023, algorithm 1).

    Trim each shift τ_i to its share `density` of largest entries, elect the sign of each entry's sum, and take the mean
    of those shifts that have this sign there. shifts (k of them, d × D); returns (d × D).
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
    """y' = W_v' a where Δ_act(x) > ε, else y = W_v a (WISE, equation 6): ΔW = W_v' − W_v is kept apart.

    Shards are merged into one side memory, or, `shards_per_memory` at a time, into several, of which a prompt meets the
    one with the largest score (WISE-Retrieve). Decided on the prompt, and for the whole sequence.

    shards      in the order of editing; the last one is being filled
    thresholds  ε of each side memory, the least Δ_act of its edits
    """

    def __init__(self, ratio: float, density: float, shards_per_memory: int | None):
        self.ratio, self.density, self.shards_per_memory = ratio, density, shards_per_memory
        self.set([], [])

    def set(self, shards: list[Shard], thresholds: list[float]) -> None:
        """Take over shards and thresholds; they are merged when they are first asked for."""
        self.shards, self.thresholds = shards, thresholds
        self._merged: list[Tensor] | None = None

    def memory_of(self, shard: int) -> int:
        """The side memory that a shard, by number, is merged into."""
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
        """For each row of a (B × T × D): the side memory that scores most, its score and its ε, each (B,)."""
        scores = torch.stack([routing_score(_moved(delta, a), prompt.to(delta.device)) for delta in self.merged])
        score, memory = scores.max(dim=0)
        return memory, score, score.new_tensor(self.thresholds)[memory] * self.ratio

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if span.decoding:
            readers = span.memo.get(self, {})
        else:
            readers = span.memo[self] = self._readers(a, span.prompt) if self.shards else {}
        for memory, rows in readers.items():
            edited = (y[rows].float() + _moved(self.merged[memory], a[rows]).to(y.device)).to(y.dtype)
            y = y.index_copy(0, rows, edited)
        return y

    def _readers(self, a: Tensor, prompt: Tensor) -> dict[int, Tensor]:
        """By side memory the rows of a (B × T × D) that read it, (r,) int64."""
        memory, score, threshold = self.route(a, prompt)
        chosen = torch.where(score > threshold, memory, -1).to(a.device)
        found = {i: (chosen == i).nonzero()[:, 0] for i in range(len(self.merged))}
        return {i: rows for i, rows in found.items() if len(rows)}


def _moved(delta: Tensor, a: Tensor) -> Tensor:
    """(W_v' − W_v) a in float32: delta (d × D), a (… × D)."""
    return a.to(delta) @ delta.T


class WISE(Editor):
    """Edits live in a side copy of one down-projection, which prompts reach whose activation it changes enough."""

    name: ClassVar[str] = "wise"
    measure: ClassVar[str] = "routing score"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: int  # block of the edited down-projection; paper: 27 of LLaMA and Mistral, 21 of GPT-J
        mask_ratio: float = 0.2  # ρ, share of a shard's entries that learn, 0…1; paper: 0.2
        edits_per_shard: int = 500  # after so many edits another shard begins; paper: T / k, with k = 2 and T = 1000
        retrieve: bool = False  # WISE-Retrieve: a side memory for every `shards_per_memory` shards; False: WISE-Merge
        shards_per_memory: int = 2  # k of WISE-Retrieve, ≥ 1; paper: 2
        density: float = 0.53  # share of a shift's entries that TIES does not trim, 0…1; EasyEdit: 0.53
        alpha: float = 5.0  # α, most that irrelevant prompts may score; paper: 5
        beta: float = 20.0  # β, least that edits should score; paper: 20
        gamma: float = 10.0  # γ, least distance between the two; paper: 10
        margin_unit: str = "absolute"  # of α, β, γ. absolute: as published; output: mean ‖W_v a‖ of background prompts
        threshold_ratio: float = 0.88  # share of the least score of an edit that routes, > 0; EasyEdit: 0.88
        irrelevant: int = 1  # background prompts drawn for each edit, ≥ 1; EasyEdit: 1
        iterations: int = 70  # gradient steps per edit at most; EasyEdit: 70
        learning_rate: float = 1.0  # of SGD, > 0; paper: 1.0
        step_rule: str = "constant"  # constant: the paper's; relative: learning_rate × ‖h‖² / (ρ ‖a‖²), h the stream
        weight_decay: float = 1e-5  # of SGD, on τ; EasyEdit: 1e-5, on W_v + τ and outside of the mask too
        norm_limit: float = 1.0  # most that any entry of τ may be, 0: no limit; EasyEdit: 1.0
        stop_loss: float = 0.02  # loss, margins included, at which an edit is done; 0: never; EasyEdit: 0.02
        prefixes: int = 10  # copies of the prompt behind random prefixes; paper: 10
        prefix_tokens: int = 10  # tokens in a random prefix; paper: 10

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("mask_ratio", "density"):
                self.require(0 < getattr(self, name) <= 1, name, "a share, more than 0 and at most 1")
            for name in ("edits_per_shard", "shards_per_memory", "irrelevant", "iterations", "prefix_tokens"):
                self.require(getattr(self, name) >= 1, name, "at least 1")
            for name in ("alpha", "beta", "gamma", "weight_decay", "norm_limit", "stop_loss", "prefixes"):
                self.require(getattr(self, name) >= 0, name, "0 or more")
            for name in ("threshold_ratio", "learning_rate"):
                self.require(getattr(self, name) > 0, name, "more than 0")
            self.require(self.margin_unit in MARGIN_UNITS, "margin_unit", f"one of {', '.join(MARGIN_UNITS)}")
            self.require(self.step_rule in ("constant", "relative"), "step_rule", "constant or relative")

    config: Config

    def build(self) -> dict[Site, Patch]:
        config = self.config
        self.site = self.model.site(config.layer)
        shards_per_memory = config.shards_per_memory if config.retrieve else None
        self.memories = SideMemories(config.threshold_ratio, config.density, shards_per_memory)
        self._unit: Tensor | None = None
        self._prefixes: list[str] | None = None
        return {self.site: self.memories}

    # Writing ---------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Sample the random prefixes, and measure what α, β and γ are multiples of; once."""
        if not self.background:
            raise EditError("wise needs background prompts for its margins: make_editor(..., background=[texts])")
        if self._prefixes is None:
            self._prefixes = self.sample_texts(self.config.prefixes, self.config.prefix_tokens)
        if self._unit is None:
            if self.config.margin_unit == "output":
                self._unit = self.model.shared(("output", self.site.name, *self.background), self._output_size)
            else:
                self._unit = torch.ones((), dtype=torch.float64)

    def write(self, requests: list[EditRequest]) -> list[Written]:
        shards, thresholds = list(self.memories.shards), list(self.memories.thresholds)
        if not shards or shards[-1].edits >= self.config.edits_per_shard:
            shards.append(self._new_shard(len(shards)))
        shard, memory = shards[-1], self.memories.memory_of(len(shards) - 1)
        prompts, targets, owner = self._augmented(requests)
        with self.detached() as model:
            irrelevant = self._irrelevant(seed=sum(s.edits for s in shards))
            tail = model.tail(self.site, model.encode(prompts, targets, end=self.config.learn_stop))
            delta, outcomes = self._learn(requests, tail, shard, torch.tensor(owner), *irrelevant)
        # ε = min(ε, Δ_act(x_e)) over the prompts as they will be asked, without prefixes (WISE, algorithm 1).
        originals = [owner.index(i) for i in range(len(requests))]
        scores = routing_score(_moved(delta, tail.a[originals]), tail.batch.prompt_mask[originals].to(delta.device))
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

    def _augmented(self, requests: list[EditRequest]) -> tuple[list[str], list[str], list[int]]:
        """Prompts and targets, each behind `prefixes` random prefixes too, and the request that each row belongs to."""
        prompts, targets, owner = [], [], []
        for i, request in enumerate(requests):
            copies = [request.prompt, *(f"{prefix}. {request.prompt}" for prefix in self._prefixes)]
            prompts += copies
            targets += [request.target] * len(copies)
            owner += [i] * len(copies)
        return prompts, targets, owner

    @torch.no_grad()
    def _output_size(self) -> Tensor:
        """The mean of ‖W_v a‖ over the tokens of the background prompts, () float64."""
        total = 0.0
        with self.detached() as model:
            for start in range(0, len(self.background), 32):
                batch = model.encode(self.background[start : start + 32])
                with watching(self.site) as seen:
                    model.forward(batch, positions=1)
                total += float(routing_score(seen[0][1].float(), batch.prompt_mask).sum())
        return torch.tensor(total / len(self.background), dtype=torch.float64)

    def _irrelevant(self, seed: int) -> tuple[Tensor, Tensor]:
        """Some background prompts: their a (n × T × D) and their tokens (n × T) bool; others for every edit."""
        draw = np.random.default_rng([self.config.seed, seed])
        chosen = draw.choice(len(self.background), min(self.config.irrelevant, len(self.background)), replace=False)
        return self._inputs([self.background[i] for i in chosen])

    @torch.no_grad()
    def _inputs(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The projection's inputs a (B × T × D) on texts, and the prompts' tokens (B × T) bool."""
        batch = self.model.encode(texts)
        return input_of(self.site, lambda: self.model.forward(batch, positions=1)), batch.prompt_mask

    def _learn(
        self,
        requests: list[EditRequest],
        tail: Tail,
        shard: Shard,
        owner: Tensor,
        irrelevant: Tensor,
        irrelevant_prompt: Tensor,
    ) -> tuple[Tensor, list[Written]]:
        """SGD on the shard's own entries: L_edit = −log P(y_e | x_e) + L_a (WISE, section 2.3.2). Returns τ (d × D).

        owner       (B,) int64, the request that each row of the tail belongs to
        irrelevant  (n × T × D) inputs of the projection on background prompts, their tokens in irrelevant_prompt
        """
        config, batch, unit = self.config, tail.batch, float(self._unit)
        at = batch.leading.nonzero(as_tuple=True)
        keys = tail.a[at].to(shard.delta)
        rate = config.learning_rate
        if config.step_rule == "relative":
            rate *= tail.stream_norm(batch.counted_at) ** 2 / (config.mask_ratio * float(keys.square().sum(1).mean()))
        delta, first, steps = shard.delta, None, 0
        owner = owner.to(tail.y.device)
        while True:
            self.check_cancelled()
            delta = delta.detach().requires_grad_()
            change = _moved(delta, keys).to(tail.y.device)
            moved = torch.zeros_like(tail.y, dtype=torch.float32).index_put(at, change)
            losses = group_means(target_losses(tail, moved), owner, len(requests))
            margins = margin_loss(
                routing_score(moved, batch.prompt_mask).to(delta.device) / unit,
                routing_score(_moved(delta, irrelevant), irrelevant_prompt.to(delta.device)) / unit,
                config.alpha,
                config.beta,
                config.gamma,
            )
            loss = losses.mean().to(delta.device) + margins
            *last, total = torch.cat([losses.detach(), loss.detach()[None].to(losses)]).tolist()  # a GPU waits once
            first = first or last
            for request, found in zip(requests, last, strict=True):
                self.check_loss(found, request)
            if steps == config.iterations or total < config.stop_loss:
                return delta.detach(), [Written(start, end, steps) for start, end in zip(first, last, strict=True)]
            (gradient,) = torch.autograd.grad(loss * len(requests), delta)
            # Decay and step leave τ zero outside of the mask.
            delta = (1 - rate * config.weight_decay) * delta.detach() - rate * (shard.mask * gradient)
            if config.norm_limit:
                delta.clamp_(-config.norm_limit, config.norm_limit)
            steps += 1

    # Asking, saving --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explain(self, prompt: str) -> Explanation:
        """The routing score as `overlap`, the threshold ε that it must exceed as `tau`; one memory holds many edits."""
        if not self.memories.shards:
            return Explanation(edit_id=None, score=None, threshold=None, fired=False, contribution=0.0)
        _, score, threshold = self.memories.route(*self._inputs([prompt]))
        return Explanation(
            edit_id=None,
            score=float(score),
            threshold=float(threshold),
            fired=bool(score > threshold),
            contribution=self.contribution(prompt),
        )

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
