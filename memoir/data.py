"""Edit sets, all in one schema: the almanac's own, and public files of edits, whose format their keys tell."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memoir.files import read_json, read_json_or_lines
from memoir.records import EditRequest, Probe, listed

Record = Mapping[str, Any]


class EditSet(list):
    """A list of EditRequest with its origin.

    name   the dataset's name, as reports call it
    seed   of the selection
    """

    def __init__(self, edits: Sequence[EditRequest], name: str, seed: int = 0):
        super().__init__(edits)
        self.name, self.seed = name, seed


# Formats -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A public format of edits.

    keys  the keys that each record has
    read  makes an edit of a record; ValueError names a key whose value is not as it should be
    """

    keys: tuple[str, ...]
    read: Callable[[Record], EditRequest]


def _zsre(record: Record) -> EditRequest:
    """ZsRE in the WISE format: `alt` is the new answer, `loc` an unrelated question."""
    target = _text(record, "alt")
    rephrase = Probe(kind="rephrase", prompt=_text(record, "rephrase"), answer=target)
    unrelated = Probe(kind="unrelated", prompt=_text(record, "loc"), answer=_text(record, "loc_ans"))
    return _edit(record, _text(record, "src"), target, [rephrase, unrelated])


def _selfcheckgpt(record: Record) -> EditRequest:
    """SelfCheckGPT in the WISE format. It leaves some continuations empty: such an edit has no locality probe."""
    prompt, answer = _text(record, "locality_prompt"), _text(record, "locality_ground_truth", empty=True)
    unrelated = [Probe(kind="unrelated", prompt=prompt, answer=answer)] if answer.strip() else []
    return _edit(record, _text(record, "prompt"), _text(record, "target_new"), unrelated)


def _counterfact(record: Record) -> EditRequest:
    """CounterFact in EasyEdit's flat form. Its locality prompts ask the same of another subject; the data set scores
    them as locality, so they are `unrelated` probes here, whose score is `loc`, and no `same_template` ones."""
    target = _text(record, "target_new")
    rephrase = Probe(kind="rephrase", prompt=_text(record, "rephrase_prompt"), answer=target)
    answer = _text(record, "locality_ground_truth")
    unrelated = Probe(kind="unrelated", prompt=_text(record, "locality_prompt"), answer=answer)
    return _edit(record, _text(record, "prompt"), target, [rephrase, unrelated])


def _qaedit(record: Record) -> EditRequest:
    """QAEdit: questions, each with several unrelated ones under `locality`."""
    target = _text(record, "target")
    probes = [Probe(kind="rephrase", prompt=_text(record, "rephrase"), answer=target)]
    for other in _list(record, "locality"):
        probes.append(Probe(kind="unrelated", prompt=_text(other, "loc"), answer=_text(other, "loc_ans")))
    return _edit(record, _text(record, "prompt"), target, probes)


def _knowedit(record: Record) -> EditRequest:
    """KnowEdit: under `locality` it asks for other relations of the same subject. Its other probes are left out."""
    target, probes = _text(record, "target_new"), []
    if "rephrase_prompt" in record:
        probes.append(Probe(kind="rephrase", prompt=_text(record, "rephrase_prompt"), answer=target))
    locality = record["locality"] if isinstance(record["locality"], Mapping) else {}
    for other in locality.get("Relation_Specificity") or ():
        answers = other["ground_truth"]
        while isinstance(answers, list) and answers:
            answers = answers[0]  # of several answers, and of the several names of one, the first
        answer = _text({"ground_truth": answers}, "ground_truth")
        probes.append(Probe(kind="same_subject", prompt=_text(other, "prompt"), answer=answer))
    return _edit(record, _text(record, "prompt"), target, probes)


def _edit(record: Record, prompt: str, target: str, probes: Sequence[Probe]) -> EditRequest:
    subject = _text(record, "subject", empty=True)
    return EditRequest(prompt=prompt, target=target, subject=subject, probes=tuple(probes))


def _text(record: Record, key: str, *, empty: bool = False) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"key {key!r} holds {'null' if value is None else type(value).__name__}, expected text")
    if not (empty or value.strip()):
        raise ValueError(f"key {key!r} holds no text")
    return value


def _list(record: Record, key: str) -> list[Record]:
    value = record[key]
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        raise ValueError(f"key {key!r} holds {type(value).__name__}, expected a list of objects")
    return value


# Where the keys of one format are also those of another, the one with more keys comes first.
FORMATS = {
    "zsre": Format(("subject", "src", "rephrase", "alt", "loc", "loc_ans"), _zsre),
    "counterfact": Format(
        ("prompt", "target_new", "subject", "rephrase_prompt", "locality_prompt", "locality_ground_truth"), _counterfact
    ),
    "selfcheckgpt": Format(
        ("prompt", "target_new", "subject", "locality_prompt", "locality_ground_truth"), _selfcheckgpt
    ),
    "qaedit": Format(("prompt", "target", "subject", "rephrase", "locality"), _qaedit),
    "knowedit": Format(("prompt", "target_new", "subject", "locality"), _knowedit),
}
SHIPPED = ("almanac-qa", "almanac-bio", "atlas", "atlas-validation")  # in the package: they take no path
DATASETS = (*SHIPPED[:2], *FORMATS, *SHIPPED[2:])
ENDLESS = ("almanac-qa",)  # it invents further people where more edits are asked for than it has


# Loading -------------------------------------------------------------------------------------------------------------


def load_edits(
    name: str,
    *,
    path: str | os.PathLike | None = None,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    format: str | None = None,
) -> EditSet:
    """An edit set of the package (`SHIPPED`), or a file of one of `FORMATS`.

    name    a format's name; any other name with a path is how reports call that file
    path    local file (JSON or JSON lines, gzipped or not), or a hub id that `datasets` loads
    n       how many edits; default: all
    seed    which edits, and in which order
    split   "test" or "validation" of a set of the package; the split's name on the hub
    format  the file's format; default: `name`, or else the format whose keys the records have
    """
    if n is not None and n < 1:
        raise ValueError(f"n = {n} edits, expected at least 1")
    if format is not None and format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; expected one of {', '.join(FORMATS)}")
    if name in SHIPPED:
        if path is not None:
            raise ValueError(f"{name} ships with the package; it takes no path, but got {path}")
        from memoir.almanac import atlas_edits, edit_requests

        make = atlas_edits if name.startswith("atlas") else edit_requests
        return EditSet(make(name, split=split, n=n, seed=seed), name, seed)
    if path is None:
        if name not in DATASETS:
            raise ValueError(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}")
        raise ValueError(f"dataset {name!r} needs a path: a local file of its records, or a hub id")
    edits = _parse(path, _read_records(os.fspath(path), split), format or (name if name in FORMATS else None))
    if n is not None and n > len(edits):
        raise ValueError(f"n = {n} edits, but {path} holds {len(edits)}")
    chosen = random.Random(seed).sample(range(len(edits)), n if n is not None else len(edits))
    return EditSet([edits[i] for i in chosen], name, seed)


def load_background(path: str | os.PathLike) -> list[str]:
    """Texts irrelevant to all edits, for features that are centred on them: a JSON list, or a .txt file with one text
    per line."""
    if Path(path).suffix == ".txt":
        texts = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    else:
        texts = read_json(path)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path} holds no list of non-empty texts, as background prompts must be")
    return texts


def _read_records(path: str, split: str) -> list[Any]:
    local = Path(path).expanduser()
    if local.exists() or {".json", ".jsonl"} & set(local.suffixes) or path.startswith((".", "/", "~")):
        records = read_json_or_lines(local)
    else:
        from datasets import load_dataset

        records = load_dataset(path, split=split).to_list()
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} holds {type(records).__name__}, expected a non-empty list of records")
    return records


def _parse(path: str | os.PathLike, records: list[Any], format: str | None) -> list[EditRequest]:
    """All records as edits; ValueError names the records that cannot be read, up to ten of them."""
    if format is None and (format := format_of(records[0])) is None:
        keys = ", ".join(records[0]) if isinstance(records[0], Mapping) else "of no object"
        known = "; ".join(f"{name}: {', '.join(FORMATS[name].keys)}" for name in FORMATS)
        raise ValueError(f"{path} is of no known format: its first record has the keys {keys}; expected {known}")
    edits, problems = [], []
    for index, record in enumerate(records):
        try:
            edits.append(_read(record, format))
        except ValueError as error:
            problems.append(f"record {index}: {error}")
    if problems:
        raise ValueError(f"{path}, {listed(problems)}")
    return edits


def format_of(record: Any) -> str | None:
    """The format that has a record's keys."""
    keys = set(record) if isinstance(record, Mapping) else set()
    return next((name for name in FORMATS if keys.issuperset(FORMATS[name].keys)), None)


def _read(record: Any, format: str) -> EditRequest:
    if not isinstance(record, Mapping):
        raise ValueError(f"{type(record).__name__}, expected an object")
    try:
        for key in FORMATS[format].keys:
            record[key]
        return FORMATS[format].read(record)
    except KeyError as error:
        actual = format_of(record)
        other = f" (its keys are those of {actual})" if actual not in (None, format) else ""
        keys = ", ".join(FORMATS[format].keys)
        raise ValueError(f"key {error.args[0]!r} is missing; {format} records carry {keys}{other}") from None
