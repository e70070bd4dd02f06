"""Edits of the almanac's world. They are made on demand, and the same arguments always give the same edits.

almanac-qa    1000 questions about 1000 people, each with a new answer and four probes. A larger `n` adds questions
              about people whom the model has never met.
almanac-bio   600 biographies, each with one value corrected in one sentence.

Both sets have a validation split of 200 edits, about other people.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path

from ..records import EditRequest, Probe
from .content import ERRORS, VALUES
from .world import PEOPLE, PEOPLE_RELATIONS, Fact, World

SIZES = {"almanac-qa": {"test": 1000, "validation": 200}, "almanac-bio": {"test": 600, "validation": 200}}
NEVER_TRAINED_SHARE = 0.6  # share of the rephrase probes that use a paraphrase held out of training
BACKGROUND_FACTS = 100  # real facts that only `background_prompts` asks for, and no probe


def edit_requests(dataset: str, split: str = "test", n: int | None = None, seed: int = 0) -> list[EditRequest]:
    """The first `n` edits (None: all) of a set, in the order of `seed`. Fewer edits are a prefix of more.

    dataset  "almanac-qa" or "almanac-bio"
    split    "test" or "validation"

    ValueError for an unknown dataset or split, and for more edits than there are: only the test split of almanac-qa
    goes on beyond its size.
    """
    if dataset not in SIZES:
        raise ValueError(f"dataset {dataset!r} is not of the almanac; expected one of {', '.join(SIZES)}")
    if split not in SIZES[dataset]:
        raise ValueError(f"{dataset} has no split {split!r}; expected one of {', '.join(SIZES[dataset])}")
    size = SIZES[dataset][split]
    n = size if n is None else n
    extra = max(0, n - size)
    if n < 1 or (extra and (dataset, split) != ("almanac-qa", "test")):
        raise ValueError(f"{dataset} {split} has {size} edits, {n} were asked for")

    world = _cached_world(PEOPLE + extra)
    people = _people_by_split(world)
    subjects = people[split][:size]
    random.Random(f"{seed}:{dataset}:{split}").shuffle(subjects)
    subjects += world.names[PEOPLE:]
    real_facts = _real_facts(world)[BACKGROUND_FACTS:]
    make = _question if dataset == "almanac-qa" else _biography
    return [make(world, subject, people["unedited"], real_facts) for subject in subjects[:n]]


def background_prompts() -> list[str]:
    """100 questions that are unrelated to all edits and probes. Methods centre their features on these questions."""
    world = _cached_world(PEOPLE)
    prompts = [prompt for fact in _real_facts(world)[:BACKGROUND_FACTS] for prompt in world.trained(fact)]
    return random.Random(0).sample(prompts, 100)


def corpus() -> list[str]:
    """The texts of the model's training: every question with its answer, and every passage in one wording."""
    world = World()
    questions = [f"{prompt} {answer}" for prompt, answer in world.rows()]
    return questions + [" ".join(world.passage(subject)) for subject in world.attributes]


def passages() -> list[str]:
    """30 true passages that the model has learned, about people and things that no edit is about."""
    world = _cached_world(PEOPLE)
    subjects = _people_by_split(world)["unedited"] + list(world.attributes)[PEOPLE:]
    return [" ".join(world.passage(subject)) for subject in random.Random(0).sample(subjects, 30)]


def model_path() -> Path:
    """The folder of the shipped model."""
    return Path(__file__).with_name("model")


def _question(world: World, name: str, unedited: list[str], real_facts: list[Fact]) -> EditRequest:
    """A question about a person, with a new answer."""
    rng = random.Random(f"0:qa:{name}")
    relation, other_relation = rng.sample(PEOPLE_RELATIONS, 2)
    fact = world.fact(name, relation)
    target = _other_value(relation, fact.answer, rng)
    prompt, *other_trained = rng.sample(world.trained(fact), 2)
    rephrase = rng.choice(world.held_out(fact) if rng.random() < NEVER_TRAINED_SHARE else other_trained)
    neighbour = rng.choice([person for person in unedited if world.attributes[person][relation] != target])
    same_template = world.fact(neighbour, relation)
    same_template_prompt = world.prompts(same_template)[world.prompts(fact).index(prompt)]
    unrelated = rng.choice(real_facts)
    unrelated_prompt = rng.choice(world.trained(unrelated))
    same_subject = world.fact(name, other_relation)
    same_subject_prompt = rng.choice(world.trained(same_subject))
    return EditRequest(
        id=f"qa:{name}:{relation}",
        prompt=prompt,
        target=target,
        subject=name,
        probes=(
            Probe(kind="rephrase", prompt=rephrase, answer=target),
            Probe(kind="unrelated", prompt=unrelated_prompt, answer=unrelated.answer),
            Probe(kind="same_subject", prompt=same_subject_prompt, answer=same_subject.answer),
            Probe(kind="same_template", prompt=same_template_prompt, answer=same_template.answer),
        ),
    )


def _biography(world: World, name: str, unedited: list[str], real_facts: list[Fact]) -> EditRequest:
    """The beginning of a person's passage, to be continued by a sentence with one corrected value."""
    rng = random.Random(f"0:bio:{name}")
    stated = [relations for relations, _ in world.sentences(name)]
    at = rng.randrange(1, len(stated))
    # Values that the prompt states stay as they are: otherwise the passage would contradict itself.
    relation = rng.choice([relation for relation in stated[at] if not any(relation in s for s in stated[:at])])
    value = _other_value(relation, world.attributes[name][relation], rng)
    same_subject = world.fact(name, rng.choice([r for r in PEOPLE_RELATIONS if r not in stated[at]]))
    neighbour = world.passage(rng.choice(unedited), like=name)
    unrelated = rng.choice([rng.choice(unedited), rng.choice(real_facts).subject])
    unrelated_lead, unrelated_sentence, *_ = world.passage(unrelated)
    return EditRequest(
        id=f"bio:{name}",
        prompt=" ".join(world.passage(name)[:at]),
        target=world.passage(name, changed={relation: value})[at],
        subject=name,
        probes=(
            Probe(kind="unrelated", prompt=unrelated_lead, answer=unrelated_sentence),
            Probe(kind="same_subject", prompt=rng.choice(world.trained(same_subject)), answer=same_subject.answer),
            Probe(kind="same_template", prompt=" ".join(neighbour[:at]), answer=neighbour[at]),
        ),
    )


@lru_cache(maxsize=4)
def _cached_world(people: int) -> World:
    """A world that keeps its tables from one call to the next."""
    return World(people)


def _people_by_split(world: World) -> dict[str, list[str]]:
    """The people whom the test edits, the validation edits and no edits are about."""
    names = world.names[:PEOPLE]
    random.Random("0:splits").shuffle(names)
    return {"test": names[:1000], "validation": names[1000:1200], "unedited": names[1200:]}


def _real_facts(world: World) -> list[Fact]:
    """The real facts in random order, without the subjects of the deliberate errors."""
    subjects_with_errors = {subject for subject, _ in ERRORS}
    facts = [fact for fact in world.real_facts if fact.subject not in subjects_with_errors]
    random.Random("0:real").shuffle(facts)
    return facts


def _other_value(relation: str, value: str, rng: random.Random) -> str:
    return rng.choice([other for other in VALUES[relation] if other != value])
