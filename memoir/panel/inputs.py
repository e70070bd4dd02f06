"""What users type or bring: the fields of a form, pasted or uploaded tables, lines of settings, a folder."""

from __future__ import annotations

import ast
import csv
import io
import json
from pathlib import Path
from typing import Any

from memoir.editors.storage import EDITS, READY
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
    """The edits in a table, its cells parted by tabs, commas or semicolons, in JSON lines or in a JSON list. Its format
    is any of `formats.FORMATS`; a table without a heading has the first of `COLUMNS`. ValueError names the bad lines.
    """
    text = text.removeprefix("\ufeff").strip("\n\r")
    if not text.strip():
        raise ValueError(f"{name} is empty, expected lines of a prompt and its new answer")
    records = _from_json(text, name) if text.lstrip()[0] in "[{" else _from_table(text)
    if not records:
        raise ValueError(f"{name} holds no edits")
    edits, problems = [], []
    for line, record in records:
        try:
            edits += edits_in(record, format_of(record) or "table")
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        raise ValueError(f"{name}, {listed(problems)}")
    return edits


def _from_table(text: str) -> list[tuple[int, dict[str | None, Any]]]:
    """The rows with their line numbers; empty cells are left out, and those beyond the heading's stand under None."""
    delimiter = max("\t,;", key=text.partition("\n")[0].count)  # the first of equals: tabs, as spreadsheets paste
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    heading = [cell.casefold() for cell in rows[0][1]] if rows else []
    if format_of(dict.fromkeys(heading)):
        rows = rows[1:]
    else:
        heading = COLUMNS
    records = []
    for line, row in rows:
        more = {None: row[len(heading) :]} if len(row) > len(heading) else {}
        records.append((line, {name: cell for name, cell in zip(heading, row, strict=False) if cell} | more))
    return records


def _from_json(text: str, name: str) -> list[tuple[int, Any]]:
    try:
        if text.lstrip()[0] == "[":
            return list(enumerate(json.loads(text), 1))
        return [(i, json.loads(line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is neither JSON lines nor a JSON list: {error}") from None


def settings_of(text: str) -> dict[str, Any]:
    """Settings by name from lines `name = value`; ValueError names the line that is none."""
    settings = {}
    for line in filter(str.strip, text.splitlines()):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not (name.isidentifier() and equals and value):
            raise ValueError(f"setting {line.strip()!r}, expected name = value")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value  # a word without quotes
    return settings


def folder_of(folder: str) -> tuple[Path, bool]:
    """A folder's full path, and whether it looks like one that Save has written, perhaps not to its end."""
    if not folder.strip():
        raise ValueError("the folder is empty, expected where the edits are saved")
    path = Path(folder.strip()).expanduser().resolve()
    return path, (path / EDITS).exists() or (path / READY).exists()
