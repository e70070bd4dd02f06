"""What editing costs: seconds per edit, and MEMOIR's ratios against baselines that the same run measures.

Each ratio is a median over pairs of neighbouring measurements, ours and then the baseline, so a busy machine slows both
alike. A warm-up that does not count precedes every measurement. OMP_NUM_THREADS=1 makes small models' numbers steadier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from math import inf
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import nn

from memoir.bank import MaskBank
from memoir.data import load_edits
from memoir.editors import EDITORS, EditError, Editor, make_editor
from memoir.editors.memoir import MEMOIR
from memoir.grid import variant
from memoir.models import LanguageModel, load_model
from memoir.plain import against_plain
from memoir.provenance import now, peak_bytes, run_info
from memoir.records import EditRequest
from memoir.text import Batch
from memoir.timing import clock, timed, within

METHODS = tuple(name for name, editor in EDITORS.items() if editor.changes_model)
WARM_UP = 3  # edits by a method that do not count: the first one by itself, then two in a list, if lists run ahead


@dataclass(frozen=True)
class Sizes:
    """How much `measure` measures. After so many seconds a measurement begins nothing more."""

    n_edits: int = 35  # by each method, the warm-up included
    edit_seconds: float = 60
    n_plain: int = 289  # edits against the plain form, of which the first one warms up; 0: none
    plain_seconds: float = 600
    counts: Sequence[int] = (1000, 100_000)  # edits in the memory when questions are asked
    rounds: int = 30  # how often each question is asked
    round_seconds: float = 120
    masks: Sequence[int] = (1000, 10**6)  # to search


QUICK = Sizes(13, 10, 97, 60, (1000,), 10, 20, (1000, 10**5))


# Edits ---------------------------------------------------------------------------------------------------------------


def time_edits(editor: Editor, edits: Sequence[EditRequest], budget: float = inf) -> dict[str, float]:
    """Median seconds per edit of edits in a list, how many these were, and their mean iterations, after others that
    warm up; the seconds of the first edit with all that a method prepares before it; on a GPU, peak memory over the
    model's weights.

    budget  seconds after which no further list begins
    """
    device, reports = editor.model.device, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock(device)
    editor.edit(edits[0], check=False)
    row: dict[str, float] = {"first_edit_seconds": clock(device) - start}
    if editor.ahead > 1:
        editor.edit(edits[1:WARM_UP], check=False)
    together = max(editor.ahead, editor.config.batch_size)
    for at in within(budget - (clock(device) - start), range(WARM_UP, len(edits), together)):
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


# Questions -----------------------------------------------------------------------------------------------------------


def synthetic_masks(count: int, width: int) -> np.ndarray:
    """(count × ⌈width/64⌉) uint64: random masks, packed. How many of their bits are ones makes no search slower."""
    words = np.random.default_rng(0).integers(0, 2**64, (count, -(-width // 64)), dtype=np.uint64)
    words[:, -1] &= np.uint64(2 ** (width % 64 or 64) - 1)
    return words


@torch.no_grad()
def question_seconds(model: LanguageModel, batch: Batch, steps: int = 4) -> tuple[float, float]:
    """Seconds of a prefill, after one that warms up, and of one decoding step behind it, the mean of several."""
    mask, device = batch.attention_mask.long(), model.device
    asked = dict(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids)
    for _ in range(2):
        began = clock(device)
        output = model.network(**asked, use_cache=True, logits_to_keep=1)
        filled = clock(device)
    for _ in range(steps):
        mask = nn.functional.pad(mask, (0, 1), value=1)
        asked = dict(input_ids=output.logits[:, -1:].argmax(-1), attention_mask=mask)
        output = model.network(**asked, past_key_values=output.past_key_values, use_cache=True)
    return filled - began, (clock(device) - filled) / steps


def overheads(
    editor: MEMOIR, edits: Sequence[EditRequest], counts: Sequence[int], rounds: int, budget: float = inf
) -> list[dict[str, Any]]:
    """Prefill and decoding time of the edited model over the unedited one, with so many edits in the memory.

    The edits are real, and their prompts are asked one by one; synthetic masks fill the memory up to each count. After
    the budget's seconds at a count no further round begins; one always counts.
    EditError where no prompt reads the memory: such questions cost less.
    """
    model, bank = editor.model, editor.memory.bank
    editor.edit([request for request in edits if request.id not in editor.edits], check=False)
    prompts = [request.prompt for request in edits]
    batches = [model.encode([p]) for p, edit_id in zip(prompts, editor.matches(prompts), strict=True) if edit_id]
    if not batches:
        raise EditError(f"none of {len(prompts)} edited prompts reads the memory, expected at least one")

    def ratios(batches: Sequence[Batch]) -> list[np.ndarray]:
        rows = []
        for batch in batches:
            edited = question_seconds(model, batch)
            with editor.detached():
                rows.append(np.divide(edited, question_seconds(model, batch)))
        return rows

    ids, packed, found = list(bank.ids), bank.packed.copy(), []
    for count in counts:
        more = synthetic_masks(max(0, count - len(ids)), bank.width)
        bank.replace([*ids, *(f"synthetic {i}" for i in range(len(more)))], np.concatenate([packed, more]))
        ratios(batches[:1])  # warms up
        measured = [ratios(batches) for _ in within(budget, range(rounds))]
        prefill, decode = np.median(np.concatenate(measured), axis=0).tolist()
        found.append({"edits": len(bank), "prefill": prefill, "decode": decode})
    bank.replace(ids, packed)
    return found


def mask_search(counts: Sequence[int], device: torch.device, *, width: int = 14336) -> list[dict[str, Any]]:
    """Median seconds of the search for the mask nearest to one mask, among so many synthetic ones."""
    words, rows = synthetic_masks(max(counts), width), []
    query = torch.from_numpy(np.random.default_rng(1).random((1, width)) < 2 / 7).to(device)
    for count in counts:
        bank = MaskBank(width, device)
        bank.replace([str(i) for i in range(count)], words[:count])
        rows.append({"masks": count, "seconds": median(timed(device, partial(bank.nearest, query)))})
    return rows


# All of it -----------------------------------------------------------------------------------------------------------


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
    sizes    in the place of some `Sizes`
    """
    size = replace(QUICK if quick else Sizes(), **sizes)
    edits, model = load_edits(dataset, path=data_path), load_model(name)
    if not WARM_UP < size.n_edits <= len(edits):
        raise ValueError(f"n_edits = {size.n_edits}, expected {WARM_UP + 1} to {len(edits)}")
    started, rows = now(), {}
    make = partial(make_editor, model=model, dataset=dataset, background=background)
    for label in methods or [method for method in METHODS if not (quick and measures_moments(method))]:
        method, own = variant(label)
        editor = make(method, **own)
        rows[label] = time_edits(editor, edits[: size.n_edits], size.edit_seconds)
        editor.detach()
        say(f"{label}: {numbers_of(rows[label])}")
    plain = {}
    if size.n_plain > 1:  # the plain form takes a real model minutes
        plain = against_plain(make("memoir"), edits[: size.n_plain], size.plain_seconds)
    for form, row in plain.items():
        say(f"{form}, same loss: {numbers_of(row)}")
    editor = make("memoir")
    overhead = overheads(editor, edits[:8], size.counts, size.rounds, size.round_seconds)
    search = mask_search(size.masks, model.device)
    for row in (*overhead, *search):
        say(numbers_of(row))
    return {
        "info": asdict(run_info(editor, dataset, size.n_edits, 1, started)),
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
