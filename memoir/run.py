"""Edit in sequence, evaluate ALL edits made so far at every checkpoint, return a Result with its provenance."""

from __future__ import annotations

import datetime
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from memoir import metrics
from memoir.editors.base import Editor
from memoir.models import LanguageModel, predicting
from memoir.records import Checkpoint, EditRequest, Result, RunInfo

# The score that each probe kind yields.
PROBE_SCORES = {
    "rephrase": "gen",
    "unrelated": "loc",
    "same_subject": "loc_same_subject",
    "same_template": "loc_same_template",
}
SCORES = ("rel", "gen", "loc", "avg", "ppl", "exact_match", "loc_same_subject", "loc_same_template")
PROTOCOL = {
    "evaluated": "all edits made so far, after the last of them",
    "rel, gen": "teacher-forced share of target tokens that are the argmax",
    "loc": "teacher-forced share of answer tokens whose argmax is the unedited model's",
    "avg": "mean of rel, gen and loc, of those that the data defines",
    "ppl": "mean over edits of exp(mean negative log-likelihood of the target's tokens)",
    "exact_match": "free greedy generation on the edit's prompt, natural stop, equal to the target",
}


def run_edits(
    editor: Editor,
    edits: Sequence[EditRequest],
    *,
    checkpoints: Iterable[int] | None = None,
    dataset: str | None = None,
    eval_batch_size: int = 32,
    progress: bool = True,
    generate: bool = True,
    cancelled: Callable[[], bool] | None = None,
) -> Result:
    """Make edits one after the other and evaluate at each checkpoint.

    checkpoints      numbers of edits after which all of them are evaluated; the last edit always is one
    dataset          name in the report; default: the edit set's own
    eval_batch_size  prompts evaluated together
    generate         also measure the exact match of free generation, which costs most of the evaluation
    """
    edits = list(edits) if not hasattr(edits, "name") else edits
    if not edits:
        raise ValueError("no edits to run, expected at least one")
    stops = sorted({*(checkpoints or ()), len(edits)})
    if stops[0] < 1 or stops[-1] > len(edits):
        raise ValueError(f"checkpoints {stops} do not fit {len(edits)} edits, expected 1 to {len(edits)}")
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    evaluation = Evaluation(editor, eval_batch_size, generate=generate, progress=progress)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reports, found, queue = [], [], iter(edits)
    for stop in stops:
        batch = list(islice(queue, stop - len(reports)))
        reports += editor.edit(batch, progress=progress, cancelled=cancelled)
        found.append(evaluation.checkpoint(list(edits[:stop])))
    return Result(
        info=run_info(editor, dataset or getattr(edits, "name", "custom"), len(edits), eval_batch_size, started),
        checkpoints=tuple(found),
        edit_ids=tuple(edit.id for edit in edits),
        seconds_per_edit=metrics.mean([r.seconds for r in reports]),
        peak_bytes=peak_bytes(),
        losses=tuple(r.loss_after for r in reports),
        conflicts=tuple({"edit_id": r.edit_id, "replaced": list(r.replaced)} for r in reports if r.replaced),
    )


class Evaluation:
    """Scores edits under an editor, against the unedited model's predictions, which it keeps."""

    def __init__(self, editor: Editor, batch_size: int = 32, *, generate: bool = True, progress: bool = False):
        self.editor, self.batch_size, self.generate, self.progress = editor, batch_size, generate, progress
        self._unedited: dict[tuple[str, str], Tensor] = {}

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
        forced = [(i, "rel", edit.prompt, edit.target) for i, edit in enumerate(edits)]
        forced += [(i, PROBE_SCORES[p.kind], p.prompt, p.answer) for i, edit in enumerate(edits) for p in edit.probes]
        local = [row for row in forced if row[1].startswith("loc") and row[2:] not in self._unedited]
        if local:
            with self.editor.detached():
                for row, answer in zip(local, self._forced(model, local, "unedited"), strict=True):
                    self._unedited[row[2:]] = answer.predicted
        for (i, name, *texts), answer in zip(forced, self._forced(model, forced, "evaluate"), strict=True):
            expected = self._unedited[tuple(texts)] if name.startswith("loc") else answer.tokens
            whole = torch.ones_like(answer.tokens, dtype=torch.bool)[None]
            scores[name][i] = metrics.token_match(answer.predicted[None], expected[None], whole)[0]
            if name == "rel":
                scores["ppl"][i] = metrics.perplexity(answer.log_likelihood[None], whole)[0]
        if self.generate:
            for i, text in enumerate(self._generated(model, edits)):
                scores["exact_match"][i] = metrics.exact_match(text, edits[i].target)
        return scores

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
