"""What stored edits cost a question: prefill and decoding over the unedited model's, and the search among masks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from memoir.bank import MaskBank
from memoir.editors import EditError
from memoir.editors.residual import ResidualEditor
from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.text import Batch


def clock(device: torch.device) -> float:
    """Seconds, once the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], Any], rounds: int = 5) -> list[float]:
    """Seconds of each of several calls of work(), after one that warms up."""
    work()
    stamps = [clock(device)]
    for _ in range(rounds):
        work()
        stamps.append(clock(device))
    return np.diff(stamps).tolist()


def synthetic_masks(count: int, width: int) -> np.ndarray:
    """(count × ⌈width/64⌉) uint64: random masks, a quarter of their bits ones, as stand-ins for the masks of edits."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (count, -(-width // 64)), dtype=np.uint64)
    for start in range(0, count, 4096):  # a second matrix for a million masks would take 1.8 GB
        some = words[start : start + 4096]
        some &= rng.integers(0, 2**64, some.shape, dtype=np.uint64)
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
    editor: ResidualEditor, edits: Sequence[EditRequest], counts: Sequence[int], rounds: int, seconds: float = inf
) -> list[dict[str, Any]]:
    """Prefill and decoding time of the edited model over the unedited one, with so many edits in the memory.

    The edits are real, and their prompts are asked one by one; synthetic masks fill the memory up to each count. After
    so many `seconds` at a count no further round begins.
    EditError where no prompt reads the memory: such questions cost less.
    """
    model, bank = editor.model, editor.memory.bank
    editor.edit([request for request in edits if request.id not in editor.edits], check=False)
    prompts = [request.prompt for request in edits]
    batches = [model.encode([p]) for p, edit_id in zip(prompts, editor.matches(prompts), strict=True) if edit_id]
    if not batches:
        raise EditError(f"none of {len(prompts)} edited prompts reads the memory, expected at least one")
    ids, packed, rows = list(bank.ids), bank.packed.copy(), []
    for count in counts:
        more = synthetic_masks(max(0, count - len(ids)), bank.width)
        bank.replace([*ids, *(f"synthetic {i}" for i in range(len(more)))], np.concatenate([packed, more]))
        ratios, began = [], time.monotonic()
        for round in range(rounds + 1):
            if round > 1 and time.monotonic() - began > seconds:
                break
            for batch in batches:
                edited = question_seconds(model, batch)
                with editor.detached():
                    ratios.append(np.divide(edited, question_seconds(model, batch)))
        prefill, decode = np.median(ratios[len(batches) :], axis=0).tolist()  # the first round warms up
        rows.append({"edits": len(bank), "prefill": prefill, "decode": decode})
    bank.replace(ids, packed)
    return rows


def mask_search(counts: Sequence[int], device: torch.device, *, width: int = 14336) -> list[dict[str, Any]]:
    """Median seconds of the search for the mask nearest to one mask, among so many synthetic ones."""
    words, rows = synthetic_masks(max(counts), width), []
    query = torch.from_numpy(np.random.default_rng(1).random((1, width)) < 2 / 7).to(device)
    for count in counts:
        bank = MaskBank(width, device)
        bank.replace([str(i) for i in range(count)], words[:count])
        rows.append({"masks": count, "seconds": median(timed(device, partial(bank.nearest, query)))})
    return rows
