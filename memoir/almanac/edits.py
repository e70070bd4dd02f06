"""Edits of the almanac's world, made on demand and always the same.

`almanac-qa`   1000 questions about 1000 people, each with a new answer and four probes; with a larger `n` it goes on
               with people whom the model has never met
`almanac-bio`  600 biographies, each with one value corrected in one sentence
Both have a validation split of 200, about other people.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ..records import EditRequest, Probe
from .facts import WRONG
from .phrases import VALUES
from .world import PEOPLE, PEOPLE_RELATIONS, Fact, World

SIZES = {"almanac-qa": {"test": 1000, "validation": 200}, "almanac-bio": {"test": 600, "validation": 200}}
NEVER_TRAINED_SHARE = 0.6  # of the rephrase probes: paraphrases that the model has not seen for this subject
BACKGROUND_FACTS = 100  # real facts set aside for `background_prompts`, asked in no probe


def edit_requests(
    dataset: str, split: str = "test", n: int | None = None, seed: int = 0, world: World | None = None
) -> list[EditRequest]:
    """The first `n` edits (None: all) of a set, in the order of `seed`: fewer edits are a prefix of more.

    ValueError for an unknown dataset or split, or for more validation edits than there are.
    """
    if dataset not in SIZES:
        raise ValueError(f"dataset {dataset!r} is not of the almanac; expected one of {', '.join(SIZES)}")
    if split not in SIZES[dataset]:
        raise ValueError(f"{dataset} has no split {split!r}; expected one of {', '.join(SIZES[dataset])}")
    size = SIZES[dataset][split]
    n = size if n is None else n
    extra = max(0, n - size)
    if n < 1 or (extra and split != "test"):
        raise ValueError(f"{dataset} {split} has {size} edits, {n} were asked for")
    world = _known(replace(world or World(), people=PEOPLE + extra))
    test, validation, spare = _people(world)
    names = (test if split == "test" else validation)[:size]
    random.Random(f"{seed}:{dataset}:{split}").shuffle(names)
    make = {"almanac-qa": _question, "almanac-bio": _biography}[dataset]
    unrelated = _real_facts(world)[BACKGROUND_FACTS:]
    return [make(world, name, spare, unrelated) for name in (names + world.names[PEOPLE:])[:n]]


def background_prompts(n: int = 100, seed: int = 0) -> list[str]:
    """`n` questions that no edit and no probe has anything to do with, to centre features on."""
    world = _known(World())
    prompts = [prompt for fact in _real_facts(world)[:BACKGROUND_FACTS] for prompt in world.trained(fact)]
    if not 1 <= n <= len(prompts):
        raise ValueError(f"n is {n}, expected 1 to {len(prompts)} background prompts")
    return random.Random(seed).sample(prompts, n)


def corpus() -> list[str]:
    """What the model was trained on: every question with its answer, and every passage in one wording."""
    world = World()
    return [f"{prompt} {answer}" for prompt, answer in world.rows()] + [
        " ".join(world.passage(subject)) for subject in world.attributes
    ]


def model_path() -> Path:
    """The folder of the shipped model."""
    return Path(__file__).with_name("model")


def _question(world: World, name: str, spare: list[str], unrelated: list[Fact]) -> EditRequest:
    random_ = random.Random(f"{world.seed}:qa:{name}")
    relation, other = random_.sample(PEOPLE_RELATIONS, 2)
    fact = Fact(name, relation, world.attributes[name][relation])
    target = _other_value(relation, fact.answer, random_)
    prompt, *trained = random_.sample(world.trained(fact), 2)
    rephrase = random_.choice(world.held_out(fact) if random_.random() < NEVER_TRAINED_SHARE else trained)
    known = Fact(name, other, world.attributes[name][other])
    neighbour = random_.choice([s for s in spare if world.attributes[s][relation] != target])
    same_template = Fact(neighbour, relation, world.attributes[neighbour][relation])
    real = random_.choice(unrelated)
    return EditRequest(
        id=f"qa:{name}:{relation}",
        prompt=prompt,
        target=target,
        subject=name,
        probes=(
            Probe(kind="rephrase", prompt=rephrase, answer=target),
            Probe(kind="unrelated", prompt=random_.choice(world.trained(real)), answer=real.answer),
            Probe(kind="same_subject", prompt=random_.choice(world.trained(known)), answer=known.answer),
            Probe(
                kind="same_template",
                prompt=world.prompts(same_template)[world.prompts(fact).index(prompt)],
                answer=same_template.answer,
            ),
        ),
    )


def _biography(world: World, name: str, spare: list[str], unrelated: list[Fact]) -> EditRequest:
    random_ = random.Random(f"{world.seed}:bio:{name}")
    stated = world.passage_relations(name)
    at = random_.randrange(1, len(stated))
    row = world.attributes[name]
    new = [relation for relation in stated[at] if not any(relation in earlier for earlier in stated[:at])]
    corrected = random_.choice(new)  # not what the passage so far has said otherwise
    changed = {corrected: _other_value(corrected, row[corrected], random_)}
    before, target = world.passage(name)[:at], world.passage(name, changed=changed)[at]
    untouched = random_.choice([r for r in PEOPLE_RELATIONS if r not in stated[at]])
    known = Fact(name, untouched, row[untouched])
    neighbour = world.passage(random_.choice(spare), like=name)
    subject = random_.choice([random_.choice(spare), random_.choice(unrelated).subject])
    lead, text, *_ = world.passage(subject)
    return EditRequest(
        id=f"bio:{name}",
        prompt=" ".join(before),
        target=target,
        subject=name,
        probes=(
            Probe(kind="unrelated", prompt=lead, answer=text),
            Probe(kind="same_subject", prompt=random_.choice(world.trained(known)), answer=known.answer),
            Probe(kind="same_template", prompt=" ".join(neighbour[:at]), answer=neighbour[at]),
        ),
    )


@lru_cache(maxsize=4)
def _known(world: World) -> World:
    """The first world equal to this one, which need not find out its people and facts again."""
    return world


def _people(world: World) -> tuple[list[str], list[str], list[str]]:
    """Whom the test edits are about, whom the validation edits are about, and whom no edit is about."""
    names = world.names[:PEOPLE]
    random.Random(f"{world.seed}:splits").shuffle(names)
    return names[:1000], names[1000:1200], names[1200:]


def _real_facts(world: World) -> list[Fact]:
    """The second domain without anything about the subjects of the deliberate errors, shuffled."""
    wrong = {subject for subject, _ in WRONG}
    facts = [fact for fact in world.real_facts if fact.subject not in wrong]
    random.Random(f"{world.seed}:real").shuffle(facts)
    return facts


def _other_value(relation: str, value: str, random_: random.Random) -> str:
    return random_.choice([v for v in VALUES[relation] if v != value])
