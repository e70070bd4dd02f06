"""Edits as users bring them: the fields of a form, and pasted or uploaded tables."""

from __future__ import annotations

import ast
import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from memoir.data import format_of, load_edits
from memoir.records import EditRequest, Probe, listed

COLUMNS = ("prompt", "target", "subject", "rephrase", "unrelated", "unrelated_answer")


def request_of(prompt: str, target: str, rephrase: str = "", subject: str = "") -> EditRequest:
    """The edit that a form describes; ValueError names the field that is empty."""
    return _request({"prompt": prompt, "new answer": target, "rephrase": rephrase, "subject": subject}, "new answer")


def edits_of(text: str, name: str = "the table") -> list[EditRequest]:
    """The edits in a text: a table with the columns prompt and target, and perhaps the others of `COLUMNS`, separated
    by tabs, commas or semicolons; JSON lines with the same keys; or a public format that `load_edits` reads.

    A table without a heading has its columns in the order of `COLUMNS`. ValueError names the lines that are wrong.
    """
    text = text.removeprefix("\ufeff").strip("\n\r")
    if not text.strip():
        raise ValueError(f"{name} is empty, expected lines of a prompt and its new answer")
    if text.lstrip()[0] in "[{":
        records = _json_records(text, name)
        if records and not set(records[0][1]) <= set(COLUMNS) and format_of(records[0][1]) is not None:
            return _public(text, name)
    else:
        records = _rows(text, name)
    edits, problems = [], []
    for line, record in records:
        try:
            edits.append(_request(record, "target"))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    if problems:
        raise ValueError(f"{name}, {listed(problems)}")
    return edits


def _request(record: dict[str, Any], target_key: str) -> EditRequest:
    texts = {}
    for key, value in record.items():
        if not isinstance(value, str | None):
            raise ValueError(f"{key} is {type(value).__name__}, expected text")
        texts[key] = (value or "").strip()
    for key in ("prompt", target_key):
        if not texts.get(key):
            raise ValueError(f"{key} is empty, expected text")
    target, probes = texts[target_key], []
    if texts.get("rephrase"):
        probes.append(Probe(kind="rephrase", prompt=texts["rephrase"], answer=target))
    if texts.get("unrelated"):
        if not texts.get("unrelated_answer"):
            raise ValueError("unrelated has no unrelated_answer beside it")
        probes.append(Probe(kind="unrelated", prompt=texts["unrelated"], answer=texts["unrelated_answer"]))
    return EditRequest(prompt=texts["prompt"], target=target, subject=texts.get("subject", ""), probes=tuple(probes))


def _rows(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a table with their line numbers."""
    first = text.splitlines()[0]
    separator = max("\t,;", key=first.count)  # the first of equals: tabs, as spreadsheets paste
    reader = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    rows = []
    for row in reader:
        if any(cell.strip() for cell in row):
            rows.append((reader.line_num, row))
    heading = [cell.strip().casefold() for cell in rows[0][1]]
    if {"prompt", "target"} <= set(heading):
        rows = rows[1:]
        if unknown := sorted(set(heading) - set(COLUMNS) - {""}):
            raise ValueError(f"{name} has unknown columns {', '.join(unknown)}; expected {', '.join(COLUMNS)}")
    else:
        heading = list(COLUMNS)
    for line, row in rows:
        if len(row) > len(heading):
            raise ValueError(
                f"{name}, line {line} has {len(row)} columns, expected at most {len(heading)}: "
                "put a text that holds a separator in double quotes"
            )
    if not rows:
        raise ValueError(f"{name} has a heading but no edits")
    return [(line, dict(zip(heading, row, strict=False))) for line, row in rows]


def _json_records(text: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        if text.lstrip()[0] == "[":
            records = list(enumerate(json.loads(text), 1))
        else:
            records = [(i, json.loads(line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is neither JSON lines nor a JSON list: {error}") from None
    for line, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{name}, line {line} is {type(record).__name__}, expected an object")
    return records


def _public(text: str, name: str) -> list[EditRequest]:
    """Edits in a public format, by the package's own reader, which takes a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edits.json"
        path.write_text(text, encoding="utf-8")
        return list(load_edits(Path(name).stem or "upload", path=path))


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
