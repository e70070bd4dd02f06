"""Edit sets, all in one schema: those that the package makes itself, and files of edits."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memoir.files import RECORD_SUFFIXES, read_json, read_records, read_text
from memoir.formats import FORMATS, edits_of, format_of, known_formats
from memoir.records import REMEDY, BadInput, EditRequest, listed


class EditSet(list):
    """A list of EditRequest with its origin.

    name     the dataset's name, as reports call it
    seed     of the selection
    places   where each edit stands: its file and record; () where they come from no file
    skipped  the bad records that were left out, one line each: file, record, key, value, what was expected
    """

    def __init__(
        self,
        edits: Sequence[EditRequest],
        name: str,
        seed: int = 0,
        places: Sequence[str] = (),
        skipped: Sequence[str] = (),
    ):
        super().__init__(edits)
        self.name, self.seed, self.places, self.skipped = name, seed, tuple(places), tuple(skipped)


# Sets that are made here ---------------------------------------------------------------------------------------------


BUILT_IN = ("almanac-qa", "almanac-bio", "atlas", "atlas-validation")  # they take no path
ENDLESS = ("almanac-qa",)  # it invents further people where more edits are asked for than it has
DATASETS = (*BUILT_IN, *FORMATS)


# Loading -------------------------------------------------------------------------------------------------------------


def load_edits(
    name: str,
    *,
    path: str | os.PathLike | None = None,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    format: str | None = None,
    skip_bad: bool = False,
) -> EditSet:
    """An edit set: one of `BUILT_IN`, or a file of one of `formats.FORMATS`. BadInput names what cannot be read; of bad
    records it names all, up to ten.

    name      a format's name; any other name with a path is how reports call that file
    path      a local file (JSON, JSON lines, CSV or TSV, gzipped or not), or a folder or hub id that `datasets` loads
    n         how many edits; default: all
    seed      which edits, and in which order
    split     "test" or "validation" of a set that is made here; the split's name on the hub
    format    the file's format; default: `name`, or else the format whose keys the records have
    skip_bad  leave bad records out, and tell of them in the set's `skipped`
    """
    if n is not None and n < 1:
        raise BadInput(f"n = {n} edits, expected at least 1")
    if format is not None and format not in FORMATS:
        raise BadInput(f"format {format!r} is unknown; expected one of {', '.join(FORMATS)}")
    if name in BUILT_IN:
        if path is not None:
            raise BadInput(f"{name} ships with the package; it takes no path, but got {path}")
        from memoir import almanac

        make = almanac.atlas_edits if name.startswith("atlas") else almanac.edit_requests
        return EditSet(make(name, split=split, n=n, seed=seed), name, seed)
    if path is None:
        if name not in DATASETS:
            raise BadInput(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}, or the path of a file")
        raise BadInput(f"dataset {name!r} needs a path: a local file of its records, or a hub id")
    records = _read_records(os.fspath(path), split)
    edits, skipped = _parse(path, records, format or (name if name in FORMATS else None), skip_bad)
    if n is not None and n > len(edits):
        left_out = f" besides {len(skipped)} bad records" if skipped else ""
        raise BadInput(f"n = {n} edits, but {path} holds {len(edits)}{left_out}")
    chosen = random.Random(seed).sample(range(len(edits)), n if n is not None else len(edits))
    places, requests = zip(*(edits[i] for i in chosen), strict=True)
    return EditSet(requests, name, seed, places, skipped)


def load_background(path: str | os.PathLike) -> list[str]:
    """Texts irrelevant to all edits, for features that are centred on them: a JSON list, or a .txt file with one text
    per line."""
    if Path(path).suffix == ".txt":
        texts = [line for line in read_text(path).splitlines() if line.strip()]
    else:
        texts = read_json(path)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path} holds no list of non-empty texts, as background prompts must be")
    return texts


def _read_records(path: str, split: str) -> list[Any]:
    local = Path(path).expanduser()
    if local.is_dir():
        records = _from_datasets(local, split)
    elif local.exists() or RECORD_SUFFIXES & set(local.suffixes) or path.startswith((".", "/", "~")):
        records = read_records(local)
    else:
        _check_hub(path)
        records = _from_datasets(path, split)
    if isinstance(records, dict) and format_of(records):
        return [records]  # one record alone
    if records == []:
        raise BadInput(f"{path} is empty, expected a list of records")
    if not isinstance(records, list):
        keys = f" with the keys {', '.join(map(str, records))}" if isinstance(records, dict) else ""
        raise BadInput(f"{path} holds {type(records).__name__}{keys}, expected a non-empty list of records"[:300])
    return records


def _check_hub(path: str) -> None:
    """BadInput where neither the cache nor the hub has such a data set; `datasets` itself tries for half a minute."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import dataset_info

    *owner, name = path.split("/")
    cached = "___".join([*owner, camelcase_to_snakecase(name)])  # as `datasets` names the folder
    if (Path(datasets.config.HF_DATASETS_CACHE) / cached).exists():
        return
    try:
        dataset_info(path, timeout=10)
    except Exception as error:  # no connection, no such data set, no permission, or no possible id
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"no such file: {path}; as a data set of the hub it cannot be loaded: {reason}") from None


def _from_datasets(path: str | Path, split: str) -> list[Any]:
    """The records of a split, from the hub, from a folder of files, or from a folder that `save_to_disk` wrote."""
    import datasets

    try:
        if any((Path(path) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            return (saved[split] if isinstance(saved, dict) else saved).to_list()
        return datasets.load_dataset(os.fspath(path), split=split).to_list()
    except Exception as error:  # whatever a data set that is damaged, or of another kind, leads to
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"{path} cannot be loaded by `datasets` with the split {split!r}: {reason}") from error


def _parse(
    path: str | os.PathLike, records: list[Any], format: str | None, skip_bad: bool
) -> tuple[list[tuple[str, EditRequest]], list[str]]:
    """All edits in the records, each behind its place, and the bad records that are left out."""
    if format is None and (format := next(filter(None, map(format_of, records)), None)) is None:
        keys = f"has the keys {', '.join(map(str, records[0]))}" if isinstance(records[0], dict) else "is no object"
        raise BadInput(f"{path} is of no known format: its first record {keys}; expected {known_formats()}")
    edits, bad, seen = [], [], set()
    shared = any(form.shared for form in FORMATS[format])
    columns = getattr(records, "columns", ())
    for index, record in enumerate(records):
        place = f"{path}, record {index}"
        try:
            found = edits_of(record, format, columns)
        except ValueError as error:
            bad.append(f"{place}: {error}")
            continue
        for edit in found:
            if not (shared and edit in seen):
                edits.append((place, edit))
            seen.add(edit)
    if bad and not (skip_bad and edits):
        raise BadInput(f"{len(bad)} of {len(records)} records are bad: {listed(bad)}\n{REMEDY}")
    return edits, bad
