"""DEFER: the gated predictor that GRACE is compared with (Hartvigsen et al., NeurIPS 2023, section 4.1), modelled on
SERAC (Mitchell, Lin, Bosselut, Manning, Finn, "Memory-Based Model Editing at Scale", ICML 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memoir.editors.base import Editor, EditorConfig, Written, target_losses
from memoir.memory import pool_prompt
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, Span, Tail, input_of


def gate(a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """g(a) = σ(w·a + b), how far to trust the predictor (DEFER; the scope classifier of SERAC, section 3).

    a (B × D) inputs of the projection at the last prompt token, weight w (D,), bias b (); returns (B,) in 0…1.
    """
    return torch.sigmoid(a @ weight + bias)


def blend(y: Tensor, predicted: Tensor, opening: Tensor) -> Tensor:
    """g v + (1 − g) y: y (B × T × d), predicted v (B × d), opening g (B,), of 0 and 1 at inference; (B × T × d)."""
    g = opening[:, None, None].to(y)
    return g * predicted[:, None].to(y) + (1 - g) * y


class GatedPredictor:
    """y' = v where g(a) ≥ θ, else y, with v = V a + c and a the input at the last prompt token.

    Decided on the prompt, and for the whole sequence: its every token gets the same v, as published.

    parameters  gate_weight w (D,), gate_bias b (), weight V (d × D), bias c (d,), float32
    trained     whether an edit was made; before that there is nothing to trust
    """

    def __init__(self, site: Site, threshold: float, seed: int):
        self.threshold, self.trained = threshold, False
        generator, D, d = torch.Generator().manual_seed(seed), site.in_features, site.out_features

        def uniform(*shape: int) -> Tensor:
            # The published adaptor is made of two `nn.Linear`, which start like this.
            return ((torch.rand(shape, generator=generator) * 2 - 1) / D**0.5).to(site.device)

        self.parameters = dict(gate_weight=uniform(D), gate_bias=uniform(), weight=uniform(d, D), bias=uniform(d))

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if span.decoding:
            decision = span.memo.get(self)
            return y if decision is None else blend(y, *decision)
        if not self.trained:
            return y
        opening, predicted = predict(pool_prompt(a, span.prompt.to(a.device), "last"), self.parameters)
        # Hard at inference: an answer is the model's or the predictor's, and bit for bit the model's where it is.
        decision = span.memo[self] = tuple(x.to(y.device) for x in (predicted, opening >= self.threshold))
        return blend(y, *decision)


def predict(query: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """g(a) (B,) and v = V a + c (B × d) for queries a (B × D)."""
    query = query.to(parameters["weight"])
    opening = gate(query, parameters["gate_weight"], parameters["gate_bias"])
    return opening, query @ parameters["weight"].T + parameters["bias"]


class DEFER(Editor):
    """A gate and a linear predictor beside one projection, both trained on every edit as it comes, on nothing else."""

    name: ClassVar[str] = "defer"
    measure: ClassVar[str] = "gate"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: int  # block of the edited down-projection; WISE, appendix A.3: 27 of LLaMA and Mistral, 21 of GPT-J
        threshold: float = 0.5  # θ, least gate value that lets the predictor answer, 0…1; published: 0.5
        iterations: int = 100  # gradient steps per edit at most; published: 100
        learning_rate: float = 7e-5  # of Adam, > 0; WISE, appendix A.3: 7e-5 (GRACE's own 1.0 does not converge there)
        scope_loss: float = 0.0  # weight of −log g on the edit, as SERAC trains its scope classifier; 0: as published
        stop_loss: float = 0.01  # nats per token at which an edit is done; 0: never, as published

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(0 <= self.threshold <= 1, "threshold", "a gate value, 0 to 1")
            self.require(self.iterations >= 1, "iterations", "at least 1")
            self.require(self.learning_rate > 0, "learning_rate", "more than 0")
            self.require(self.scope_loss >= 0, "scope_loss", "0 (none) or more")
            self.require(self.stop_loss >= 0, "stop_loss", "0 (never) or more")

    config: Config

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
            first, steps = self._hard_losses(tail, query, self.patch.parameters, self.patch.trained), 0
            while True:
                self.check_cancelled()
                opening, predicted = predict(query, parameters)
                losses = self._losses(tail, opening, predicted)
                opened = (opening >= config.threshold).all()
                *found, opened = torch.cat([losses.detach(), opened[None].to(losses)]).tolist()  # a GPU waits once
                for request, loss in zip(requests, found, strict=True):
                    self.check_loss(loss, request)
                if (opened and max(found) < config.stop_loss) or steps == config.iterations:
                    break
                optimizer.zero_grad()
                scope = -opening.clamp(min=1e-30).log()
                (losses + config.scope_loss * scope).mean().backward()
                optimizer.step()
                steps += 1
            last = self._hard_losses(tail, query, parameters, True)
        self.patch.parameters = {name: value.detach() for name, value in parameters.items()}
        self.patch.trained = True
        return [Written(start, end, steps) for start, end in zip(first, last, strict=True)]

    @torch.no_grad()
    def _hard_losses(self, tail: Tail, query: Tensor, parameters: dict[str, Tensor], trained: bool) -> list[float]:
        """(B,) losses as the model answers: with a gate that is open or shut."""
        opening, predicted = predict(query, parameters)
        return self._losses(tail, (opening >= self.config.threshold) & trained, predicted).tolist()

    def _losses(self, tail: Tail, opening: Tensor, predicted: Tensor) -> Tensor:
        """(B,) mean loss of each target, the gates at opening (B,): between 0 and 1 while they are trained."""
        y = tail.y.to(predicted)
        return target_losses(tail, blend(y, predicted, opening) - y)

    @torch.no_grad()
    def explain(self, prompt: str) -> Explanation:
        """The gate's value as `overlap`, its threshold as `tau`; which edit opened it, the gate does not know."""
        batch = self.model.encode([prompt])
        a = input_of(self.site, lambda: self.model.forward(batch, positions=1))
        opening, _ = predict(pool_prompt(a, batch.prompt_mask, "last"), self.patch.parameters)
        return Explanation(
            edit_id=None,
            score=float(opening),
            threshold=self.config.threshold,
            fired=self.patch.trained and bool(opening >= self.config.threshold),
            contribution=self.contribution(prompt),
        )

    def state(self) -> dict[str, Tensor]:
        return {**self.patch.parameters, "trained": torch.tensor(self.patch.trained)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.patch.parameters = {name: tensors[name].to(old.device) for name, old in self.patch.parameters.items()}
        self.patch.trained = bool(tensors["trained"])
