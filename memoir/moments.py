"""Second moments C = E[k kᵀ] of a projection's inputs over ordinary text: what ROME, MEMIT and AlphaEdit
hold edits against.

They are measured once: `MEMOIR_HOME` (default ~/.cache/memoir) keeps them by model, site, dataset and number of texts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from memoir.models import LanguageModel
from memoir.records import write_atomically
from memoir.sites import Site, input_of

TEXT_FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class CacheError(ValueError):
    """A cached file that cannot be trusted."""


def cache_folder() -> Path:
    """MEMOIR_HOME, or ~/.cache/memoir."""
    return Path(os.environ.get("MEMOIR_HOME") or Path.home() / ".cache" / "memoir")


def texts_of(name: str, samples: int) -> Iterable[str]:
    """Up to `samples` texts of a dataset, streamed.

    name  "almanac"; a local file (.txt with one text per line; .json, .jsonl, .csv, .parquet with a column `text`);
          or a dataset of the hub, "name" or "name:config", its `train` split and its column `text`
    """
    if name == "almanac":
        from memoir.almanac import corpus

        texts = corpus()
        return random.Random(0).sample(texts, min(samples, len(texts)))
    return _streamed(name, samples)


def _streamed(name: str, samples: int) -> Iterator[str]:
    from datasets import load_dataset

    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in TEXT_FORMATS:
            raise ValueError(f"{path} has suffix {path.suffix!r}, expected one of {', '.join(TEXT_FORMATS)}")
        rows = load_dataset(TEXT_FORMATS[path.suffix], data_files=str(path), split="train", streaming=True)
    elif name.startswith((".", "/", "~")) and not path.is_dir():
        raise FileNotFoundError(f"no such file: {path}")
    else:
        dataset, _, config = name.partition(":")
        rows = load_dataset(dataset, config or None, split="train", streaming=True)
    for row in islice(rows, samples):
        if "text" not in row:
            raise ValueError(f"dataset {name} has columns {', '.join(row)}, expected one named text")
        yield row["text"]


@torch.no_grad()
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
    if name is not None:
        return cached(
            "moments",
            cache_header(model, site, name, samples),
            lambda: second_moments(
                model, site, texts, samples=samples, progress=progress, batch_size=batch_size, check=check
            ),
        )
    total = torch.zeros(site.in_features, site.in_features, dtype=torch.float64, device=site.device)
    tokens, pending = 0, []
    chosen = islice((text for text in texts if text.strip()), samples)
    bar = tqdm(total=samples, desc=f"second moments, {site.name}", unit="text", disable=not progress)
    with bar, model.editor.detached() if model.editor is not None else contextlib.nullcontext():
        while chunk := list(islice(chosen, batch_size)):
            check()
            pending.append(_keys(model, site, chunk))
            if sum(map(len, pending)) >= site.in_features:  # products of fewer keys would cost as much
                tokens += _accumulate(total, pending)
            bar.update(len(chunk))
    tokens += _accumulate(total, pending)
    if not tokens:
        raise ValueError("no text to measure second moments on: the texts given are empty")
    return (total / tokens).float().cpu()


def _accumulate(total: Tensor, pending: list[Tensor]) -> int:
    """Add Σ k kᵀ of the pending keys (n × D) each to total (D × D), forget them, and say how many there were."""
    keys = torch.cat(pending) if pending else total.new_zeros(0, len(total))
    pending.clear()
    total += keys.T @ keys
    return len(keys)


def _keys(model: LanguageModel, site: Site, texts: list[str]) -> Tensor:
    """(n × D) float32, the site's inputs at all tokens of some texts."""
    coded = model.tokenizer(
        texts,
        truncation=True,
        max_length=model.context_length,
        padding=True,
        padding_side="right",  # so that positions count from 0 without being told
        return_tensors="pt",
    )
    inputs = {name: coded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    a = input_of(site, lambda: model.network(**inputs, use_cache=False))
    return a[inputs["attention_mask"].bool().to(a.device)].float()


def cache_header(model: LanguageModel, site: Site, name: str, samples: int | None) -> dict[str, str]:
    """What the second moments of a dataset's texts at a site belong to."""
    path = Path(name).expanduser()
    if path.is_file():  # another file under the same name is another dataset
        stat = path.stat()
        name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return {"model": model.fingerprint, "site": site.name, "dataset": name, "samples": str(samples or "all")}


def cached(kind: str, header: dict[str, str], compute: Callable[[], Tensor]) -> Tensor:
    """The matrix that belongs to a header, read from `MEMOIR_HOME/kind`, or computed and written there.

    CacheError where the file is damaged or belongs to something else.
    """
    digest = hashlib.sha256("\0".join(f"{k}={v}" for k, v in header.items()).encode()).hexdigest()[:16]
    path = cache_folder() / kind / f"{digest}.safetensors"
    if path.exists():
        return _read(path, header)
    matrix = compute().contiguous()
    sealed = {**header, "sha256": _checksum(matrix)}
    write_atomically(path, lambda temporary: save_file({"matrix": matrix}, temporary, metadata=sealed))
    return matrix


def _read(path: Path, header: dict[str, str]) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            found, matrix = file.metadata() or {}, file.get_tensor("matrix").clone()
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged ({error}); delete it to have it computed again") from None
    expected = {**header, "sha256": _checksum(matrix)}
    if found != expected:
        wrong = sorted(key for key in expected | found if found.get(key) != expected.get(key))
        raise CacheError(
            f"{path} is damaged or belongs to something else: its {', '.join(wrong)} is "
            f"{', '.join(str(found.get(key)) for key in wrong)}, expected "
            f"{', '.join(str(expected.get(key)) for key in wrong)}; delete it to have it computed again"
        )
    return matrix


def _checksum(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.flatten().view(torch.uint8).numpy()).hexdigest()
