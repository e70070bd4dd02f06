"""FT: fine-tuning one projection, the plainest baseline. FT-L is ROME's (Meng, Bau, Andonian, Belinkov, NeurIPS 2022,
appendix E), FT-M is by Zhang et al., "A Comprehensive Study of Knowledge Editing for Large Language Models", 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memoir.editors.base import Editor, Written
from memoir.editors.config import Count, EditorConfig, Layer, NonNegative, Rate
from memoir.editors.depth import layer_at
from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.sites import DeltaWeight, Patch, Site, places


class FT(Editor):
    """Adam on ΔW of one site, L = −mean_j log p(o_j | x, o_<j) over the target's tokens o_j (FT-M), or
    −mean_j log p(o_j | x), all of them at the last prompt position (FT-L)."""

    name: ClassVar[str] = "ft"
    colour: ClassVar[str] = "#de8f05"
    marker: ClassVar[str] = "*"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: Layer  # block of the edited down-projection; EasyEdit: 21 of LLaMA, Mistral and GPT-J
        # Loss on all target tokens each at its own position (FT-M), or all at the last prompt position (FT-L, ROME's).
        variant: Literal["FT-M", "FT-L"] = "FT-M"
        iterations: Count = 25  # gradient steps per edit at most; EasyEdit: 25
        learning_rate: Rate = 5e-4  # of Adam; EasyEdit: 5e-4
        norm_limit: NonNegative = 0.0  # L∞ bound on what one edit changes in any weight, 0: none; ROME: 5e-5 on GPT-J
        stop_loss: NonNegative = 0.01  # nats per token at which an edit is done, 0: never; ROME: 0.01

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        return dict(layer=layer_at(model, 21 / 31))

    def build(self) -> dict[Site, Patch]:
        self.site = self.model.site(self.config.layer)
        self.patch = DeltaWeight(self.site, self.site.device)
        return {self.site: self.patch}

    def write(self, requests: list[EditRequest]) -> list[Written]:
        config, tail = self.config, self.model.tail(self.site, self.encode_edits(requests))
        batch, before, counted = tail.batch, self.patch.delta, tail.batch.counted
        if config.variant == "FT-L":
            counted = counted & (counted.cumsum(1) == 1)  # the position that predicts the target's first token
        # Tokens after a row's last counted position cannot change its loss.
        used = (counted.flip(1).cumsum(1).flip(1) > 0) & batch.attention_mask
        asked, changed = places(counted), places(used)
        keys, delta = tail.inputs(changed).to(before), before.clone()
        optimizer = torch.optim.Adam([delta], lr=config.learning_rate, fused=True)
        history: list[list[float]] = []
        while True:
            self.check_cancelled()
            change = (keys @ (delta - before).T).to(tail.y.device).requires_grad_()
            logits = tail.logits(change, asked, changed)
            losses = batch.losses(logits[batch.label_rows] if config.variant == "FT-L" else logits)
            history.append(self.check_losses(losses.tolist(), requests))
            steps = len(history) - 1
            if steps == config.iterations or max(history[-1]) < config.stop_loss:
                self.patch.set(delta)
                return [Written(first, last, steps) for first, last in zip(history[0], history[-1], strict=True)]
            (gradient,) = torch.autograd.grad(losses.mean(), change)
            # The keys are fixed while an edit is learned, so ∂L/∂ΔW = Σ_t δ_t a_tᵀ needs no other backward pass.
            delta.grad = gradient.to(keys).T @ keys
            optimizer.step()
            if config.norm_limit:
                delta.copy_(before + (delta - before).clamp_(-config.norm_limit, config.norm_limit))

    def state(self) -> dict[str, Tensor]:
        return {"delta": self.patch.delta}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.patch.set(tensors["delta"])
