"""Files: JSON and JSON lines, read with errors that name the file, written whole or not at all; the cache folder; the
lock of a folder that is written to."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import platform
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"  # in a folder that a run writes to
_GZIP = b"\x1f\x8b"  # the first bytes of every gzip file
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
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_json_or_lines(path: str | os.PathLike) -> Any:
    """Read a JSON file, or the list of values of a file with one JSON value per line; errors name file and line."""
    text = _text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not lines or not _is_json(lines[0][1]):
            raise ValueError(f"{path} is not JSON: {error}") from None
        return [_line(path, number, line) for number, line in lines]
    one_line = len(lines) == 1 and isinstance(value, dict)
    return [value] if one_line and {".jsonl", ".ndjson"} & set(Path(path).suffixes) else value


def _line(path: str | os.PathLike, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _text(path: str | os.PathLike) -> str:
    try:
        data = Path(path).read_bytes()
        return (gzip.decompress(data) if data.startswith(_GZIP) else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
