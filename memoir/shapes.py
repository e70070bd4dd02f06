"""What editing costs at the shapes of published models, with random weights.

A shape takes three minutes at most on a GPU that holds it: MEMOIR comes first, a method takes `METHOD_SECONDS` at most,
and none begins after `SHAPE_SECONDS`. Each row says how many edits its median is over.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memoir.almanac import background_prompts, model_path
from memoir.bench import METHODS, bytes_over, measures_moments, numbers_of, overheads, time_edits
from memoir.data import load_edits
from memoir.editors import EditError, Editor, make_editor
from memoir.editors.memoir import MEMOIR
from memoir.grid import variant
from memoir.models import LanguageModel
from memoir.presets import SHAPES
from memoir.provenance import now, software
from memoir.records import EditRequest
from memoir.timing import timed

REAL_SHAPES = ("llama-3-8b", "mistral-7b", "gpt-j-6b")
OTHERS = [method for method in METHODS if method != "memoir"]
# Those that decompose a D × D matrix before their first edit come last: they take longest.
LABELS = ("memoir", "memoir+step_rule=relative", *sorted(OTHERS, key=measures_moments))
COUNTS, ROUNDS = (1000, 100_000), 7  # edits in the memory for the overheads, and how often each is measured
SHAPE_SECONDS = 170  # after which no further method is begun at a shape, and no further edit
METHOD_SECONDS = 45  # after which a method makes no further edit


def shape_names(request: str) -> list[str]:
    """The shapes that a request means; ValueError names those there are."""
    if request != "all" and request not in REAL_SHAPES:
        raise ValueError(f"shape {request!r} is unknown; expected one of {', '.join(REAL_SHAPES)} or all")
    return list(REAL_SHAPES) if request == "all" else [request]


def shaped(name: str, device: torch.device) -> LanguageModel:
    """A model of a published shape with random weights and the almanac's tokenizer: on a GPU all of it, in bfloat16; on
    a CPU two blocks of it, in float32 and with the almanac's vocabulary."""
    shape, whole = SHAPES[name], device.type == "cuda"
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    blocks, vocabulary = (shape.blocks, shape.vocabulary) if whole else (2, len(tokenizer))
    if shape.family == "gptj":
        sizes = dict(n_embd=shape.d, n_layer=blocks, n_head=16, n_inner=shape.D, rotary_dim=64)
    else:
        sizes = dict(hidden_size=shape.d, intermediate_size=shape.D, num_hidden_layers=blocks)
        sizes |= dict(num_attention_heads=shape.d // 128, num_key_value_heads=8, max_position_embeddings=2048)
    config = AutoConfig.for_model(shape.family, vocab_size=vocabulary, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if whole else torch.float32)
    return LanguageModel(network, tokenizer, f"{name}, random weights" + ("" if whole else f", {blocks} blocks"))


def measure_shapes(
    names: Sequence[str], methods: Sequence[str] = (), *, n_edits: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Edits by all methods at published models' shapes, their floors, and what MEMOIR's memory costs a question there.

    n_edits  by each method; default: 13 on a GPU, so that ten count, and 5 on a CPU
    """
    device, started, began = torch.device("cuda" if torch.cuda.is_available() else "cpu"), now(), time.monotonic()
    edits, shapes = load_edits("almanac-qa", n=n_edits or (13 if device.type == "cuda" else 5)), {}
    for name in names:
        since, model = time.monotonic(), shaped(name, device)
        rates, rows = rates_of(model), {}
        for label in methods or LABELS:
            left = SHAPE_SECONDS - (time.monotonic() - since)
            asked = any("decode" in key for row in rows.values() for key in row)  # one memory costs what another does
            if left > 0:
                rows[label] = _shape_row(model, label, edits, rates, left, questions=not asked)
            else:
                rows[label] = {"reason": f"not begun: {SHAPE_SECONDS} s had passed"}
            say(f"{name}, {label}: {numbers_of(rows[label])}")
        weights = sum(p.nbytes for p in model.network.parameters())
        shapes[name] = {"model": repr(model), "parameter_bytes": weights, **rates, "methods": rows}
        del model  # the next one would not fit beside it
    info = {"started": started, "machine": machine(device), **software()}
    return {"info": info, "shapes": shapes, "seconds": time.monotonic() - began}


def machine(device: torch.device) -> str:
    """The card's name, or the processor's and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _shape_row(
    model: LanguageModel,
    label: str,
    edits: Sequence[EditRequest],
    rates: dict[str, float],
    left: float,
    questions: bool,
) -> dict[str, Any]:
    """One method's figures, or the reason why there are none; no edit begins after the seconds left."""
    method, settings = variant(label)
    if measures_moments(method):  # the second moments' size matters here, their values do not
        settings = {"moments": "background"} | settings
    elif method == "memoir":  # the paper's number, as random weights may never reach the loss at which it stops
        settings = {"iterations": 30} | settings
    try:
        editor = make_editor(method, model, background=background_prompts(), **settings)
        row: dict[str, Any] = time_edits(editor, edits, min(METHOD_SECONDS, left))
        row["floor_seconds"] = edit_floor(editor, edits[0], row["iterations"], **rates)
        if questions and isinstance(editor, MEMOIR):
            for over in overheads(editor, edits[:1], COUNTS, ROUNDS):
                row |= {f"{part} at {over['edits']} edits": over[part] for part in ("prefill", "decode")}
            if model.device.type == "cuda":
                row["bytes_over_model"] = bytes_over(model)  # with the masks of so many edits
    except (EditError, torch.OutOfMemoryError) as error:
        row = {"reason": str(error).splitlines()[0]}
    if model.editor is not None:
        model.editor.detach()
    return row


def shapes_summary(found: dict[str, Any]) -> dict[str, Any]:
    """Seconds per edit by "shape, method", null where there is none, and how long all of it took."""
    shapes = found["shapes"].items()
    rows = {f"{name}, {label}": row for name, shape in shapes for label, row in shape["methods"].items()}
    return {label: row.get("seconds") for label, row in rows.items()} | {"seconds": found["seconds"]}


def rates_of(model: LanguageModel) -> dict[str, float]:
    """What the device does in a second: operations of a large matrix product in the model's type, and bytes read."""
    device = model.device
    size = 1024 if device.type == "cpu" else 8192
    matrix, words = torch.randn(size, size, device=device, dtype=model.dtype), torch.ones(1 << 27, device=device)
    return {
        "operations_per_second": 2 * size**3 / min(timed(device, lambda: matrix @ matrix)),
        "bytes_per_second": words.nbytes / min(timed(device, words.sum)),
    }


def edit_floor(
    editor: Editor, request: EditRequest, iterations: float, *, operations_per_second: float, bytes_per_second: float
) -> float:
    """Seconds that no edit can undercut, at these rates.

    The blocks up to the last edited one run once; the later ones run forward in each iteration and once more at the
    end, and backward in each iteration. A pass takes two operations per weight and token, where the last MLP and the
    head see so few tokens that none are counted. It reads the weights once; edits that look ahead share the first
    blocks' reading. What a method does to its own matrices comes on top.
    """
    model, config, count = editor.model, editor.config, list(editor.patches)[-1].layer + 1
    copies = getattr(config, "prefixes", 0)
    tokens = int(editor.encode_edits([request]).attention_mask.sum()) * (1 + copies)
    tokens += copies * getattr(config, "prefix_tokens", 0)
    first, later = (sum(p.numel() for p in part.parameters()) for part in (model.blocks[:count], model.blocks[count:]))
    last_mlp = sum(p.numel() for p in model.site(len(model.blocks) - 1).mlp.parameters()) if later else 0
    passes = 2 * iterations + 1
    operations = 2 * tokens * (first + passes * (later - last_mlp))
    read = first / editor.ahead + passes * (later + model.head.weight.numel())
    return max(operations / operations_per_second, read * model.dtype.itemsize / bytes_per_second)
