"""What editing costs at the shapes of published models, with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memoir.almanac import background_prompts, model_path
from memoir.bench import METHODS, measures_moments, numbers_of, time_edits
from memoir.data import load_edits
from memoir.editors import EditError, make_editor
from memoir.editors.memoir import MEMOIR
from memoir.grid import variant
from memoir.models import LanguageModel
from memoir.overheads import overheads, timed
from memoir.presets import SHAPES
from memoir.records import EditRequest

REAL_SHAPES = ("llama-3-8b", "mistral-7b", "gpt-j-6b")
COUNTS = (1000, 100_000)  # edits in the memory for the overheads
BUDGET_SECONDS = 500  # after which no further method is begun


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
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(shape.family, vocab_size=vocabulary, **sizes),
            dtype=torch.bfloat16 if whole else torch.float32,
        )
    return LanguageModel(network, tokenizer, f"{name}, random weights" + ("" if whole else f", {blocks} blocks"))


def measure_shapes(
    names: Sequence[str], methods: Sequence[str] = (), *, n_edits: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Edits by all methods at published models' shapes, and MEMOIR's floor and overheads there.

    n_edits  by each method; default: 13 on a GPU, so that ten count, and 5 on a CPU
    """
    device, began = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.monotonic()
    edits, shapes = load_edits("almanac-qa", n=n_edits or (13 if device.type == "cuda" else 5)), {}
    for name in names:
        model = shaped(name, device)
        rows: dict[str, dict[str, Any]] = {}
        for label in methods or METHODS:
            if time.monotonic() - began > BUDGET_SECONDS:
                rows[label] = {"reason": f"not begun: {BUDGET_SECONDS} s had passed"}
            else:
                rows[label] = _shape_row(model, label, edits)
            say(f"{name}, {label}: {numbers_of(rows[label])}")
        shapes[name] = {"model": repr(model), "methods": rows}
        del model
    return {"shapes": shapes, "seconds": time.monotonic() - began}


def _shape_row(model: LanguageModel, label: str, edits: Sequence[EditRequest]) -> dict[str, Any]:
    """One method's figures, or the reason why there are none."""
    method, settings = variant(label)
    if measures_moments(method):  # the second moments' size matters here, their values do not
        settings = {"moments": "background"} | settings
    elif method == "memoir":  # the paper's number, as random weights may never reach the loss at which it stops
        settings = {"iterations": 30} | settings
    try:
        editor = make_editor(method, model, background=background_prompts(), **settings)
        row: dict[str, Any] = time_edits(editor, edits)
        if isinstance(editor, MEMOIR):
            row["floor_seconds"] = edit_floor(editor, edits[0], row["iterations"])
            for over in overheads(editor, edits[:1], COUNTS, 5):
                row |= {f"{part} at {over['edits']} edits": over[part] for part in ("prefill", "decode")}
    except (EditError, torch.OutOfMemoryError) as error:
        row = {"reason": str(error).splitlines()[0]}
    if model.editor is not None:
        model.editor.detach()
    return row


def shape_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shape and method of what `measure_shapes` returns, for a table; None where there is no figure."""
    rows = [
        {"shape": name, "method": label, **row}
        for name, shape in found["shapes"].items()
        for label, row in shape["methods"].items()
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


def shapes_summary(found: dict[str, Any]) -> dict[str, Any]:
    """Seconds per edit by "shape, method", null where there is none, and how long all of it took."""
    seconds = {f"{row['shape']}, {row['method']}": row.get("seconds") for row in shape_rows(found)}
    return seconds | {"seconds": found["seconds"]}


def edit_floor(editor: MEMOIR, request: EditRequest, iterations: float) -> float:
    """Seconds that no edit by MEMOIR can undercut, at the rates of a large matrix product and of reading half a GB.

    The blocks up to the edited one run once; the later ones run forward in each iteration and once more at the end, and
    backward in each iteration. A pass takes two operations per weight and token, where the last MLP and the head see so
    few tokens that none are counted. It reads the weights once; edits that look ahead share the first blocks' reading.
    """
    model, device, count = editor.model, editor.model.device, editor.site.layer + 1
    size = 1024 if device.type == "cpu" else 8192
    matrix, words = torch.randn(size, size, device=device, dtype=model.dtype), torch.ones(1 << 27, device=device)
    operation = min(timed(device, lambda: matrix @ matrix)) / (2 * size**3)
    byte = min(timed(device, words.sum)) / words.nbytes
    tokens = int(editor.encode_edits([request]).attention_mask.sum()) * (1 + editor.config.prefixes)
    first, later = (sum(p.numel() for p in part.parameters()) for part in (model.blocks[:count], model.blocks[count:]))
    last_mlp = sum(p.numel() for p in model.site(len(model.blocks) - 1).mlp.parameters()) if later else 0
    passes = 2 * iterations + 1
    operations = 2 * tokens * (first + passes * (later - last_mlp))
    read = first / editor.config.ahead + passes * (later + model.head.weight.numel())
    return max(operations * operation, read * model.dtype.itemsize * byte)
