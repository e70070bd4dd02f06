"""What editing costs: seconds per edit, and MEMOIR's ratios against baselines that the same run measures.

Each ratio is a median over pairs of neighbouring measurements, ours and then the baseline, so a busy machine slows both
alike. A warm-up that does not count precedes every measurement. OMP_NUM_THREADS=1 makes small models' numbers steadier.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memoir.almanac import background_prompts, model_path
from memoir.bank import MaskBank
from memoir.data import load_edits
from memoir.editors import EDITORS, EditError, Editor, make_editor
from memoir.editors.memoir import MEMOIR
from memoir.grid import variant
from memoir.models import Batch, LanguageModel, load_model
from memoir.presets import SHAPES
from memoir.records import EditRequest
from memoir.run import peak_bytes, run_info
from memoir.sites import adding, watching

METHODS = tuple(name for name, editor in EDITORS.items() if editor.changes_model)
PAPER_RATE = 1.0  # of SGD on W_m; MEMOIR, section 4.1
WARM_UP = 3  # edits by a method that do not count: the first one by itself, then two in a list
REAL_SHAPES = ("llama-3-8b", "mistral-7b", "gpt-j-6b")
SHAPE_COUNTS = (1000, 100_000)  # edits in the memory for the overheads at real shapes
BUDGET_SECONDS = 500  # after which no further method is begun at real shapes
TURN = 32  # edits by MEMOIR in a list, before the plain form makes them too

# n_edits by each method; n_plain edits against the plain form, for plain_seconds at most; counts of edits in the
# memory, asked for so many rounds; masks to search.
FULL = dict(n_edits=35, n_plain=289, plain_seconds=600, counts=(1000, 100_000), rounds=30, masks=(1000, 10**6))
QUICK = dict(n_edits=13, n_plain=97, plain_seconds=60, counts=(1000,), rounds=10, masks=(1000, 10**5))


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


# Edits ---------------------------------------------------------------------------------------------------------------


def time_edits(editor: Editor, edits: Sequence[EditRequest]) -> dict[str, float]:
    """Median seconds per edit of edits in a list and their mean iterations, after `WARM_UP` others; the seconds of the
    first edit with all that a method prepares before it; on a GPU, peak memory over the model's weights."""
    device = editor.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = clock(device)
    editor.edit(edits[0])
    row = {"first_edit_seconds": clock(device) - start}
    editor.edit(edits[1:WARM_UP])
    reports = editor.edit(edits[WARM_UP:])
    row["seconds"] = median(report.seconds for report in reports)
    row["iterations"] = fmean(report.iterations for report in reports)
    if device.type == "cuda":
        row["bytes_over_model"] = peak_bytes() - sum(p.nbytes for p in editor.model.network.parameters())
    return row


def plain_edit(
    editor: MEMOIR, request: EditRequest, weight: Tensor, iterations: int, stop_loss: float = 0.0, *, frozen: bool
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


def against_plain(
    editor: MEMOIR, edits: Sequence[EditRequest], *, same_iterations: bool = False, budget: float = 60
) -> dict[str, dict[str, float]]:
    """Edits by a fresh editor and by the plain form, in turns: a list of edits, then each of them by the plain form's
    two variants. The first edit, a turn of its own, warms up.

    same_iterations  the plain form makes as many iterations; otherwise it stops at the editor's loss, or at `stop_loss`
                     where the editor went further
    budget           seconds after which the plain form makes no further edit
    returns          form → its median seconds per edit, mean iterations and loss, and the editor's median speedup
    """
    began, measured = time.monotonic(), []
    weights = {frozen: torch.zeros_like(editor.memory.weight) for frozen in (False, True)}
    for start in (0, *range(1, len(edits), TURN)):
        requests = edits[start : start + TURN] if start else edits[:1]
        reports = editor.edit(requests)
        for request, report in zip(requests, reports, strict=True):
            limits = (100, max(report.loss_after, editor.config.stop_loss))
            if same_iterations:
                limits = (report.iterations, 0.0)
            row = [(report.seconds, report.iterations, report.loss_after)]
            with editor.detached() as model:
                for frozen in weights:
                    since = clock(model.device)
                    weights[frozen], *outcome = plain_edit(editor, request, weights[frozen], *limits, frozen=frozen)
                    row.append((clock(model.device) - since, *outcome))
            measured.append(row)
            out_of_time = len(measured) > 1 and time.monotonic() - began > budget
            if out_of_time:
                break
        if out_of_time:
            break
    seconds, iterations, losses = np.array(measured[1:]).transpose(2, 1, 0)  # each (forms × edits)
    columns = np.median(seconds, 1), iterations.mean(1), losses.mean(1), np.median(seconds / seconds[0], 1)
    return {
        form: dict(zip(("seconds", "iterations", "loss", "speedup"), map(float, values), strict=True))
        for form, *values in zip(("memoir", "plain", "plain, frozen"), *columns, strict=True)
    }


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


# Questions -----------------------------------------------------------------------------------------------------------


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


def overheads(editor: MEMOIR, edits: Sequence[EditRequest], counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Prefill and decoding time of the edited model over the unedited one, with so many edits in the memory.

    The edits are real, and their prompts are asked one by one; synthetic masks fill the memory up to each count.
    EditError where no prompt reads the memory: such questions cost less.
    """
    model, bank = editor.model, editor.memory.bank
    editor.edit([request for request in edits if request.id not in editor.edits])
    prompts = [request.prompt for request in edits]
    batches = [model.encode([p]) for p, edit_id in zip(prompts, editor.matches(prompts), strict=True) if edit_id]
    if not batches:
        raise EditError(f"none of {len(prompts)} edited prompts reads the memory, expected at least one")
    ids, packed, rows = list(bank.ids), bank.packed.copy(), []
    for count in counts:
        more = synthetic_masks(max(0, count - len(ids)), bank.width)
        bank.replace([*ids, *(f"synthetic {i}" for i in range(len(more)))], np.concatenate([packed, more]))
        ratios = []
        for batch in batches * (rounds + 1):
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


# A model and an edit set ---------------------------------------------------------------------------------------------


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
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    make = partial(make_editor, model=model, dataset=dataset, background=background)
    rows, plain = {}, {}
    for label in methods or [method for method in METHODS if not (quick and measures_moments(method))]:
        method, own = variant(label)
        editor = make(method, **own)
        rows[label] = time_edits(editor, edits[: size["n_edits"]])
        editor.detach()
        say(f"{label}: {_numbers(rows[label])}")
    for equal, own in {"loss": {}, "iterations": dict(iterations=10, stop_loss=0, learning_rate=PAPER_RATE)}.items():
        plain[equal] = against_plain(
            make("memoir", **own),
            edits[: size["n_plain"]],
            same_iterations=equal == "iterations",
            budget=size["plain_seconds"],
        )
        for form, row in plain[equal].items():
            say(f"{form}, same {equal}: {_numbers(row)}")
    editor = make("memoir")
    overhead = overheads(editor, edits[:8], size["counts"], size["rounds"])
    search = mask_search(size["masks"], model.device)
    for row in (*overhead, *search):
        say(_numbers(row))
    return {
        "info": asdict(run_info(editor, dataset, size["n_edits"], 1, started)),
        "methods": rows,
        "plain": plain,
        "floor_seconds": edit_floor(editor, edits[0], plain["loss"]["memoir"]["iterations"]),
        "overhead": overhead,
        "search": search,
        "summary": {
            "model": model.name,
            "edit_speedup_vs_plain": plain["loss"]["plain"]["speedup"],
            "edit_speedup_same_iterations": plain["iterations"]["plain"]["speedup"],
            "prefill_overhead": overhead[0]["prefill"],
            "decode_overhead": overhead[0]["decode"],
            "mask_search_million_seconds": search[-1]["seconds"] * 1_000_000 / search[-1]["masks"],
            "seconds_per_edit": {label: row["seconds"] for label, row in rows.items()},
        },
    }


def measures_moments(method: str) -> bool:
    """Whether a method decomposes second moments of keys, a D × D matrix, before its first edit."""
    return any(field.name == "moments" for field in fields(EDITORS[method].Config))


def _numbers(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in row.items())


# The shapes of published models --------------------------------------------------------------------------------------


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
            say(f"{name}, {label}: {_numbers(rows[label])}")
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
            for over in overheads(editor, edits[:1], SHAPE_COUNTS, 5):
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
