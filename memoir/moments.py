"""Second moments C = E[k kᵀ] of a projection's inputs over ordinary text. ROME, MEMIT, AlphaEdit and RLSEdit weigh
edits by C.

The text is Wikipedia's where the hub can be reached, else the model's own (`available`). C is measured once:
`MEMOIR_HOME` (default ~/.cache/memoir) keeps it by model, site, dataset and number of texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import dataset_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from memoir.almanac import corpus
from memoir.files import cache_folder, read_json, write_atomically, write_json
from memoir.models import LanguageModel
from memoir.records import BadInput
from memoir.sites import Site, input_of
from memoir.text import Row

TEXT_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
WIKIPEDIA = "wikimedia/wikipedia:20231101.en"
SAMPLED = "sampled"  # names texts that are sampled from the model
TEXT_TOKENS = 128  # length of a sampled text
SAMPLED_TOGETHER = 128  # texts sampled at the same time
TOKENS_PER_DIMENSION = 20  # of sampled text, for each of the D dimensions of C
PATIENCE = 4.0  # seconds within which the hub has to answer


class CacheError(ValueError):
    """A cached file that cannot be trusted."""


def available(model: LanguageModel, sites: Iterable[Site], samples: int) -> tuple[str, int]:
    """The ordinary text that C can be measured on at some sites: the name for `texts_of`, and how many texts of it.

    Wikipedia, if the hub answers or C is in the cache for all sites; else texts sampled from the model, at most as many
    as give 20 tokens for each dimension of C.
    """
    sites = list(sites)
    files = [_cache_path("moments", cache_header(model, site, WIKIPEDIA, samples)) for site in sites]
    if reachable(WIKIPEDIA) or all(file.exists() for file in files):
        return WIKIPEDIA, samples
    width = max(site.in_features for site in sites)
    return SAMPLED, min(samples, math.ceil(TOKENS_PER_DIMENSION * width / TEXT_TOKENS))


@cache  # a process asks once, so that all its runs use the same text, and wait once at most
def reachable(dataset: str) -> bool:
    """Whether the hub answers for a dataset, within `PATIENCE` seconds. False under HF_HUB_OFFLINE."""
    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # no connection, no such dataset, no permission
            answers.append(dataset_info(dataset.partition(":")[0], timeout=PATIENCE))

    thread = threading.Thread(target=ask, daemon=True)  # the look-up of an address has no time limit of its own
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)


def sampled_texts(
    model: LanguageModel, count: int, *, progress: bool = True, check: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Texts of 128 tokens, sampled from the unedited model; seeded, and kept in `MEMOIR_HOME`."""
    header = {"model": model.fingerprint, "samples": str(count), "tokens": str(TEXT_TOKENS)}
    path = cache_folder() / "texts" / f"{_digest(header)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # of several processes, one samples and the others wait
        if not path.exists():
            write_json(path, {**header, "texts": _sampled(model, count, progress, check)})
    yield from read_json(path)["texts"]


def _sampled(model: LanguageModel, count: int, progress: bool, check: Callable[[], None]) -> list[str]:
    texts: list[str] = []
    bar = tqdm(total=count * TEXT_TOKENS, desc=f"texts sampled from {model.name}", unit="token", disable=not progress)
    with bar, _unedited(model):
        while len(texts) < count:
            rows = min(SAMPLED_TOGETHER, count - len(texts))

            def step(rows: int = rows) -> None:
                check()
                bar.update(rows)

            texts += model.sample(rows, TEXT_TOKENS, seed=len(texts), step=step)
    return texts


def texts_of(name: str, samples: int) -> Iterator[str]:
    """Up to `samples` texts of a dataset, streamed.

    name  "almanac"; a local file with one text per line (.txt) or with a column `text` (.json, .jsonl, .csv, .parquet);
          or a dataset of the hub, "name" or "name:config", its `train` split and its column `text`

    BadInput, once the texts are read, where there are none.
    """
    if name == "almanac":
        texts = corpus()
        yield from random.Random(0).sample(texts, min(samples, len(texts)))
        return
    from datasets import load_dataset  # takes seconds

    path = Path(name).expanduser().resolve()
    if path.is_file():
        if path.suffix not in TEXT_FORMATS:
            raise BadInput(f"{path} has suffix {path.suffix!r}, expected one of {', '.join(TEXT_FORMATS)}")
        rows = load_dataset(TEXT_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
    elif name.startswith((".", "/", "~")) and not path.is_dir():
        raise BadInput(f"no such file: {Path(name)}")
    elif not (path.is_dir() or reachable(name)):  # `datasets` itself tries for half a minute
        raise BadInput(
            f"moments = {name!r}: no such file here, and the hub has no such data set, or cannot be reached; expected "
            f"a connection, moments={SAMPLED!r} (texts sampled from the model), or a file with the suffix "
            f"{' or '.join(TEXT_FORMATS)}"
        )
    else:
        dataset, _, config = name.partition(":")
        rows = load_dataset(dataset, config or None, split="train", streaming=True)
    for row in islice(rows, samples):
        if "text" not in row:
            raise BadInput(f"dataset {name} has columns {', '.join(row)}, expected one named text")
        yield row["text"]


def second_moments(
    model: LanguageModel,
    site: Site,
    texts: Iterable[str],
    *,
    samples: int | None = None,
    name: str | None = None,
    progress: bool = True,
    batch_size: int = 16,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """C = E[k kᵀ] (D × D) float32 over all tokens of texts, k the site's input on the unedited model.

    texts    empty ones are passed over, longer ones cut at the model's context
    samples  how many texts at most; None: all
    name     the dataset's name, under which the result is cached; None: not cached
    check    called between batches; it may raise

    Raises CacheError, which names the file, where a cached result is damaged or belongs to something else.
    """

    def measure() -> Tensor:
        total, count = torch.zeros(site.in_features, site.in_features, dtype=torch.float64, device=site.device), 0
        chosen = islice((text for text in texts if text.strip()), samples)
        bar = tqdm(total=samples, desc=f"second moments, {site.name}", unit="text", disable=not progress)
        with bar, _unedited(model), torch.no_grad():
            while chunk := list(islice(chosen, batch_size)):
                check()
                rows = [tokens[: model.context_length] for tokens in model.encoder.tokens(chunk)]
                batch = model.encoder.pad([Row(tokens, [True] * len(tokens)) for tokens in rows]).to(model.device)
                a = input_of(site, lambda batch=batch: model.forward(batch))
                keys = a[batch.attention_mask.to(a.device)].float()
                total += keys.T @ keys
                count += len(keys)
                bar.update(len(chunk))
        if not count:
            raise ValueError("no text to measure second moments on: the texts given are empty")
        return (total / count).float().cpu()

    return measure() if name is None else cached("moments", cache_header(model, site, name, samples), measure)


def _unedited(model: LanguageModel) -> contextlib.AbstractContextManager:
    return model.editor.detached() if model.editor is not None else contextlib.nullcontext()


def cache_header(model: LanguageModel, site: Site, name: str, samples: int | None) -> dict[str, str]:
    """What identifies the second moments of a dataset's texts at a site."""
    path = Path(name).expanduser()
    if path.is_file():  # another file under the same name is another dataset
        stat = path.stat()
        name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return {"model": model.fingerprint, "site": site.name, "dataset": name, "samples": str(samples or "all")}


def cached(kind: str, header: dict[str, str], compute: Callable[[], Tensor]) -> Tensor:
    """The matrix with this header: read from `MEMOIR_HOME/kind`, or computed and written there.

    CacheError where the file is damaged or belongs to something else.
    """
    path = _cache_path(kind, header)
    if path.exists():
        return _read(path, header)
    matrix = compute().contiguous()
    sealed = {**header, "sha256": _checksum(matrix)}
    write_atomically(path, lambda temporary: save_file({"matrix": matrix}, temporary, metadata=sealed))
    return matrix


def _cache_path(kind: str, header: dict[str, str]) -> Path:
    return cache_folder() / kind / f"{_digest(header)}.safetensors"


def _digest(header: dict[str, str]) -> str:
    return hashlib.sha256("\0".join(f"{k}={v}" for k, v in header.items()).encode()).hexdigest()[:16]


def _read(path: Path, header: dict[str, str]) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            stored, matrix = file.metadata() or {}, file.get_tensor("matrix").clone()
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged ({error}); delete it to have it computed again") from None
    for key, expected in {**header, "sha256": _checksum(matrix)}.items():
        if stored.get(key) != expected:
            raise CacheError(
                f"{path} is damaged or belongs to something else: its {key} is {stored.get(key)}, expected {expected}; "
                "delete it to have it computed again"
            )
    return matrix


def _checksum(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.flatten().view(torch.uint8).numpy()).hexdigest()
