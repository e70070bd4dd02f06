"""What an edit set itself makes impossible, or gives away: `audit(edits)`, to be read beside any table of results."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from memoir.editors import make_editor
from memoir.evaluation import Evaluation
from memoir.metrics import mean, normalised
from memoir.models import LanguageModel
from memoir.records import EditRequest


@dataclass(frozen=True)
class Audit:
    """Counts over a set of edits; targets are compared without case, leading article and final punctuation.

    subjects                distinct subjects
    repeated_subjects       subjects of several edits; `on_repeated_subjects` edits stand on them
    contradicting_subjects  of these, those whose edits have different targets although no true answers tell the edits
                            apart. Some may ask different things of the subject
    contradicting_wordings  subjects and questions with different targets, where the set words the questions alike
    ceiling                 (low, high): the best generalization, in whole answers, of an oracle that stores every edit
                            but has one answer for each question: the most frequent target. For the low end all edits
                            of a subject (with the same true answer, if given) ask one question; for the high end only
                            those whose wordings the set itself links: one is a rephrase of the other, for whatever
                            subject, or both of a third. None without rephrases
    spaces                  edits with a text that begins or ends with white space
    no_rephrase, no_locality  edits without such a probe
    edited_localities       edits with a locality probe that asks what an edit of the set changes
    already_answered        edits whose target the model gives unedited; None without a model
    known                   share of the edits whose true answer the model gives; None without a model or true answers
    """

    edits: int
    subjects: int
    repeated_subjects: int
    on_repeated_subjects: int
    contradicting_subjects: int
    contradicting_wordings: int
    ceiling: tuple[float, float] | None
    spaces: int
    no_rephrase: int
    no_locality: int
    edited_localities: int
    already_answered: int | None = None
    known: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Audit:
        return cls(**{**data, "ceiling": tuple(data["ceiling"]) if data["ceiling"] else None})

    @property
    def ceiling_text(self) -> str:
        """The ceiling as one number, or as two where they differ; "–" without one."""
        return "–".join(dict.fromkeys(f"{end:.2f}" for end in self.ceiling or ())) or "–"

    def lines(self) -> list[str]:
        """What was found, one sentence each; nothing about what is as it should be."""
        found = [f"Edits: {self.edits:,}. Subjects: {self.subjects:,}."]
        if self.repeated_subjects:
            found[0] += f" Edits that share their subject with another one: {self.on_repeated_subjects:,}."
        if self.ceiling and self.ceiling[0] < 1:
            found.append(
                f"Subjects whose edits have different targets: {self.contradicting_subjects:,} of the "
                f"{self.repeated_subjects:,} with several edits. The set itself words their questions alike "
                f"{self.contradicting_wordings:,} times. An oracle that stores every edit, but has one answer for each "
                f"question, would generalize to {self.ceiling_text}."
            )
        for count, what in (
            (self.already_answered, "Edits whose target the unedited model answers already"),
            (self.spaces, "Edits with a text that begins or ends with white space"),
            (self.no_rephrase, "Edits without a rephrased prompt"),
            (self.no_locality, "Edits without a locality prompt"),
            (self.edited_localities, "Edits with a locality prompt that asks what another edit changes"),
        ):
            if count:
                found.append(f"{what}: {count:,}.")
        if self.known is not None:
            found.append(f"The unedited model knows {self.known:.0%} of the true answers.")
        return found


def audit(edits: Sequence[EditRequest], model: LanguageModel | None = None) -> Audit:
    """Audit a set of edits. With a model, also ask it for the targets and the true answers, teacher-forced."""
    subjects = [edit.subject.casefold().strip() or edit.question for edit in edits]
    counts, targets = Counter(subjects), [normalised(edit.target) for edit in edits]
    told_apart = [(subject, normalised(edit.truth)) for subject, edit in zip(subjects, edits, strict=True)]
    low = _groups(told_apart, targets)
    high = _groups(list(zip(told_apart, _wordings(edits), strict=True)), targets)
    changed = {edit.question for edit in edits} | {
        _question(probe.prompt) for edit in edits for probe in _rephrases(edit)
    }
    asked = {} if model is None else _ask(edits, model)
    return Audit(
        edits=len(edits),
        subjects=len(counts),
        repeated_subjects=sum(count > 1 for count in counts.values()),
        on_repeated_subjects=sum(count for count in counts.values() if count > 1),
        contradicting_subjects=len({subject for (subject, _), answers in low.items() if len(answers) > 1}),
        contradicting_wordings=sum(len(answers) > 1 for answers in high.values()),
        ceiling=(_ceiling(low), _ceiling(high)) if any(map(_rephrases, edits)) else None,
        spaces=sum(any(text != text.strip() for text in _texts(edit)) for edit in edits),
        no_rephrase=sum(not _rephrases(edit) for edit in edits),
        no_locality=sum(len(_rephrases(edit)) == len(edit.probes) for edit in edits),
        edited_localities=sum(
            any(probe.kind != "rephrase" and _question(probe.prompt) in changed for probe in edit.probes)
            for edit in edits
        ),
        **asked,
    )


def _ask(edits: Sequence[EditRequest], model: LanguageModel) -> dict[str, Any]:
    bare = [replace(edit, probes=()) for edit in edits]
    with model.lent():
        scores = Evaluation(make_editor("unedited", model), generate=False, texts=()).scores(bare)
    return {"already_answered": sum(share == 1 for share in scores["rel"]), "known": mean(scores["known"])}


def _groups(keys: Sequence[Hashable], targets: Sequence[str]) -> dict[Hashable, Counter]:
    groups: dict[Hashable, Counter] = defaultdict(Counter)
    for key, target in zip(keys, targets, strict=True):
        groups[key][target] += 1
    return groups


def _ceiling(groups: dict[Hashable, Counter]) -> float:
    """Share of the edits whose target is the most frequent one of their key."""
    return sum(max(answers.values()) for answers in groups.values()) / sum(map(Counter.total, groups.values()))


def _wordings(edits: Sequence[EditRequest]) -> list[str]:
    """For each edit a name of its question without the subject. Wordings that one edit uses for the same question have
    the same name, and so have those that are linked over several edits."""
    parents: dict[str, str] = {}

    def root(wording: str) -> str:
        while parents.setdefault(wording, wording) != wording:
            parents[wording] = wording = parents[parents[wording]]
        return wording

    for edit in edits:
        for probe in _rephrases(edit):
            parents[root(_wording(probe.prompt, edit))] = root(_wording(edit.prompt, edit))
    return [root(_wording(edit.prompt, edit)) for edit in edits]


def _wording(prompt: str, edit: EditRequest) -> str:
    subject = edit.subject.strip()
    return _question(re.sub(re.escape(subject), "{}", prompt, flags=re.IGNORECASE) if subject else prompt)


def _question(prompt: str) -> str:
    return EditRequest(prompt=prompt, target="x").question


def _rephrases(edit: EditRequest) -> list[Any]:
    return [probe for probe in edit.probes if probe.kind == "rephrase"]


def _texts(edit: EditRequest) -> list[str]:
    return [edit.prompt, edit.target, *(text for probe in edit.probes for text in (probe.prompt, probe.answer))]
