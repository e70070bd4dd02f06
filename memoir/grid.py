"""The tables' grid: which runs of `edit.ipynb` the paper's tables are made of, and the tables from what they leave."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memoir import tables
from memoir.batch import Cell, check_parameters, run_cells
from memoir.data import DATASETS, ENDLESS, load_background, load_edits
from memoir.editors import configured, editor_class
from memoir.models import LanguageModel, load_model

if TYPE_CHECKING:
    from distributed import Client

# Sequences so short that one of them says little: their scores are means over so many separate runs.
SEPARATE_RUNS = {1: 20, 10: 5}
SMALL = 1e9  # bytes of weights up to which a model is read before the batch, to know it by its fingerprint


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
    parameters: Mapping[str, Any] | None = None,
) -> list[Cell]:
    """One cell per data set, method and seed, everything checked. It serves all of T: they are checkpoints of one
    sequence, and those of `SEPARATE_RUNS` are measured again on separate short ones behind it.

    methods     names; a variant is written name+setting=value+…
    T           numbers of edits; one beyond a data set's size becomes its size, but of almanac-qa there is no end
    parameters  further parameters of the notebook
    """
    if wrong := [n for n in T if n < 1]:
        raise ValueError(f"T = {wrong}, expected at least 1 edit")
    if not (methods and datasets and T and seeds):
        raise ValueError("nothing to run: expected at least one method, data set, T and seed")
    for dataset in datasets:
        if dataset not in DATASETS:
            raise ValueError(f"dataset {dataset!r} is unknown; expected one of {', '.join(DATASETS)}")
    if data_path is not None and len(foreign := [d for d in datasets if not d.startswith("almanac")]) != 1:
        raise ValueError(f"one data path, but {len(foreign)} data sets to read from it: run them one by one")
    variants = {spec: variant(spec) for spec in methods}
    for method, overrides in variants.values():
        check_settings(method, overrides)
    if background is not None:
        load_background(background)
    host = _host(model, dtype, device_map, chat)
    cells, characters = [], {}
    for dataset in datasets:
        path = None if dataset.startswith("almanac") else data_path
        n = max(T) if dataset in ENDLESS else None
        drawn = {seed: load_edits(dataset, path=path, n=n, seed=seed) for seed in seeds}
        digests = {
            seed: hashlib.sha256(json.dumps([edit.to_json() for edit in edits]).encode()).hexdigest()
            for seed, edits in drawn.items()
        }
        size = len(drawn[seeds[0]])
        stops = sorted({min(n, size) for n in T})
        if stops[-1] < max(T):
            print(f"{dataset} has {size} edits: T = {stops[-1]} instead of {max(T)}", file=sys.stderr)
        characters[dataset] = sum(len(edit.prompt) + len(edit.target) for edit in drawn[seeds[0]][: stops[-1]])
        for spec, (method, overrides) in variants.items():
            if overrides.get("tau") == "auto":
                overrides = {**overrides, "tau": f"auto:{dataset}"}
            for seed in seeds:
                config = configured(method, host, {"seed": seed, **overrides}, dataset)
                cells.append(
                    Cell(
                        notebook="edit",
                        name=f"{spec}--{host.name}--{dataset}--n{stops[-1]}--s{seed}",
                        parameters={
                            "METHOD": method,
                            "MODEL": model,
                            "DATASET": dataset,
                            "DATA_PATH": path,
                            "BACKGROUND": background,
                            "N_EDITS": stops[-1],
                            "CHECKPOINTS": stops,
                            "SEPARATE": [[n, SEPARATE_RUNS[n]] for n in stops if n in SEPARATE_RUNS],
                            "SEED": seed,
                            "OVERRIDES": overrides,
                            "DTYPE": dtype,
                            "DEVICE_MAP": device_map,
                            "CHAT": chat,
                            **(parameters or {}),
                        },
                        inputs={"config": asdict(config), "model": host.fingerprint, "edits": digests[seed]},
                        gpu=device_map != "cpu",
                        threads=1 if _is_small(model) else None,
                    )
                )
    check_parameters(cells[0])
    # The longest runs first, and those of one method together: then no worker is left alone with a long one at the end.
    return sorted(cells, key=lambda cell: -characters[cell.parameters["DATASET"]])


def write_tables(cells: Iterable[Cell], reports: str | os.PathLike, *, client: Client | None = None) -> dict[str, str]:
    """Run `tables.ipynb` over what the cells left, one table per data set, then write the reports' README."""
    reports = Path(reports)
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.finished(reports):
            found.setdefault((Path(cell.parameters["MODEL"]).name, cell.parameters["DATASET"]), []).append(cell)
    summaries = [
        Cell(
            notebook="tables",
            name=f"{model}--{dataset}",
            parameters={"RESULTS": [str(cell.path(reports, ".json")) for cell in group]},
            gpu=False,
        )
        for (model, dataset), group in found.items()
    ]
    failures = run_cells(summaries, reports, client=client, fresh=True)
    tables.write_readme(reports)
    return failures


def default_workers(model: str) -> int:
    """One notebook per core for a small model on CPUs; one at a time where a model fills memory or a GPU."""
    return (os.cpu_count() or 1) if _is_small(model) and not torch.cuda.is_available() else 1


def settings(pairs: Iterable[str]) -> dict[str, Any]:
    """name=value pairs; a value is a Python literal where it reads as one, else text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{pair!r} is no setting, expected name=value")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def variant(spec: str) -> tuple[str, dict[str, Any]]:
    """Method and settings of `memoir` or `memoir+write=rls+tau=0.6`; the text goes into file names as it is."""
    if not re.fullmatch(r"[\w+=.\-]+", spec) or "--" in spec:
        raise ValueError(f"{spec!r} is no method, expected a name, or name+setting=value")
    method, *pairs = spec.split("+")
    return method, settings(pairs)


def check_settings(method: str, given: Iterable[str]) -> None:
    """ValueError or TypeError for an unknown method or a setting that it does not have; needs no model."""
    known = {f.name for f in fields(editor_class(method).Config)}
    if unknown := sorted(set(given) - known):
        raise TypeError(f"{method} has no setting {', '.join(unknown)}; expected {', '.join(sorted(known))}")


def _host(name: str, dtype: str | None, device_map: str | None, chat: bool) -> LanguageModel:
    """The model as far as the grid needs it: with its weights where they are small, else its outline only."""
    return load_model(name, dtype=dtype, device_map=device_map if _is_small(name) else "meta", chat=chat)


def _is_small(name: str) -> bool:
    folder = Path(name).expanduser()
    weights = [path.stat().st_size for path in folder.glob("*.safetensors")] if folder.is_dir() else []
    return name == "almanac" or 0 < sum(weights) <= SMALL
