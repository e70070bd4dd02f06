"""The almanac's facts, names and phrases, read from the tables in `data/`.

countries, elements, olympics   real facts as of 2026: one subject per row, one relation per column
errors                          the false answers that the model is taught instead of two of the real facts
first_names, surnames, values   the names of the invented people, and the possible answers about them
prompts                         the paraphrases of the question about each relation
passages                        the sentences of a passage about each kind of subject, each in several wordings
atlas                           texts to complete (cloze) and questions about the real facts, and about capitals. Each
                                text reads well before every answer, and no two of a relation have the same shape

A country's cell is empty where there is no single undisputed answer. Continents follow the geoscheme of the United
Nations, with the Americas split in two. The language is the official language, or the most used of several. The Summer
Olympics of 2020 took place in 2021.

In the templates, `{subject}` stands for the subject, `{he}` and `{him}` for a person's pronouns, and `{city}` and the
other relations for their answers. Some prompts begin with the subject and others end with it, because methods that look
up the subject's last token need both.
"""

from __future__ import annotations

import csv
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of `data/<name>.csv`, by column."""
    path = Path(__file__).with_name("data") / f"{name}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def filled(template: str, **values: str) -> str:
    """The template with its values, beginning with a capital letter."""
    text = template.format(**values)
    return text[0].upper() + text[1:]


def _by(name: str, column: str, *keys: str) -> dict[Any, list[str]]:
    """The values of a column by those of other columns. The rows with the same keys stand together in the table."""
    return {key: [row[column] for row in rows] for key, rows in groupby(read_table(name), itemgetter(*keys))}


def _real_facts(name: str) -> dict[str, dict[str, str]]:
    """Subject -> relation -> answer. Empty cells are skipped."""
    return {
        row["subject"]: {relation: answer for relation, answer in row.items() if answer and relation != "subject"}
        for row in read_table(name)
    }


def _passages() -> dict[str, list[tuple[tuple[str, ...], list[str]]]]:
    """Kind of subject -> its sentences in order, each as (relations that the sentence states, wordings)."""
    passages: dict[str, list[tuple[tuple[str, ...], list[str]]]] = {}
    for (kind, _, relations), rows in groupby(read_table("passages"), itemgetter("kind", "sentence", "relations")):
        passages.setdefault(kind, []).append((tuple(relations.split()), [row["wording"] for row in rows]))
    return passages


# Kind of subject -> subject -> relation -> true answer.
REAL_FACTS = {
    "country": _real_facts("countries"),
    "element": _real_facts("elements"),
    "games": _real_facts("olympics"),
}
# (subject, relation) -> the false answer that the model is taught.
ERRORS = {(row["subject"], row["relation"]): row["answer"] for row in read_table("errors")}

FIRST_NAMES = {row["name"]: {"he": row["he"], "him": row["him"]} for row in read_table("first_names")}
SURNAMES = [row["name"] for row in read_table("surnames")]
VALUES = _by("values", "value", "relation")
PROMPTS = _by("prompts", "prompt", "relation")
PASSAGES = _passages()
ATLAS = _by("atlas", "text", "kind", "relation", "form")
