"""What an editor is asked for and what a run leaves: frozen records, to JSON and back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from memoir.files import read_json, write_json

PROBE_KINDS = ("rephrase", "unrelated", "same_subject", "same_template")
REMEDY = "fix them, or skip them: --skip-bad or skip_bad=True"  # for bad records


class BadInput(ValueError):
    """What a caller gave cannot be used; nothing was done with it yet."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A further prompt, on which one sees what an edit did beyond its own prompt.

    kind     `rephrase`, which the edit must change; or `unrelated`, `same_subject` (another relation of the same
             subject) or `same_template` (the same question about another subject), which it must not change
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
    subject  the subject as it stands in the prompt; ROME, MEMIT, AlphaEdit and RLSEdit edit at its last token
    truth    the answer before the edit, where the data set gives one; evaluation marks whether the model knew it
    probes   prompts on which the edit is evaluated
    id       any unique text; where it is left empty, it is derived from prompt and target
    """

    prompt: str
    target: str
    subject: str = ""
    truth: str = ""
    probes: tuple[Probe, ...] = ()
    id: str = ""

    def __post_init__(self):
        for name in ("prompt", "target"):
            _require_text(f"edit {self.id!r}" if self.id else "edit", name, getattr(self, name))
        object.__setattr__(self, "probes", tuple(self.probes))
        if not self.id:
            digest = hashlib.sha256(f"{self.prompt}\0{self.target}".encode()).hexdigest()
            object.__setattr__(self, "id", digest[:12])

    @cached_property
    def question(self) -> str:
        """The prompt without differences that change no question: case, white space, final punctuation."""
        return " ".join(self.prompt.casefold().split()).rstrip(" .?!:")

    def probe(self, kind: str) -> Probe | None:
        """The first probe of that kind, or None."""
        return next((p for p in self.probes if p.kind == kind), None)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return data if self.truth else {name: value for name, value in data.items() if name != "truth"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EditRequest:
        return cls(**{**data, "probes": tuple(Probe(**p) for p in data.get("probes", ()))})


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """How one edit was written.

    loss_before, loss_after  mean negative log-likelihood of the target's tokens in nats, as the method optimises it
    iterations               gradient steps taken
    seconds                  wall time, without the question that `learned` costs
    replaced                 ids of earlier edits that this edit replaced
    conflicts                ids of earlier edits that this edit contradicts: its prompt read them, with another target
    learned                  whether the edited model's free greedy answer to the edit's prompt is the target, or begins
                             with it where the method does not learn to stop; None where nobody asked
    together                 how many edits were written in one go, this one included
    """

    edit_id: str
    loss_before: float
    loss_after: float
    iterations: int
    seconds: float
    replaced: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    learned: bool | None = None
    together: int = 1


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why an edited model answers a prompt as it does; None where the method does not route.

    edit_id       the nearest stored edit
    score         how near that edit is, in the method's own measure (MEMOIR: R_match, 0…1; GRACE: a distance)
    threshold     the limit of `score` (MEMOIR: τ): a distance fires at or below it, WISE's score above it, all other
                  scores at or above it
    fired         whether the edit's memory took part in the answer
    contribution  ‖y' − y‖ / ‖y‖ at the prompt's last token: how far the edited projection's output moved
    """

    edit_id: str | None = None
    score: float | None = None
    threshold: float | None = None
    fired: bool = False
    contribution: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Where a number comes from: everything needed to compute it again.

    commit, dirty  of the code that ran, and whether it was changed since; None outside a checkout
    weights        the GGUF file or the hub's revision that the model's weights come from; None for other models
    versions       of Python and the packages; None for a package that is not installed
    """

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
    commit: str | None
    dirty: bool | None
    versions: dict[str, str | None]
    started: str
    weights: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The evaluation of all edits made so far, after the last of them.

    edits     how many edits were evaluated
    scores    means, e.g. {"rel": 0.99, "gen": 0.97, "loc": 1.0, "avg": 0.99, "ppl": 1.1, "generated": 0.98,
              "loc_same_subject": 1.0, "text_ppl": 14.2}; None where the data defines no such score
    per_edit  the same scores edit by edit, in the order of editing; not those of the whole model, like text_ppl
    """

    edits: int
    scores: dict[str, float | None]
    per_edit: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run leaves.

    losses     each edit's loss when it was written, in nats per token of its target
    together   how many edits were written in one go with each edit, itself included: at most the setting `batch_size`,
               fewer before an evaluation or a save. Results of older versions have none
    conflicts  one for each edit that contradicted or replaced earlier ones: {"edit_id", "with", "replaced"}, ids
    tau        the threshold by which the editor routed; None where it routes by none
    extra      whatever else belongs to the run, JSON
    skipped    the bad records that were left out, one line each: file, record, key, value, what was expected
    """

    info: RunInfo
    checkpoints: tuple[Checkpoint, ...]
    edit_ids: tuple[str, ...]
    seconds_per_edit: float | None
    peak_bytes: int | None
    losses: tuple[float, ...] = ()
    together: tuple[int, ...] = ()
    conflicts: tuple[dict[str, Any], ...] = ()
    tau: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The last checkpoint as one flat JSON object; `replaced` counts the edits that later ones replaced, `skipped`
        the bad records that were left out."""
        last = self.checkpoints[-1]
        return {
            "method": self.info.method,
            "model": self.info.model,
            "dataset": self.info.dataset,
            "edits": last.edits,
            "seed": self.info.seed,
            **last.scores,
            # An edit that is made once more has the same id, and nothing is lost.
            "replaced": sum(old != each["edit_id"] for each in self.conflicts for old in each["replaced"]),
            "skipped": len(self.skipped),
            "tau": self.tau,
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
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        given["info"] = RunInfo(**data["info"])
        given["checkpoints"] = tuple(Checkpoint(**checkpoint) for checkpoint in data["checkpoints"])
        return cls(**given)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the result as JSON, atomically."""
        return write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Result:
        return cls.from_json(read_json(path))


def _require_text(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{owner}: {name} is {type(value).__name__}, expected text")
    if not value.strip():
        raise ValueError(f"{owner}: {name} is empty, expected text")


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Problems as one message, the first ones if there are many."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n".join([*problems[:most], *more])
