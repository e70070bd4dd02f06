"""Edit in sequence, evaluate ALL edits made so far at every checkpoint, and save so that a run can go on."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from memoir import metrics
from memoir.editors import make_editor
from memoir.editors.base import Editor
from memoir.editors.storage import MemoryFileError, check_replaceable, holds_memory, read_memory, refusing
from memoir.evaluation import Evaluation
from memoir.files import sole_writer
from memoir.models import LanguageModel
from memoir.provenance import peak_bytes, run_info
from memoir.records import REMEDY, BadInput, Checkpoint, EditReport, EditRequest, Result, RunInfo, listed

TOLD = ("seconds", "losses", "together", "conflicts")  # what a run keeps of its edits' reports
SAVING = 0.05  # of the time that the clock's saves may take at most


def run_edits(
    editor: Editor,
    edits: Iterable[EditRequest],
    *,
    checkpoints: Iterable[int] | None = None,
    dataset: str | None = None,
    eval_batch_size: int = 32,
    progress: bool = True,
    generate: bool = True,
    texts: Sequence[str] | None = None,
    cancelled: Callable[[], bool] | None = None,
    save_to: str | os.PathLike | None = None,
    save_every: int = 500,
    save_seconds: float | None = None,
    skip_bad: bool = False,
) -> Result:
    """Make edits one after the other and evaluate at each checkpoint, until the last checkpoint.

    edits            a sequence, all of which is checked before the first edit; or an iterator, which may never end and
                     is read no further than the edits that are written next (the editor's `batch_size`)
    checkpoints      numbers of edits after which all edits so far are evaluated. A sequence's last edit always is one.
                     An iterator of rising numbers, `itertools.count(1000, 1000)` say, may never end either: then the
                     last checkpoint is the end of the edits
    dataset          name in the report; default: the edit set's own
    eval_batch_size  prompts evaluated together
    generate         also score free answers, which takes most of the evaluation's time
    texts            passages whose perplexity is measured before and after the edits; default: ordinary ones; (): none
    save_to          a folder for the memory and the results so far, saved before the first edit, before and after each
                     evaluation, and in between as set below. If the folder already holds a run of these edits, that run
                     goes on: called again with the same arguments, a stopped run ends as if it had never stopped. Only
                     one run may use the folder at a time: BlockingIOError
    save_every       save after so many edits
    save_seconds     also save when so many seconds have passed since the last save, or longer if saving takes more than
                     a twentieth of the time; None: the clock does not matter
    skip_bad         leave out the edits of a sequence that cannot be made, and the checkpoints beyond the others, and
                     tell of them in the result's `skipped`

    BadInput names all edits of a sequence that cannot be made, up to ten, before the first one is made.
    """
    if save_every < 1:
        raise ValueError(f"save_every = {save_every} edits, expected at least 1")
    complete = isinstance(edits, Sequence)
    info = run_info(editor, dataset or getattr(edits, "name", "custom"), 0, eval_batch_size)
    skipped: tuple[str, ...] = getattr(edits, "skipped", ())
    if complete:
        edits, refused = check_edits(editor, edits, skip_bad)
        skipped += tuple(refused)
    stops = _stops(checkpoints, len(edits) if complete else None, clip=bool(skipped))
    evaluation = Evaluation(editor, eval_batch_size, generate=generate, progress=progress, texts=texts)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    folder = None if save_to is None else check_replaceable(save_to)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(sole_writer(folder))
        journal = Journal(editor, folder, evaluation.terms, save_every, save_seconds)
        queue = iter(edits)
        stops = journal.resume(queue, stops)
        # A list goes to the editor by as many edits as it looks ahead at; a stream is read no further than is written.
        portion, total = (editor.window, len(edits)) if complete else (editor.config.batch_size, None)
        bar = tqdm(desc=editor.name, unit="edit", initial=journal.made, total=total, disable=not progress)
        stack.enter_context(bar)
        for stop in stops:
            while batch := list(islice(queue, min(stop - journal.made, portion))):
                # The evaluation asks all edits, so nothing is asked here.
                journal.add(batch, editor.edit(batch, cancelled=cancelled, check=False))
                bar.update(len(batch))
                if journal.made < stop:
                    journal.save_if_due()
            ended = journal.made < stop
            if ended and (not journal.made or not isinstance(checkpoints, Iterator)):
                raise ValueError(f"the stream ended after {journal.made} edits, expected {stop}")
            if journal.made not in journal.evaluated:
                journal.save()  # before the evaluation, which may take long
                journal.checkpoints.append(evaluation.checkpoint(journal.edits))
                journal.save()
            if ended:
                break
        return replace(journal.result(replace(info, edits=journal.made)), skipped=skipped)


def check_edits(
    editor: Editor, edits: Sequence[EditRequest], skip_bad: bool = False
) -> tuple[Sequence[EditRequest], list[str]]:
    """The edits that can be made, and the reasons why others are left out. BadInput names all edits, up to ten of them,
    that cannot be made (too long, or refused by the method) unless they are to be left out and others remain."""
    problems, good = [], []
    places = getattr(edits, "places", ())
    for number, edit in enumerate(edits):
        try:
            texts = [(edit.prompt, edit.target), *((probe.prompt, probe.answer) for probe in edit.probes)]
            editor.model.encoder.rows(*zip(*texts, strict=True))
            editor.check(edit)
            good.append(edit)
        except ValueError as error:
            problems.append(f"{places[number] if places else f'edit {number}'}, {_named(edit)}: {error}")
    if problems and not (skip_bad and good):
        raise BadInput(f"{len(problems)} of {len(edits)} edits cannot be made: {listed(problems)}\n{REMEDY}")
    return (good if problems else edits), problems


def _stops(checkpoints: Iterable[int] | None, count: int | None, *, clip: bool) -> Iterator[int]:
    """Where to evaluate, rising, of `count` edits (None: an unknown number). Checkpoints beyond them are wrong, or, if
    edits were left out, passed over (`clip`)."""
    if count == 0:
        raise BadInput("no edits to run, expected at least one")
    if isinstance(checkpoints, Iterator):
        stops = _rising(checkpoints)
        return stops if count is None else chain(takewhile(lambda stop: stop < count, stops), [count])
    stops = sorted({*(checkpoints or ()), *([] if count is None else [count])})
    if not stops or stops[0] < 1:
        raise BadInput(f"checkpoints {stops}, expected numbers of edits, at least 1")
    if count is not None and clip:
        stops = [stop for stop in stops if stop <= count]
    if count is not None and stops[-1] > count:
        raise BadInput(f"checkpoints {stops} do not fit {count} edits, expected 1 to {count}")
    return iter(stops)


def _rising(numbers: Iterator[int]) -> Iterator[int]:
    last = 0
    for number in numbers:
        if number <= last:
            raise BadInput(f"checkpoint {number} comes after {last}, expected rising numbers from 1 on")
        yield number
        last = number


class Journal:
    """What a run has made so far, and the folder that keeps it: a memory file whose header holds the rest. The caller
    keeps other runs out of the folder.

    A save holds all that the editor needs to go on bit for bit, and the clock only says when to save. So neither the
    clock, nor a save, nor a kill shows in the results.

    edits    in the order in which they were made, including those that a later edit replaced
    told     what their reports say, by the names in `TOLD`
    unsaved  why the last save failed, if it did
    """

    def __init__(
        self,
        editor: Editor,
        folder: Path | None,
        terms: dict[str, Any],
        save_every: int,
        save_seconds: float | None,
    ):
        """
        folder  is read if it holds a run, and `resume` goes on from there; None: nothing is kept
        terms   what the evaluation's numbers depend on, JSON: a run goes on under the same ones only
        """
        self.editor, self.folder, self.terms, self._terms = editor, folder, terms, terms
        self.save_every, self.save_seconds = save_every, save_seconds
        self.edits: list[EditRequest] = []
        self.told: dict[str, list[Any]] = {name: [] for name in TOLD}
        self.checkpoints: list[Checkpoint] = []
        self.unsaved: str | None = None
        self._saved_made, self._saved_at, self._cost = 0, time.monotonic(), 0.0
        if folder is not None and holds_memory(folder):
            self._read(folder)

    def _read(self, folder: Path) -> None:
        header, _, _ = read_memory(folder)
        if "run" not in header:
            raise MemoryFileError(f"{folder} holds a memory but no run; expected a folder of a run, or a new one")
        run = header["run"]
        with refusing(f"{folder} is damaged: its run cannot be read"):
            self._terms, self.told = run["terms"], {name: run[name] for name in TOLD}
            self.edits = [EditRequest.from_json(edit) for edit in run["edits"]]
            self.checkpoints = [Checkpoint(**checkpoint) for checkpoint in run["checkpoints"]]

    @property
    def made(self) -> int:
        return len(self.edits)

    @property
    def evaluated(self) -> set[int]:
        return {checkpoint.edits for checkpoint in self.checkpoints}

    def resume(self, stream: Iterator[EditRequest], stops: Iterator[int]) -> Iterator[int]:
        """Read the stream past the edits made so far, give this fresh editor their memory, and return the stops ahead.

        MemoryFileError, and the editor stays fresh, where this stream with these stops does not begin as the saved run.
        OSError where the folder cannot be written.
        """
        if self.made:
            self._read_past(stream)
            stops = self._stops_ahead(stops)
            if differing := [name for name in self.terms if self._terms.get(name) != self.terms[name]]:
                raise self._other(f"evaluated with different {', '.join(differing)}", "the same")
            self.editor.resume(self.folder)
        if self.made not in self.evaluated:
            self.save(must=True)
        return stops

    def _read_past(self, stream: Iterator[EditRequest]) -> None:
        number = 0
        for number, (saved, edit) in enumerate(zip(self.edits, stream), 1):  # noqa: B905 - a stream goes on
            if (saved.id, saved.prompt, saved.target) != (edit.id, edit.prompt, edit.target):
                raise self._other(
                    f"of other edits: its edit {number} is {_named(saved)}, this stream's {_named(edit)}",
                    "the same stream from its first edit on",
                )
            if saved != edit:
                raise self._other(f"of other edits: its edit {number}, {_named(saved)}, has other probes", "the same")
        if number < self.made:
            raise self._other(f"of {self.made} edits, and the stream ended after {number}", "the same stream")

    def _stops_ahead(self, stops: Iterator[int]) -> Iterator[int]:
        stop = 0
        for stop in stops:
            if stop not in self.evaluated:
                break
        if stop < self.made:
            what = f", but the last checkpoint is {stop}" if stop in self.evaluated else f" without checkpoint {stop}"
            expected = f"checkpoints from {self.made} on besides {sorted(self.evaluated)}"
            raise self._other(f"of {self.made} edits{what}", expected)
        return chain([stop], stops)

    def _other(self, holds: str, expected: str) -> MemoryFileError:
        return MemoryFileError(f"{self.folder} holds a run {holds}; expected {expected}, or a new folder")

    def add(self, edits: Sequence[EditRequest], reports: Sequence[EditReport]) -> None:
        self.edits += edits
        self.told["seconds"] += [report.seconds for report in reports]
        self.told["losses"] += [report.loss_after for report in reports]
        self.told["together"] += [report.together for report in reports]
        self.told["conflicts"] += [
            {"edit_id": r.edit_id, "with": list(r.conflicts), "replaced": list(r.replaced)}
            for r in reports
            if r.conflicts or r.replaced
        ]

    def save_if_due(self) -> None:
        by_number = self.made // self.save_every > self._saved_made // self.save_every
        if by_number or (
            self.save_seconds is not None
            and time.monotonic() - self._saved_at >= max(self.save_seconds, self._cost / SAVING)
        ):
            self.save()

    def save(self, *, must: bool = False) -> None:
        """Write the folder, if there is one. Where that fails the older save stays, and the run goes on with a warning,
        unless it `must` be saved: OSError."""
        if self.folder is None:
            return
        run = {
            "terms": self.terms,
            "edits": [edit.to_json() for edit in self.edits],
            **self.told,
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
        }
        began = time.perf_counter()
        try:
            self.editor.save(self.folder, run=run)
            self.unsaved = None
        except OSError as error:
            if must:
                raise
            self.unsaved = f"{error.strerror}: {self.folder}"
            warnings.warn(f"after {self.made} edits nothing could be saved: {self.unsaved}", stacklevel=3)
        self._saved_made, self._saved_at, self._cost = self.made, time.monotonic(), time.perf_counter() - began

    def result(self, info: RunInfo) -> Result:
        return Result(
            info=info,
            checkpoints=tuple(self.checkpoints),
            edit_ids=tuple(edit.id for edit in self.edits),
            seconds_per_edit=metrics.mean(self.told["seconds"]),
            peak_bytes=peak_bytes(),
            **{name: tuple(values) for name, values in self.told.items() if name != "seconds"},
            tau=self.editor.tau,
            extra={"unsaved": self.unsaved} if self.unsaved else {},
        )


def _named(edit: EditRequest) -> str:
    return f"{edit.id!r} ({edit.prompt[:60]!r} → {edit.target[:60]!r})"


def run_separately(
    method: str,
    model: LanguageModel,
    edit_sets: Iterable[Sequence[EditRequest]],
    skip_bad: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Several short sequences of the same length, each on a fresh editor: the scores after one edit, or ten, are mostly
    chance, but their means over many runs are not.

    skip_bad  leave out the edits that cannot be made, and sequences of nothing else

    Returns {"edits": length, "scores": the scores of each run, "per_edit": the scores of each run's edits,
    "seconds_per_edit": mean over the runs}.
    """
    results, length = [], 0
    with model.lent():
        for edits in edit_sets:
            origin, length = {"seed": edits.seed, "dataset": edits.name} if hasattr(edits, "seed") else {}, len(edits)
            editor = make_editor(method, model, **{**origin, **overrides})
            with contextlib.suppress(*[BadInput] if skip_bad else []):
                # A few edits do not show in passages.
                results.append(run_edits(editor, edits, progress=False, texts=(), skip_bad=skip_bad))
            editor.detach()
    return {
        "edits": length,
        "scores": [result.checkpoints[-1].scores for result in results],
        "per_edit": [result.checkpoints[-1].per_edit for result in results],
        "seconds_per_edit": metrics.mean([result.seconds_per_edit for result in results]),
    }
