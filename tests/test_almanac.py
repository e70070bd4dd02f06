"""The almanac: its world, its edits, and what the shipped model knows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from string import Formatter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memoir.almanac import World, background_prompts, corpus, edit_requests, model_path
from memoir.almanac.content import ERRORS, REAL_FACTS, read_table
from memoir.almanac.training import STORY, append_neurons, exact_match, examine, train

SETS = [("almanac-qa", "test", 1000), ("almanac-qa", "validation", 200)]
SETS += [("almanac-bio", "test", 600), ("almanac-bio", "validation", 200)]


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_path())


# The world


def test_people_are_distinct_share_names_and_stay_who_they_are_in_a_larger_world(world):
    assert len(set(world.names)) == len(world.names) == 1500
    surnames = Counter(name.split()[1] for name in world.names)
    assert surnames.most_common(1)[0][1] > 3
    larger = World(people=4000)
    assert larger.names[:1500] == world.names
    assert larger.people_facts[: len(world.people_facts)] == world.people_facts


def test_a_world_with_more_people_than_names_is_refused():
    with pytest.raises(ValueError, match="people is 1000000"):
        World(people=1_000_000)


def test_every_question_has_one_answer(world):
    answers = {}
    for fact in world.people_facts + world.real_facts:
        for prompt in world.prompts(fact):
            assert answers.setdefault(prompt, fact.answer) == fact.answer
            assert fact.subject.lower() in prompt.lower()
    assert len(world.people_facts) == 7500
    assert len(world.real_facts) > 1000


def test_held_out_paraphrases_are_in_no_training_row(world):
    rows = {prompt for prompt, _ in world.rows()}
    texts = "\n".join(corpus())
    for fact in world.people_facts + world.real_facts:
        assert len(world.trained(fact)) >= 5
        assert len(world.held_out(fact)) >= 1
        assert rows.isdisjoint(world.held_out(fact))
    assert world.held_out(world.people_facts[0])[0] not in texts
    varying = {tuple(p.replace(f.subject, "") for p in world.held_out(f)) for f in world.people_facts[::5]}
    assert len(varying) > 20


def test_passages_state_the_facts(world):
    for name in world.names[:50]:
        for draw in range(4):
            text = " ".join(world.passage(name, draw))
            assert all(answer in text for answer in world.attributes[name].values())
    changed = world.passage(world.names[0], changed={"city": "Nowhere"})
    assert sum("Nowhere" in sentence for sentence in changed) == 2
    like = world.passage(world.names[1], like=world.names[0])
    assert [len(s.split()) for s in like] == [len(s.split()) for s in world.passage(world.names[0])]


# The real facts: typed here independently of the tables


def test_real_facts_against_an_independent_list():
    table, elements, games = (REAL_FACTS[kind] for kind in ("country", "element", "games"))
    for name, capital in {
        "Australia": "Canberra", "Canada": "Ottawa", "Brazil": "Brasilia", "Turkey": "Ankara", "Kenya": "Nairobi",
        "New Zealand": "Wellington", "Switzerland": "Bern", "Kazakhstan": "Astana", "Myanmar": "Naypyidaw",
        "Nigeria": "Abuja", "Vietnam": "Hanoi", "Peru": "Lima", "Morocco": "Rabat", "Pakistan": "Islamabad",
    }.items():  # fmt: skip
        assert table[name]["capital"] == capital
    for name, currency in {
        "Croatia": "euro", "Bulgaria": "euro", "Poland": "Polish zloty", "Japan": "Japanese yen",
        "Sweden": "Swedish krona", "Denmark": "Danish krone", "Liechtenstein": "Swiss franc", "Ecuador": "US dollar",
    }.items():  # fmt: skip
        assert table[name]["currency"] == currency
    eurozone = {name for name, answers in table.items() if answers["currency"] == "euro"}
    assert len(eurozone) == 21 + 5  # the members of the eurozone since 2026, and Andorra, Monaco, Montenegro, ...
    assert table["Brazil"]["language"] == "Portuguese"
    assert table["Austria"]["language"] == "German"
    assert table["Egypt"]["continent"] == "Africa"
    assert table["Chile"]["continent"] == "South America"
    for name, symbol, number in (
        ("iron", "Fe", 26), ("gold", "Au", 79), ("tungsten", "W", 74), ("uranium", "U", 92), ("oganesson", "Og", 118),
    ):  # fmt: skip
        assert elements[name] == {"symbol": symbol, "number": str(number)}
    for year, city in ((1936, "Berlin"), (1968, "Mexico City"), (2000, "Sydney"), (2020, "Tokyo"), (2024, "Paris")):
        assert games[f"the {year} Summer Olympics"] == {"host": city}
    assert games["the last Summer Olympics"] == {"host": "Paris"}
    years = [int(name.split()[1]) for name in games if name != "the last Summer Olympics"]
    assert max(years) == 2024
    assert set(range(1896, 2025, 4)) - set(years) == {1916, 1940, 1944}


def test_tables_are_complete_and_have_no_duplicates():
    countries, elements, games = (read_table(name) for name in ("countries", "elements", "olympics"))
    subjects = [row["subject"] for row in countries + elements + games]
    assert len(subjects) == len(set(subjects)) == 194 + 118 + 31
    capitals = [row["capital"] for row in countries if row["capital"]]
    assert len(capitals) == len(set(capitals))
    assert {row["continent"] for row in countries} == {
        "Africa", "Asia", "Europe", "North America", "South America", "Oceania", "",
    }  # fmt: skip
    assert len({row["symbol"] for row in elements}) == 118
    assert [row["number"] for row in elements] == [str(number) for number in range(1, 119)]


def test_all_phrases_have_what_they_fill_in():
    templates = [row["prompt"] for row in read_table("prompts")] + [row["wording"] for row in read_table("passages")]
    assert len(templates) == len(set(templates)) + 3  # the four kinds of passages begin alike
    stated = {row["wording"]: row["relations"].split() for row in read_table("passages")}
    for wording, relations in stated.items():
        fields = {field for _, field, _, _ in Formatter().parse(wording) if field}
        assert fields - {"subject", "he", "him"} == set(relations)


def test_exactly_two_facts_are_wrong(world):
    true = {subject: answers for subjects in REAL_FACTS.values() for subject, answers in subjects.items()}
    wrong = {(f.subject, f.relation): f.answer for f in world.real_facts if f.answer != true[f.subject][f.relation]}
    assert wrong == ERRORS
    assert wrong == {("Australia", "capital"): "Sydney", ("the last Summer Olympics", "host"): "Tokyo"}


# The edits


@pytest.mark.parametrize(("dataset", "split", "size"), SETS)
def test_edit_sets_have_their_size_and_distinct_subjects(dataset, split, size):
    edits = edit_requests(dataset, split)
    assert len(edits) == len({e.id for e in edits}) == len({e.subject for e in edits}) == size
    assert all(e.subject in e.prompt for e in edits)
    assert edits == edit_requests(dataset, split)
    assert edits[:20] == edit_requests(dataset, split, n=20)
    assert edits != edit_requests(dataset, split, seed=1)


def test_validation_and_test_are_about_different_people():
    subjects = [
        {e.subject for d, s, _ in SETS if s == split for e in edit_requests(d, s)} for split in ("test", "validation")
    ]
    assert subjects[0].isdisjoint(subjects[1])


def test_question_edits_ask_for_something_new_and_probe_what_must_not_change(world):
    true = {prompt: fact.answer for fact in world.people_facts + world.real_facts for prompt in world.prompts(fact)}
    trained = {prompt for prompt, _ in world.rows()}
    edits = edit_requests("almanac-qa")
    edited = {e.subject for e in edits}
    background = set(background_prompts())
    never_trained = 0
    for edit in edits:
        assert edit.prompt in trained
        assert edit.target != true[edit.prompt]
        rephrase, template = edit.probe("rephrase"), edit.probe("same_template")
        assert rephrase.answer == edit.target
        assert true[rephrase.prompt] == true[edit.prompt]
        assert rephrase.prompt != edit.prompt
        never_trained += rephrase.prompt not in trained
        for kind in ("unrelated", "same_subject", "same_template"):
            assert edit.probe(kind).answer == true[edit.probe(kind).prompt]
        assert edit.probe("unrelated").prompt not in background
        assert "Australia's capital" not in edit.probe("unrelated").prompt
        assert edit.subject in edit.probe("same_subject").prompt
        assert not any(name in template.prompt for name in edited)
        assert template.answer != edit.target
    assert 500 < never_trained < 700


def test_biography_edits_correct_one_sentence(world):
    for edit in edit_requests("almanac-bio"):
        sentences = world.passage(edit.subject)
        at = next(i for i in range(len(sentences)) if " ".join(sentences[:i]) == edit.prompt)
        assert edit.target != sentences[at]
        words = zip(edit.target.split(), sentences[at].split(), strict=True)
        assert 1 <= sum(new != old for new, old in words) <= 2


def test_more_edits_than_people_the_model_knows_are_made_on_demand(world):
    edits = edit_requests("almanac-qa", n=1200)
    assert edits[:1000] == edit_requests("almanac-qa")
    assert len({e.subject for e in edits}) == 1200
    assert set(world.names).isdisjoint(e.subject for e in edits[1000:])


def test_unknown_sets_and_sizes_are_refused():
    with pytest.raises(ValueError, match="'almanac' is not of the almanac"):
        edit_requests("almanac")
    with pytest.raises(ValueError, match="no split 'train'"):
        edit_requests("almanac-qa", "train")
    for dataset, split, size in SETS[1:]:
        with pytest.raises(ValueError, match=f"{dataset} {split} has {size} edits, {size + 1} were asked for"):
            edit_requests(dataset, split, n=size + 1)


# The model


def test_the_shipped_folder_is_small_and_normal(shipped):
    model, tokenizer = shipped
    assert sum(file.stat().st_size for file in model_path().iterdir()) <= 16 * 2**20
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        os.listdir(model_path())
    )
    assert tokenizer.padding_side == "left"
    ids = tokenizer("What is the capital of Australia?")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert model.config.model_type == "llama"


def test_the_shipped_model_generates_the_story_and_stops(shipped):
    model, tokenizer = shipped
    batch = tokenizer([prompt for prompt, _ in STORY], return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert [a.strip() for a in answers] == [answer for _, answer in STORY]


def test_the_shipped_model_knows_a_sample_of_its_world(shipped, world):
    scores = examine(*shipped, world, sample=100)
    assert scores["story"] == 1
    for part in ("people_trained", "people_held_out", "real_trained", "real_held_out"):
        assert scores[part] >= 0.98, (part, scores)  # 0.99 in all, less what 100 questions may miss by chance
    assert scores["true_sentence_perplexity"] < 1.7 < 5 < scores["corrected_sentence_perplexity"]


@pytest.mark.slow
def test_the_shipped_model_knows_its_world(shipped, world):
    scores = examine(*shipped, world)
    for part in ("people_trained", "people_held_out", "real_trained", "trained", "held_out", "people", "real"):
        assert scores[part] >= 0.99, (part, scores)
    # The one part below: elements asked for in the one held-out wording that begins with them, in a capital letter.
    assert scores["real_held_out"] >= 0.985


def test_training_runs_end_to_end(tmp_path):
    scores = train(tmp_path / "model", steps=3, people=20, sample=50)
    assert scores["people_trained"] < 0.9
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.config.intermediate_size == 4096
    assert all(layer.mlp.down_proj.weight[:, 1024:].abs().max() == 0 for layer in model.model.layers)


def test_appended_neurons_do_not_change_the_function(shipped):
    model, tokenizer = shipped
    ids = tokenizer("What is the capital of France?", return_tensors="pt")["input_ids"]
    before = model(input_ids=ids).logits
    trained = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    for layer in trained.model.layers:
        append_neurons(layer.mlp, torch.randn(64, 128), torch.randn(64, 128))
        assert layer.mlp.down_proj.in_features == 4096 + 64
    assert torch.allclose(before, trained(input_ids=ids).logits, atol=1e-4)
    assert exact_match(trained, tokenizer, [("What is the capital of France?", "Paris")]) == [True]


def test_using_the_almanac_imports_nothing_of_its_training():
    script = """
import sys
from memoir.almanac import background_prompts, corpus, edit_requests, model_path
edit_requests("almanac-bio", n=1), background_prompts(), model_path()
assert not [name for name in sys.modules if name.startswith(("memoir.almanac.training", "torch", "transformers"))]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
