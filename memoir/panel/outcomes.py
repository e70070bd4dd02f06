"""What the panel's actions give back: frozen records, which the templates show."""

from __future__ import annotations

from dataclasses import dataclass

from memoir.records import EditReport, EditRequest, Explanation


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's greedy answer, and its most likely next tokens with their probabilities."""

    text: str  # as it is shown
    whole: str  # the full generation; it may include the beginning of a second line, which is not shown
    tokens: tuple[tuple[str, float], ...]
    cut: bool = False  # whether it continues, or may, because it reached the length limit


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One question, asked of the model without and with its edits."""

    prompt: str
    before: Answer | None  # None while it is being asked, which is last
    after: Answer
    why: Explanation  # without its contribution, which costs two more forward passes
    edit: EditRequest | None  # the nearest stored edit; None where the method does not route or nothing is stored
    measure: str  # the name of `why.score`, "overlap" or "distance" for example
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question asked after an edit."""

    kind: str  # "prompt" or "rephrase", which the edit is to change, or "unrelated", which it is to leave alone
    prompt: str
    answer: str
    passed: bool  # whether the answer is the target; for an unrelated prompt, whether it is that of the unedited model


@dataclass(frozen=True, kw_only=True)
class Edited:
    """How an edit, or a list of them, went."""

    requests: tuple[EditRequest, ...]
    made: int  # how many of the requests were written; fewer than all if the list was cancelled
    failed: tuple[EditRequest, ...]  # those written that the model does not answer with
    replaced: tuple[EditRequest, ...]  # earlier edits that they replaced
    reports: tuple[EditReport, ...]  # of the last try
    checks: tuple[Check, ...] = ()  # after a single edit, its own prompt first; none after a list
    again: int = 0  # how often what had failed was tried again

    @property
    def learned(self) -> bool:
        return not self.failed and self.made == len(self.requests)


@dataclass(frozen=True, kw_only=True)
class Clash:
    """Two edits that give one question different answers: one would replace the other."""

    new: EditRequest
    old: EditRequest
    overlap: float  # of their prompts' masks, 0 to 1


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Edits that wait for a decision, because some would replace others. Nothing was written."""

    requests: tuple[EditRequest, ...]
    unrelated: str
    clashes: tuple[Clash, ...]


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """τ and where it comes from: "calibrated" on this model, "preset", or by "hand"."""

    tau: float
    origin: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an action is: `done` of `total` edits, steps of one edit at most, checks of an edit, or answers."""

    unit: str
    done: int
    total: int
    loss: float | None = None  # of the edit at its last step, nats; None while something else is counted
    left: float | None = None  # seconds, at most and if the rest goes as fast; None before the first step
