"""MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs (Wang, Qin, Dimitriadis,
Favero, Frossard, NeurIPS 2025), as published: gradient descent on W_m. `preset="paper"` has the authors' own
settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.base import Written
from memoir.editors.config import Count, NonNegative, Rate
from memoir.editors.residual import Factors, Prepared, ResidualConfig, ResidualEditor
from memoir.models import LanguageModel
from memoir.sites import places
from memoir.text import Batch, group_means

MANY = 64  # rows of an edit's factors from which compressing them pays


class MEMOIR(ResidualEditor):
    """SGD on the masked columns of W_m, one edit after the other (MEMOIR, section 3).

    While an edit is learned its keys A (n × D) do not change. So every step leaves W_m = s W_before + Gᵀ A, where
    weight decay makes the scalar s, and G (n × d) is all there is to learn. The change of the edit's own outputs is
    K G, with the small Gram matrix K = A Aᵀ. These are the steps of SGD on W_m itself, for a sliver of their time.
    """

    name: ClassVar[str] = "memoir"
    colour: ClassVar[str] = "#d55e00"
    marker: ClassVar[str] = "o"
    write_rule: ClassVar[str] = "sgd"

    @dataclass(frozen=True, kw_only=True)
    class Config(ResidualConfig):
        iterations: Count = 50  # gradient steps per edit at most; paper: 30 to 70
        learning_rate: Rate = 1.0  # of SGD on W_m; paper: 1.0
        # constant: the paper's rate; relative, not in the paper: learning_rate × ‖h‖² / ‖M ⊙ a‖², h the stream
        step_rule: Literal["constant", "relative"] = "constant"
        weight_decay: NonNegative = 1e-5  # of SGD on all of W_m; paper: 1e-5. It fades old edits by 1 − rate × decay
        clip: NonNegative = 1.0  # gradient norm clip on W_m, 0: none; paper: 1.0
        # Largest change of the loss from the step before at which an edit is done, besides stop_loss; 0: not asked
        stop_change: NonNegative = 0.0
        # Divide the loss of n tokens by n + 1. The authors' release does: its mask begins a token early.
        extra_token: bool = False

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        """The paper's layer and width, with steps in proportion to the model's own sizes, as large as those chosen for
        SmolLM2. No decay: the larger the steps are, the faster it would fade old edits."""
        steps = dict(step_rule="relative", learning_rate=0.03, iterations=15, stop_loss=0.02, weight_decay=0.0)
        return super().defaults(model) | steps | dict(prefixes=0)

    def learn(self, edits: Prepared) -> list[Written]:
        config, memory, tail, batch = self.config, self.memory, edits.tail, edits.tail.batch
        count = len(edits.requests)
        used = places(batch.leading)
        key_owner = edits.owner[used // batch.input_ids.shape[1]]
        columns = edits.masks.any(0).nonzero()[:, 0]  # outside of these nothing is read or written
        keys = tail.inputs(used).to(memory.weight)[:, columns] * edits.masks[:, columns][key_owner]
        gram = keys @ keys.T
        rate = config.learning_rate
        if config.step_rule == "relative":
            size = float(keys[batch.counted[batch.leading]].square().sum(1).mean())
            rate *= tail.stream_norm(batch.counted_at) ** 2 / max(size, 1e-12)
        decay = 1 - rate * config.weight_decay
        before = keys @ memory.weight.T[columns]
        weight = token_weights(batch) if config.extra_token else 1.0
        G, first, last = torch.zeros_like(before), None, [math.inf] * count
        for steps in range(config.iterations + 1):
            self.check_cancelled()
            change = torch.addmm(before, gram, G, beta=decay**steps).requires_grad_()
            logits = tail.logits(change, batch.counted_at, used).float()
            losses = weight * cross_entropy(logits, batch.labels, reduction="none")
            previous = last
            last = self.check_losses(group_means(losses, edits.owner[batch.label_rows], count).tolist(), edits.requests)
            first = first or last
            if steps == config.iterations or self.done(last, previous):
                break
            (delta,) = torch.autograd.grad(count * losses.mean(), change)
            G = decay * G - rate * clip_factor(gram, delta, config.clip) * delta
        terms = {}
        for i, request in enumerate(edits.requests):
            own_rows, own_columns = key_owner == i, edits.masks[i, columns]
            term = compressed(keys[own_rows][:, own_columns], G[own_rows])
            terms[request.id] = Factors(*(factor.cpu() for factor in term))
        # The state changes last, once nothing can fail any more.
        memory.weight.mul_(decay**steps)
        memory.weight.T.index_add_(0, columns, keys.T @ G)
        self.scales *= decay**steps
        self.factors |= terms
        return [Written(*losses, steps) for losses in zip(first, last, strict=True)]

    def done(self, losses: list[float], before: list[float]) -> bool:
        """Whether edits with these losses, and those of the step before, need no further step."""
        change = max(abs(now - then) for now, then in zip(losses, before, strict=True))
        return max(losses) < self.config.stop_loss and change <= (self.config.stop_change or math.inf)

    def add_term(self, keys: Tensor, values: Tensor, scale: float) -> None:
        self.memory.weight.add_(scale * (values.T @ keys))

    def remove_terms(self, edit_ids: Sequence[str], page: int) -> None:
        for edit_id in edit_ids:
            keys, values = self.pairs(edit_id)
            scale = float(self.scales[self.memory.bank.ids.index(edit_id)])
            self.memory.pages[page].sub_(scale * (values.T @ keys))


def token_weights(batch: Batch) -> Tensor:
    """(m,) n / (n + 1) for each of the m learned tokens of a batch, n of which are in its row."""
    sizes = batch.learn_mask.sum(1)
    return (sizes / (sizes + 1))[batch.label_rows]


def clip_factor(gram: Tensor, delta: Tensor, limit: float) -> Tensor | float:
    """The factor that keeps the norm of the gradient in W_m, δᵀA, within the limit (0: none), without forming that
    gradient: gram A Aᵀ (n × n), delta δ (n × d)."""
    if not limit:
        return 1.0
    norm = ((gram @ delta) * delta).sum().clamp(min=0).sqrt()
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def compressed(keys: Tensor, G: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The same Gᵀ A with fewer rows, where a prompt's copies give many: as many as its rank. Relative singular values
    below the tolerance are dropped. keys A (n × k), G (n × d)."""
    written = G.any(1)
    if not bool(written.any()):
        return keys[:1], G[:1]
    keys, G = keys[written], G[written]
    if len(keys) <= MANY:
        return keys, G
    key_basis, key_factor = torch.linalg.qr(keys.T)
    G_basis, G_factor = torch.linalg.qr(G.T)
    core = (G_factor @ key_factor.T).cpu()  # an SVD this small is slow on a GPU
    u, s, vt = (part.to(G) for part in torch.linalg.svd(core, full_matrices=False))
    keep = s > tolerance * s[0]
    return ((key_basis @ vt[keep].T) * s[keep]).T.contiguous(), (G_basis @ u[:, keep]).T.contiguous()
