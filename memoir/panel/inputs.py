"""What users type or bring: the fields of a form, pasted or uploaded tables, a folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memoir.editors.storage import EDITS, READY
from memoir.files import Rows, column_names, delimiter_of
from memoir.formats import edits_of as edits_in
from memoir.formats import format_of
from memoir.records import EditRequest, Probe, listed

COLUMNS = ("prompt", "target", "subject", "rephrase", "unrelated", "unrelated_answer")


def request_of(prompt: str, target: str, rephrase: str = "", subject: str = "") -> EditRequest:
    """The edit that a form describes; ValueError names the field that is empty."""
    prompt, target, rephrase, subject = (text.strip() for text in (prompt, target, rephrase, subject))
    for name, text in {"prompt": prompt, "new answer": target}.items():
        if not text:
            raise ValueError(f"{name} is empty, expected text")
    probes = (Probe(kind="rephrase", prompt=rephrase, answer=target),) if rephrase else ()
    return EditRequest(prompt=prompt, target=target, subject=subject, probes=probes)


def edits_of(text: str, name: str = "the table") -> list[EditRequest]:
    """The edits in a table, its cells separated by tabs, commas or semicolons, in JSON lines or in a JSON list. Its
    format is any of `formats.FORMATS`; a table without a header has the first of `COLUMNS`. ValueError names the bad
    records by their place.
    """
    text = text.removeprefix("\ufeff").strip("\n\r")
    if not text.strip():
        raise ValueError(f"{name} is empty, expected lines of a prompt and its new answer")
    records = _from_json(text, name) if text.lstrip()[0] in "[{" else _from_table(text, name)
    if not records:
        raise ValueError(f"{name} holds no edits")
    edits, problems = [], []
    for place, record in records:
        try:
            edits += edits_in(record, format_of(record) or "table", getattr(records, "columns", ()))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise ValueError(f"{name}, {listed(problems)}")
    return edits


def _from_table(text: str, name: str) -> Rows:
    """The rows with their places; empty cells are left out, and those beyond the header's stand under None."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter_of(text), skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    header: Sequence[str] = COLUMNS
    if rows and format_of(dict.fromkeys(map(str.casefold, rows[0][1]))):
        header, rows = column_names(rows[0][1], name), rows[1:]
    records = Rows()
    records.columns = header
    for line, row in rows:
        more = {None: row[len(header) :]} if len(row) > len(header) else {}
        cells = {column: cell for column, cell in zip(header, row, strict=False) if cell}
        records.append((f"line {line}", cells | more))
    return records


def _from_json(text: str, name: str) -> list[tuple[str, Any]]:
    try:
        if text.lstrip()[0] == "[":
            return [(f"record {i}", record) for i, record in enumerate(json.loads(text), 1)]
        return [(f"line {i}", json.loads(line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is neither JSON lines nor a JSON list: {error}") from None


def folder_of(folder: str) -> tuple[Path, bool]:
    """A folder's full path, and whether it looks like one that Save has written, possibly incompletely."""
    if not folder.strip():
        raise ValueError("the folder is empty, expected where the edits are saved")
    path = Path(folder.strip()).expanduser().resolve()
    return path, (path / EDITS).exists() or (path / READY).exists()
