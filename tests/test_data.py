from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from memoir.data import load_background, load_edits
from memoir.formats import FORMATS, format_of
from memoir.records import BadInput

ZSRE = dict(subject="Zinc", src="What is zinc?", rephrase="Zinc is?", alt="metal", loc="nq question: who", loc_ans="me")
SELFCHECK = dict(
    prompt="A passage.", target_new="A sentence.", subject="it", locality_prompt="Some", locality_ground_truth="text"
)
COUNTERFACT = dict(
    case_id=3,
    prompt="The mother tongue of Ida is",
    target_new="Czech",
    subject="Ida",
    ground_truth="Dutch",
    rephrase_prompt="Ida speaks",
    locality_prompt="The mother tongue of Olo is",
    locality_ground_truth="Danish",
)
QAEDIT = dict(
    id=1,
    source="NQ",
    prompt="who wrote it?",
    target="Ida",
    subject="it",
    rephrase="Its author is who?",
    locality=[{"loc": "where is Brno", "loc_ans": "Moravia"}, {"loc": "who is Olo", "loc_ans": "a singer"}],
)
KNOWEDIT = dict(
    subject="Zinc",
    prompt="Zinc's symbol is",
    target_new="Xy",
    ground_truth=["Zn"],
    rephrase_prompt="One writes zinc as",
    locality={"Relation_Specificity": [{"prompt": "Zinc's colour is", "ground_truth": [["grey", "gray"]]}]},
    portability={},
)
NESTED = dict(
    case_id=0,
    requested_rewrite={
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "Czech", "id": "Q9056"},
        "target_true": {"str": "Dutch", "id": "Q7411"},
        "subject": "Ida",
    },
    paraphrase_prompts=["Rain. Ida speaks", "Ida was born, and speaks"],
    neighborhood_prompts=["The mother tongue of Olo is", "Mira speaks"],
    attribute_prompts=["Uwe speaks"],
    generation_prompts=["Ida lives in"],
)
BIOGRAPHY = dict(
    concept="Ida",
    text="Ida is",
    labels="a potter.",
    locality={"Relation_Specificity": [{"prompt": "Ida's home is", "ground_truth": [["Ulm", "Ulm an der Donau"]]}]},
)
UNKE = dict(
    id=0,
    question="What does Ida do?",
    para_question="What is Ida's work?",
    answer="Ida is a potter. She lives in Ulm.",
    sub_question=["Where does Ida live?"],
    sub_answer=["Ulm."],
)
MQUAKE = dict(
    case_id=1,
    requested_rewrite=[
        {"prompt": "{} is a citizen of", "target_new": {"str": "Peru"}, "subject": "Ida", "question": "Ida's country?"},
        {"prompt": "The capital of {} is", "target_new": {"str": "Ulm"}, "subject": "Peru", "question": "Peru's?"},
    ],
    questions=["What is the capital of Ida's country?"],
    new_answer="Ulm",
)
EASYEDIT = dict(
    prompt="Ida speaks",
    target_new="Czech",
    ground_truth="Dutch",
    subject="Ida",
    locality={"neighborhood": {"prompt": ["Olo speaks", "Mira speaks"], "ground_truth": ["Danish", "Welsh"]}},
    rephrase_prompt="Ida's tongue is",
)
TABLE = dict(
    prompt="Ida speaks", target="Czech", rephrase="Ida's is", unrelated="Olo speaks", unrelated_answer="Danish"
)
RECORDS = dict(
    zsre=ZSRE, counterfact=COUNTERFACT, selfcheckgpt=SELFCHECK, qaedit=QAEDIT, knowedit=KNOWEDIT, unke=UNKE,
    mquake=MQUAKE, easyedit={"prompt": "Ida speaks", "target_new": "Czech"}, table=TABLE,
)  # fmt: skip
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").partition("### Your own data")[2]
README_ROWS = re.findall(r"^\| `(\w+)`.*\| `(\{.*\})` \|$", README.partition("\n## ")[0], re.MULTILINE)
REAL = Path(__file__).parents[2] / "shared" / "data"


def written(tmp_path, records) -> Path:
    path = tmp_path / "edits.json"
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


def test_the_wise_format_becomes_the_common_schema(tmp_path):
    (edit,) = load_edits("zsre", path=written(tmp_path, [ZSRE]))
    assert (edit.prompt, edit.target, edit.subject) == ("What is zinc?", "metal", "Zinc")
    assert edit.probe("rephrase").answer == "metal" and edit.probe("unrelated").prompt == "nq question: who"
    (edit,) = load_edits("selfcheckgpt", path=written(tmp_path, [SELFCHECK]))
    assert (edit.target, edit.probe("unrelated").answer, edit.probe("rephrase")) == ("A sentence.", "text", None)
    (edit,) = load_edits("selfcheckgpt", path=written(tmp_path, [SELFCHECK | {"locality_ground_truth": ""}]))
    assert edit.probes == ()


def test_n_and_seed_choose(tmp_path):
    path = written(tmp_path, [ZSRE | {"subject": str(i), "src": f"What is {i}?"} for i in range(30)])
    chosen = load_edits("zsre", path=path, n=10, seed=3)
    assert chosen == load_edits("zsre", path=path, n=10, seed=3) != load_edits("zsre", path=path, n=10, seed=4)
    assert len({e.id for e in chosen}) == 10 and (chosen.name, chosen.seed) == ("zsre", 3)
    assert load_edits("zsre", path=path, seed=3)[:10] != load_edits("zsre", path=path)[:10]


def probes(edit):
    return [(probe.kind, probe.prompt, probe.answer) for probe in edit.probes]


def test_the_forms_of_other_benchmarks_become_the_common_schema(tmp_path):
    (edit,) = load_edits("counterfact", path=written(tmp_path, [COUNTERFACT]))
    assert (edit.prompt, edit.target, edit.subject) == ("The mother tongue of Ida is", "Czech", "Ida")
    assert probes(edit) == [
        ("rephrase", "Ida speaks", "Czech"),
        ("unrelated", "The mother tongue of Olo is", "Danish"),
    ]
    (edit,) = load_edits("qaedit", path=written(tmp_path, [QAEDIT]))
    assert (edit.target, edit.subject) == ("Ida", "it")
    assert probes(edit) == [
        ("rephrase", "Its author is who?", "Ida"),
        ("unrelated", "where is Brno", "Moravia"),
        ("unrelated", "who is Olo", "a singer"),
    ]
    (edit,) = load_edits("knowedit", path=written(tmp_path, [KNOWEDIT]))
    assert probes(edit) == [("rephrase", "One writes zinc as", "Xy"), ("same_subject", "Zinc's colour is", "grey")]

    nested, biography = (load_edits(name, path=written(tmp_path, [record])) for name, record in OTHER_FORMS)
    assert (nested[0].prompt, nested[0].target, nested[0].subject) == ("The mother tongue of Ida is", "Czech", "Ida")
    assert probes(nested[0]) == [
        ("rephrase", "Rain. Ida speaks", "Czech"),
        ("rephrase", "Ida was born, and speaks", "Czech"),
        ("unrelated", "The mother tongue of Olo is", "Dutch"),
        ("unrelated", "Mira speaks", "Dutch"),
    ]
    assert (biography[0].prompt, biography[0].target, biography[0].subject) == ("Ida is", "a potter.", "Ida")
    assert probes(biography[0]) == [("same_subject", "Ida's home is", "Ulm")]
    (edit,) = load_edits("unke", path=written(tmp_path, [UNKE]))
    assert (edit.prompt, edit.target, edit.subject) == ("What does Ida do?", UNKE["answer"], "")
    assert probes(edit) == [("rephrase", "What is Ida's work?", UNKE["answer"])]
    (edit,) = load_edits("easyedit", path=written(tmp_path, [EASYEDIT]))
    assert probes(edit) == [
        ("rephrase", "Ida's tongue is", "Czech"),
        ("unrelated", "Olo speaks", "Danish"),
        ("unrelated", "Mira speaks", "Welsh"),
    ]


OTHER_FORMS = [("counterfact", NESTED), ("knowedit", BIOGRAPHY)]


def test_mquake_gives_each_of_its_single_edits_once(tmp_path):
    again = MQUAKE | {"requested_rewrite": MQUAKE["requested_rewrite"][::-1]}
    edits = load_edits("mquake", path=written(tmp_path, [MQUAKE, again]))
    assert {(e.prompt, e.target, e.subject, e.probes[0].prompt) for e in edits} == {
        ("Ida is a citizen of", "Peru", "Ida", "Ida's country?"),
        ("The capital of Peru is", "Ulm", "Peru", "Peru's?"),
    }
    assert len(edits) == 2 and all(place.endswith("edits.json, record 0") for place in edits.places)


def test_a_plain_table_needs_two_columns(tmp_path):
    texts = {
        "plain.csv": "prompt,target\nIda speaks,Czech\n",
        "excel.csv": '\ufeffPrompt;Target;Subject;Note;\r\n"Ida; she\nspeaks";Czech;;x;\r\n;;;;\r\n',
        "tabs.tsv": "id\tprompt\ttarget\n1\tIda speaks\t1969\n",
        "lines.jsonl": '{"prompt": "Ida speaks", "target": 1969, "rephrase": ["Ida\'s is", "Hers is"]}\n',
        "one.json": json.dumps(TABLE),
    }
    loaded = {}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-16" if name == "tabs.tsv" else "utf-8", newline="")
        (loaded[name],) = load_edits("mine", path=tmp_path / name)
    assert (loaded["plain.csv"].prompt, loaded["plain.csv"].target) == ("Ida speaks", "Czech")
    assert loaded["excel.csv"].prompt == "Ida; she\nspeaks" and loaded["excel.csv"].subject == ""
    assert loaded["tabs.tsv"].target == loaded["lines.jsonl"].target == "1969"
    assert probes(loaded["lines.jsonl"]) == [("rephrase", "Ida's is", "1969"), ("rephrase", "Hers is", "1969")]
    assert probes(loaded["one.json"]) == [("rephrase", "Ida's is", "Czech"), ("unrelated", "Olo speaks", "Danish")]


def test_edits_that_were_saved_as_json_come_back_whole(tmp_path):
    edits = [edit for record in RECORDS.values() for edit in load_edits("any", path=written(tmp_path, [record]))]
    again = load_edits("mine", path=written(tmp_path, [edit.to_json() for edit in edits]))
    assert sorted(again, key=repr) == sorted(edits, key=repr)


def test_a_misspelt_column_is_not_passed_over(tmp_path):
    with pytest.raises(BadInput, match="record 0: key 'rephrse' is unknown, expected 'rephrase'"):
        load_edits("mine", path=written(tmp_path, [{"prompt": "a", "target": "b", "rephrse": "c"}]))


@pytest.mark.parametrize("rows", ["a,b,c,\nd,e,f,g\n", "a,b,,c\nd,e,f,g\n", "a,b,,c\nd,e,,f\n"])
def test_a_column_beside_the_one_it_resembles_is_no_misspelling_in_any_row(tmp_path, rows):
    (tmp_path / "edits.csv").write_text(f"prompt,target,rephrase,rephrase_2\n{rows}")
    assert len(load_edits("mine", path=tmp_path / "edits.csv")) == 2
    (tmp_path / "edits.csv").write_text(f"prompt,target,subject,rephrase_2\n{rows}")
    with pytest.raises(BadInput, match="key 'rephrase_2' is unknown, expected 'rephrase'"):
        load_edits("mine", path=tmp_path / "edits.csv")


@pytest.mark.parametrize("name", FORMATS)
def test_a_files_format_is_told_from_its_keys_or_by_name(tmp_path, name):
    path = written(tmp_path, [RECORDS[name]])
    expected = load_edits(name, path=path)
    told, said = load_edits("mine", path=path), load_edits("mine", path=path, format=name)
    assert expected == told == said and told.name == said.name == "mine"
    with pytest.raises(BadInput, match="of no known format: its first record has the keys a; expected zsre: subject"):
        load_edits("mine", path=written(tmp_path, [{"a": 1}]))
    with pytest.raises(BadInput, match="format 'csv' is unknown; expected one of zsre, counterfact"):
        load_edits("mine", path=path, format="csv")


# A list or an object may be missing a value, and a subject or an answer may be empty.
MAY_BE_EMPTY = {"locality_ground_truth", "subject", "concept", "locality", "paraphrase_prompts", "questions"}
MAY_BE_EMPTY |= {"neighborhood_prompts", "new_answer"}


@pytest.mark.parametrize(
    ("name", "good", "keys"),
    [
        *((name, record, FORMATS[name][0].keys) for name, record in RECORDS.items() if name != "table"),
        *((name, record, FORMATS[name][1].keys) for name, record in [*OTHER_FORMS, ("table", TABLE)]),
    ],
)
def test_every_missing_or_empty_key_is_named(tmp_path, name, good, keys):
    for key in keys:
        broken = {k: v for k, v in good.items() if k != key}
        with pytest.raises(BadInput, match=rf"edits\.json, record 1: key '{key}' is missing; {name} records carry"):
            load_edits(name, path=written(tmp_path, [good, broken]))
        if key not in MAY_BE_EMPTY and key != "requested_rewrite":
            with pytest.raises(BadInput, match=rf"record 1: key '{key}' holds \" \", expected text that is not empty"):
                load_edits(name, path=written(tmp_path, [good, good | {key: " "}]))
        needed = {"concept", "locality_ground_truth"} | ({"subject"} if name != "knowedit" else set())
        if key not in MAY_BE_EMPTY - needed:
            wanted = "a list of objects" if name == "mquake" else "an object" if good is NESTED else "text"
            with pytest.raises(BadInput, match=rf"edits\.json, record 1: key '{key}' holds null, expected {wanted}"):
                load_edits(name, path=written(tmp_path, [good, good | {key: None}]))


INNER = [  # a record, what is wrong in it, and what the message says
    (NESTED, ("requested_rewrite", "subject"), 3.5, "key 'requested_rewrite.subject' holds 3.5, expected text"),
    (
        NESTED,
        ("requested_rewrite", "target_new", "str"),
        "",
        "'requested_rewrite.target_new.str' holds \"\", expected t",
    ),
    (NESTED, ("paraphrase_prompts",), ["a", None], "key 'paraphrase_prompts' holds null, expected text"),
    (MQUAKE, ("requested_rewrite", 1, "prompt"), [], "key 'requested_rewrite[1].prompt' holds [], expected text"),
    (MQUAKE, ("requested_rewrite",), [], "key 'requested_rewrite' holds [], expected one edit or more"),
    (QAEDIT, ("locality", 0), "x", "key 'locality' holds [\"x\""),
    (QAEDIT, ("locality", 1, "loc_ans"), True, "key 'locality[1].loc_ans' holds true, expected text"),
    (KNOWEDIT, ("locality",), [1], "key 'locality' holds [1], expected an object"),
    (
        KNOWEDIT,
        ("locality", "Relation_Specificity", 0, "ground_truth"),
        [[7.5]],
        "ground_truth' holds 7.5, expected text",
    ),
    (EASYEDIT, ("locality", "neighborhood", "ground_truth"), ["a"], "expected a list of 2, as many as under"),
    (TABLE, ("unrelated_answer",), "", "key 'unrelated_answer' holds \"\", expected the answer to 'unrelated'"),
    (TABLE, ("unrelated",), None, "key 'unrelated' holds null, expected text"),
    (TABLE, ("target",), "\ud800", "key 'target' holds \"\\ud800\", expected valid Unicode text (no lone surrogates)"),
]


@pytest.mark.parametrize(("good", "path", "value", "said"), INNER, ids=[str(row[1]) for row in INNER])
def test_what_is_wrong_inside_a_record_is_named_with_its_path(tmp_path, good, path, value, said):
    broken = json.loads(json.dumps(good))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BadInput, match=re.escape(said)):
        load_edits("mine", path=written(tmp_path, [good, broken]))


def test_all_records_that_cannot_be_read_are_named_up_to_ten(tmp_path):
    bad = [ZSRE | {"alt": None}] * 11
    with pytest.raises(BadInput) as caught:
        load_edits("zsre", path=written(tmp_path, [ZSRE, QAEDIT, *bad]))
    lines = str(caught.value).splitlines()
    assert (
        lines[0].startswith("12 of 13 records are bad: ") and "edits.json, record 1: key 'src' is missing" in lines[0]
    )
    assert "those of qaedit" in lines[0] and len(lines) == 12
    assert lines[1].endswith("edits.json, record 2: key 'alt' holds null, expected text")
    assert lines[-2:] == ["and 2 more", "fix them, or skip them: --skip-bad or skip_bad=True"]


def test_bad_records_are_left_out_and_told(tmp_path):
    path = written(tmp_path, [3, ZSRE, ZSRE | {"alt": None}, ZSRE | {"src": "Zinc?"}])
    edits = load_edits("mine", path=path, skip_bad=True)
    assert {edit.prompt for edit in edits} == {"What is zinc?", "Zinc?"}
    assert edits.skipped == (
        f"{path}, record 0: 3 is not a record, expected an object with the keys of zsre",
        f"{path}, record 2: key 'alt' holds null, expected text",
    )
    assert dict(zip(edits.places, edits, strict=True))[f"{path}, record 3"].prompt == "Zinc?"
    with pytest.raises(BadInput, match=r"n = 3 edits, but .* holds 2 besides 2 bad records"):
        load_edits("mine", path=path, skip_bad=True, n=3)
    with pytest.raises(BadInput, match="2 of 2 records are bad"):  # then nothing is left to go on with
        load_edits("zsre", path=written(tmp_path, [3, {}]), skip_bad=True)


@pytest.mark.parametrize(("name", "record"), README_ROWS)
def test_each_record_of_the_readme_is_loaded(tmp_path, name, record):
    path = written(tmp_path, f"[{record}]")
    (edit,) = load_edits("mine", path=path)
    assert load_edits(name, path=path) == [edit] and format_of(json.loads(record)) == name
    assert "Ida" in edit.prompt or "Ida" in edit.subject


def test_the_readme_has_every_format_and_form(tmp_path):
    assert {name for name, _ in README_ROWS} == set(FORMATS)
    assert len(README_ROWS) == sum(map(len, FORMATS.values()))
    table = re.search(r"```csv\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "edits.csv").write_text(table)
    (edit,) = load_edits("mine", path=tmp_path / "edits.csv")
    assert (edit.prompt, edit.target, edit.subject, len(edit.probes)) == ("Ida plays the", "oboe", "Ida", 2)
    assert set(table.splitlines()[0].split(",")) == {*FORMATS["table"][1].keys, *FORMATS["table"][1].optional}


@pytest.mark.parametrize("name", ["bom.json", "lines.jsonl", "lines.json.gz"])
def test_records_are_read_with_a_byte_order_mark_line_by_line_or_packed(tmp_path, name):
    texts = {
        "bom.json": "\ufeff" + json.dumps([ZSRE]),
        "lines.jsonl": json.dumps(ZSRE) + "\n",
        "lines.json.gz": json.dumps(ZSRE) + "\n" + json.dumps(ZSRE),
    }
    data = texts[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert load_edits("zsre", path=tmp_path / name)[0].target == "metal"


def test_background_is_a_list_of_texts_or_a_text_a_line(tmp_path):
    assert load_background(written(tmp_path, ["text"])) == ["text"]
    (tmp_path / "background.txt").write_text("Is it late?\n\nTwo and two\n")
    assert load_background(tmp_path / "background.txt") == ["Is it late?", "Two and two"]


def test_a_hub_id_goes_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path, split):
        asked.append((path, split))
        return datasets.Dataset.from_list([ZSRE])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda name, timeout: None)
    (edit,) = load_edits("zsre", path="someone/zsre", split="train")
    assert asked == [("someone/zsre", "train")] and edit.target == "metal"


def test_a_folder_goes_through_datasets_too(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([ZSRE, ZSRE | {"alt": None}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput, match=r"1 of 2 records are bad: .*saved, record 1: key 'alt' holds null"):
        load_edits("mine", path=tmp_path / "saved")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.csv").write_text("prompt,target\nIda was born in,1969\n")
    (edit,) = load_edits("mine", path=tmp_path / "files", split="train")
    assert edit.target == "1969"
    with pytest.raises(BadInput, match=r"files cannot be loaded by `datasets` with the split 'test': .*train"):
        load_edits("mine", path=tmp_path / "files")


def test_a_cached_hub_id_needs_no_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda name, timeout: 1 / 0)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_list([ZSRE]))
    (tmp_path / "Some_One___zs_re").mkdir()  # as `datasets` writes the name
    (edit,) = load_edits("zsre", path="Some_One/ZsRE")
    assert edit.target == "metal"
    with pytest.raises(BadInput, match="no such file: ZsRE"):
        load_edits("zsre", path="ZsRE")


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("zsre", "zsre/zsre_mend_edit.json", 1000),
        ("selfcheckgpt", "selfcheckgpt/hallucination-edit.json", 600),
        ("counterfact", "counterfact/counterfact-edit.json", 1000),
        ("qaedit", "qaedit/qaedit-validation.json", 300),
    ],
)
def test_the_public_files_load_whole(name, file, count):
    if not (REAL / file).is_file():
        pytest.skip(f"{file} of the public releases is not beside this checkout")
    edits = load_edits(name, path=REAL / file)
    assert edits == load_edits("told from its keys", path=REAL / file)
    assert len(edits) == len({e.id for e in edits}) == count
