"""The scores of edits: what an edited model answers to their prompts and probes, beside the unedited model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from memoir import almanac, metrics
from memoir.editors.base import Editor
from memoir.models import LanguageModel
from memoir.presets import known_model
from memoir.records import Checkpoint, EditRequest
from memoir.text import predicting, similar_lengths
from memoir.texts import passages

# The score that each probe kind yields.
PROBE_SCORES = {
    "rephrase": "gen",
    "unrelated": "loc",
    "same_subject": "loc_same_subject",
    "same_template": "loc_same_template",
}
# Every score, and its heading in tables.
SCORES = {
    "rel": "Rel.",
    "gen": "Gen.",
    "loc": "Loc.",
    "avg": "Avg.",
    "ppl": "Perplexity",
    "generated": "Generated",
    "begins": "Begins",
    "exact_match": "Exact match",
    "loc_same_subject": "Loc., same subject",
    "loc_same_template": "Loc., same template",
    "routing_recall": "Routing recall",
    "routing_precision": "Routing precision",
    "text_ppl_unedited": "Perplexity of plain text: before",
    "text_ppl": "Perplexity of plain text: after",
    "known": "Known before",
}
WHOLE = ("avg", "text_ppl", "text_ppl_unedited")  # scores of the whole model: there is no value for a single edit
FREE = {"generated": metrics.generated, "begins": metrics.begins, "exact_match": metrics.exact_match}  # of free answers
TEXTS_AT_ONCE = 4  # a passage is long, and its logits are as wide as the vocabulary
Values = dict[str, list[list[float]]]  # score → for each edit, one value per prompt that the score is taken on


class Question(NamedTuple):
    """A prompt with the answer that it is scored on: of which edit (its number), for which score."""

    edit: int
    score: str
    prompt: str
    answer: str


class Answer(NamedTuple):
    """What a model predicts for an answer's n tokens under teacher forcing.

    tokens, predicted  (n,) int64: the answer's tokens, and those that the model puts highest
    log_likelihood     (n,) of the answer's tokens, in nats
    """

    tokens: Tensor
    predicted: Tensor
    log_likelihood: Tensor


class Evaluation:
    """Scores edits under an editor. It keeps the unedited model's predictions from one call to the next."""

    def __init__(
        self,
        editor: Editor,
        batch_size: int = 32,
        *,
        generate: bool = True,
        progress: bool = False,
        texts: Sequence[str] | None = None,
    ):
        """
        generate  also score free answers
        texts     passages of several sentences, for `text_ppl`; default: ordinary passages that the model can read
        """
        self.editor, self.batch_size, self.generate, self.progress = editor, batch_size, generate, progress
        self._texts = continuations(editor.model, passages_for(editor.model) if texts is None else texts)
        self._unedited: dict[tuple[str, str], Answer] = {}

    @property
    def terms(self) -> dict[str, Any]:
        """What the scores depend on beside editor and edits, JSON."""
        digest = hashlib.sha256("\0".join(text.prompt + text.answer for text in self._texts).encode()).hexdigest()
        return {"eval_batch_size": self.batch_size, "generate": self.generate, "texts": digest}

    def checkpoint(self, edits: Sequence[EditRequest]) -> Checkpoint:
        """All scores of all these edits."""
        per_edit = self.scores(edits)
        means = {name: metrics.mean(per_edit[name]) for name in per_edit}
        means["avg"] = metrics.average(means["rel"], means["gen"], means["loc"])
        means["text_ppl"], means["text_ppl_unedited"] = self._text_perplexity(), self._unedited_text_perplexity
        return Checkpoint(edits=len(edits), scores={name: means[name] for name in SCORES}, per_edit=per_edit)

    def scores(self, edits: Sequence[EditRequest]) -> dict[str, list[float | None]]:
        """Score name → one value per edit, the mean over its probes of that kind; None where it has none."""
        values: Values = {name: [[] for _ in edits] for name in SCORES if name not in WHOLE}
        self._score_routing(edits, values)
        questions = [Question(i, "rel", edit.prompt, edit.target) for i, edit in enumerate(edits)]
        for i, edit in enumerate(edits):
            questions += [Question(i, PROBE_SCORES[p.kind], p.prompt, p.answer) for p in edit.probes]
        known = [Question(i, "known", edit.prompt, edit.truth) for i, edit in enumerate(edits) if edit.truth]
        self._ask_unedited([*questions, *known])
        for i, score, *asked in known:  # of the unedited model, whether its whole greedy answer is the true one
            before = self._unedited[tuple(asked)]
            values[score][i].append(float(metrics.token_match(before.predicted, before.tokens) == 1))
        for question, answer in zip(questions, self._answers(questions, "evaluate"), strict=True):
            i, score = question.edit, question.score
            unedited = self._unedited.get((question.prompt, question.answer))
            expected = unedited.predicted if score.startswith("loc") else answer.tokens
            values[score][i].append(metrics.token_match(answer.predicted, expected))
            if score == "rel":
                values["ppl"][i].append(metrics.perplexity(answer.log_likelihood))
        if self.generate:
            self._score_free_answers(edits, values)
        return {name: [metrics.mean(each) for each in per_edit] for name, per_edit in values.items()}

    def _ask_unedited(self, questions: Sequence[Question]) -> None:
        """Remember what the unedited model predicts where locality is scored, and where an edit's truth is known."""
        asked = [q for q in questions if q.score.startswith(("loc", "known"))]
        local = [q for q in asked if (q.prompt, q.answer) not in self._unedited]
        if local:
            with self.editor.detached():
                for question, answer in zip(local, self._answers(local, "unedited"), strict=True):
                    self._unedited[question.prompt, question.answer] = answer

    def _score_routing(self, edits: Sequence[EditRequest], values: Values) -> None:
        """Compare the edit that each prompt reads with the one that it should read, where the method routes."""
        asked = [(i, edit.prompt, edit.id) for i, edit in enumerate(edits)]
        for i, edit in enumerate(edits):
            asked += [(i, probe.prompt, edit.id if probe.kind == "rephrase" else None) for probe in edit.probes]
        read = self.editor.matches([prompt for _, prompt, _ in asked])
        for (i, _, right), edit_id in zip(asked, read or (), strict=read is not None):
            if right is not None:
                values["routing_recall"][i].append(float(edit_id == right))
            if edit_id is not None:
                values["routing_precision"][i].append(float(edit_id == right))

    def _answers(self, questions: Sequence[Question], title: str, size: int | None = None) -> list[Answer]:
        """Teacher-forced predictions of each question's answer, `size` questions at a time."""
        answers: dict[int, Answer] = {}
        pairs = [(question.prompt, question.answer) for question in questions]
        chunks = self._chunks([" ".join(pair) for pair in pairs], title, size)
        for i, tokens, logits in answer_logits(self.editor.model, pairs, chunks):
            likelihood = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            answers[i] = Answer(tokens.cpu(), logits.argmax(-1).cpu(), likelihood.cpu())
        return [answers[i] for i in range(len(questions))]

    def _score_free_answers(self, edits: Sequence[EditRequest], values: Values) -> None:
        """Compare what the model generates on each edit's prompt with the target."""
        for chunk in self._chunks([f"{edit.prompt} {edit.target}" for edit in edits], "generate"):
            for i, answer in zip(chunk, self.editor.free_answers([edits[i] for i in chunk]), strict=True):
                for name, score in FREE.items():
                    values[name][i].append(score(answer, edits[i].target))

    def _text_perplexity(self) -> float | None:
        """Perplexity of all passages' tokens together, as the model is now; None without passages."""
        if not self._texts:
            return None
        answers = self._answers(self._texts, "texts", TEXTS_AT_ONCE)
        return metrics.perplexity(torch.cat([answer.log_likelihood for answer in answers]))

    @cached_property
    def _unedited_text_perplexity(self) -> float | None:
        with self.editor.detached():
            return self._text_perplexity()

    def _chunks(self, texts: Sequence[str], title: str, size: int | None = None) -> Iterable[list[int]]:
        chunks = list(similar_lengths(texts, size or self.batch_size))
        return tqdm(chunks, desc=title, unit="batch", leave=False, disable=not self.progress)


@torch.no_grad()
def answer_logits(
    model: LanguageModel, pairs: Sequence[tuple[str, str]], chunks: Iterable[Sequence[int]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each prompt and its answer under teacher forcing, as chunks of their numbers give the batches: the pair's
    number, the answer's tokens (n,) int64, and the logits (n × V) float32 that predict them."""
    for chunk in chunks:
        prompts, answers = zip(*(pairs[i] for i in chunk), strict=True)
        batch = model.encode(prompts, answers)
        # Rows are padded on the left, so all answers end in the last column: the head sees no more than these.
        width = int(batch.target_mask.sum(1).max()) + 1
        logits = model.forward(batch, positions=width).float()
        target, tokens = batch.target_mask[:, -width:], batch.input_ids[:, -width:]
        before = predicting(target)
        for row, i in enumerate(chunk):
            yield i, tokens[row, target[row]], logits[row, before[row]]


def passages_for(model: LanguageModel) -> list[str]:
    """Passages in the language that a model has learned: ordinary English, or the almanac's own passages."""
    return almanac.passages() if known_model(model) == "almanac" else passages()


def continuations(model: LanguageModel, texts: Sequence[str]) -> list[Question]:
    """Each text as a question: its first sentence is the prompt, and the rest is the answer. So an edit that is read at
    the beginning shows in the rest. Texts of one sentence, or too long for the model's context, are left out."""
    questions = []
    for number, text in enumerate(texts):
        first, _, rest = text.partition(". ")
        if rest and len(model.tokenizer(text)["input_ids"]) < model.context_length:
            questions.append(Question(number, "text_ppl", f"{first}.", rest))
    return questions
