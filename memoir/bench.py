"""What editing costs: ratios in one run against named baselines, and the floors that arithmetic and bytes set.

Whatever is compared is measured in turns, a round of each after the other, and told by medians: a machine that others
use as well slows both alike. On a CPU edits and questions take one core, the mask search all that torch may use.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, LlamaConfig, MistralConfig

from memoir.almanac import background_prompts, model_path
from memoir.bank import ApproximateBank, MaskBank, make_bank
from memoir.data import load_edits
from memoir.editors import EDITORS, EditError, make_editor
from memoir.editors.base import Editor
from memoir.editors.memoir import MEMOIR
from memoir.grid import variant
from memoir.metrics import mean
from memoir.models import Batch, LanguageModel, load_model
from memoir.presets import SHAPES
from memoir.records import EditRequest
from memoir.run import Evaluation, peak_bytes, run_info
from memoir.sites import Tail, adding, input_of, watching

METHODS = tuple(name for name in EDITORS if name not in ("incontext", "unedited"))
QUICK_METHODS = ("memoir", "ft", "defer", "grace", "wise")  # the others factor a D × D matrix before their first edit
AHEAD = 32  # edits whose prompts run through the model together
LOT = 1 + 3 * AHEAD  # edits that are made one after the other, the first of which is not counted
VARIANTS = (f"memoir+ahead={AHEAD}", "memoir+step_rule=relative")
PAPER_RATE = 1.0  # of the plain form, MEMOIR, section 4.1
REAL_SHAPES = ("llama-3-8b", "mistral-7b", "gpt-j-6b")
BUDGET_SECONDS = 500  # after which no further method is begun at the real shapes
SHAPE_ITERATIONS = 30  # of MEMOIR there, the paper's fewest: with random weights the loss may not reach its limit

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


def device_name(device: torch.device) -> str:
    """What the GPU or the processor is called, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux has it here; elsewhere Python knows
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


def measured_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What floors are counted for: the device, operations_per_second and bytes_per_second."""
    return {
        "device": device_name(device),
        "operations_per_second": arithmetic_rate(device, dtype),
        "bytes_per_second": bandwidth(device),
    }


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
    counted, labels = batch.counted, batch.labels
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
    device, count = editor.model.device, len(edits) - 1
    preparing = timed(device, lambda: editor.edit(edits[0]))
    with parts_of(device) as spent:
        began = clock(device)
        reports = editor.edit(edits[1:])
        seconds = (clock(device) - began) / count
    shares = {part: spent[part] / count for part in PARTS}
    shares["write"] = seconds - sum(shares.values())
    return {
        "seconds": seconds,
        "median_seconds": median(report.seconds for report in reports),
        "parts": shares,
        "iterations": sum(report.iterations for report in reports) / count,
        "loss_after": sum(report.loss_after for report in reports) / count,
        "first_edit_seconds": preparing,
    }


def against_plain(editor: MEMOIR, edits: Sequence[EditRequest], iterations: int | None = None) -> dict[str, Any]:
    """Ours and the plain form, `AHEAD` edits by each in turns, stopped at the same loss or after as many iterations.

    The first edit of each is not counted. Ours makes them as they come, and with the prompts of `AHEAD` run through the
    model together; at equal iterations, where neither stops early, that way.

    iterations  for the comparison at equal iterations; None: at equal loss
    returns     by name: seconds per edit in each turn and their median, iterations, reliability after all edits
    """
    device, model, settings = editor.model.device, editor.model, asdict(editor.config)
    limit, stop_loss = (iterations, 0.0) if iterations else (100, editor.config.stop_loss)

    def ours(**changes: Any) -> MEMOIR:
        return make_editor("memoir", model, background=editor.background, **{**settings, **changes})

    def by_ours(name: str, window: Sequence[EditRequest]) -> list[int]:
        mine[name].attach()
        return [report.iterations for report in mine[name].edit(window)]

    def by_plain(name: str, window: Sequence[EditRequest]) -> list[int]:
        if model.editor is not None:
            model.editor.detach()
        made = []
        for request in window:
            weights[name], steps = plain_edit(
                editor, request, weights[name], iterations=limit, stop_loss=stop_loss, frozen="frozen" in name
            )
            made.append(steps)
        return made

    if iterations:
        mine = {"memoir": ours(ahead=AHEAD, stop_loss=0.0, iterations=iterations, learning_rate=PAPER_RATE)}
    else:
        mine = {"memoir": ours(), "memoir, ahead": ours(ahead=AHEAD)}
    weights = {name: torch.zeros_like(editor.memory.weight) for name in ("plain", "plain, frozen")}
    windows = [edits[:1], *(edits[start : start + AHEAD] for start in range(1, len(edits), AHEAD))]
    times: dict[str, list[float]] = {name: [] for name in (*mine, *weights)}
    steps: dict[str, list[int]] = {name: [] for name in times}
    for window in windows:
        for name in times:
            began = clock(device)
            made = (by_ours if name in mine else by_plain)(name, window)
            times[name].append((clock(device) - began) / len(window))
            steps[name] += made
    found = {}
    for name in times:
        reader = mine.get(name, mine["memoir"])
        if name in weights:  # the plain form's W_m, read as MEMOIR reads its own: the masks are the same
            reader.memory.weight.copy_(weights[name])
        reader.attach()
        found[name + (", same iterations" if iterations else "")] = {
            "median_seconds": median(times[name][1:]),
            "seconds_by_turn": times[name][1:],
            "iterations": mean(steps[name][1:]),
            "reliability": mean(Evaluation(reader, generate=False).scores(edits)["rel"]),
        }
    editor.attach()
    return found


def together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `against_plain` found with one lot of edits after another, each into an empty memory."""
    found = {}
    for name in parts[0]:
        rows = [part[name] for part in parts]
        turns = [seconds for row in rows for seconds in row["seconds_by_turn"]]
        means = {key: mean([row[key] for row in rows]) for key in ("iterations", "reliability")}
        found[name] = {"median_seconds": median(turns), "seconds_by_turn": turns, **means}
    return found


def speedup(theirs: dict[str, Any], ours: dict[str, Any]) -> float:
    """How many times as fast as a rival ours is, turn by turn; the median."""
    return median(a / b for a, b in zip(theirs["seconds_by_turn"], ours["seconds_by_turn"], strict=True))


def edit_floor(
    editor: MEMOIR, request: EditRequest, iterations: float, rate: float, reading: float, ahead: int = 1
) -> dict[str, float]:
    """What one edit cannot go below: the prefix once, the tail forward in each iteration and at the end, and backward;
    the last block's MLP and the head at the answer's tokens only.

    Each pass takes two operations per weight and token, and reads the weights once; which of the two takes longer is
    its floor. Backward passes ask for no weight's gradient, so they cost as much as forward ones.

    rate     operations per second
    reading  bytes per second
    ahead    edits that share the reading of the prefix, and of which each one's last pass takes the next one's first
             along
    """
    model, batch = editor.model, editor.encode_edits([request])
    copies = 1 + editor.config.prefixes
    tokens, answers = int(batch.attention_mask.sum()) * copies, int(batch.learn_mask.sum()) * copies
    layer = editor.site.layer
    sizes = [_weights(block) for block in model.blocks]
    last = _weights(model.site(len(sizes) - 1).mlp) if layer + 1 < len(sizes) else 0
    before = (sum(sizes[: layer + 1]), tokens)
    behind = [(sum(sizes[layer + 1 :]) - last, tokens), (last + model.head.weight.numel(), answers)]
    made = [(before, 1.0, 1 / ahead), *((part, 2 * iterations + 1, 2 * iterations + 1 / ahead) for part in behind)]
    operations = [2 * weights * seen * passes for (weights, seen), passes, _ in made]
    moved = [weights * model.dtype.itemsize * readings for (weights, _), _, readings in made]
    seconds = sum(max(done / rate, read / reading) for done, read in zip(operations, moved, strict=True))
    return {"operations": sum(operations), "bytes": sum(moved), "seconds": seconds}


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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

    The edits are real, made here where they were not; the bank is filled up to each of `counts` with synthetic masks.
    Each prompt is asked by itself. Its mask is a stored one; of a rephrase's the search reads more of the others.
    """
    model, bank, device = editor.model, editor.memory.bank, editor.model.device
    editor.edit([request for request in edits if request.id not in editor.edits])
    prompts = [request.prompt for request in edits]
    if silent := [prompt for prompt, found in zip(prompts, editor.matches(prompts), strict=True) if not found]:
        raise EditError(f"questions that do not read the memory cost less than those that do: {silent}")
    ids, packed = list(bank.ids), bank.packed.copy()
    batches = [model.encode([prompt]) for prompt in prompts]
    found = []
    for count in counts:
        more = synthetic_masks(count - len(ids), bank.width)
        bank.replace([*ids, *(f"synthetic {i}" for i in range(len(more)))], np.concatenate([packed, more]))
        ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
        for batch in batches:
            asked: dict[str, list[tuple[float, float]]] = {"decode": [], "prefill": []}

            def ask(batch: Batch = batch) -> tuple[float, float]:
                # In this order: what attaching and detaching leave cold is no part of a question.
                decoding = decode_seconds(model, batch, 4)
                return decoding, timed(device, lambda: [prefill(model, batch) for _ in range(3)]) / 3  # one is short

            for _ in range(rounds + 1):
                editor.attach()
                edited = ask()
                with editor.detached():
                    plain = ask()
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
        bank = make_bank(width, device)
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


def approximate_search(editor: MEMOIR, edits: Sequence[EditRequest], rounds: int) -> dict[str, Any] | None:
    """The search along a graph (`bank.ApproximateBank`) beside the exact one: the masks of the edits' prompts are
    stored, those of their rephrases are asked for. None without faiss.

    recall  share of the questions for which it finds a mask as near as the nearest
    """
    width, masks = editor.memory.bank.width, {}
    try:
        banks = {"exact": MaskBank(width), "approximate": ApproximateBank(width)}
    except ImportError:
        return None
    banks["approximate"].block = 0
    asked = [probe.prompt for edit in edits if (probe := edit.probe("rephrase"))]
    with editor.detached():
        for name, prompts in {"stored": [edit.prompt for edit in edits], "asked": asked}.items():
            found = torch.zeros(len(prompts), width, dtype=torch.bool)
            for rows, batch in editor.batches(prompts, 64):
                a = input_of(editor.site, lambda batch=batch: editor.model.forward(batch))
                found[rows] = editor.memory.fingerprint(a, batch.prompt_mask).cpu()
            masks[name] = found
    for bank in banks.values():
        bank.add([str(i) for i in range(len(edits))], masks["stored"])
    cpu, queries = torch.device("cpu"), masks["asked"]
    building = timed(cpu, lambda: banks["approximate"].nearest(queries[:1]))
    nearest = {name: bank.nearest(queries)[1] for name, bank in banks.items()}
    some = queries[:: max(1, len(queries) // 50)]
    each = {
        name: partial(lambda bank: [bank.nearest(query[None]) for query in some], bank) for name, bank in banks.items()
    }
    exact, approximate = in_turns(cpu, rounds, *each.values())
    return {
        "masks": len(edits),
        "questions": len(queries),
        "recall": float((nearest["approximate"] == nearest["exact"]).mean()),
        "exact_seconds": median(exact) / len(some),
        "approximate_seconds": median(approximate) / len(some),
        "building_seconds": building,
    }


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
    sizes    n_edits (by MEMOIR and the plain form, in lots of `LOT`; the methods' seconds are of the first lot),
             rounds, counts (edits in the memory), nearby (edits whose masks are searched approximately) and masks (in
             the exact search), where they should not be as usual
    """
    model = load_model(name)
    device, cores = model.device, torch.get_num_threads()
    few = {
        "n_edits": 3 * LOT,
        "rounds": 5,
        "nearby": 2000,
        "counts": (1000,),
        "masks": (1000, 100_000, 1_000_000),
    }
    many = {
        "n_edits": 4 * LOT,
        "rounds": 9,
        "nearby": 20_000,
        "counts": (1000, 10_000, 100_000),
        "masks": (1000, 10_000, 100_000, 1_000_000),
    }
    size = {**(few if quick else many), **sizes}
    edits = list(load_edits(dataset, path=data_path, n=size["n_edits"], seed=0))
    known = {"dataset": dataset, "background": background}
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with threads(1):
        machine = measured_machine(device, model.dtype)
        rate, reading = machine["operations_per_second"], machine["bytes_per_second"]
        say(f"{machine['device']}, one core")
        say(f"{rate / 1e9:.1f} Gflop/s in a matrix product, {reading / 1e9:.1f} GB/s in reading")
        rows = {}
        for label in methods or (*(QUICK_METHODS if quick else METHODS), *VARIANTS):
            method, settings = variant(label)
            editor = make_editor(method, model, **known, **settings)
            rows[label] = split(editor, edits[:LOT])
            parts = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in rows[label]["parts"].items())
            say(f"{label}: {1e3 * rows[label]['seconds']:.1f} ms per edit ({parts})")
            editor.detach()
        editor = make_editor("memoir", model, **known)
        lots = [edits[start : start + LOT] for start in range(0, len(edits) - 1, LOT)]
        plain = together([against_plain(editor, lot) for lot in lots])
        plain |= against_plain(editor, edits[: 1 + 2 * AHEAD], iterations=10)
        for label, row in plain.items():
            say(
                f"{label}: {1e3 * row['median_seconds']:.1f} ms per edit, {row['iterations']:.1f} iterations,"
                f" reliability {row['reliability']:.3f}"
            )
        floor = edit_floor(editor, edits[0], plain["memoir, ahead"]["iterations"], rate, reading, AHEAD)
        over = overheads(editor, edits[:8], size["counts"], 5 * size["rounds"])
        for row in over:
            say(f"{row['edits']} edits: prefill × {row['prefill']:.3f}, decode × {row['decode']:.3f}")
        info = asdict(run_info(editor, dataset, len(edits), 1, started))
        nearby = list(load_edits("almanac-qa", n=size["nearby"], seed=0)) if dataset.startswith("almanac") else edits
        graph = approximate_search(editor, nearby, size["rounds"])
        if graph:
            say(
                f"{graph['masks']} real masks along a graph: recall {graph['recall']:.4f},"
                f" {1e6 * graph['approximate_seconds']:.0f} µs for {1e6 * graph['exact_seconds']:.0f} µs"
            )
    with threads(cores):
        search = mask_search(size["masks"], device=device, rounds=size["rounds"])
    for row in search:
        say(f"{row['masks']} masks: {1e3 * row['seconds']:.2f} ms, {row['bandwidth_share']:.0%} of reading them")
    return {
        "info": info,
        "machine": {**machine, "search_threads": cores},
        "methods": rows,
        "plain": plain,
        "floor": floor,
        "overhead": over,
        "search": search,
        "approximate_search": graph,
        "peak_bytes": peak_bytes(),
        "summary": {
            "edit_speedup_vs_plain": speedup(plain["plain"], plain["memoir, ahead"]),
            "edit_speedup_same_iterations": speedup(plain["plain, same iterations"], plain["memoir, same iterations"]),
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
        machine = measured_machine(device, model.dtype)
        rate, reading = machine["operations_per_second"], machine["bytes_per_second"]
        rows: dict[str, Any] = {}
        for label in methods or (*METHODS, *VARIANTS):
            method, settings = variant(label)
            if time.monotonic() - began > BUDGET_SECONDS:
                rows[label] = {"reason": f"not begun: {BUDGET_SECONDS} s had passed"}
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            editor = None
            try:
                if method in ("rome", "memit", "alphaedit"):
                    settings = {"moments": "background", **settings}
                elif method == "memoir":
                    settings = {"iterations": SHAPE_ITERATIONS, **settings}
                editor = make_editor(method, model, background=background_prompts(), **settings)
                rows[label] = split(editor, edits)
                if method == "memoir":
                    made, ahead = rows[label]["iterations"], editor.config.ahead
                    rows[label]["floor"] = edit_floor(editor, edits[0], made, rate, reading, ahead)
                    rows[label]["overhead"] = overheads(editor, edits[:1], (1000,), 5)
                if device.type == "cuda":  # MEMOIR's with the masks of 1000 edits
                    rows[label]["bytes_over_model"] = peak_bytes() - weights
                say(f"{name}, {label}: {rows[label]['seconds']:.3f} s per edit, {rows[label]['iterations']:.0f} steps")
            except (EditError, torch.OutOfMemoryError) as error:
                rows[label] = {"reason": str(error).splitlines()[0]}
                say(f"{name}, {label}: {rows[label]['reason']}")
            finally:
                if editor is not None:
                    editor.detach()
                del editor
        found[name] = {"model": repr(model), "parameter_bytes": weights, "methods": rows, "machine": machine}
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
            **{
                f"{part} at 1000 edits": _short(row.get("overhead", [{}])[0].get(part))
                for part in ("prefill", "decode")
            },
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
