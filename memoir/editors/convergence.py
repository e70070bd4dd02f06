"""When an edit's steps may end, found out without making a GPU wait for the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Convergence:
    """Ends the steps of some edits written together once each one's loss is below a limit.

    On a GPU the host runs ahead of the device, and learns of a loss some steps later. So the device itself holds on to
    what it had when the limit was reached (`kept`): steps that the host asks for after that change nothing, and the
    outcome does not depend on when a loss arrived.
    """

    def __init__(self, owner: Tensor, count: int, limit: float, check: Callable[[int, float], object]):
        """
        owner  (n,) int64, which of `count` edits each loss belongs to
        limit  nats per token; 0: never reached
        check  called with each edit's number and every loss of it, as they arrive; it may raise
        """
        self.owner, self.count, self.limit, self.check = owner, count, limit, check
        self._going: Tensor | None = None
        self._sent: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._seen: list[list[float]] = []

    @property
    def waits(self) -> bool:
        """Whether losses take their time to arrive."""
        return self.owner.device.type != "cpu"

    def reached(self, losses: Tensor) -> bool:
        """Take the losses (n,) in nats of the state before the next step; whether the host knows by now that no step
        is needed any more."""
        if self.count == 1:
            means = losses.detach().mean(0, keepdim=True)
        else:
            sums = torch.stack([losses.detach(), torch.ones_like(losses)], dim=1)
            total = sums.new_zeros(self.count, 2).index_add_(0, self.owner, sums)
            means = total[:, 0] / total[:, 1]
        if self.waits:
            going = means.max() >= self.limit
            self._going = going if self._going is None else self._going & going
        self._send(means)
        while len(self._seen) < len(self._sent) and self._arrived(len(self._seen)):
            self._see()
        return bool(self._seen) and self._done(self._seen[-1])

    def kept(self, new: Tensor, old: Tensor) -> Tensor:
        """new, or old where the limit was reached before the step that led to new."""
        return torch.where(self._going, new, old) if self.waits else new

    def outcome(self) -> tuple[list[tuple[float, float]], int]:
        """Each edit's first and last loss, and how many steps counted; waits for all losses."""
        while len(self._seen) < len(self._sent):
            self._see()
        steps = next((i for i, losses in enumerate(self._seen) if self._done(losses)), len(self._seen) - 1)
        return list(zip(self._seen[0], self._seen[steps], strict=True)), steps

    def _done(self, losses: list[float]) -> bool:
        return max(losses) < self.limit

    def _send(self, means: Tensor) -> None:
        event = None
        if means.is_cuda:
            means, event = means.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.owner.device))
        self._sent.append((means, event))

    def _arrived(self, step: int) -> bool:
        _, event = self._sent[step]
        return event is None or event.query()

    def _see(self) -> None:
        """Read the next loss, waiting for it where it has not arrived."""
        means, event = self._sent[len(self._seen)]
        if event is not None:
            event.synchronize()
        self._seen.append(means.tolist())
        for i, loss in enumerate(self._seen[-1]):
            self.check(i, loss)
