"""What is asked of an editor and what came out: frozen records, JSON in and out, standard library only."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# Of indented JSON a list of what is no text, list or object. No text holds such a line break: there it is escaped.
_NUMBERS = re.compile(r'\[\n([^\[\]{}"]*)\n *\]')
PROBE_KINDS = ("rephrase", "unrelated", "same_subject", "same_template")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One further prompt that shows what an edit did beyond its own prompt.

    kind     `rephrase` (the edit must reach it), `unrelated`, `same_subject` (another relation of the same
             subject) or `same_template` (the same question about another subject): the edit must not reach them
    prompt   text
    answer   text: the edit's target for a rephrase, the reference answer for the others
    """

    kind: str
    prompt: str
    answer: str

    def __post_init__(self):
        if self.kind not in PROBE_KINDS:
            raise ValueError(f"probe kind {self.kind!r} is unknown; expected one of {', '.join(PROBE_KINDS)}")
        for name in ("prompt", "answer"):
            _require_text(f"{self.kind} probe", name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One edit: after it, the model continues `prompt` with `target`.

    prompt   text, no trailing space needed
    target   text of the new answer, without its leading space
    subject  the prompt's subject as it stands in the prompt; ROME, MEMIT and AlphaEdit may look it up
    probes   prompts on which the edit is evaluated
    id       any unique text; derived from prompt and target where it is left empty
    """

    prompt: str
    target: str
    subject: str = ""
    probes: tuple[Probe, ...] = ()
    id: str = ""

    def __post_init__(self):
        for name in ("prompt", "target"):
            _require_text(f"edit {self.id!r}" if self.id else "edit", name, getattr(self, name))
        object.__setattr__(self, "probes", tuple(self.probes))
        if not self.id:
            digest = hashlib.sha256(f"{self.prompt}\0{self.target}".encode()).hexdigest()
            object.__setattr__(self, "id", digest[:12])

    def probe(self, kind: str) -> Probe | None:
        """The first probe of that kind, or None."""
        return next((p for p in self.probes if p.kind == kind), None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EditRequest:
        return cls(**{**data, "probes": tuple(Probe(**p) for p in data.get("probes", ()))})


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """How the writing of one edit went.

    loss_before, loss_after  mean negative log-likelihood of the target's tokens in nats, as the method optimises it
    iterations               gradient steps taken
    seconds                  wall time
    replaced                 ids of earlier edits that this one replaced
    conflicts                ids of earlier edits that it contradicts: those that its prompt read, with another target
    """

    edit_id: str
    loss_before: float
    loss_after: float
    iterations: int
    seconds: float
    replaced: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why an edited model answers a prompt as it does; None where the method does not route.

    edit_id       the nearest stored edit
    score         how near, in the method's own measure (MEMOIR: the overlap ratio R_match, 0…1; GRACE: a distance)
    threshold     what `score` is held against (MEMOIR: τ); a distance fires at or below it, all others at or above it
    fired         whether the edit's memory took part in the answer
    contribution  ‖y' − y‖ / ‖y‖ at the prompt's last token: how far the output of the edited projection moved
    """

    edit_id: str | None
    score: float | None
    threshold: float | None
    fired: bool
    contribution: float

    @property
    def overlap(self) -> float | None:
        """MEMOIR's name for `score`."""
        return self.score

    @property
    def tau(self) -> float | None:
        """MEMOIR's name for `threshold`."""
        return self.threshold


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Where a number comes from: everything needed to make it again."""

    method: str
    model: str
    model_fingerprint: str
    dataset: str
    edits: int
    seed: int
    dtype: str
    device: str
    config: dict[str, Any]
    protocol: dict[str, Any]
    commit: str
    dirty: bool | None
    versions: dict[str, str]
    started: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All edits made so far, evaluated together after the last of them.

    edits     how many
    scores    means, e.g. {"rel": 0.99, "gen": 0.97, "loc": 1.0, "avg": 0.99, "ppl": 1.1, "exact_match": 0.98,
              "loc_same_subject": 1.0, "loc_same_template": 1.0}; None where the data defines no such score
    per_edit  the same scores edit by edit, in the order of editing
    """

    edits: int
    scores: dict[str, float | None]
    per_edit: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run left behind."""

    info: RunInfo
    checkpoints: tuple[Checkpoint, ...]
    edit_ids: tuple[str, ...]
    seconds_per_edit: float | None
    peak_bytes: int | None
    losses: tuple[float, ...] = ()
    conflicts: tuple[dict[str, Any], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The last checkpoint as one flat JSON object."""
        last = self.checkpoints[-1]
        return {
            "method": self.info.method,
            "model": self.info.model,
            "dataset": self.info.dataset,
            "edits": last.edits,
            "seed": self.info.seed,
            **last.scores,
            "seconds_per_edit": self.seconds_per_edit,
            "peak_bytes": self.peak_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"result has unknown keys {unknown}; expected {sorted(known)}")
        return cls(
            **{
                **data,
                "info": RunInfo(**data["info"]),
                "checkpoints": tuple(Checkpoint(**c) for c in data["checkpoints"]),
                "edit_ids": tuple(data["edit_ids"]),
                "losses": tuple(data.get("losses", ())),
                "conflicts": tuple(data.get("conflicts", ())),
            }
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the result as JSON, atomically."""
        return write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Result:
        return cls.from_json(read_json(path))


def write_json(path: str | os.PathLike, data: Any) -> Path:
    """Write JSON atomically: the old file stays whole until the new one is. A list of numbers takes one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=True) + "\n"
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: str | os.PathLike, write) -> Path:
    """Call `write(temporary_path)`, flush what it wrote to disk, then move it to `path` in one step."""
    path = Path(path)
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
    """Read a JSON file; errors name the file."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_json_lines(path: str | os.PathLike) -> Iterable[Any]:
    """Read a file with one JSON value per line; errors name the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def _require_text(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{owner}: {name} is {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{owner}: {name} is empty, expected text")
