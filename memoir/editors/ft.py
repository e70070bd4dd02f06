"""FT: fine-tuning one projection, the plainest baseline. FT-L is ROME's (Meng, Bau, Andonian, Belinkov, NeurIPS 2022,
appendix E), FT-M that of Zhang et al., "A Comprehensive Study of Knowledge Editing for Large Language Models", 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memoir.editors.base import Editor, EditorConfig, Written
from memoir.records import EditRequest
from memoir.sites import DeltaWeight, Patch, Site, places

VARIANTS = ("FT-M", "FT-L")


class FT(Editor):
    """Adam on ΔW of one site, L = −mean_j log p(o_j | x, o_<j) over the target's tokens o_j (FT-M), or
    −mean_j log p(o_j | x), all of them at the last prompt position (FT-L)."""

    name: ClassVar[str] = "ft"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: int  # block of the edited down-projection; EasyEdit: 21 of LLaMA, Mistral and GPT-J
        variant: str = "FT-M"  # FT-M: loss on all target tokens; FT-L: at the last prompt position, as in ROME
        iterations: int = 25  # gradient steps per edit at most; EasyEdit: 25
        learning_rate: float = 5e-4  # of Adam, > 0; EasyEdit: 5e-4
        norm_limit: float = 0.0  # L∞ bound on what one edit changes in any weight, 0: none; ROME: 5e-5 on GPT-J
        stop_loss: float = 0.01  # nats per token at which an edit is done; 0: never; ROME: 0.01

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.variant in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}")
            self.require(self.iterations >= 1, "iterations", "at least 1")
            self.require(self.learning_rate > 0, "learning_rate", "more than 0")
            self.require(self.norm_limit >= 0, "norm_limit", "0 (none) or more")
            self.require(self.stop_loss >= 0, "stop_loss", "0 (never) or more")

    config: Config

    def build(self) -> dict[Site, Patch]:
        self.site = self.model.site(self.config.layer)
        self.patch = DeltaWeight(self.site, self.site.device)
        return {self.site: self.patch}

    def write(self, requests: list[EditRequest]) -> list[Written]:
        config, tail = self.config, self.model.tail(self.site, self.encode_edits(requests))
        batch = tail.batch
        counted = batch.counted
        if config.variant == "FT-L":
            counted = counted & (counted.cumsum(1) == 1)  # the position that predicts the target's first token
        # What lies behind a row's last counted place cannot change its loss.
        used = (counted.flip(1).cumsum(1).flip(1) > 0) & batch.attention_mask
        before = self.patch.delta
        asked, changed = places(counted), places(used)
        keys, delta = tail.inputs(changed).to(before), before.clone()
        optimizer = torch.optim.Adam([delta], lr=config.learning_rate, fused=True)
        first, last, steps = None, None, 0
        for _ in range(config.iterations + 1):
            self.check_cancelled()
            change = (keys @ (delta - before).T).to(tail.y.device).requires_grad_()
            logits = tail.logits(change, asked, changed)
            if config.variant == "FT-L":
                logits = logits[batch.label_rows]
            losses = batch.losses(logits)
            last = losses.tolist()
            first = first or last
            for request, loss in zip(requests, last, strict=True):
                self.check_loss(loss, request)
            if steps == config.iterations or max(last) < config.stop_loss:
                break
            (gradient,) = torch.autograd.grad(losses.mean(), change)
            # The keys are fixed while an edit is learned, so ∂L/∂ΔW = Σ_t δ_t a_tᵀ needs no other backward pass.
            delta.grad = gradient.to(keys).T @ keys
            optimizer.step()
            if config.norm_limit:
                delta = delta.copy_(before + (delta - before).clamp_(-config.norm_limit, config.norm_limit))
            steps += 1
        self.patch.set(delta)
        return [Written(start, end, steps) for start, end in zip(first, last, strict=True)]

    def state(self) -> dict[str, Tensor]:
        return {"delta": self.patch.delta}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.patch.set(tensors["delta"])
