"""The exploring notebooks, rerun headless: each leaves a JSON result, figures, a page and a card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memoir import frontpage, plots
from memoir.batch import Cell
from memoir.files import write_atomically, write_json
from memoir.provenance import run_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memoir.editors.base import Editor

NOTEBOOKS = tuple(frontpage.CARDS)


def cells(only: Sequence[str] = (), parameters: Mapping[str, Any] | None = None) -> list[Cell]:
    """One run of each notebook, or only of the named ones; ValueError for an unknown one."""
    if unknown := sorted(set(only) - set(NOTEBOOKS)):
        raise ValueError(f"no exploring notebook {', '.join(unknown)}; expected one of {', '.join(NOTEBOOKS)}")
    parameters = dict(parameters or {})
    model = Path(parameters.get("MODEL", "almanac")).name.removesuffix(".gguf")  # its name in tables, as loaded
    dataset = parameters.get("DATASET", "almanac-qa")
    return [Cell(name, f"{name}--{model}--{dataset}", parameters) for name in NOTEBOOKS if not only or name in only]


def provenance(editor: Editor, dataset: str, edits: int) -> dict[str, Any]:
    """Where a notebook's numbers come from, as of now."""
    return asdict(run_info(editor, dataset, edits, 32))


def leave(
    out: str | os.PathLike, title: str, meaning: str, figures: Mapping[str, Figure], record: Mapping[str, Any], table=""
) -> None:
    """Write the figures `<out>--<name>.png` and `.svg`, the page `<out>.md`, and the JSON `out`, last.

    meaning  two sentences on what the numbers say
    table    Markdown to show below the figures
    """
    out = Path(out)
    stem = out.name.removesuffix(".json")
    thumbnails = []
    for name, figure in figures.items():
        image = f"{stem}--{name}"
        plots.save(figure, out.with_name(f"{image}.png"))
        thumbnails.append(f'[<img src="{image}.png" alt="{title}: {name}" width="480">]({image}.svg)')
    parts = [f"# {title}", meaning, "\n".join(thumbnails), table, f"[The notebook]({stem}.ipynb)"]
    page = "\n\n".join(part for part in parts if part)
    write_atomically(out.with_name(f"{stem}.md"), lambda path: path.write_text(f"{page}\n", encoding="utf-8"))
    write_json(out, {"title": title, "meaning": meaning, **record})
