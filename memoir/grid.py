"""The grid of runs of `edit.ipynb` behind the paper's tables, and the tables of their results."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from memoir import frontpage
from memoir.audits import audit
from memoir.batch import Cell
from memoir.data import BUILT_IN, DATASETS, ENDLESS, load_background, load_edits
from memoir.editors import configured, resolved
from memoir.editors.config import check_values, settings_from
from memoir.models import load_model
from memoir.provenance import software
from memoir.tables import Table
from memoir.weights import NAMED, dequantised, installed

# One run of a sequence this short says little: its scores are means over so many separate runs.
SEPARATE_RUNS = (20, 5)  # for T = 1 and for T = 10
WORKER = 1e9  # bytes that a worker takes besides thrice its model's weights, roughly
SMALL = 1e9  # bytes of weights; a model up to this size is loaded before the batch, for its fingerprint


def table_cells(
    methods: Sequence[str],
    model: str,
    datasets: Sequence[str],
    *,
    T: Sequence[int],
    seeds: Sequence[int] = (0,),
    data_path: str | None = None,
    background: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    chat: bool = False,
    separate: Sequence[int] = SEPARATE_RUNS,
    skip_bad: bool = False,
    parameters: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> list[Cell]:
    """One cell per data set, method and seed, with everything checked. Each T is a checkpoint of the cell's one long
    sequence; T = 1 and T = 10 are measured on separate short sequences as well.

    methods     names; a variant is written name+setting=value+…, and name@10 is left out where T is larger than 10
    T           numbers of edits; a T beyond the size of a data set becomes its size (almanac-qa has no end)
    separate    so many short sequences for T = 1 and for T = 10; with 0, a checkpoint of the long one has to do
    skip_bad    leave bad records out instead of stopping at them
    parameters  further parameters of the notebook
    command     the command line that asks for the cells
    """
    _check_request(methods, datasets, T, seeds, data_path)
    if len(separate) != 2 or min(separate) < 0:
        raise ValueError(f"separate = {list(separate)}, expected two numbers of runs: for T = 1 and for T = 10")
    limits = dict(limited(spec, T) for spec in methods)
    variants = {spec: variant(spec) for spec in limits}
    for method, overrides in variants.values():
        check_settings(method, overrides)
    if background is not None:
        load_background(background)
    small = _is_small(model)
    # A large model is loaded without its weights: the grid needs its shape only.
    host = load_model(model, dtype=dtype, device_map=device_map if small else "meta", chat=chat)
    shared = {"MODEL": model, "BACKGROUND": background, "DTYPE": dtype, "DEVICE_MAP": device_map, "CHAT": chat}
    if skip_bad:  # left out when False, so cells from before this option still match
        shared["SKIP_BAD"] = True

    cells, characters, commit = [], {}, software()["commit"]
    for dataset in datasets:
        path = None if dataset in BUILT_IN else data_path
        n = max(T) if dataset in ENDLESS else None
        drawn = {seed: load_edits(dataset, path=path, n=n, seed=seed, skip_bad=skip_bad) for seed in seeds}
        edits = drawn[seeds[0]]
        stops = sorted({min(n, len(edits)) for n in T})
        if stops[-1] < max(T):
            print(f"{dataset} has {len(edits)} edits: T = {stops[-1]} instead of {max(T)}", file=sys.stderr)
        characters[dataset] = sum(len(edit.prompt) + len(edit.target) for edit in edits[: stops[-1]])
        digests = {seed: _digest(drawn[seed]) for seed in seeds}
        for spec, (method, overrides) in variants.items():
            stops = sorted({min(n, len(edits)) for n in T if n <= limits[spec]})
            sequence = {"DATASET": dataset, "DATA_PATH": path, "N_EDITS": stops[-1], "CHECKPOINTS": stops}
            sequence["SEPARATE"] = [[n, runs] for n, runs in zip((1, 10), separate, strict=True) if runs and n in stops]
            for seed in seeds:
                own = {**shared, **sequence, "METHOD": method, "SEED": seed, "OVERRIDES": overrides}
                config = configured(method, host, {"seed": seed, **overrides}, dataset)
                cells.append(
                    Cell(
                        notebook="edit",
                        name=f"{spec}--{host.name}--{dataset}--n{stops[-1]}--s{seed}",
                        parameters=_joined(own, parameters or {}),
                        inputs={"config": asdict(config), "model": host.fingerprint, "edits": digests[seed]},
                        gpu=device_map != "cpu",
                        threads=1 if small else None,
                        commit=commit,
                        command=command,
                    )
                )
    # The longest runs start first, so that no worker is left alone with a long one at the end.
    return sorted(cells, key=lambda cell: -characters[cell.parameters["DATASET"]])


def _check_request(methods, datasets, T, seeds, data_path) -> None:
    if wrong := [n for n in T if n < 1]:
        raise ValueError(f"T = {wrong}, expected at least 1 edit")
    if not (methods and datasets and T and seeds):
        raise ValueError("nothing to run: expected at least one method, data set, T and seed")
    if unknown := [dataset for dataset in datasets if dataset not in DATASETS]:
        raise ValueError(f"dataset {unknown[0]!r} is unknown; expected one of {', '.join(DATASETS)}")
    from_file = [dataset for dataset in datasets if dataset not in BUILT_IN]
    if data_path is not None and len(from_file) != 1:
        raise ValueError(f"one data path, but {len(from_file)} data sets to read from it: run them one by one")


def _joined(own: dict[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    if taken := sorted(set(own) & set(further)):
        raise ValueError(f"parameter {', '.join(taken)} is set by the grid; use the grid's own options")
    return {**own, **further}


def _digest(edits: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps([edit.to_json() for edit in edits]).encode()).hexdigest()


def write_tables(cells: Iterable[Cell], reports: str | os.PathLike) -> None:
    """Write `tables/<model>--<data set>.json`, with what belongs to it, from the results of the finished cells of each
    data set, and the front page. The cells are those of one model."""
    reports = Path(reports)
    finished = [cell for cell in cells if cell.finished(reports)]
    for dataset in dict.fromkeys(cell.parameters["DATASET"] for cell in finished):
        own = [cell for cell in finished if cell.parameters["DATASET"] == dataset]
        table = Table.of([cell.path(reports, ".json") for cell in own])
        longest = max((cell.parameters for cell in own), key=lambda parameters: parameters["N_EDITS"])
        drawn = {"path": longest["DATA_PATH"], "seed": longest["SEED"], "skip_bad": longest.get("SKIP_BAD", False)}
        edits = load_edits(dataset, n=longest["N_EDITS"], **drawn)[: table.main_T]
        replace(table, audit=audit(edits)).save(reports / "tables" / f"{table.model}--{dataset}.json")
    frontpage.write(reports)


def default_workers(model: str) -> int:
    """One worker per core for a small model on CPUs, if the memory holds them; else one in all."""
    if not _is_small(model) or torch.cuda.is_available():
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, int(memory / (WORKER + 3 * _bytes(model)))))


def _is_small(model: str) -> bool:
    return model == "almanac" or model in NAMED or 0 < _bytes(model) <= SMALL


def _bytes(model: str) -> int:
    """Bytes of a model's weights in a folder or a GGUF file; 0 for any other model."""
    path = installed(model) if model in NAMED else Path(model).expanduser()
    if path is None:
        return 0
    folder = dequantised(path) if path.suffix == ".gguf" and path.is_file() else path
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# Settings ------------------------------------------------------------------------------------------------------------


def variant(spec: str) -> tuple[str, dict[str, Any]]:
    """Method and settings of a spec like `memoir+tau=0.6`, or `memoir+paper`: a word without `=` names a preset. Specs
    become parts of file names."""
    if not re.fullmatch(r"[\w+=.\-]+", spec) or "--" in spec:
        raise ValueError(f"{spec!r} is no method, expected a name, or name+setting=value")
    method, *pairs = spec.split("+")
    return method, settings_from(pair if "=" in pair else f"preset={pair}" for pair in pairs)


def limited(spec: str, T: Sequence[int]) -> tuple[str, int]:
    """A spec like `rome@10`, without its limit, and the limit; the largest T without one. ValueError for a limit below
    every T."""
    name, at, limit = spec.partition("@")
    if at and not (limit.isdecimal() and int(limit) >= min(T)):
        raise ValueError(
            f"{spec!r}: the limit is {limit or 'empty'}, expected a number of at least {min(T)}, the least T"
        )
    return name, int(limit) if at else max(T)


def check_settings(method: str, overrides: Mapping[str, Any]) -> None:
    """ValueError or TypeError for an unknown method or setting or a wrong value; needs no model."""
    editor, overrides = resolved(method, overrides)
    config = editor.Config
    known = {field.name for field in fields(config)}
    if unknown := sorted(set(overrides) - known):
        raise TypeError(f"{method} has no setting {', '.join(unknown)}; expected {', '.join(sorted(known))}")
    check_values(config, overrides)
