"""What editing costs: ratios in one run against named baselines, and the floors that arithmetic and bytes set.

Whatever is compared is measured in turns, a round of each after the other, and told by medians: a machine that others
use as well slows both alike. On a CPU edits and questions take one core, the mask search all that torch may use.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, LlamaConfig, MistralConfig

from memoir.almanac import background_prompts, model_path
from memoir.batch import variant
from memoir.data import load_edits
from memoir.editors import EDITORS, EditError, make_editor
from memoir.editors.base import Editor
from memoir.editors.memoir import MEMOIR
from memoir.memory import MaskBank
from memoir.models import Batch, LanguageModel, load_model, predicting
from memoir.presets import SHAPES
from memoir.records import EditRequest
from memoir.run import peak_bytes, run_info
from memoir.sites import Tail, adding, watching

METHODS = tuple(name for name in EDITORS if name not in ("incontext", "unedited"))
QUICK_METHODS = ("memoir", "ft", "defer", "grace", "wise")  # the others factor a D × D matrix before their first edit
STEP_RULE = "memoir+step_rule=relative"
PAPER_RATE = 1.0  # of the plain form, MEMOIR, section 4.1
REAL_SHAPES = ("llama-3-8b", "mistral-7b", "gpt-j-6b")
BUDGET_SECONDS = 500  # after which no further method is begun at the real shapes

# Machine -------------------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds, once everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that work() takes."""
    began = clock(device)
    work()
    return clock(device) - began


def in_turns(device: torch.device, rounds: int, *works: Callable[[], Any]) -> list[list[float]]:
    """Seconds of each of several works, `rounds` times one after the other, after one round that does not count."""
    measured = [[timed(device, work) for work in works] for _ in range(rounds + 1)][1:]
    return [list(times) for times in zip(*measured, strict=True)]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch computes with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read_all(words: Tensor) -> None:
    """Read every byte of a matrix once and do next to nothing with it: the yardstick of memory bandwidth."""
    if words.device.type != "cpu":
        words.sum()
        return
    parts = np.array_split(words.numpy(), torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda part: np.bitwise_or.reduce(part, axis=None), parts))


def arithmetic_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second in a large matrix product, the best of five."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (times,) = in_turns(device, 5, lambda: a @ b)
    return 2 * size**3 / min(times)


def bandwidth(device: torch.device) -> float:
    """Bytes per second in reading half a gigabyte, the best of five."""
    words = torch.ones(1 << 26, dtype=torch.int64, device=device)
    (times,) = in_turns(device, 5, lambda: read_all(words))
    return words.nbytes / min(times)


# The plain form ------------------------------------------------------------------------------------------------------


def plain_edit(
    editor: MEMOIR, request: EditRequest, weight: Tensor, *, iterations: int, stop_loss: float = 0.0, frozen: bool
) -> tuple[Tensor, int]:
    """MEMOIR as a textbook writes it: in every iteration the whole model, forward and backward, into a dense W_m.

    torch's autograd and SGD at the paper's fixed rate; stopped after `iterations`, or once the loss is below stop_loss.

    weight  W_m (d × D) so far
    frozen  the model's weights ask for no gradient, so that backward ends at the edited projection
    returns W_m (d × D) and the iterations made
    """
    model, site, config = editor.model, editor.site, editor.config
    batch = editor.encode_edits([request])
    with torch.no_grad(), watching(site) as seen:
        model.forward(batch)
    a = seen[0][0]
    mask = editor.memory.fingerprint(a, batch.prompt_mask)[0]
    counted, labels = predicting(batch.learn_mask), batch.input_ids[batch.learn_mask]
    parameter = nn.Parameter(weight)
    optimizer = torch.optim.SGD([parameter], lr=PAPER_RATE, weight_decay=config.weight_decay)
    model.network.requires_grad_(not frozen)
    try:
        for step in range(iterations + 1):
            with adding(site, (a.float() * mask) @ parameter.T):
                loss = cross_entropy(model.forward(batch)[counted].float(), labels)
            if step == iterations or loss.item() < stop_loss:
                return parameter.detach(), step
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([parameter], config.clip)
            optimizer.step()
            model.network.zero_grad()
    finally:
        model.network.requires_grad_(False)
    raise AssertionError("the loop ends by itself")


# Edits ---------------------------------------------------------------------------------------------------------------

PARTS = {
    "prefix": ((LanguageModel, "encode"), (LanguageModel, "tail"), (LanguageModel, "forward")),
    "tail": ((Tail, "logits"), (torch.autograd, "grad"), (Tensor, "backward")),
    "bank": ((MaskBank, "nearest"), (MaskBank, "overlaps"), (MaskBank, "add")),
}


@contextlib.contextmanager
def parts_of(device: torch.device) -> Iterator[Counter]:
    """Seconds spent inside in each of `PARTS`; a part called by another counts as that one."""
    spent: Counter = Counter()
    running: list[str] = []

    def watched(function: Callable, part: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if running:
                return function(*args, **kwargs)
            running.append(part)
            began = clock(device)
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += clock(device) - began
                running.clear()

        return call

    with contextlib.ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                function = getattr(owner, name)
                stack.callback(setattr, owner, name, function)
                setattr(owner, name, watched(function, part))
        yield spent


def split(editor: Editor, edits: Sequence[EditRequest]) -> dict[str, Any]:
    """Means over edits: seconds, their parts (write: all that is no other part), and iterations.

    The first edit is made beforehand, and what a method measures once before it stands by itself.
    """
    device = editor.model.device
    preparing = timed(device, lambda: editor.edit(edits[0]))
    rows, spent = [], Counter()
    for request in edits[1:]:
        with parts_of(device) as parts:
            began = clock(device)
            (report,) = editor.edit(request)
            seconds = clock(device) - began
        rows.append((seconds, report.iterations, report.loss_after))
        spent.update(parts)
    seconds, iterations, losses = zip(*rows, strict=True)
    shares = {part: spent[part] / len(rows) for part in PARTS}
    shares["write"] = sum(seconds) / len(rows) - sum(shares.values())
    return {
        "seconds": sum(seconds) / len(rows),
        "median_seconds": median(seconds),
        "parts": shares,
        "iterations": sum(iterations) / len(rows),
        "loss_after": sum(losses) / len(rows),
        "first_edit_seconds": preparing,
    }


def against_plain(editor: MEMOIR, edits: Sequence[EditRequest], iterations: int) -> dict[str, Any]:
    """Each edit by ours and by the plain form in turns: stopped at the same loss, and after as many iterations.

    iterations  for the comparison at equal iterations, where neither stops early
    """
    device, model = editor.model.device, editor.model
    stop = editor.config.stop_loss
    fixed = {**asdict(editor.config), "stop_loss": 0.0, "iterations": iterations, "learning_rate": PAPER_RATE}
    exact = make_editor("memoir", model, background=editor.background, **fixed)
    weights = {"plain": torch.zeros_like(editor.memory.weight), "plain, frozen": torch.zeros_like(editor.memory.weight)}
    times: dict[str, list[float]] = {}
    steps: dict[str, list[int]] = {}

    def note(name: str, seconds: float, made: int) -> None:
        times.setdefault(name, []).append(seconds)
        steps.setdefault(name, []).append(made)

    for request in edits:
        for name, mine in (("memoir", editor), ("memoir, same iterations", exact)):
            mine.attach()
            (report,) = mine.edit(request)
            note(name, report.seconds, report.iterations)
        with exact.detached():
            for name in weights:
                for asked, limit in ((name, 100), (f"{name}, same iterations", iterations)):
                    began = clock(device)
                    # At equal iterations nothing is kept: sequences must not grow apart.
                    weight, made = plain_edit(
                        editor,
                        request,
                        weights[name].clone(),
                        iterations=limit,
                        stop_loss=stop if asked == name else 0.0,
                        frozen=name != "plain",
                    )
                    note(asked, clock(device) - began, made)
                    if asked == name:
                        weights[name] = weight
    editor.attach()
    return {
        name: {"median_seconds": median(times[name][1:]), "iterations": sum(steps[name][1:]) / (len(edits) - 1)}
        for name in times
    }


def edit_floor(
    editor: MEMOIR, request: EditRequest, iterations: float, rate: float, reading: float
) -> dict[str, float]:
    """What one edit cannot go below: the prefix once, the tail forward in each iteration and at the end, and backward.

    Each pass takes two operations per weight and token, and reads the weights once; which of the two takes longer is
    its floor. Backward passes ask for no weight's gradient, so they cost as much as forward ones.

    rate     operations per second
    reading  bytes per second
    """
    model, batch = editor.model, editor.encode_edits([request])
    tokens, answers = int(batch.attention_mask.sum()), int(batch.learn_mask.sum())
    layer = editor.site.layer
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    copies = 1 + editor.config.prefixes
    before = (sum(sizes[: layer + 1]), tokens * copies)
    behind = [(sum(sizes[layer + 1 :]), tokens * copies), (model.head.weight.numel(), answers * copies)]
    passes = [(before, 1.0), *((part, 2 * iterations + 1) for part in behind)]
    operations = sum(2 * weights * seen * times for (weights, seen), times in passes)
    moved = sum(weights * model.dtype.itemsize * times for (weights, _), times in passes)
    seconds = sum(
        max(2 * weights * seen / rate, weights * model.dtype.itemsize / reading) * times
        for (weights, seen), times in passes
    )
    return {"operations": operations, "bytes": moved, "seconds": seconds}


# Questions -----------------------------------------------------------------------------------------------------------


def synthetic_masks(count: int, width: int, seed: int = 0) -> np.ndarray:
    """(count × ⌈width/64⌉) uint64, random bits of which a quarter are ones: edits that were never made."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**64, (count, -(-width // 64)), dtype=np.uint64)
    for start in range(0, count, 4096):
        words[start : start + 4096] &= rng.integers(0, 2**64, words[start : start + 4096].shape, dtype=np.uint64)
    words[:, -1] &= np.uint64(2 ** (width % 64 or 64) - 1)
    return words


def prefill(model: LanguageModel, batch: Batch) -> Any:
    """The forward call that fills a KV cache."""
    with torch.no_grad(), model.scope.prompt(batch.prompt_mask):
        return model.network(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
            use_cache=True,
            logits_to_keep=1,
        )


def decode_seconds(model: LanguageModel, batch: Batch, steps: int) -> float:
    """Seconds of one decoding step behind a prefill, mean of `steps`."""
    output, mask = prefill(model, batch), batch.attention_mask.long()
    began = clock(model.device)
    with torch.no_grad():
        for _ in range(steps):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            token = output.logits[:, -1:].argmax(-1)
            output = model.network(
                input_ids=token, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True
            )
    return (clock(model.device) - began) / steps


def overheads(editor: MEMOIR, edits: Sequence[EditRequest], counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """The edited model over the unedited one, on the edits' own prompts, all of which read the memory.

    The edits are real; the bank is filled up to each of `counts` with synthetic masks. Each prompt is asked by itself.
    """
    model, bank, device = editor.model, editor.memory.bank, editor.model.device
    ids, packed = list(bank.ids), bank.packed.copy()
    batches = [model.encode([request.prompt]) for request in edits]
    found = []
    for count in counts:
        more = synthetic_masks(count - len(ids), bank.width)
        bank.replace([*ids, *(f"synthetic {i}" for i in range(len(more)))], np.concatenate([packed, more]))
        ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
        for batch in batches:
            asked: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
            for _ in range(rounds + 1):
                editor.attach()
                edited = timed(device, lambda batch=batch: prefill(model, batch)), decode_seconds(model, batch, 8)
                with editor.detached():
                    plain = timed(device, lambda batch=batch: prefill(model, batch)), decode_seconds(model, batch, 8)
                for part, mine, theirs in zip(asked, edited, plain, strict=True):
                    asked[part].append((mine, theirs))
            for part, pairs in asked.items():
                ratios[part] += [mine / theirs for mine, theirs in pairs[1:]]
        found.append({"edits": count, **{part: median(values) for part, values in ratios.items()}})
    bank.replace(ids, packed)
    return found


def mask_search(
    counts: Sequence[int], width: int = 14336, *, device: torch.device, rounds: int = 5
) -> list[dict[str, Any]]:
    """The search of one mask among synthetic ones, in turns with reading as many bytes."""
    words = synthetic_masks(max(counts), width)
    query = torch.from_numpy(np.random.default_rng(1).random((1, width)) < 2 / 7).to(device)
    found = []
    for count in counts:
        bank = MaskBank(width, device)
        bank.replace([str(i) for i in range(count)], words[:count])
        stored = torch.from_numpy(words[:count].view(np.int64)).to(device)
        searching, reading = in_turns(device, rounds, partial(bank.nearest, query), partial(read_all, stored))
        seconds, floor = median(searching), median(reading)
        found.append(
            {
                "masks": count,
                "seconds": seconds,
                "floor_seconds": floor,
                "bytes": int(words[:count].nbytes),
                "bandwidth": words[:count].nbytes / floor,
                "bandwidth_share": median(read / search for read, search in zip(reading, searching, strict=True)),
            }
        )
        del bank, stored
    return found


# Both commands -------------------------------------------------------------------------------------------------------


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
    """The whole benchmark; `summary` holds the six numbers that `python -m memoir bench` ends with.

    methods  to split an edit's seconds of; default: all, and MEMOIR with a relative step
    say      is told each result as it comes
    sizes    n_edits, rounds, counts (edits in the memory) and masks (in the search), where they should not be as usual
    """
    model = load_model(name)
    device, cores = model.device, torch.get_num_threads()
    few = {"n_edits": 8, "rounds": 5, "counts": (1000, 10_000), "masks": (1000, 100_000, 1_000_000)}
    many = {
        "n_edits": 32,
        "rounds": 9,
        "counts": (1000, 10_000, 100_000),
        "masks": (1000, 10_000, 100_000, 1_000_000),
    }
    size = {**(few if quick else many), **sizes}
    edits = list(load_edits(dataset, path=data_path, n=size["n_edits"], seed=0))
    known = {"dataset": dataset, "background": background}
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with threads(1):
        rate, reading = arithmetic_rate(device, model.dtype), bandwidth(device)
        say(f"machine: {rate / 1e9:.1f} Gflop/s in a matrix product, {reading / 1e9:.1f} GB/s in reading, one core")
        rows = {}
        for label in methods or (*(QUICK_METHODS if quick else METHODS), STEP_RULE):
            method, settings = variant(label)
            editor = make_editor(method, model, **known, **settings)
            rows[label] = split(editor, edits)
            parts = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in rows[label]["parts"].items())
            say(f"{label}: {1e3 * rows[label]['seconds']:.1f} ms per edit ({parts})")
            editor.detach()
        editor = make_editor("memoir", model, **known)
        plain = against_plain(editor, edits, iterations=10)
        for label, row in plain.items():
            say(f"{label}: {1e3 * row['median_seconds']:.1f} ms per edit, {row['iterations']:.1f} iterations")
        floor = edit_floor(editor, edits[0], plain["memoir"]["iterations"], rate, reading)
        over = overheads(editor, edits[:4], size["counts"], size["rounds"])
        for row in over:
            say(f"{row['edits']} edits: prefill × {row['prefill']:.3f}, decode × {row['decode']:.3f}")
        info = asdict(run_info(editor, dataset, len(edits), 1, started))
    with threads(cores):
        search = mask_search(size["masks"], device=device, rounds=size["rounds"])
    for row in search:
        say(f"{row['masks']} masks: {1e3 * row['seconds']:.2f} ms, {row['bandwidth_share']:.0%} of reading them")
    return {
        "info": info,
        "machine": {"operations_per_second": rate, "bytes_per_second": reading, "search_threads": cores},
        "methods": rows,
        "plain": plain,
        "floor": floor,
        "overhead": over,
        "search": search,
        "peak_bytes": peak_bytes(),
        "summary": {
            "edit_speedup_vs_plain": plain["plain"]["median_seconds"] / plain["memoir"]["median_seconds"],
            "edit_speedup_same_iterations": plain["plain, same iterations"]["median_seconds"]
            / plain["memoir, same iterations"]["median_seconds"],
            "prefill_overhead": over[0]["prefill"],
            "decode_overhead": over[0]["decode"],
            "mask_search_bandwidth_share": search[-1]["bandwidth_share"],
            "mask_search_million_seconds": search[-1]["seconds"] * 1_000_000 / search[-1]["masks"],
        },
    }


CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "gptj": GPTJConfig}


def shape_names(request: str) -> list[str]:
    """The shapes that a request means; ValueError names those there are."""
    if request != "all" and request not in REAL_SHAPES:
        raise ValueError(f"shape {request!r} is unknown; expected one of {', '.join(REAL_SHAPES)} or all")
    return list(REAL_SHAPES) if request == "all" else [request]


def shaped(name: str, device: torch.device) -> LanguageModel:
    """A published model's shape with random weights: all of it in bfloat16 on a GPU; on a CPU two blocks of it, in
    float32 and with the almanac's vocabulary. Its tokenizer is the almanac's."""
    shape, whole = SHAPES[name], device.type == "cuda"
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    blocks, vocabulary = (shape.blocks, shape.vocabulary) if whole else (2, len(tokenizer))
    sizes = {"hidden_size": shape.d, "num_hidden_layers": blocks, "num_attention_heads": shape.d // 128}
    sizes |= {"intermediate_size": shape.D, "max_position_embeddings": 2048}
    if shape.family == "gptj":
        sizes = {"n_embd": shape.d, "n_layer": blocks, "n_head": 16, "n_inner": shape.D, "rotary_dim": 64}
    else:
        sizes["num_key_value_heads"] = 8
    config = CONFIGS[shape.family](vocab_size=vocabulary, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if whole else torch.float32)
    return LanguageModel(network, tokenizer, f"{name}, random weights" + ("" if whole else f", {blocks} blocks"))


def measure_shapes(
    names: Sequence[str], methods: Sequence[str] = (), *, n_edits: int = 4, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Edits by all methods at published models' shapes, with random weights.

    A method that does not fit, or for which no time is left, has a "reason" instead of figures. C of the key-value
    methods is measured on the background texts: its values do not matter here, its size does.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    edits = list(load_edits("almanac-qa", n=n_edits, seed=0))
    began, found = time.monotonic(), {}
    for name in names:
        model = shaped(name, device)
        weights = sum(p.nbytes for p in model.network.parameters())
        rate, reading = arithmetic_rate(device, model.dtype), bandwidth(device)
        rows: dict[str, Any] = {}
        for label in methods or (*METHODS, STEP_RULE):
            method, settings = variant(label)
            if time.monotonic() - began > BUDGET_SECONDS:
                rows[label] = {"reason": f"not begun: {BUDGET_SECONDS} s had passed"}
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            editor = None
            try:
                if method in ("rome", "memit", "alphaedit"):
                    settings = {**settings, "moments": "background"}
                editor = make_editor(method, model, background=background_prompts(), **settings)
                rows[label] = split(editor, edits)
                if device.type == "cuda":
                    rows[label]["bytes_over_model"] = peak_bytes() - weights
                if method == "memoir":
                    rows[label]["floor"] = edit_floor(editor, edits[0], rows[label]["iterations"], rate, reading)
                    rows[label]["overhead"] = overheads(editor, edits[:1], (1000,), 5)
                say(f"{name}, {label}: {rows[label]['seconds']:.3f} s per edit, {rows[label]['iterations']:.0f} steps")
            except (EditError, torch.OutOfMemoryError) as error:
                rows[label] = {"reason": str(error).splitlines()[0]}
                say(f"{name}, {label}: {rows[label]['reason']}")
            finally:
                if editor is not None:
                    editor.detach()
                del editor
        found[name] = {"model": repr(model), "parameter_bytes": weights, "methods": rows}
        found[name]["machine"] = {"operations_per_second": rate, "bytes_per_second": reading, "device": str(device)}
        if device.type == "cuda":
            found[name]["machine"]["device"] = torch.cuda.get_device_name()
        del model
    return {"shapes": found, "seconds": time.monotonic() - began}


def shape_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per shape and method of what `measure_shapes` returns, for a table."""
    return [
        {
            "shape": name,
            "method": label,
            "seconds per edit": _short(row.get("seconds")),
            "floor": _short(row.get("floor", {}).get("seconds")),
            "iterations": _short(row.get("iterations")),
            "GB over the model": _short(row["bytes_over_model"] / 1e9 if "bytes_over_model" in row else None),
            "note": row.get("reason"),
        }
        for name, shape in found["shapes"].items()
        for label, row in shape["methods"].items()
    ]


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def shapes_summary(found: dict[str, Any]) -> dict[str, Any]:
    """Seconds per edit by "shape, method", null where there is none, and how long all of it took."""
    return {
        f"{name}, {label}": row.get("seconds")
        for name, shape in found["shapes"].items()
        for label, row in shape["methods"].items()
    } | {"seconds": found["seconds"]}
