"""MEMOIR's gradient descent on W_m, carried out in the span of the edits' keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.convergence import Convergence
from memoir.memory import ResidualMemory
from memoir.sites import Tail, places


class Descent:
    """SGD on W_m until edits written together are learned; W_m itself stays as it is until `write`.

    The keys A (n × D) of the edits do not change meanwhile, so every step leaves W_m = s W_before + Gᵀ A: G (n × d) and
    the scalar s, which weight decay makes, are all there is to learn, and the change that the edits make to their own
    outputs is K G with the small Gram matrix K = A Aᵀ. The same steps as SGD on W_m itself.

    keys     (n × c) A in the columns of the edits' masks; elsewhere there is nothing to read, and nothing is written
    columns  (c,) int64
    row_of   (n,) int64, the row of the tail's batch that each key belongs to
    G        (n × d)
    """

    def __init__(
        self,
        config: Any,
        memory: ResidualMemory,
        tail: Tail,
        masks: Tensor,
        owner: Tensor,
        check: Callable[[int, float], object],
        behind: Descent | None = None,
    ):
        """
        config  `MEMOIR.Config`
        masks   (m × D) bool, of the edits
        owner   (B,) int64, which of the edits each of the tail's rows belongs to
        check   is called with each edit's number and every loss of it; it may raise
        behind  the descent before this one, which may take this one's first look along
        """
        self.config, self.memory, self.tail = config, memory, tail
        batch = tail.batch
        self._used, self._counted, self._labels = places(batch.leading), batch.counted_at, batch.labels
        self.row_of, self.columns = self._used // batch.input_ids.shape[1], masks.any(0).nonzero()[:, 0]
        inputs, edit_of = tail.inputs(self._used).to(memory.weight), owner[self.row_of]

        def masked(columns: Tensor) -> Tensor:
            return inputs.index_select(1, columns) * masks.index_select(1, columns).index_select(0, edit_of)

        one = len(masks) == 1  # whose columns are all its mask's
        self.keys = inputs.index_select(1, self.columns) if one else masked(self.columns)
        self._gram = self.keys @ self.keys.T
        self._reach = None if behind is None else masked(behind.columns) @ behind.keys.T
        self._rate = config.learning_rate
        if config.step_rule == "relative":
            size = float(self.keys[batch.counted[batch.leading]].square().sum(1).mean())
            self._rate *= tail.stream_norm(self._counted) ** 2 / max(size, 1e-12)
        self._decay = 1 - self._rate * config.weight_decay
        self._edits = len(masks)
        self._ended = Convergence(owner[batch.label_rows], self._edits, config.stop_loss, check)
        self.G, self._steps = self.keys.new_zeros(len(self.keys), memory.weight.shape[0]), 0
        self.restart()

    def restart(self) -> None:
        """Forget what was read of W_m, which has changed, before the first step."""
        self._before = self._change = self._losses = None

    def _read(self) -> Tensor:
        """(n × d) what W_m, as it stands, adds to the site's output at the places of the keys."""
        return self.memory.product(self.keys, self.columns)

    def _moved(self) -> Tensor:
        """(n × d) what W_m, as far as it is learned, adds to the site's output."""
        return torch.addmm(self._before, self._gram, self.G, beta=self._decay**self._steps)

    @property
    def may_end(self) -> bool:
        """Whether the next look may well be the last one, and is at once known to be."""
        last = self._steps == self.config.iterations
        return not self._ended.waits and (last or (self._steps > 0 and self.config.stop_loss > 0))

    def look(self, then: Descent | None = None, together: Tail | None = None) -> None:
        """Run the blocks behind the site, if that was not done since the last step.

        then      the descent behind this one: it takes its first look along, as if this one ended here, which saves it
                  a pass through these blocks
        together  the tail of this one's rows and then's
        """
        if self._losses is not None:
            return
        if self._change is None:
            self._begin(self._read())
        if then is None:
            logits = self.tail.logits(self._change, self._counted, self._used)
            self._losses = cross_entropy(logits.float(), self._labels, reduction="none")
            return
        then._begin(torch.addmm(then._read(), then._reach, self.G, beta=self._decay**self._steps))
        behind = self.tail.batch.input_ids.numel()
        logits = together.logits(
            torch.cat([self._change, then._change]),
            torch.cat([self._counted, then._counted + behind]),
            torch.cat([self._used, then._used + behind]),
        )
        losses = cross_entropy(logits.float(), torch.cat([self._labels, then._labels]), reduction="none")
        self._losses, then._losses = losses.split([len(self._labels), len(then._labels)])

    def _begin(self, before: Tensor) -> None:
        """Start from what W_m adds (n × d) before the first step."""
        self._before, self._change = before, before.detach().requires_grad_()

    def ended(self) -> bool:
        """Whether, by what was seen, no further step is needed, or none is left."""
        return self._ended.reached(self._losses) or self._steps == self.config.iterations

    def step(self) -> None:
        """One step of SGD with weight decay, the gradient's norm clipped."""
        share = self._losses.new_full((len(self._losses),), self._edits / len(self._losses))
        (delta,) = torch.autograd.grad(self._losses, self._change, share)
        moved = self._decay * self.G - self._rate * _clip(self._gram, delta, self.config.clip) * delta
        self.G = self._ended.kept(moved, self.G)
        self._steps += 1
        self._change = self._ended.kept(self._moved(), self._change.detach()).requires_grad_()
        self._losses = None

    def write(self) -> tuple[list[tuple[float, float]], int, float]:
        """Bring what was learned into W_m; each edit's first and last loss, the steps, and s."""
        losses, steps = self._ended.outcome()
        shrink = self._decay**steps
        if shrink != 1:
            self.memory.weight.mul_(shrink)
        self.memory.update(self.columns, self.keys, self.G)
        return losses, steps, shrink


def _clip(gram: Tensor, delta: Tensor, limit: float) -> Tensor | float:
    """What the gradient in W_m, δᵀA, is multiplied with so that its norm stays within the limit (0: none), without
    forming it: gram A Aᵀ (n × n), delta δ (n × d)."""
    if not limit:
        return 1.0
    norm = ((gram @ delta) * delta).sum().clamp(min=0).sqrt()
    return (limit / (norm + 1e-6)).clamp(max=1.0)
