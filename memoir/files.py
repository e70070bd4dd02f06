"""Files: JSON, JSON lines and tables, read with errors that name the file; JSON written whole or not at all; the cache
folder; the lock of a folder that is written to."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import platform
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"  # in a folder that a run writes to
RECORD_SUFFIXES = {".json", ".jsonl", ".ndjson", ".csv", ".tsv"}
_LINES, _TABLES = {".jsonl", ".ndjson"}, {".csv", ".tsv"}
_GZIP = b"\x1f\x8b"  # the first bytes of every gzip file
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # with which Windows begins a "Unicode" file
# In indented JSON, a list without texts, lists and objects. Texts escape line breaks, so none can look like one.
_NUMBERS = re.compile(r'\[\n([^\[\]{}"]*)\n *\]')


def cache_folder() -> Path:
    """MEMOIR_HOME, or ~/.cache/memoir."""
    return Path(os.environ.get("MEMOIR_HOME") or Path.home() / ".cache" / "memoir")


@contextlib.contextmanager
def sole_writer(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of a folder. BlockingIOError, which says who, where another one is writing there.

    The system releases the lock when the process ends, however it ends.
    """
    lock = Path(folder) / LOCK
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            lock.write_text(f"process {os.getpid()} on {platform.node()}")
            yield
    except Timeout:
        raise BlockingIOError(f"another run is writing here: {folder} ({lock.read_text()})") from None


def try_writing(folder: str | os.PathLike) -> None:
    """Make a folder and write a little there. OSError where that is not allowed, or where no room is left."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | os.PathLike, data: Any) -> Path:
    """Write JSON atomically: the old file stays whole until the new one is. A list of numbers takes one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=True) + "\n"
    text = _NUMBERS.sub(lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: str | os.PathLike, write: Callable[[Path], Any]) -> Path:
    """Call `write(temporary_path)`, flush that file to disk, then move it to `path` in one step."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file, gzipped or not, with or without a byte order mark; errors name the file."""
    return _parsed(read_text(path), str(path))


class Rows(list):
    """The records of a table, and the names in its header, `columns`."""

    columns: Sequence[str] = ()


def read_records(path: str | os.PathLike) -> Any:
    """The records of a table with a header (.csv, .tsv), the values of a file with one JSON value per line, or the one
    value of a JSON file; errors name file and line."""
    suffixes = set(Path(path).suffixes)
    if _TABLES & suffixes:
        return _table(path)
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        first = json.loads(lines[0][1])
    except (IndexError, ValueError, RecursionError):  # the file is empty, or one value over several lines
        return _parsed(text, str(path))
    if len(lines) == 1 and not (_LINES & suffixes and isinstance(first, dict)):
        return first
    return [_parsed(line, f"{path}, line {number}") for number, line in lines]


def _table(path: str | os.PathLike) -> Rows:
    """The rows of a table by the names in its header.

    Empty cells, and columns without a name, are left out. Cells beyond the header's stand under None, as `csv` puts
    them.
    """
    text = read_text(path)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text), strict=True)
    try:
        names = column_names(next(rows, []), str(path))
        records = Rows()
        records.columns = names
        for cells in filter(any, rows):
            more = {None: cells[len(names) :]} if len(cells) > len(names) else {}
            pairs = zip(names, cells, strict=False)
            records.append({name: cell for name, cell in pairs if name and cell.strip()} | more)
        return records
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num} is not a valid table row: {error}") from None


def delimiter_of(table: str) -> str:
    """What separates the cells of a table: a tab if its first line has one, else the more frequent of comma and
    semicolon there."""
    first = table.partition("\n")[0]
    return "\t" if "\t" in first else max(",;", key=first.count)


def column_names(header: Sequence[str], place: str) -> list[str]:
    """The names in a table's header, in lower case. ValueError if two columns share a name."""
    names = [name.strip().casefold() for name in header]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"{place} has two columns named {twice[0]!r}, expected each name once")
    return names


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number with thousands of digits
        raise ValueError(f"{place} is not JSON: {error}") from None


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8, gzipped or not, without a byte order mark (with one, UTF-16 is read as well)."""
    try:
        data = Path(path).expanduser().read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
        return data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}; save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not a gzip file: {error}") from None
