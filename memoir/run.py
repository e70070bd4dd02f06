"""Edit in sequence, evaluate ALL edits made so far at every checkpoint, return a Result with its provenance."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from memoir import metrics
from memoir.editors import make_editor
from memoir.editors.base import Editor
from memoir.editors.storage import MemoryFileError, holds_memory, read_memory
from memoir.models import LanguageModel, predicting
from memoir.records import Checkpoint, EditReport, EditRequest, Result, RunInfo

# The score that each probe kind yields.
PROBE_SCORES = {
    "rephrase": "gen",
    "unrelated": "loc",
    "same_subject": "loc_same_subject",
    "same_template": "loc_same_template",
}
SCORES = (
    "rel",
    "gen",
    "loc",
    "avg",
    "ppl",
    "exact_match",
    "loc_same_subject",
    "loc_same_template",
    "unrelated_ppl",
    "unrelated_ppl_unedited",
    "routing_recall",
    "routing_precision",
)
PROTOCOL = {
    "evaluated": "all edits made so far, after the last of them",
    "rel, gen": "teacher-forced share of target tokens that are the argmax",
    "loc": "teacher-forced share of answer tokens whose argmax is the unedited model's",
    "avg": "mean of rel, gen and loc, of those that the data defines",
    "ppl": "mean over edits of exp(mean negative log-likelihood of the target's tokens)",
    "exact_match": "free greedy generation on the edit's prompt, natural stop, equal to the target",
    "unrelated_ppl": "perplexity of the unrelated prompts' answers, beside the unedited model's",
    "routing_recall": "mean over edits of the share of edited and rephrased prompts that read the right edit",
    "routing_precision": "mean over edits: of the prompts that read any edit, the share that read the right one",
}


def run_edits(
    editor: Editor,
    edits: Iterable[EditRequest],
    *,
    checkpoints: Iterable[int] | None = None,
    dataset: str | None = None,
    eval_batch_size: int = 32,
    progress: bool = True,
    generate: bool = True,
    cancelled: Callable[[], bool] | None = None,
    save_to: str | os.PathLike | None = None,
    save_every: int = 500,
    save_seconds: float | None = None,
    settle_every: int = 50,
) -> Result:
    """Make edits one after the other and evaluate at each checkpoint, to the last of them.

    edits            a sequence, or an iterator that may never end, of which no more is read than is written next
                     (the editor's `batch_size`)
    checkpoints      numbers of edits after which all of them are evaluated; a sequence's last edit always is one. An
                     iterator of rising numbers, `itertools.count(1000, 1000)` say, may never end either: then the end
                     of the edits is the last checkpoint
    dataset          name in the report; default: the edit set's own
    eval_batch_size  prompts evaluated together
    generate         also measure the exact match of free generation, which costs most of the evaluation
    save_to          a folder that keeps the memory and the results so far, saved at every checkpoint, before and after
                     it is evaluated, and between them as below. Where it holds a run of these edits already, that run
                     goes on; called again with the same arguments it has the same outcome as if it had never stopped
    save_every       edits after which to save
    save_seconds     seconds since the last save after which to save too; None: the clock does not matter
    settle_every     edits from one look at that clock to the next: 1 where edits are slow to come. At each look MEMOIR
                     with `write="rls"` computes its ridge solution anew, as whoever goes on from the folder does
    """
    for name, number in (("save_every", save_every), ("settle_every", settle_every)):
        if number < 1:
            raise ValueError(f"{name} = {number} edits, expected at least 1")
    at_hand = isinstance(edits, Sequence)
    stops = _stops(checkpoints, len(edits) if at_hand else None)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    evaluation = Evaluation(editor, eval_batch_size, generate=generate, progress=progress)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    journal, queue = Journal(editor, save_to), iter(edits)
    stops = journal.resume(queue, stops)
    if not at_hand:
        queue = iter(tqdm(queue, desc=editor.name, unit="edit", initial=journal.made, disable=not progress))
    # Saving settles the editor, and where it settles its rounding depends on. So it settles at places that are fixed
    # beforehand, whether it is saved there or not: neither the clock nor a stop ever shows in what comes out.
    places = [] if save_to is None else [save_every] if save_seconds is None else [save_every, settle_every]
    for stop in stops:
        while journal.made < stop:
            rest = min([stop, *(journal.made // every * every + every for every in places)])
            # What is at hand goes to the editor in one piece, as it computes ahead; what is yet to come does not wait.
            size = rest - journal.made if at_hand else min(rest - journal.made, editor.config.batch_size)
            batch = list(islice(queue, size))
            if not batch:
                break
            journal.add(batch, editor.edit(batch, progress=progress and at_hand, cancelled=cancelled))
            if journal.made == rest < stop:
                editor.settle()
                if rest % save_every == 0 or journal.unsaved_seconds >= save_seconds:
                    journal.save()
        ended = journal.made < stop
        if ended and (not journal.made or not isinstance(checkpoints, Iterator)):
            raise ValueError(f"the stream ended after {journal.made} edits, expected {stop}")
        if journal.made not in journal.evaluated:
            journal.save()  # first, as an evaluation may take long
            journal.checkpoints.append(evaluation.checkpoint(journal.edits))
            journal.save()
        if ended:
            break
    return Result(
        info=run_info(editor, dataset or getattr(edits, "name", "custom"), journal.made, eval_batch_size, started),
        checkpoints=tuple(journal.checkpoints),
        edit_ids=tuple(edit.id for edit in journal.edits),
        seconds_per_edit=metrics.mean(journal.seconds),
        peak_bytes=peak_bytes(),
        losses=tuple(journal.losses),
        conflicts=tuple(journal.conflicts),
    )


def _stops(checkpoints: Iterable[int] | None, count: int | None) -> Iterator[int]:
    """Where to evaluate, rising, of `count` edits (None: nobody knows how many)."""
    if count == 0:
        raise ValueError("no edits to run, expected at least one")
    if isinstance(checkpoints, Iterator):
        stops = _rising(checkpoints)
        return stops if count is None else chain(takewhile(lambda stop: stop < count, stops), [count])
    stops = sorted({*(checkpoints or ()), *([] if count is None else [count])})
    if not stops or stops[0] < 1:
        raise ValueError(f"checkpoints {stops} are no numbers of edits, expected 1 or more of a stream's edits")
    if count is not None and stops[-1] > count:
        raise ValueError(f"checkpoints {stops} do not fit {count} edits, expected 1 to {count}")
    return iter(stops)


def _rising(numbers: Iterator[int]) -> Iterator[int]:
    before = 0
    for number in numbers:
        if number <= before:
            raise ValueError(f"checkpoint {number} comes after {before}, expected rising numbers from 1 on")
        yield number
        before = number


class Journal:
    """What a run has made so far, and the folder that keeps it: a memory file whose header holds the rest.

    edits  in the order in which they were made, those that were replaced since included
    """

    def __init__(self, editor: Editor, folder: str | os.PathLike | None):
        """Read what the folder holds, if anything; `resume` goes on from it."""
        self.editor, self.folder = editor, folder
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

    @property
    def unsaved_seconds(self) -> float:
        return time.monotonic() - self._saved_at

    def resume(self, stream: Iterator[EditRequest], stops: Iterator[int]) -> Iterator[int]:
        """Read the stream past the edits made so far, and give this fresh editor their memory; returns the stops ahead.

        MemoryFileError, and the editor stays fresh, where what was made is not how this stream with these stops begins.
        """
        if not self.made:
            return stops
        number = 0
        for number, (own, other) in enumerate(zip(self.edits, stream), 1):  # noqa: B905 - a stream goes on
            if (own.id, own.prompt, own.target) != (other.id, other.prompt, other.target):
                raise MemoryFileError(
                    f"{self.folder} holds a run of other edits: its edit {number} is {_named(own)}, this stream's "
                    f"{_named(other)}; expected the same stream from its first edit on, or a new folder"
                )
        if number < self.made:
            raise MemoryFileError(
                f"{self.folder} holds a run of {self.made} edits, and the stream ended after {number}; expected the "
                "same stream, or a new folder"
            )
        last, evaluated = 0, self.evaluated
        for last in stops:
            if last in evaluated:
                continue
            if last < self.made:
                raise MemoryFileError(
                    f"{self.folder} holds a run of {self.made} edits without checkpoint {last}; expected checkpoints "
                    f"from {self.made} on besides {sorted(evaluated)}, or a new folder"
                )
            stops = chain([last], stops)
            break
        if last < self.made:
            raise MemoryFileError(
                f"{self.folder} holds a run of {self.made} edits, but the last checkpoint is {last}; expected one from "
                f"{self.made} on, or a new folder"
            )
        self.editor.resume(self.folder)
        return stops

    def add(self, edits: Sequence[EditRequest], reports: Sequence[EditReport]) -> None:
        self.edits += edits
        self.seconds += [report.seconds for report in reports]
        self.losses += [report.loss_after for report in reports]
        self.conflicts += [
            {"edit_id": r.edit_id, "with": list(r.conflicts), "replaced": list(r.replaced)}
            for r in reports
            if r.conflicts
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


def _named(edit: EditRequest) -> str:
    return f"{edit.id!r} ({edit.prompt[:60]!r} → {edit.target[:60]!r})"


def run_separately(
    method: str, model: LanguageModel, edit_sets: Iterable[Sequence[EditRequest]], **overrides: Any
) -> dict[str, Any]:
    """Several short sequences of the same length, each on a fresh editor: scores after one edit, or ten, are mostly
    chance, their means over many runs are not.

    Returns {"edits": length, "scores": those of each run, "per_edit": those of each run's edits, "seconds_per_edit":
    mean over the runs}.
    """
    results = []
    for edits in edit_sets:
        known = {"seed": edits.seed, "dataset": edits.name} if hasattr(edits, "seed") else {}
        editor = make_editor(method, model, **{**known, **overrides})
        results.append(run_edits(editor, edits, progress=False))
        editor.detach()
    return {
        "edits": results[0].info.edits,
        "scores": [result.checkpoints[-1].scores for result in results],
        "per_edit": [result.checkpoints[-1].per_edit for result in results],
        "seconds_per_edit": metrics.mean([result.seconds_per_edit for result in results]),
    }


class Evaluation:
    """Scores edits under an editor, against the unedited model's predictions, which it keeps."""

    def __init__(self, editor: Editor, batch_size: int = 32, *, generate: bool = True, progress: bool = False):
        self.editor, self.batch_size, self.generate, self.progress = editor, batch_size, generate, progress
        self._unedited: dict[tuple[str, str], Answer] = {}

    def checkpoint(self, edits: Sequence[EditRequest]) -> Checkpoint:
        """All scores of all these edits."""
        per_edit = self.scores(edits)
        means = {name: metrics.mean(per_edit[name]) for name in per_edit if name != "avg"}
        means["avg"] = metrics.average(means["rel"], means["gen"], means["loc"])
        return Checkpoint(edits=len(edits), scores={name: means[name] for name in SCORES}, per_edit=per_edit)

    def scores(self, edits: Sequence[EditRequest]) -> dict[str, list[float | None]]:
        """Score name → one value per edit; None where an edit has no such probe."""
        model = self.editor.model
        scores: dict[str, list[float | None]] = {name: [None] * len(edits) for name in SCORES if name != "avg"}
        self._score_routing(edits, scores)
        forced = [(i, "rel", edit.prompt, edit.target) for i, edit in enumerate(edits)]
        forced += [(i, PROBE_SCORES[p.kind], p.prompt, p.answer) for i, edit in enumerate(edits) for p in edit.probes]
        local = [row for row in forced if row[1].startswith("loc") and row[2:] not in self._unedited]
        if local:
            with self.editor.detached():
                for row, answer in zip(local, self._forced(model, local, "unedited"), strict=True):
                    self._unedited[row[2:]] = answer
        for (i, name, *texts), answer in zip(forced, self._forced(model, forced, "evaluate"), strict=True):
            unedited = self._unedited.get(tuple(texts))
            scores[name][i] = answer.match(unedited.predicted if name.startswith("loc") else answer.tokens)
            if name == "rel":
                scores["ppl"][i] = answer.perplexity
            elif name == "loc":
                scores["unrelated_ppl"][i] = answer.perplexity
                scores["unrelated_ppl_unedited"][i] = unedited.perplexity
        if self.generate:
            for i, text in enumerate(self._generated(model, edits)):
                scores["exact_match"][i] = metrics.exact_match(text, edits[i].target)
        return scores

    def _score_routing(self, edits: Sequence[EditRequest], scores: dict[str, list[float | None]]) -> None:
        """Which edit each prompt reads, where the method says so, against which it should read."""
        asked = [(i, edit.prompt, edit.id) for i, edit in enumerate(edits)]
        asked += [
            (i, probe.prompt, edit.id if probe.kind == "rephrase" else None)
            for i, edit in enumerate(edits)
            for probe in edit.probes
        ]
        read = self.editor.matches([prompt for _, prompt, _ in asked])
        if read is None:
            return
        recalled: list[list[float]] = [[] for _ in edits]
        precise: list[list[float]] = [[] for _ in edits]
        for (i, _, right), found in zip(asked, read, strict=True):
            if right is not None:
                recalled[i].append(float(found == right))
            if found is not None:
                precise[i].append(float(found == right))
        scores["routing_recall"][:] = map(metrics.mean, recalled)
        scores["routing_precision"][:] = map(metrics.mean, precise)

    @torch.no_grad()
    def _forced(self, model: LanguageModel, rows: list[tuple], what: str) -> list[Answer]:
        """Teacher-forced predictions of each row's answer, rows (…, prompt, answer)."""
        answers: list[Answer | None] = [None] * len(rows)
        for chunk in self._buckets([f"{row[-2]} {row[-1]}" for row in rows], what):
            batch = model.encode([rows[i][-2] for i in chunk], [rows[i][-1] for i in chunk])
            # Rows are padded on the left, so answers stand at the end: the head need not see more.
            tail = int(batch.target_mask.sum(1).max()) + 1
            logits = model.forward(batch, positions=tail).float()
            target = batch.target_mask[:, -tail:]
            tokens = batch.input_ids[:, -tail:]
            places = predicting(target)
            for j, i in enumerate(chunk):
                own, expected = logits[j, places[j]], tokens[j, target[j]]
                likelihood = own.log_softmax(-1).gather(-1, expected[:, None])[:, 0]
                answers[i] = Answer(expected.cpu(), own.argmax(-1).cpu(), likelihood.cpu())
        return answers

    def _generated(self, model: LanguageModel, edits: Sequence[EditRequest]) -> list[str]:
        texts = [""] * len(edits)
        for chunk in self._buckets([f"{edit.prompt} {edit.target}" for edit in edits], "generate"):
            targets = [edits[i].target for i in chunk]
            longest = max(len(model.tokenizer(f" {t}", add_special_tokens=False)["input_ids"]) for t in targets)
            # A few tokens more than the longest target: whoever does not stop by itself then shows it.
            answers = model.generate([edits[i].prompt for i in chunk], max_new_tokens=longest + 4)
            for i, text in zip(chunk, answers, strict=True):
                texts[i] = text
        return texts

    def _buckets(self, texts: list[str], what: str) -> Iterable[list[int]]:
        """Row numbers in batches of similar length, so that little is spent on padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=what, unit="batch", leave=False, disable=not self.progress):
            yield order[start : start + self.batch_size]


class Answer:
    """One answer's n tokens: what they are, what was predicted (n,) int64, their log-likelihoods (n,) in nats."""

    def __init__(self, tokens: Tensor, predicted: Tensor, log_likelihood: Tensor):
        self.tokens, self.predicted, self.log_likelihood = tokens, predicted, log_likelihood
        self._whole = torch.ones(1, len(tokens), dtype=torch.bool)

    def match(self, expected: Tensor) -> float:
        """Share of the tokens whose prediction is the expected one, (n,) int64."""
        return metrics.token_match(self.predicted[None], expected[None], self._whole)[0]

    @property
    def perplexity(self) -> float:
        return metrics.perplexity(self.log_likelihood[None], self._whole)[0]


# Provenance ----------------------------------------------------------------------------------------------------------


def run_info(editor: Editor, dataset: str, edits: int, eval_batch_size: int, started: str) -> RunInfo:
    """Where this run's numbers come from."""
    commit, dirty = _commit()
    return RunInfo(
        method=editor.name,
        model=editor.model.name,
        model_fingerprint=editor.model.fingerprint,
        dataset=dataset,
        edits=edits,
        seed=editor.config.seed,
        dtype=str(editor.model.dtype).removeprefix("torch."),
        device=str(editor.model.device),
        config=asdict(editor.config),
        protocol={**PROTOCOL, "eval_batch_size": eval_batch_size, "edit_batch_size": editor.config.batch_size},
        commit=commit,
        dirty=dirty,
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("memoir", "torch", "transformers", "numpy")},
        },
        started=started,
    )


def peak_bytes() -> int:
    """Most memory in use so far: on the GPU where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _commit() -> tuple[str, bool | None]:
    """The commit that this code stands at and whether it was changed since; ("unknown", None) outside a checkout."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
