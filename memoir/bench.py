"""What editing costs: seconds per edit, and MEMOIR's ratios against baselines that the same run measures.

Each ratio is a median over pairs of neighbouring measurements, ours and then the baseline, so a busy machine slows both
alike. A warm-up that does not count precedes every measurement. OMP_NUM_THREADS=1 makes small models' numbers steadier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from math import inf
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memoir.data import load_edits
from memoir.editors import EDITORS, Editor, make_editor
from memoir.editors.memoir import MEMOIR
from memoir.grid import variant
from memoir.models import LanguageModel, load_model
from memoir.overheads import clock, mask_search, overheads
from memoir.provenance import now, peak_bytes, run_info
from memoir.records import EditRequest
from memoir.sites import adding, watching

METHODS = tuple(name for name, editor in EDITORS.items() if editor.changes_model)
PAPER_RATE = 1.0  # of SGD on W_m; MEMOIR, section 4.1
WARM_UP = 3  # edits by a method that do not count: the first one by itself, then two in a list, if lists run ahead

# n_edits by each method, for edit_seconds at most; n_plain edits against the plain form (0: none), for plain_seconds at
# most; counts of edits in the memory, asked for so many rounds, for round_seconds at most; masks to search.
FULL = dict(n_edits=35, edit_seconds=60, n_plain=289, plain_seconds=600)
FULL |= dict(counts=(1000, 100_000), rounds=30, round_seconds=120, masks=(1000, 10**6))
QUICK = dict(n_edits=13, edit_seconds=10, n_plain=97, plain_seconds=60)
QUICK |= dict(counts=(1000,), rounds=10, round_seconds=20, masks=(1000, 10**5))


def time_edits(editor: Editor, edits: Sequence[EditRequest], budget: float = inf) -> dict[str, float]:
    """Median seconds per edit of edits in a list, how many these were, and their mean iterations, after others that
    warm up; the seconds of the first edit with all that a method prepares before it; on a GPU, peak memory over the
    model's weights.

    budget  seconds since the first edit began, after which no further list begins; one always counts
    """
    device = editor.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock(device)
    editor.edit(edits[0], check=False)
    row: dict[str, float] = {"first_edit_seconds": clock(device) - start}
    if editor.ahead > 1:
        editor.edit(edits[1:WARM_UP], check=False)
    reports, together = [], max(editor.ahead, editor.config.batch_size)
    for at in range(WARM_UP, len(edits), together):
        if reports and clock(device) - start > budget:
            break
        reports += editor.edit(edits[at : at + together], check=False)
    row["seconds"] = median(report.seconds for report in reports)
    row["edits"] = len(reports)
    row["iterations"] = fmean(report.iterations for report in reports)
    if device.type == "cuda":
        row["bytes_over_model"] = bytes_over(editor.model)
    return row


def bytes_over(model: LanguageModel) -> int:
    """Most memory of a GPU in use since its peak was last reset, over the model's weights."""
    return peak_bytes() - sum(p.nbytes for p in model.network.parameters())


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


def against_plain(editor: MEMOIR, edits: Sequence[EditRequest], budget: float = 60) -> dict[str, dict[str, float]]:
    """A list of edits by a fresh editor, then each of them by the plain form's two variants, which stop at the editor's
    loss, or at `stop_loss` where the editor went further. The first edit warms up.

    budget   seconds after which the plain form makes no further edit
    returns  form → its median seconds per edit, mean iterations and loss, and the editor's median speedup
    """
    weights = {frozen: torch.zeros_like(editor.memory.weight) for frozen in (False, True)}
    reports = [*editor.edit(edits[:1], check=False), *editor.edit(edits[1:], check=False)]
    began, measured = time.monotonic(), []
    for request, report in zip(edits, reports, strict=True):
        row = [(report.seconds, report.iterations, report.loss_after)]
        goal = max(report.loss_after, editor.config.stop_loss)
        with editor.detached() as model:
            for frozen in weights:
                since = clock(model.device)
                weights[frozen], *outcome = plain_edit(editor, request, weights[frozen], goal, frozen=frozen)
                row.append((clock(model.device) - since, *outcome))
        measured.append(row)
        if len(measured) > 1 and time.monotonic() - began > budget:
            break
    seconds, iterations, losses = np.array(measured[1:]).transpose(2, 1, 0)  # each (forms × edits)
    columns = np.median(seconds, 1), iterations.mean(1), losses.mean(1), np.median(seconds / seconds[0], 1)
    return {
        form: dict(zip(("seconds", "iterations", "loss", "speedup"), map(float, values), strict=True))
        for form, *values in zip(("memoir", "plain", "plain, frozen"), *columns, strict=True)
    }


def measure(
    name: str = "almanac",
    dataset: str = "almanac-qa",
    *,
    data_path: str | None = None,
    background: Sequence[str] | None = None,
    quick: bool = False,
    methods: Sequence[str] = (),
    say: Callable[[str], None] = print,
    **sizes: Any,
) -> dict[str, Any]:
    """All measurements on one model and edit set; `summary` holds the numbers that `python -m memoir bench` ends with.

    quick    smaller sizes, and without the methods that decompose a D × D matrix before their first edit
    methods  names and variants to time; default: all
    say      is given a line for each result
    sizes    in the place of those in `FULL`, or in `QUICK`
    """
    if unknown := sorted(set(sizes) - set(FULL)):
        raise TypeError(f"bench.measure has no size {', '.join(unknown)}; expected {', '.join(FULL)}")
    size = FULL | (QUICK if quick else {}) | sizes
    edits, model = load_edits(dataset, path=data_path), load_model(name)
    if not WARM_UP < size["n_edits"] <= len(edits):
        raise ValueError(f"n_edits = {size['n_edits']}, expected {WARM_UP + 1} to {len(edits)}")
    started = now()
    make = partial(make_editor, model=model, dataset=dataset, background=background)
    rows = {}
    for label in methods or [method for method in METHODS if not (quick and measures_moments(method))]:
        method, own = variant(label)
        editor = make(method, **own)
        rows[label] = time_edits(editor, edits[: size["n_edits"]], size["edit_seconds"])
        editor.detach()
        say(f"{label}: {numbers_of(rows[label])}")
    several = size["n_plain"] > 1  # the plain form takes a real model minutes
    plain = against_plain(make("memoir"), edits[: size["n_plain"]], size["plain_seconds"]) if several else {}
    for form, row in plain.items():
        say(f"{form}, same loss: {numbers_of(row)}")
    editor = make("memoir")
    overhead = overheads(editor, edits[:8], size["counts"], size["rounds"], size["round_seconds"])
    search = mask_search(size["masks"], model.device)
    for row in (*overhead, *search):
        say(numbers_of(row))
    return {
        "info": asdict(run_info(editor, dataset, size["n_edits"], 1, started)),
        "methods": rows,
        "plain": plain,
        "overhead": overhead,
        "search": search,
        "summary": {
            "model": model.name,
            "edit_speedup_vs_plain": plain["plain"]["speedup"] if plain else None,
            "prefill_overhead": overhead[0]["prefill"],
            "decode_overhead": overhead[0]["decode"],
            "mask_search_million_seconds": search[-1]["seconds"] * 1_000_000 / search[-1]["masks"],
            "seconds_per_edit": {label: row["seconds"] for label, row in rows.items()},
        },
    }


def measures_moments(method: str) -> bool:
    """Whether a method decomposes second moments of keys, a D × D matrix, before its first edit."""
    return any(field.name == "moments" for field in fields(EDITORS[method].Config))


def numbers_of(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    return ", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in row.items())
