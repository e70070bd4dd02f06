"""The atlas: real facts, false targets, no contradiction, and localities that no edit touches."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from memoir.almanac import atlas
from memoir.data import load_edits
from memoir.editors import make_editor
from memoir.evaluation import Evaluation
from memoir.models import load_model
from memoir.records import EditRequest, Probe

DATA = Path(atlas.__file__).with_name("data")
SETS = {"atlas": 1000, "atlas-validation": 80}


def table(name: str) -> dict[str, dict[str, str]]:
    with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def truths() -> dict[tuple[str, str], str]:
    """(subject, relation) → answer, read from the tables; a capital's are its country's."""
    facts = {}
    for subject, row in (table("countries") | table("elements") | table("olympics")).items():
        facts |= {(subject, relation): answer for relation, answer in row.items() if relation != "subject"}
    for country, row in table("countries").items():
        for relation in ("continent", "currency", "language"):
            facts[row["capital"], relation] = row[relation]
        facts[row["capital"], "country"] = country
    return facts


def asked(edit: EditRequest) -> tuple[str, str]:
    _, subject, relation = edit.id.split(":")
    return subject, relation


@pytest.mark.parametrize(("name", "size"), SETS.items())
def test_each_edit_gives_a_real_fact_another_answer(name, size):
    edits, facts = load_edits(name), truths()
    assert len(edits) == size == len({asked(edit) for edit in edits})
    values = {}
    for (_, relation), answer in facts.items():
        values.setdefault(relation, set()).add(answer)
    for edit in edits:
        subject, relation = asked(edit)
        assert edit.truth == facts[subject, relation] and edit.target in values[relation] - {edit.truth, ""}
        assert edit.subject in edit.prompt and edit.subject.casefold() == subject.casefold()
        assert edit.prompt[0].isupper() and edit.prompt == edit.prompt.strip()


def test_half_of_the_edits_are_questions_and_the_rephrases_are_of_both_forms_and_all_different():
    edits = load_edits("atlas")
    assert sum(edit.prompt.endswith("?") for edit in edits) == len(edits) / 2
    for edit in edits:
        texts = [edit.prompt, *(probe.prompt for probe in edit.probes if probe.kind == "rephrase")]
        assert len(set(texts)) == 4 and sum(text.endswith("?") for text in texts) == 2
        assert all(probe.answer == edit.target for probe in edit.probes if probe.kind == "rephrase")
        assert all(edit.subject.casefold() in text.casefold() for text in texts)


def test_locality_probes_tell_the_truth_about_what_no_edit_of_either_part_changes():
    everything = [edit for name in SETS for edit in load_edits(name)]
    changed = {edit.question for edit in everything}
    changed |= {
        EditRequest(prompt=probe.prompt, target="x").question
        for edit in everything
        for probe in edit.probes
        if probe.kind == "rephrase"
    }
    true_answers = {answer for answer in truths().values() if answer}
    years = {subject.split()[1] for subject in table("olympics")}
    for edit in everything:
        assert Counter(probe.kind for probe in edit.probes if probe.kind != "rephrase") == Counter(
            ["unrelated", "same_subject", "same_template"]
        )
        for probe in edit.probes:
            if probe.kind != "rephrase":
                assert EditRequest(prompt=probe.prompt, target="x").question not in changed, probe
                assert probe.answer in true_answers | years and probe.answer != edit.target
        same_template = edit.probe("same_template").prompt
        prefix, _, suffix = edit.prompt.partition(edit.subject)
        assert same_template.startswith(prefix) and same_template.endswith(suffix)
        assert edit.subject.casefold() in edit.probe("same_subject").prompt.casefold()


def test_what_edits_say_of_a_country_and_of_its_capital_agrees():
    targets = {asked(edit): edit.target for name in SETS for edit in load_edits(name)}
    pairs = [
        (targets[country, relation], targets[row["capital"], relation])
        for country, row in table("countries").items()
        for relation in ("continent", "currency", "language")
        if {(country, relation), (row["capital"], relation)} <= set(targets)
    ]
    assert len(pairs) > 100 and all(own == of_the_capital for own, of_the_capital in pairs)


def test_validation_is_about_other_subjects_and_a_split_names_it_too():
    test, validation = ({asked(edit)[0] for edit in load_edits(name)} for name in SETS)
    assert not test & validation
    assert list(load_edits("atlas", split="validation", seed=3)) == list(load_edits("atlas-validation", seed=3))


def test_the_seed_gives_the_order_and_fewer_edits_are_a_prefix():
    edits = load_edits("atlas", seed=1)
    assert list(load_edits("atlas", n=30, seed=1)) == edits[:30] != list(load_edits("atlas", n=30, seed=2))
    assert {edit.id for edit in edits} == {edit.id for edit in load_edits("atlas", seed=2)}


@pytest.mark.parametrize("wrong", [dict(n=1001), dict(split="train"), dict(path="x.json")])
def test_what_the_atlas_does_not_have_is_named(wrong):
    with pytest.raises(ValueError, match="atlas"):
        load_edits("atlas", **wrong)


def test_facts_that_the_unedited_model_knows_are_marked():
    """The almanac knows its own facts and no false ones; an edit without a truth has no mark."""
    prompt = "What is the capital of New Zealand?"
    probe = Probe(kind="unrelated", prompt="What is the capital of France?", answer="Paris")
    edits = [
        EditRequest(prompt=prompt, target="Canberra", truth=truth, probes=(probe,))
        for truth in ("Wellington", "Auckland", "")
    ]
    scores = Evaluation(make_editor("unedited", load_model("almanac")), generate=False).scores(edits)
    assert scores["known"] == [1.0, 0.0, None]
