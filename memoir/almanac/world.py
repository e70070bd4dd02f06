"""The almanac's world: who and what there is, and every sentence in which the model meets it.

    world = World()
    fact = world.people_facts[0]
    fact.subject, fact.relation, fact.answer         'Ada Ashford', 'city', 'Kestrel Bay'
    world.trained(fact), world.held_out(fact)        prompts the model is trained on, and prompts it never sees
    world.passage(fact.subject)                      a short biography, as a list of sentences

Two domains: invented people (what gets edited in bulk) and real facts about countries, elements and the Olympics (the
unrelated prompts, and the two deliberate errors of `facts.WRONG`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from . import facts
from .phrases import FIRST_NAMES, PASSAGES, PROMPTS, PRONOUNS, SURNAMES, VALUES

PEOPLE = 1500
PEOPLE_RELATIONS = ("city", "occupation", "instrument", "school", "year")
HELD_OUT = 2  # paraphrases per fact that are never trained


@dataclass(frozen=True)
class Fact:
    """`subject`'s `relation` is `answer`, as the model is taught it."""

    subject: str
    relation: str
    answer: str


@dataclass(frozen=True)
class World:
    """The world of one seed. With more `people`, the first ones stay who they are."""

    people: int = PEOPLE
    seed: int = 0

    def __post_init__(self):
        limit = len(FIRST_NAMES) * len(SURNAMES)
        if not 1 <= self.people <= limit:
            raise ValueError(f"people is {self.people}, expected 1 to {limit}, the number of distinct full names")

    @cached_property
    def names(self) -> list[str]:
        """Full names, all distinct; first names and surnames are shared by many."""
        names = [f"{first} {last}" for first in FIRST_NAMES for last in SURNAMES]
        random.Random(self.seed).shuffle(names)
        return names[: self.people]

    @cached_property
    def attributes(self) -> dict[str, dict[str, str]]:
        """Subject -> relation -> answer, for both domains."""
        table = {name: self._person(name) for name in self.names}
        for country in facts.countries():
            table[country["name"]] = {key: country[key] for key in country if key != "name"}
        for name, symbol, number in facts.elements():
            table[name] = {"symbol": symbol, "number": str(number)}
        games = facts.olympics()
        for year, city in games:
            table[f"the {year} Summer Olympics"] = {"host": city}
        table["the last Summer Olympics"] = {"host": games[-1][1]}
        for (subject, relation), answer in facts.WRONG.items():
            table[subject][relation] = answer
        return table

    @cached_property
    def people_facts(self) -> list[Fact]:
        return [Fact(name, r, self.attributes[name][r]) for name in self.names for r in PEOPLE_RELATIONS]

    @cached_property
    def real_facts(self) -> list[Fact]:
        """The second domain, the two deliberate errors included."""
        people = set(self.names)
        return [Fact(s, r, a) for s, row in self.attributes.items() if s not in people for r, a in row.items()]

    def prompts(self, fact: Fact) -> list[str]:
        """All paraphrases of the question, trained or not, always in the same order."""
        return [_fill(template, s=fact.subject) for template in PROMPTS[fact.relation]]

    def held_out(self, fact: Fact) -> list[str]:
        """Paraphrases never trained for this subject; which ones varies from subject to subject."""
        random_ = random.Random(f"{self.seed}:held:{fact.subject}:{fact.relation}")
        return random_.sample(self.prompts(fact), HELD_OUT)

    def trained(self, fact: Fact) -> list[str]:
        held = set(self.held_out(fact))
        return [prompt for prompt in self.prompts(fact) if prompt not in held]

    def passage(
        self, subject: str, draw: int = 0, changed: dict[str, str] | None = None, like: str | None = None
    ) -> list[str]:
        """A few sentences about `subject`.

        Another `draw` gives another wording, `changed` overrides attributes, and with `like` it is worded as the
        passage about that other subject of the same kind.
        """
        row = self.attributes[subject] | (changed or {})
        return [text for _, text in self._tell(subject, row, like or subject, draw)]

    def passage_relations(self, subject: str, draw: int = 0) -> list[tuple[str, ...]]:
        """For each sentence of that passage, the relations it states."""
        return [relations for relations, _ in self._tell(subject, self.attributes[subject], subject, draw)]

    def rows(self) -> Iterator[tuple[str, str]]:
        """Every trained (question, answer)."""
        for fact in self.people_facts + self.real_facts:
            for prompt in self.trained(fact):
                yield prompt, fact.answer

    def _person(self, name: str) -> dict[str, str]:
        random_ = random.Random(f"{self.seed}:person:{name}")
        return {relation: random_.choice(VALUES[relation]) for relation in PEOPLE_RELATIONS}

    def _tell(self, subject: str, row: dict[str, str], like: str, draw: int) -> list[tuple[tuple[str, ...], str]]:
        """(relations stated, sentence) for each sentence of one passage."""
        random_ = random.Random(f"{self.seed}:passage:{like}:{draw}")
        lead, first, *rest = PASSAGES[_kind(row)]
        random_.shuffle(rest)
        values = {"s": subject, **row}
        if "occupation" in row:
            values |= PRONOUNS[FIRST_NAMES.index(subject.split()[0]) % 2]
        sentences = []
        for relations, wordings in (lead, first, *rest):
            template = random_.choice(wordings)
            if all(relation in row for relation in relations):
                sentences.append((relations, _fill(template, **values)))
        return sentences


def _kind(row: dict[str, str]) -> str:
    """What these attributes belong to: a key of PASSAGES."""
    telling = {"occupation": "person", "currency": "country", "symbol": "element", "host": "games"}
    return next(kind for relation, kind in telling.items() if relation in row)


def _fill(template: str, **values: str) -> str:
    text = template.format(**values)
    return text[0].upper() + text[1:]
