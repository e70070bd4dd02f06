"""UltraEdit: training-, subject- and memory-free lifelong editing (Gu et al., TMLR 2026, arXiv 2505.14679), after the
authors' code.

Where this differs from their code:
- It edits gate and up projections of LLaMA-3, which are no sites here: LLaMA takes the down-projections of Mistral.
- Its variance divides by m − 1, which makes σ slightly too large, and NaN for ever after a single row. Here it divides
  by m, so σ is the deviation of all rows however they come in portions.
- It does not read the gradients of a turn's incomplete last minibatch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.base import Editor, Written
from memoir.editors.config import Count, EditorConfig, Layers, Positive, Rate
from memoir.editors.depth import layer_at
from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.sites import DeltaWeight, Patch, Site, adding, taken, watching

EPSILON = torch.finfo(torch.float32).eps  # ε


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of all rows z so far, one long average over all turns (UltraEdit, lifelong normalisation).

    N and M are count and squares, the sum of (z − μ)²; count (), mean and squares (w,), all float64.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def including(self, z: Tensor) -> Statistics:
        """With rows z (m × w): e = mean(z) − μ, N' = N + m, μ += m e / N', M += m var(z) + N m e² / N'."""
        z, m = z.to(self.mean), len(z)
        count, e = self.count + m, z.mean(0) - self.mean
        squares = self.squares + z.var(0, correction=0) * m + e.square() * (self.count * m / count)
        return Statistics(count, self.mean + e * (m / count), squares)

    def normalised(self, z: Tensor) -> Tensor:
        """(z − μ) / (σ + ε), σ = √(M / (N − 1 + ε)), for rows z (m × w); zero where all rows so far are alike."""
        deviation = (self.squares / (self.count - 1 + EPSILON)).sqrt()
        return (z.to(self.mean) - self.mean) / (deviation + EPSILON)


def turn_update(z: Tensor, D: int, statistics: Statistics, rate: float, ridge: float) -> Tensor:
    """ΔW = Vᵀ (H Hᵀ + λI)⁻¹ H with v_i = −η ‖ĥ_i‖² δ̂_i from normalised rows ẑ = [ĥ δ̂], but raw keys H. It equals the
    authors' ((HᵀH + λI)⁻¹ HᵀV)ᵀ, and its system is only as large as the number of rows.

    z  (n × (D + d)) a site's rows [h δ]; returns (d × D) float64
    """
    normalised, H = statistics.normalised(z), z[:, :D].to(statistics.mean)
    V = -rate * normalised[:, :D].square().sum(1, keepdim=True) * normalised[:, D:]
    gram = H @ H.T
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, V).T @ H


class UltraEdit(Editor):
    """One ridge solve per site for all edits of a turn (`batch_size`), without iterations: the statistics take in the
    turn's rows, then ΔW grows by `turn_update`. A row holds a site's input h and the gradient δ of the loss in its
    output, at a token that predicts the target. All sites share the statistics, as in the authors' code. The first rows
    ever have no others to be compared with: edits one by one begin weakly, and a single row writes nothing."""

    name: ClassVar[str] = "ultraedit"
    colour: ClassVar[str] = "#6a3d9a"
    marker: ClassVar[str] = "H"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layers: Layers  # blocks of the edited down-projections; UltraEdit: 29 and 30 of Mistral, 18 to 26 of GPT-J
        batch_size: Count = 1  # edits in a turn; UltraEdit: 100
        minibatch: Count = 10  # edits of a turn that share a mean loss and a backward pass; UltraEdit: 10
        learning_rate: Rate = 1e-6  # η, times ‖ĥ‖² ≈ D: another width wants another rate; UltraEdit: 1e-6
        ridge: Positive = 1.0  # λ; UltraEdit: 1

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        return dict(layers=tuple(sorted({layer_at(model, 29 / 31), layer_at(model, 30 / 31)})))  # as of Mistral

    def build(self) -> dict[Site, Patch]:
        self.sites = [self.model.site(layer) for layer in self.config.layers]
        self.deltas = {site: DeltaWeight(site, site.device) for site in self.sites}
        width = self.sites[0].in_features + self.sites[0].out_features
        none = torch.zeros(width, dtype=torch.float64, device=self.sites[0].device)
        self.statistics = Statistics(none.sum(), none, none.clone())
        return dict(self.deltas)

    def write(self, requests: list[EditRequest]) -> list[Written]:
        config, statistics, before = self.config, self.statistics, [patch.delta for patch in self.deltas.values()]
        minibatches = [requests[i : i + config.minibatch] for i in range(0, len(requests), config.minibatch)]
        first: list[float] = []
        seen: list[list[Tensor]] = [[] for _ in self.sites]  # by site, the rows of each minibatch
        for some in minibatches:
            self.check_cancelled()
            losses, rows = self.rows(some)
            first += self.check_losses(losses, some)
            for own, z in zip(seen, rows, strict=True):
                own.append(z)
                statistics = statistics.including(z)
        how = self.sites[0].in_features, statistics, config.learning_rate, config.ridge
        after = [delta + turn_update(torch.cat(z), *how).to(delta) for delta, z in zip(before, seen, strict=True)]
        try:
            self.set(after)
            last = [loss for some in minibatches for loss in self.check_losses(self.losses(some), some)]
        except BaseException:
            self.set(before)
            raise
        self.statistics = statistics
        return [Written(*losses, 1) for losses in zip(first, last, strict=True)]

    def rows(self, requests: list[EditRequest]) -> tuple[list[float], list[Tensor]]:
        """Each edit's loss, and for each site its rows z = [h δ] (n × (D + d)) float32 at the n tokens that predict the
        targets: δ is the gradient of the mean loss over all these tokens in the site's output."""
        tail = self.model.tail(self.sites[0], self.encode_edits(requests))
        at, inputs = tail.batch.counted_at, [tail.a]
        changes = [tail.y.new_zeros(len(at), s.out_features, device=s.device, requires_grad=True) for s in self.sites]
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(watching(site)) for site in self.sites[1:]]
            for site, change in zip(self.sites[1:], changes[1:], strict=True):
                stack.enter_context(adding(site, change, at.to(site.device)))
            logits = tail.logits(changes[0], at, at).float()
            inputs += [call[-1][0] for call in calls]
        gradients = torch.autograd.grad(cross_entropy(logits, tail.batch.labels), changes)
        keys = [taken(a.detach(), at) for a in inputs]
        rows = [torch.cat(pair, dim=1).float() for pair in zip(keys, gradients, strict=True)]
        return tail.batch.losses(logits.detach()).tolist(), rows

    def set(self, deltas: list[Tensor]) -> None:
        for patch, delta in zip(self.deltas.values(), deltas, strict=True):
            patch.set(delta)

    def state(self) -> dict[str, Tensor]:
        return {f"delta.{site.layer}": patch.delta for site, patch in self.deltas.items()} | vars(self.statistics)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.set([tensors[f"delta.{site.layer}"] for site in self.sites])
        self.statistics = Statistics(*(tensors[name].to(old) for name, old in vars(self.statistics).items()))
