"""Edit in sequence, evaluate ALL edits made so far at every checkpoint, and save so that a run can go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, islice, takewhile
from typing import Any

import torch
from tqdm import tqdm

from memoir import metrics
from memoir.editors import make_editor
from memoir.editors.base import Editor
from memoir.editors.storage import MemoryFileError, holds_memory, read_memory
from memoir.evaluation import Evaluation
from memoir.models import LanguageModel
from memoir.provenance import peak_bytes, run_info
from memoir.records import REMEDY, BadInput, Checkpoint, EditReport, EditRequest, Result, RunInfo, listed


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
    settle_every: int = 50,
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
    save_to          a folder for the memory and the results so far, saved before and after each evaluation, and in
                     between as set below. If the folder already holds a run of these edits, that run goes on: called
                     again with the same arguments, a stopped run ends as if it had never stopped
    save_every       save after so many edits
    save_seconds     also save when so many seconds have passed since the last save; None: the clock does not matter
    settle_every     edits between two looks at that clock: 1 if edits are slow
    skip_bad         leave out the edits of a sequence that cannot be made, and tell of them in the result's `skipped`

    BadInput names all edits of a sequence that cannot be made, up to ten, before the first one is made.
    """
    journal = Journal(editor, save_to, save_every=save_every, save_seconds=save_seconds, settle_every=settle_every)
    complete = isinstance(edits, Sequence)
    info = run_info(editor, dataset or getattr(edits, "name", "custom"), 0, eval_batch_size)
    skipped: tuple[str, ...] = getattr(edits, "skipped", ())
    if complete:
        edits, refused = check_edits(editor, edits, skip_bad)
        skipped += tuple(refused)
    stops = _stops(checkpoints, len(edits) if complete else None)
    evaluation = Evaluation(editor, eval_batch_size, generate=generate, progress=progress, texts=texts)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    queue = iter(edits)
    stops = journal.resume(queue, stops)
    if not complete:
        queue = iter(tqdm(queue, desc=editor.name, unit="edit", initial=journal.made, disable=not progress))
    for stop in stops:
        while journal.made < stop:
            pause = journal.next_pause(stop)
            # A sequence is handed over whole, because the editor runs prompts ahead; a stream is not waited for.
            size = pause - journal.made if complete else min(pause - journal.made, editor.config.batch_size)
            batch = list(islice(queue, size))
            if not batch:
                break
            # The evaluation asks all edits, so nothing is asked here.
            reports = editor.edit(batch, progress=progress and complete, cancelled=cancelled, check=False)
            journal.add(batch, reports)
            if journal.made == pause < stop:
                journal.pause()
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
    check = getattr(editor, "check", lambda edit: None)
    places = getattr(edits, "places", ())
    for number, edit in enumerate(edits):
        try:
            texts = [(edit.prompt, edit.target), *((probe.prompt, probe.answer) for probe in edit.probes)]
            editor.model.encoder.rows(*zip(*texts, strict=True))
            check(edit)
            good.append(edit)
        except ValueError as error:
            problems.append(f"{places[number] if places else f'edit {number}'}, {_named(edit)}: {error}")
    if problems and not (skip_bad and good):
        raise BadInput(f"{len(problems)} of {len(edits)} edits cannot be made: {listed(problems)}\n{REMEDY}")
    return (good if problems else edits), problems


def _stops(checkpoints: Iterable[int] | None, count: int | None) -> Iterator[int]:
    """Where to evaluate, rising, of `count` edits (None: an unknown number)."""
    if count == 0:
        raise BadInput("no edits to run, expected at least one")
    if isinstance(checkpoints, Iterator):
        stops = _rising(checkpoints)
        return stops if count is None else chain(takewhile(lambda stop: stop < count, stops), [count])
    stops = sorted({*(checkpoints or ()), *([] if count is None else [count])})
    if not stops or stops[0] < 1:
        raise BadInput(f"checkpoints {stops} are no numbers of edits, expected 1 or more of a stream's edits")
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
    """What a run has made so far, and the folder that keeps it: a memory file whose header holds the rest.

    Saving settles the editor (MEMOIR's ridge solution is computed anew), which changes rounding. So a run that saves
    settles at fixed numbers of edits, whether or not it saves there: neither the clock nor a kill changes the results.

    edits  in the order in which they were made, including those that a later edit replaced
    """

    def __init__(
        self,
        editor: Editor,
        folder: str | os.PathLike | None,
        *,
        save_every: int,
        save_seconds: float | None,
        settle_every: int,
    ):
        """Read what the folder holds, if anything; `resume` goes on from there."""
        for name, number in (("save_every", save_every), ("settle_every", settle_every)):
            if number < 1:
                raise ValueError(f"{name} = {number} edits, expected at least 1")
        self.editor, self.folder = editor, folder
        self.save_every, self.save_seconds, self.settle_every = save_every, save_seconds, settle_every
        self.edits: list[EditRequest] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.conflicts: list[dict[str, Any]] = []
        self.checkpoints: list[Checkpoint] = []
        self._saved_at = time.monotonic()
        if folder is not None and holds_memory(folder):
            header, _, _ = read_memory(folder)
            if "run" not in header:
                raise MemoryFileError(f"{folder} holds a memory but no run; expected a folder of a run, or a new one")
            run = header["run"]
            self.edits = [EditRequest.from_json(edit) for edit in run["edits"]]
            self.seconds, self.losses, self.conflicts = run["seconds"], run["losses"], run["conflicts"]
            self.checkpoints = [Checkpoint(**checkpoint) for checkpoint in run["checkpoints"]]

    @property
    def made(self) -> int:
        return len(self.edits)

    @property
    def evaluated(self) -> set[int]:
        return {checkpoint.edits for checkpoint in self.checkpoints}

    def next_pause(self, stop: int) -> int:
        """The number of edits after which the editor next settles; `stop` if that comes first."""
        if self.folder is None:
            return stop
        periods = [self.save_every] if self.save_seconds is None else [self.save_every, self.settle_every]
        return min([stop, *(self.made // period * period + period for period in periods)])

    def pause(self) -> None:
        """Settle the editor, and save where that is due."""
        self.editor.settle()
        if self.made % self.save_every == 0 or time.monotonic() - self._saved_at >= self.save_seconds:
            self.save()

    def resume(self, stream: Iterator[EditRequest], stops: Iterator[int]) -> Iterator[int]:
        """Read the stream past the edits made so far, give this fresh editor their memory, and return the stops ahead.

        MemoryFileError, and the editor stays fresh, where this stream with these stops does not begin as the saved run.
        """
        if not self.made:
            return stops
        number = 0
        for number, (saved, edit) in enumerate(zip(self.edits, stream), 1):  # noqa: B905 - a stream goes on
            if (saved.id, saved.prompt, saved.target) != (edit.id, edit.prompt, edit.target):
                raise self._other(
                    f"of other edits: its edit {number} is {_named(saved)}, this stream's {_named(edit)}",
                    "the same stream from its first edit on",
                )
        if number < self.made:
            raise self._other(f"of {self.made} edits, and the stream ended after {number}", "the same stream")
        stop = 0
        for stop in stops:
            if stop not in self.evaluated:
                break
        if stop < self.made and stop not in self.evaluated:
            raise self._other(
                f"of {self.made} edits without checkpoint {stop}",
                f"checkpoints from {self.made} on besides {sorted(self.evaluated)}",
            )
        if stop < self.made:
            raise self._other(
                f"of {self.made} edits, but the last checkpoint is {stop}", f"a checkpoint from {self.made} on"
            )
        self.editor.resume(self.folder)
        return chain([stop], stops)

    def _other(self, holds: str, expected: str) -> MemoryFileError:
        return MemoryFileError(f"{self.folder} holds a run {holds}; expected {expected}, or a new folder")

    def add(self, edits: Sequence[EditRequest], reports: Sequence[EditReport]) -> None:
        self.edits += edits
        self.seconds += [report.seconds for report in reports]
        self.losses += [report.loss_after for report in reports]
        self.conflicts += [
            {"edit_id": r.edit_id, "with": list(r.conflicts), "replaced": list(r.replaced)}
            for r in reports
            if r.conflicts or r.replaced
        ]

    def save(self) -> None:
        """Write the folder, if there is one."""
        if self.folder is None:
            return
        run = {
            "edits": [edit.to_json() for edit in self.edits],
            "seconds": self.seconds,
            "losses": self.losses,
            "conflicts": self.conflicts,
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
        }
        self.editor.save(self.folder, run=run)
        self._saved_at = time.monotonic()

    def result(self, info: RunInfo) -> Result:
        return Result(
            info=info,
            checkpoints=tuple(self.checkpoints),
            edit_ids=tuple(edit.id for edit in self.edits),
            seconds_per_edit=metrics.mean(self.seconds),
            peak_bytes=peak_bytes(),
            losses=tuple(self.losses),
            conflicts=tuple(self.conflicts),
            tau=self.editor.tau,
        )


def _named(edit: EditRequest) -> str:
    return f"{edit.id!r} ({edit.prompt[:60]!r} → {edit.target[:60]!r})"


def run_separately(
    method: str, model: LanguageModel, edit_sets: Iterable[Sequence[EditRequest]], **overrides: Any
) -> dict[str, Any]:
    """Several short sequences of the same length, each on a fresh editor: the scores after one edit, or ten, are mostly
    chance, but their means over many runs are not.

    Returns {"edits": length, "scores": the scores of each run, "per_edit": the scores of each run's edits,
    "seconds_per_edit": mean over the runs}.
    """
    results = []
    for edits in edit_sets:
        origin = {"seed": edits.seed, "dataset": edits.name} if hasattr(edits, "seed") else {}
        editor = make_editor(method, model, **{**origin, **overrides})
        results.append(run_edits(editor, edits, progress=False, texts=()))  # a few edits do not show in passages
        editor.detach()
    return {
        "edits": results[0].info.edits,
        "scores": [result.checkpoints[-1].scores for result in results],
        "per_edit": [result.checkpoints[-1].per_edit for result in results],
        "seconds_per_edit": metrics.mean([result.seconds_per_edit for result in results]),
    }
