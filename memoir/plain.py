"""MEMOIR as a textbook writes it: the baseline that the benchmark compares MEMOIR's edits with."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memoir.editors.memoir import MEMOIR
from memoir.records import EditRequest
from memoir.sites import adding, watching
from memoir.timing import clock, within

PAPER_RATE = 1.0  # of SGD on W_m; MEMOIR, section 4.1


def plain_edit(
    editor: MEMOIR, request: EditRequest, weight: Tensor, stop_loss: float, iterations: int = 100, *, frozen: bool
) -> tuple[Tensor, int, float]:
    """MEMOIR as a textbook writes it: the whole model forward and backward in every iteration, into a dense W_m, by
    torch's autograd and SGD at the paper's rate.

    weight   W_m (d × D) so far
    frozen   the model's own weights ask for no gradient, so backward ends at the edited projection
    returns  W_m (d × D), the iterations made, the last loss in nats per token
    """
    model, site, config = editor.model, editor.site, editor.config
    batch = editor._encoded([request])  # with the prompt's copies behind random prefixes
    with torch.no_grad(), watching(site) as seen:
        model.forward(batch)
    a = seen[0][0]
    mask = editor.memory.fingerprint(a[:1], batch.prompt_mask[:1])[0]
    parameter = nn.Parameter(weight)
    optimizer = torch.optim.SGD([parameter], lr=PAPER_RATE, weight_decay=config.weight_decay)
    model.network.requires_grad_(not frozen)
    for step in range(iterations + 1):
        with adding(site, (a.float() * mask) @ parameter.T):
            loss = cross_entropy(model.forward(batch)[batch.counted].float(), batch.labels)
        if step == iterations or loss.item() < stop_loss:
            break
        model.network.zero_grad()
        optimizer.zero_grad()
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_([parameter], config.clip)
        optimizer.step()
    model.network.zero_grad()
    model.network.requires_grad_(False)
    return parameter.detach(), step, loss.item()


def against_plain(editor: MEMOIR, edits: Sequence[EditRequest], budget: float = inf) -> dict[str, dict[str, float]]:
    """A list of edits by a fresh editor, then each of them by the plain form's two variants, which stop at the editor's
    loss, or at `stop_loss` where the editor went further. The first edit warms up: the plain form by one step.

    budget   seconds after which the plain form makes no further edit; one always counts
    returns  form → its median seconds per edit, mean iterations and loss, and the editor's median speedup
    """
    weights = {frozen: torch.zeros_like(editor.memory.weight) for frozen in (False, True)}
    reports = [*editor.edit(edits[:1], check=False), *editor.edit(edits[1:], check=False)]

    def measured(i: int) -> list[tuple[float, ...]]:
        row = [(reports[i].seconds, reports[i].iterations, reports[i].loss_after)]
        goal = max(reports[i].loss_after, editor.config.stop_loss)
        with editor.detached() as model:
            for frozen in weights:
                since = clock(model.device)
                weights[frozen], *outcome = plain_edit(editor, edits[i], weights[frozen], goal, frozen=frozen)
                row.append((clock(model.device) - since, *outcome))
        return row

    with editor.detached():
        for frozen in weights:
            plain_edit(editor, edits[0], weights[frozen], 0, iterations=1, frozen=frozen)
    rows = [measured(i) for i in within(budget, range(1, len(edits)))]
    seconds, iterations, losses = np.array(rows).transpose(2, 1, 0)  # each (forms × edits)
    columns = np.median(seconds, 1), iterations.mean(1), losses.mean(1), np.median(seconds / seconds[0], 1)
    return {
        form: dict(zip(("seconds", "iterations", "loss", "speedup"), map(float, values), strict=True))
        for form, *values in zip(("memoir", "plain", "plain, frozen"), *columns, strict=True)
    }
