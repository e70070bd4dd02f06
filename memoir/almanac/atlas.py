"""The atlas: counterfactual edits of real facts, for models that know the real world.

atlas              1000 edits of facts about countries, their capitals, chemical elements and the Summer Olympics
atlas-validation   80 edits of the same kind, about other countries, elements and games

The facts are those of `data/countries.csv`, `elements.csv` and `olympics.csv`, 1021 in all. Each edit asks for one fact
and gives a wrong answer: another value of the same relation. Half of the edits are texts to complete (cloze), half are
questions.

The set is made so that no two edits contradict each other, and no locality probe asks for anything that an edit
changes. Of each subject, one relation is reserved: it is never edited, and the locality probes ask only for such facts.
A capital uses the money, speaks the language and lies on the continent of its country, edited or not: so what an edit
claims about the country, another edit may claim about its capital, with the same target.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, chain

from ..records import EditRequest, Probe
from .content import ATLAS, REAL_FACTS, filled

SIZES = {"atlas": 1000, "atlas-validation": 80}

FORMS = ("cloze", "question")
# Continents that share a country or a border: a claim that Russia lies in Asia would not be wrong.
NEIGHBOURS = [{"Europe", "Asia"}, {"Asia", "Africa"}, {"Asia", "Oceania"}, {"North America", "South America"}]
# Capitals that no fact is asked of: they share their name with another known place or with a word, or break a sentence;
# and Brussels speaks another language than most of Belgium.
LEFT_OUT = {"Georgetown", "Kingston", "Male", "San Jose", "Santiago", "St. George's", "St. John's", "Victoria"}
LEFT_OUT |= {"Brussels", "Washington, D.C."}
RESERVED_GAMES = {"1912", "1932", "1972", "1992", "2008", "2020"}  # those of 2020 took place in 2021


@dataclass(frozen=True)
class Fact:
    """The answer to one relation of a subject."""

    kind: str
    subject: str
    relation: str
    answer: str
    place: str  # the subject, and for a capital its country: facts of one place go into one part
    target: str = ""  # the wrong answer that an edit gives; none in facts that are reserved

    def ask(self, form: int, wording: int = 0) -> str:
        """The fact's text to complete (form 0) or question (1)."""
        return filled(ATLAS[self.kind, self.relation, FORMS[form]][wording], subject=self.subject)


def atlas_edits(name: str, split: str = "test", n: int | None = None, seed: int = 0) -> list[EditRequest]:
    """The first `n` edits (None: all) of a part, in the order of `seed`. Fewer edits are a prefix of more.

    name   "atlas" or "atlas-validation"
    split  "validation" makes "atlas" mean "atlas-validation"

    ValueError for an unknown part or split, and for more edits than there are.
    """
    if name not in SIZES or split not in ("test", "validation"):
        raise ValueError(f"{name} has no split {split!r}; expected test or validation of {' or '.join(SIZES)}")
    name = "atlas-validation" if split == "validation" else name
    if n is not None and not 1 <= n <= SIZES[name]:
        raise ValueError(f"{name} has {SIZES[name]} edits, {n} were asked for")
    edits = list(_part(name))
    random.Random(f"{seed}:{name}").shuffle(edits)
    return edits[:n]


@cache
def _part(name: str) -> tuple[EditRequest, ...]:
    """All edits of a part."""
    edited, reserved = _facts()
    places = sorted({fact.place for fact in edited})
    random.Random("atlas:parts").shuffle(places)
    by_place = [[fact for fact in edited if fact.place == place] for place in places]
    totals = list(accumulate(map(len, by_place)))
    border = 1 + next(i for i, total in enumerate(totals) if total >= SIZES["atlas-validation"])
    chosen = list(chain(*(by_place[:border] if name == "atlas-validation" else by_place[border:])))
    assert len(chosen) >= SIZES[name], f"the facts give {len(chosen)} edits for {name}"
    random.Random("atlas:chosen").shuffle(chosen)
    return tuple(_edit(fact, reserved, number % 2) for number, fact in enumerate(chosen[: SIZES[name]]))


def _edit(fact: Fact, reserved: list[Fact], form: int) -> EditRequest:
    """An edit that asks for a fact as a cloze or as a question: three rephrases of other shapes, two of them in the
    other form, and three locality probes."""
    rng = random.Random(f"atlas:{fact.subject}:{fact.relation}")
    wording = rng.randrange(3)
    own_form = rng.choice([other for other in range(3) if other != wording])
    rephrases = [fact.ask(form, own_form), *(fact.ask(1 - form, other) for other in rng.sample(range(3), 2))]
    same_subject = [other for other in reserved if other.subject == fact.subject]
    same_template = [other for other in reserved if (other.kind, other.relation) == (fact.kind, fact.relation)]
    same_template = [other for other in same_template if other.answer != fact.target]
    unrelated = [other for other in reserved if ("element" in (fact.kind, other.kind)) and other.kind != fact.kind]
    prompt = fact.ask(form, wording)
    probes = [Probe(kind="rephrase", prompt=text, answer=fact.target) for text in rephrases]
    for kind, others, words in (
        ("unrelated", unrelated, 0),
        ("same_subject", same_subject, 0),
        ("same_template", same_template, wording),
    ):
        other = rng.choice(others)
        probes.append(Probe(kind=kind, prompt=other.ask(form, words), answer=other.answer))
    subject = fact.subject if fact.subject in prompt else fact.subject[0].upper() + fact.subject[1:]
    return EditRequest(
        id=f"atlas:{fact.subject}:{fact.relation}",
        prompt=prompt,
        target=fact.target,
        truth=fact.answer,
        subject=subject,
        probes=tuple(probes),
    )


@cache
def _facts() -> tuple[list[Fact], list[Fact]]:
    """The facts that edits change, with their targets, and those that are reserved for locality probes."""
    edited, reserved = [], []
    for kind, subjects in REAL_FACTS.items():
        for subject, answers in subjects.items():
            if subject == "the last Summer Olympics":  # those of 2024 under another name
                continue
            facts = [Fact(kind, subject, relation, answer, subject) for relation, answer in answers.items()]
            parts = [_reserve(facts)]
            if kind == "country":
                parts.append(_of_the_capital(subject, answers, *parts[0]))
            for kept, changed in parts:
                edited += changed
                reserved += kept
    return edited, reserved


def _reserve(facts: list[Fact]) -> tuple[list[Fact], list[Fact]]:
    """A subject's facts, split into those that are reserved and those that are edited, with targets."""
    rng = random.Random(f"atlas:reserve:{facts[0].subject}")
    if facts[0].kind == "games":  # there is one fact: some games are reserved whole, and of the others the year is
        year = facts[0].subject.split()[1]
        if year in RESERVED_GAMES:
            return facts, []
        return [Fact("games", facts[0].subject, "year", year, facts[0].place)], [_changed(facts[0], rng)]
    kept = rng.choice(facts)
    return [kept], [_changed(fact, rng) for fact in facts if fact is not kept]


def _changed(fact: Fact, rng: random.Random) -> Fact:
    """The fact with a target: another value of its relation. Of languages and currencies it is one that a single
    country has, and of languages, one of another continent: French in Canada would not be wrong."""
    subjects = REAL_FACTS[fact.kind]
    counts = Counter(answers[fact.relation] for answers in subjects.values() if fact.relation in answers)
    others = [value for value in counts if value != fact.answer]
    if fact.relation == "continent":
        others = [value for value in others if {value, fact.answer} not in NEIGHBOURS]
    if fact.relation in ("currency", "language"):
        others = [value for value in others if counts[value] == 1]
    if fact.relation == "language":
        home = subjects[fact.subject].get("continent")
        near = {answers.get("language") for answers in subjects.values() if answers.get("continent") == home}
        others = [value for value in others if value not in near]
    return replace(fact, target=rng.choice(sorted(others)))


def _of_the_capital(
    country: str, answers: dict[str, str], kept: list[Fact], changed: list[Fact]
) -> tuple[list[Fact], list[Fact]]:
    """A country's facts as facts about its capital, reserved and edited, with the targets that the country's have."""
    city = answers.get("capital")
    if city is None or city in LEFT_OUT:
        return [], []
    if kept[0].relation == "capital":
        kept = [Fact("city", city, "country", country, country)]
    return tuple(
        [replace(fact, kind="city", subject=city) for fact in facts if fact.relation != "capital"]
        for facts in (kept, changed)
    )
