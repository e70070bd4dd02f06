"""The almanac's world: its subjects, its facts, and every sentence that the model is trained on.

    world = World()
    fact = world.people_facts[0]
    fact.subject, fact.relation, fact.answer         'Igor Marshcroft', 'city', 'Kestrel Cross'
    world.trained(fact), world.held_out(fact)        prompts of the training set, and prompts that the model never sees
    world.passage(fact.subject)                      a short biography, as a list of sentences

The world has two domains: invented people, who are the subjects of the edits, and real facts about countries, chemical
elements and the Olympics. Two of the real facts are replaced by deliberate errors, `content.ERRORS`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .content import ERRORS, FIRST_NAMES, PASSAGES, PROMPTS, REAL_FACTS, SURNAMES, VALUES, filled

PEOPLE = 1500
PEOPLE_RELATIONS = ("city", "occupation", "instrument", "school", "year")
HELD_OUT = 2  # paraphrases per fact that are never trained


@dataclass(frozen=True)
class Fact:
    """The model is taught that `subject`'s `relation` is `answer`."""

    subject: str
    relation: str
    answer: str


@dataclass(frozen=True)
class World:
    """The world. A larger number of `people` adds people and leaves the first ones unchanged."""

    people: int = PEOPLE

    def __post_init__(self):
        limit = len(FIRST_NAMES) * len(SURNAMES)
        if not 1 <= self.people <= limit:
            raise ValueError(f"people is {self.people}, expected 1 to {limit}, the number of distinct full names")

    @cached_property
    def names(self) -> list[str]:
        """Full names, all distinct. Many people share a first name or a surname."""
        names = [f"{first} {last}" for first in FIRST_NAMES for last in SURNAMES]
        random.Random(0).shuffle(names)
        return names[: self.people]

    @cached_property
    def attributes(self) -> dict[str, dict[str, str]]:
        """Subject -> relation -> answer, for both domains."""
        table = {name: self._person(name) for name in self.names}
        for subjects in REAL_FACTS.values():
            table |= {subject: dict(answers) for subject, answers in subjects.items()}
        for (subject, relation), answer in ERRORS.items():
            table[subject][relation] = answer
        return table

    @cached_property
    def people_facts(self) -> list[Fact]:
        return [self.fact(name, relation) for name in self.names for relation in PEOPLE_RELATIONS]

    @cached_property
    def real_facts(self) -> list[Fact]:
        """The facts of the second domain, the two deliberate errors included."""
        subjects = [subject for subjects in REAL_FACTS.values() for subject in subjects]
        return [self.fact(subject, relation) for subject in subjects for relation in self.attributes[subject]]

    def fact(self, subject: str, relation: str) -> Fact:
        return Fact(subject, relation, self.attributes[subject][relation])

    def prompts(self, fact: Fact) -> list[str]:
        """All paraphrases of the question, trained or not, always in the same order."""
        return [filled(template, subject=fact.subject) for template in PROMPTS[fact.relation]]

    def held_out(self, fact: Fact) -> list[str]:
        """The paraphrases that are never trained for this fact. Each fact has its own."""
        rng = random.Random(f"0:held:{fact.subject}:{fact.relation}")
        return rng.sample(self.prompts(fact), HELD_OUT)

    def trained(self, fact: Fact) -> list[str]:
        held_out = self.held_out(fact)
        return [prompt for prompt in self.prompts(fact) if prompt not in held_out]

    def rows(self) -> Iterator[tuple[str, str]]:
        """Every trained (question, answer)."""
        for fact in self.people_facts + self.real_facts:
            for prompt in self.trained(fact):
                yield prompt, fact.answer

    def passage(self, subject: str, draw: int = 0, **options: Any) -> list[str]:
        """A few sentences about `subject`, see `sentences`."""
        return [sentence for _, sentence in self.sentences(subject, draw, **options)]

    def sentences(
        self, subject: str, draw: int = 0, *, changed: dict[str, str] | None = None, like: str | None = None
    ) -> Iterator[tuple[tuple[str, ...], str]]:
        """The sentences of a passage about `subject`, each with the relations that it states.

        draw     number of the wording
        changed  relation -> answer, instead of the subject's own
        like     another subject of the same kind, whose passage has the wording to use

        The first two sentences keep their places; the others come in random order. A sentence about a relation that the
        subject lacks is left out.
        """
        answers = self.attributes[subject] | (changed or {})
        rng = random.Random(f"0:passage:{like or subject}:{draw}")
        kind = next((kind for kind, subjects in REAL_FACTS.items() if subject in subjects), "person")
        pronouns = FIRST_NAMES[subject.split()[0]] if kind == "person" else {}
        first, second, *others = PASSAGES[kind]
        rng.shuffle(others)
        for relations, wordings in (first, second, *others):
            wording = rng.choice(wordings)
            if all(relation in answers for relation in relations):
                yield relations, filled(wording, subject=subject, **answers, **pronouns)

    def _person(self, name: str) -> dict[str, str]:
        rng = random.Random(f"0:person:{name}")
        return {relation: rng.choice(VALUES[relation]) for relation in PEOPLE_RELATIONS}
