"""DEFER: the gated predictor that GRACE is compared with (Hartvigsen et al., NeurIPS 2023, section 4.1), modelled on
SERAC (Mitchell, Lin, Bosselut, Manning, Finn, "Memory-Based Model Editing at Scale", ICML 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memoir.editors.base import Editor, Written, target_losses
from memoir.editors.config import Count, EditorConfig, Layer, NonNegative, Rate, Share
from memoir.editors.depth import layer_before_last
from memoir.memory import pool_prompt
from memoir.models import LanguageModel
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, Span, Tail


def gate(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """g(a) = σ(w·a + b), how far to trust the predictor (DEFER; the scope classifier of SERAC, section 3).

    a (B × D) inputs of the projection at the last prompt token, weight w (D,), bias b (); returns (B,) in 0…1.
    """
    return torch.sigmoid(a @ weight + bias)


def predict(query: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """g(a) (B,) and v = V a + c (B × d) for queries a (B × D)."""
    query = query.to(parameters["weight"])
    opening = gate(query, parameters["gate_weight"], parameters["gate_bias"])
    return opening, query @ parameters["weight"].T + parameters["bias"]


def blend(y: Tensor, opening: Tensor, predicted: Tensor) -> Tensor:
    """g v + (1 − g) y (B × T × d): opening g (B,), predicted v (B × d), y (B × T × d)."""
    g = opening[:, None, None].to(y)
    return g * predicted[:, None].to(y) + (1 - g) * y


class GatedPredictor:
    """y' = v where g(a) ≥ θ, else y, with v = V a + c and a the input at the last prompt token.

    The gate is read once, on the prompt; all tokens of the sequence then get the same v, as published.

    parameters  gate_weight w (D,), gate_bias b (), weight V (d × D), bias c (d,), float32
    trained     False until the first edit: the gate stays shut
    """

    def __init__(self, site: Site, threshold: float, seed: int):
        self.threshold, self.trained = threshold, False
        generator, D, d = torch.Generator().manual_seed(seed), site.in_features, site.out_features

        def uniform(*shape: int) -> Tensor:
            # The published adaptor consists of two `nn.Linear`, which initialise their weights like this.
            return ((torch.rand(shape, generator=generator) * 2 - 1) / D**0.5).to(site.device)

        self.parameters = dict(gate_weight=uniform(D), gate_bias=uniform(), weight=uniform(d, D), bias=uniform(d))

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if not span.decoding and self.trained:
            opening, predicted = predict(pool_prompt(a, span.prompt.to(a.device), "last"), self.parameters)
            # The gate is open or shut, not in between: where it is shut, the answer is bit for bit the model's.
            span.memo[self] = (opening >= self.threshold).to(y.device), predicted.to(y.device)
        return blend(y, *span.memo[self]) if self in span.memo else y


class DEFER(Editor):
    """A gate and a linear predictor beside one projection; each edit trains both, on that edit alone."""

    name: ClassVar[str] = "defer"
    colour: ClassVar[str] = "#ca9161"
    marker: ClassVar[str] = "v"
    measure: ClassVar[str] = "gate"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: Layer  # block of the edited down-projection; WISE, appendix A.3: 27 of LLaMA and Mistral, 21 of GPT-J
        threshold: Share = 0.5  # θ, least gate value that lets the predictor answer; published: 0.5
        iterations: Count = 100  # gradient steps per edit at most; published: 100
        learning_rate: Rate = 7e-5  # of Adam; WISE, appendix A.3: 7e-5 (GRACE's own 1.0 does not converge there)
        scope_loss: NonNegative = 0.0  # weight of −log g on the edit, as in SERAC's scope classifier; published: 0
        stop_loss: NonNegative = 0.01  # nats per token at which an edit is done, 0: never; published: 0

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        # Without the scope loss a gate that starts shut may stay shut, as no gradient passes through it.
        return dict(layer=layer_before_last(model, 27 / 31), learning_rate=1e-2, scope_loss=1.0)

    def build(self) -> dict[Site, Patch]:
        self.site = self.model.site(self.config.layer)
        self.patch = GatedPredictor(self.site, self.config.threshold, self.config.seed)
        return {self.site: self.patch}

    def write(self, requests: list[EditRequest]) -> list[Written]:
        config, batch = self.config, self.encode_edits(requests)
        parameters = {name: value.clone().requires_grad_() for name, value in self.patch.parameters.items()}
        optimizer = torch.optim.Adam(parameters.values(), lr=config.learning_rate, fused=True)
        with self.detached() as model:
            tail = model.tail(self.site, batch)
            query = pool_prompt(tail.a, batch.prompt_mask, "last")
            for step in range(config.iterations + 1):
                self.check_cancelled()
                opening, predicted = predict(query, parameters)
                losses, opened = self._losses(tail, opening, predicted), opening >= config.threshold
                if step == 0:
                    first = self._losses(tail, opened & self.patch.trained, predicted).tolist()
                # One transfer for all numbers: each one makes the CPU wait for the GPU.
                *values, all_open = torch.cat([losses.detach(), opened.all()[None].to(losses)]).tolist()
                self.check_losses(values, requests)
                if step == config.iterations or (all_open and max(values) < config.stop_loss):
                    break
                optimizer.zero_grad()
                scope = -opening.clamp(min=1e-30).log()
                (losses + config.scope_loss * scope).mean().backward()
                optimizer.step()
            last = self._losses(tail, opened, predicted).tolist()
        self.patch.parameters = {name: value.detach() for name, value in parameters.items()}
        self.patch.trained = True
        return [Written(start, end, step) for start, end in zip(first, last, strict=True)]

    def _losses(self, tail: Tail, opening: Tensor, predicted: Tensor) -> Tensor:
        """(B,) mean loss of each target: opening (B,) is 0 or 1 in answers, and anything between while it learns."""
        y = tail.y.to(predicted)
        return target_losses(tail, blend(y, opening, predicted) - y)

    def lookup(self, prompts: Sequence[str]) -> list[Explanation]:
        """The gate's value as `score`, θ as `threshold`. One gate serves all edits, so it names none."""
        least, found = self.config.threshold, [Explanation()] * len(prompts)
        for numbers, a, prompt in self.model.site_inputs(self.site, prompts):
            openings, _ = predict(pool_prompt(a, prompt, "last"), self.patch.parameters)
            for i, opening in zip(numbers, openings, strict=True):
                fired = self.patch.trained and bool(opening >= least)
                found[i] = Explanation(score=float(opening), threshold=least, fired=fired)
        return found

    def state(self) -> dict[str, Tensor]:
        return {**self.patch.parameters, "trained": torch.tensor(self.patch.trained)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.patch.parameters = {name: tensors[name].to(old.device) for name, old in self.patch.parameters.items()}
        self.patch.trained = bool(tensors["trained"])
