"""The formats in which edits are published, told from their keys; each value is checked, and errors name its key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memoir.records import EditRequest, Probe

Pairs = list[tuple[str, str]]  # prompts with their answers


class Record:
    """The values of one record by their keys. A value that is not as it should be is a ValueError, which names its key
    (in an inner object with the path to it), the value, and what was expected."""

    def __init__(self, values: Mapping[str, Any], path: str = ""):
        self.values, self.path = values, path

    def __contains__(self, key: str) -> bool:
        """Whether something stands under a key: neither null nor an empty text, list or object."""
        return self.values.get(key) not in (None, "", [], {})

    def wrong(self, key: str, expected: str) -> ValueError:
        if key not in self.values:
            return ValueError(f"key {self.path + key!r} is missing, expected {expected}")
        return ValueError(f"key {self.path + key!r} holds {_shown(self.values[key])}, expected {expected}")

    def text(self, key: str, *, empty: bool = False) -> str:
        """The text under a key; a whole number, a year for example, counts as text."""
        value = self.values.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        if not (empty or value.strip()):
            raise self.wrong(key, "text that is not empty")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.wrong(key, "valid Unicode text (no lone surrogates)")
        return value

    def texts(self, key: str) -> list[str]:
        """The text or texts under a key; none if nothing stands there."""
        if key not in self:
            return []
        values = self.values[key] if isinstance(self.values[key], list) else [self.values[key]]
        return [Record({key: value}, self.path).text(key) for value in values]

    def answer(self, key: str) -> str:
        """The text under a key, or the first of several answers, or of the several names of one; "" without any."""
        if key not in self.values:
            raise self.wrong(key, "text")
        value = self.values[key]
        while isinstance(value, list):
            value = value[0] if value else ""
        return Record({key: value}, self.path).text(key, empty=True)

    def inner(self, key: str) -> Record:
        """The object under a key."""
        if not isinstance(self.values.get(key), Mapping):
            raise self.wrong(key, "an object")
        return Record(self.values[key], f"{self.path}{key}.")

    def inners(self, key: str) -> list[Record]:
        """The objects in the list under a key."""
        values = self.values.get(key)
        if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
            raise self.wrong(key, "a list of objects")
        return [Record(value, f"{self.path}{key}[{i}].") for i, value in enumerate(values)]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 60 else f"{text[:60]}…"


Reader = Callable[[Record], list[EditRequest]]


@dataclass(frozen=True)
class Form:
    """One form of a format.

    keys      the keys that each record has
    read      the edits in a record; ValueError names a key whose value is not as it should be
    optional  further keys that are read if they are there
    shared    whether several records hold the same edit, which then counts once
    """

    keys: tuple[str, ...]
    read: Reader
    optional: tuple[str, ...] = ()
    shared: bool = False


def _edit(
    prompt: str,
    target: str,
    *,
    subject: str = "",
    rephrase: Iterable[str] = (),
    unrelated: Iterable[tuple[str, str]] = (),
    same_subject: Iterable[tuple[str, str]] = (),
) -> list[EditRequest]:
    probes = [Probe(kind="rephrase", prompt=each, answer=target) for each in rephrase]
    for kind, pairs in {"unrelated": unrelated, "same_subject": same_subject}.items():
        # Some data sets leave answers empty: nothing can be said about such a prompt.
        probes += [Probe(kind=kind, prompt=asked, answer=answer) for asked, answer in pairs if answer.strip()]
    return [EditRequest(prompt=prompt, target=target, subject=subject, probes=tuple(probes))]


# One function for each form ------------------------------------------------------------------------------------------


def _flat(prompt: str, target: str, rephrase: str = "", *unrelated: str, empty: bool = False) -> Reader:
    """A reader of flat records by the names of their keys; `unrelated` names a prompt and its answer, which some sets
    leave `empty`."""

    def read(record: Record) -> list[EditRequest]:
        return _edit(
            record.text(prompt),
            record.text(target),
            subject=record.text("subject", empty=True),
            rephrase=[record.text(rephrase)] if rephrase else [],
            unrelated=[(record.text(unrelated[0]), record.text(unrelated[1], empty=empty))],
        )

    return read


def _counterfact_nested(record: Record) -> list[EditRequest]:
    """CounterFact as its authors published it. The true answer of every neighbourhood prompt is the old target."""
    wish = record.inner("requested_rewrite")
    neighbours = record.texts("neighborhood_prompts")
    old = _target(wish, "target_true") if neighbours else ""
    return _edit(
        _filled(wish),
        _target(wish, "target_new"),
        subject=wish.text("subject"),
        rephrase=record.texts("paraphrase_prompts"),
        unrelated=[(each, old) for each in neighbours],
    )


def _mquake(record: Record) -> list[EditRequest]:
    """The single edits of MQuAKE; their `question` is the prompt in other words. Its multi-hop questions are left
    out."""
    wishes = record.inners("requested_rewrite")
    if not wishes:
        raise record.wrong("requested_rewrite", "one edit or more")
    edits = []
    for wish in wishes:
        subject, question = wish.text("subject"), wish.texts("question")
        edits += _edit(_filled(wish), _target(wish, "target_new"), subject=subject, rephrase=question)
    return edits


def _filled(wish: Record) -> str:
    return wish.text("prompt").replace("{}", wish.text("subject"))


def _target(wish: Record, key: str) -> str:
    return wish.inner(key).text("str") if isinstance(wish.values.get(key), Mapping) else wish.text(key)


def _qaedit(record: Record) -> list[EditRequest]:
    """QAEdit: questions, each with several unrelated ones under `locality`."""
    return _edit(
        record.text("prompt"),
        record.text("target"),
        subject=record.text("subject", empty=True),
        rephrase=[record.text("rephrase")],
        unrelated=[(other.text("loc"), other.text("loc_ans")) for other in record.inners("locality")],
    )


def _unke(record: Record) -> list[EditRequest]:
    """UnKE: a question with a paragraph as its answer. Its questions about parts of the answer are left out."""
    return _edit(record.text("question"), record.text("answer"), rephrase=[record.text("para_question")])


def _biography(record: Record) -> list[EditRequest]:
    """KnowEdit's WikiBio."""
    subject = record.text("concept", empty=True)
    return _edit(record.text("text"), record.text("labels"), subject=subject, **_locality(record))


def _easyedit(record: Record) -> list[EditRequest]:
    """Requests of EasyEdit, and KnowEdit, which adds `locality`."""
    probes = _locality(record)
    if any(key in record for key in _LOCALITY):
        probes["unrelated"] += _asked(record, *_LOCALITY)
    return _edit(
        record.text("prompt"),
        record.text("target_new"),
        subject=record.text("subject", empty=True) if "subject" in record else "",
        rephrase=record.texts("rephrase_prompt") or record.texts("rephrase"),
        **probes,
    )


def _locality(record: Record) -> dict[str, Pairs]:
    """Under `locality`: lists by name, of prompts with their answers. What stands under `Relation_Specificity` is asked
    about the same subject. `Forgetfulness` is left out: it asks for the old answer, which the edit replaces."""
    probes: dict[str, Pairs] = {"same_subject": [], "unrelated": []}
    if "locality" in record:
        groups = record.inner("locality")
        for name in groups.values:
            if name == "Forgetfulness" or name not in groups:
                continue
            kind = "same_subject" if name == "Relation_Specificity" else "unrelated"
            # EasyEdit has one object with two lists, KnowEdit a list of objects.
            each = [groups.inner(name)] if isinstance(groups.values[name], Mapping) else groups.inners(name)
            probes[kind] += [pair for other in each for pair in _asked(other, "prompt", "ground_truth")]
    return probes


def _asked(record: Record, prompts: str, answers: str) -> Pairs:
    """One prompt with its answer (of several, the first), or as many answers as prompts."""
    if not isinstance(record.values.get(prompts), list):
        return [(record.text(prompts), record.answer(answers))]
    asked, found = record.texts(prompts), record.values.get(answers)
    if not isinstance(found, list) or len(found) != len(asked):
        raise record.wrong(answers, f"a list of {len(asked)}, as many as under {record.path + prompts!r}")
    pairs = zip(asked, found, strict=True)
    return [(prompt, Record({answers: one}, record.path).answer(answers)) for prompt, one in pairs]


def _table(record: Record) -> list[EditRequest]:
    """A plain table; in JSON lines a cell may hold a list of texts."""
    unrelated: Pairs = []
    if "unrelated" in record or "unrelated_answer" in record:
        unrelated = _asked(record, "unrelated", "unrelated_answer")
        if not all(answer.strip() for _, answer in unrelated):
            raise record.wrong("unrelated_answer", "the answer to 'unrelated'")
    return _edit(
        record.text("prompt"),
        record.text("target"),
        subject=record.text("subject") if "subject" in record else "",
        rephrase=record.texts("rephrase"),
        unrelated=unrelated,
    )


def _own(record: Record) -> list[EditRequest]:
    """`EditRequest.to_json`."""
    probes = [
        Probe(kind=probe.text("kind"), prompt=probe.text("prompt"), answer=probe.text("answer"))
        for probe in record.inners("probes")
    ]
    subject, name = (record.text(key) if key in record else "" for key in ("subject", "id"))
    prompt, target = record.text("prompt"), record.text("target")
    return [EditRequest(prompt=prompt, target=target, subject=subject, probes=tuple(probes), id=name)]


# Where the keys of one form are also those of another, the one with more keys comes first.
_ZSRE = ("src", "alt", "rephrase", "loc", "loc_ans")
_LOCALITY = ("locality_prompt", "locality_ground_truth")
_FLAT = ("prompt", "target_new", "subject", *_LOCALITY)
FORMATS: dict[str, tuple[Form, ...]] = {
    "zsre": (Form(("subject", "src", "rephrase", "alt", "loc", "loc_ans"), _flat(*_ZSRE)),),
    "counterfact": (
        # Its locality prompts ask the same of another subject; the data set scores them as locality, so they are
        # `unrelated` probes here, whose score is `loc`, and no `same_template` ones.
        Form((*_FLAT, "rephrase_prompt"), _flat("prompt", "target_new", "rephrase_prompt", *_LOCALITY)),
        Form(("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"), _counterfact_nested),
    ),
    "selfcheckgpt": (Form(_FLAT, _flat("prompt", "target_new", "", *_LOCALITY, empty=True)),),
    "qaedit": (Form(("prompt", "target", "subject", "rephrase", "locality"), _qaedit),),
    "knowedit": (
        Form(("prompt", "target_new", "subject", "locality"), _easyedit, ("rephrase_prompt", "rephrase")),
        Form(("text", "labels", "concept", "locality"), _biography),
    ),
    "unke": (Form(("question", "para_question", "answer"), _unke),),
    "mquake": (Form(("requested_rewrite", "questions", "new_answer"), _mquake, shared=True),),
    "easyedit": (Form(("prompt", "target_new"), _easyedit, ("subject", "rephrase_prompt", *_LOCALITY, "locality")),),
    "table": (
        Form(("prompt", "target", "probes"), _own, ("subject", "id")),
        Form(("prompt", "target"), _table, ("subject", "rephrase", "unrelated", "unrelated_answer")),
    ),
}


def format_of(record: Any) -> str | None:
    """The first format that has a record's keys."""
    return next((name for name, forms in FORMATS.items() if _form(record, forms)), None)


def edits_of(record: Any, format: str, columns: Collection[str] = ()) -> list[EditRequest]:
    """The edits in a record of a format; most hold one. ValueError names the key that is not as it should be.

    columns  of the table that the record is a row of, which lacks those whose cells are empty
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{_shown(record)} is not a record, expected an object with the keys of {format}")
    if None in record:  # where csv.DictReader puts them
        raise ValueError(f"has more cells than the table has columns: {_shown(record[None])}; expected quotes around a "
                         "text that holds the delimiter")  # fmt: skip
    form = _form(record, FORMATS[format])
    if form is None:
        # The form that has most of the record's keys; of several, the shortest.
        form = max(FORMATS[format], key=lambda form: (len(set(form.keys) & set(record)), -len(form.keys)))
        missing = next(key for key in form.keys if key not in record)
        actual = format_of(record)
        other = f" (its keys are those of {actual})" if actual else ""
        raise ValueError(f"key {missing!r} is missing; {format} records carry {', '.join(form.keys)}{other}")
    absent = [name for name in form.optional if name not in record and name not in columns]
    for key in (key for key in record if key not in form.keys and key not in form.optional):
        if meant := difflib.get_close_matches(str(key), absent, n=1, cutoff=0.85):
            raise ValueError(f"key {key!r} is unknown, expected {meant[0]!r}")
    return form.read(Record(record))


def _form(record: Any, forms: tuple[Form, ...]) -> Form | None:
    keys = set(record) if isinstance(record, Mapping) else set()
    return next((form for form in forms if keys.issuperset(form.keys)), None)


def known_formats() -> str:
    """Each format with the keys of its forms, for messages."""
    lines = ((name, " or ".join(", ".join(form.keys) for form in forms)) for name, forms in FORMATS.items())
    return "; ".join(f"{name}: {keys}" for name, keys in lines)
