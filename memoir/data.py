"""Edit sets, all in one schema: ZsRE and SelfCheckGPT in their public WISE format, and the almanac's own."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memoir.records import EditRequest, Probe, read_json


class EditSet(list):
    """A list of EditRequest that knows where it comes from.

    name   the dataset's name, as reports call it
    seed   of the selection
    """

    def __init__(self, edits: Sequence[EditRequest], name: str, seed: int = 0):
        super().__init__(edits)
        self.name, self.seed = name, seed


def _zsre(record: Mapping[str, Any]) -> EditRequest:
    return EditRequest(
        prompt=record["src"],
        target=record["alt"],
        subject=record["subject"],
        probes=(
            Probe(kind="rephrase", prompt=record["rephrase"], answer=record["alt"]),
            Probe(kind="unrelated", prompt=record["loc"], answer=record["loc_ans"]),
        ),
    )


def _selfcheckgpt(record: Mapping[str, Any]) -> EditRequest:
    prompt, answer = record["locality_prompt"], record["locality_ground_truth"]
    # The public file leaves some continuations empty: such an edit has nothing to be local on.
    unrelated = (Probe(kind="unrelated", prompt=prompt, answer=answer),) if answer.strip() else ()
    return EditRequest(
        prompt=record["prompt"], target=record["target_new"], subject=record["subject"], probes=unrelated
    )


FORMATS: dict[str, Callable[[Mapping[str, Any]], EditRequest]] = {"zsre": _zsre, "selfcheckgpt": _selfcheckgpt}
DATASETS = ("almanac-qa", "almanac-bio", *FORMATS)
ENDLESS = ("almanac-qa",)  # where more edits than usual are asked for, there are more: about people never met


def load_edits(
    name: str,
    *,
    path: str | os.PathLike | None = None,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
) -> EditSet:
    """An edit set: "almanac-qa", "almanac-bio" (in the package), "zsre" or "selfcheckgpt" (from `path`).

    path   local JSON file in the WISE format, or a hub id that `datasets` loads
    n      how many edits; default: all
    seed   which ones, and in which order
    split  "test" or "validation" of the almanac; the split's name on the hub
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}")
    if n is not None and n < 1:
        raise ValueError(f"n = {n} edits, expected at least 1")
    if name.startswith("almanac"):
        if path is not None:
            raise ValueError(f"{name} ships with the package; it takes no path, but got {path}")
        from memoir.almanac import edit_requests

        return EditSet(edit_requests(name, split=split, n=n, seed=seed), name, seed)
    if path is None:
        raise ValueError(f"dataset {name!r} needs a path: a local JSON file in the WISE format, or a hub id")
    records = _read_records(os.fspath(path), split)
    if n is not None and n > len(records):
        raise ValueError(f"n = {n} edits, but {path} holds {len(records)}")
    edits = [_parse(name, path, i, record) for i, record in enumerate(records)]
    chosen = random.Random(seed).sample(range(len(edits)), n if n is not None else len(edits))
    return EditSet([edits[i] for i in chosen], name, seed)


def load_background(path: str | os.PathLike) -> list[str]:
    """Texts irrelevant to all edits, for features that are centred on them: a JSON list of texts."""
    texts = read_json(path)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path} holds no list of non-empty texts, as background prompts must be")
    return texts


def _read_records(path: str, split: str) -> list[Any]:
    local = Path(path).expanduser()
    if local.exists() or local.suffix in {".json", ".jsonl"} or path.startswith((".", "/", "~")):
        records = read_json(local)
    else:
        from datasets import load_dataset

        records = load_dataset(path, split=split).to_list()
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} holds {type(records).__name__}, expected a non-empty list of records")
    return records


def _parse(name: str, path: str | os.PathLike, index: int, record: Any) -> EditRequest:
    if not isinstance(record, Mapping):
        raise ValueError(f"{path}, record {index}: {type(record).__name__}, expected an object")
    try:
        return FORMATS[name](record)
    except KeyError as error:
        raise ValueError(
            f"{path}, record {index}: key {error.args[0]!r} is missing; {name} records carry {', '.join(KEYS[name])}"
        ) from None
    except (TypeError, ValueError) as error:
        empty = [key for key in KEYS[name] if not isinstance(record[key], str) or not record[key].strip()]
        raise ValueError(f"{path}, record {index}: key {', '.join(map(repr, empty))} holds no text ({error})") from None


KEYS = {
    "zsre": ("subject", "src", "rephrase", "alt", "loc", "loc_ans"),
    "selfcheckgpt": ("prompt", "target_new", "subject", "locality_prompt", "locality_ground_truth"),
}
