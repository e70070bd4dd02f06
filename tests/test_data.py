from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from memoir.data import FORMATS, load_background, load_edits

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
RECORDS = dict(zsre=ZSRE, selfcheckgpt=SELFCHECK, counterfact=COUNTERFACT, qaedit=QAEDIT, knowedit=KNOWEDIT)
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


@pytest.mark.parametrize("name", FORMATS)
def test_a_files_format_is_told_from_its_keys_or_by_name(tmp_path, name):
    path = written(tmp_path, [RECORDS[name]])
    expected = load_edits(name, path=path)
    told, said = load_edits("mine", path=path), load_edits("mine", path=path, format=name)
    assert expected == told == said and told.name == said.name == "mine"
    with pytest.raises(ValueError, match="of no known format: its first record has the keys a; expected zsre: subject"):
        load_edits("mine", path=written(tmp_path, [{"a": 1}]))
    with pytest.raises(ValueError, match="format 'csv' is unknown; expected one of zsre, counterfact"):
        load_edits("mine", path=path, format="csv")


@pytest.mark.parametrize("name", FORMATS)
def test_every_missing_or_empty_key_is_named(tmp_path, name):
    good = RECORDS[name]
    for key in FORMATS[name].keys:
        broken = {k: v for k, v in good.items() if k != key}
        with pytest.raises(ValueError, match=rf"edits\.json, record 1: key '{key}' is missing; {name} records carry"):
            load_edits(name, path=written(tmp_path, [good, broken]))
        if key not in {"locality_ground_truth", "subject", "locality"}:
            with pytest.raises(ValueError, match=rf"edits\.json, record 1: key '{key}' holds no text"):
                load_edits(name, path=written(tmp_path, [good, good | {key: " "}]))
        if key != "locality":
            with pytest.raises(ValueError, match=rf"edits\.json, record 1: key '{key}' holds null, expected text"):
                load_edits(name, path=written(tmp_path, [good, good | {key: None}]))


def test_all_records_that_cannot_be_read_are_named_up_to_ten(tmp_path):
    bad = [ZSRE | {"alt": None}] * 11
    with pytest.raises(ValueError) as caught:
        load_edits("zsre", path=written(tmp_path, [ZSRE, QAEDIT, *bad]))
    lines = str(caught.value).splitlines()
    assert "record 1: key 'src' is missing" in lines[0] and "those of qaedit" in lines[0]
    assert (
        lines[1] == "record 2: key 'alt' holds null, expected text" and lines[-1] == "and 2 more" and len(lines) == 11
    )
    with pytest.raises(ValueError, match=r"'src' is missing; zsre .* \(its keys are those of qaedit\)"):
        load_edits("zsre", path=written(tmp_path, [QAEDIT]))


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(name="zsrr"), ValueError, "dataset 'zsrr' is unknown; expected one of almanac-qa, almanac-bio, zsre"),
        (dict(name="zsre"), ValueError, "dataset 'zsre' needs a path"),
        (dict(name="zsre", path="nowhere.json"), FileNotFoundError, r"no such file: nowhere\.json"),
        (dict(name="almanac-qa", path="x.json"), ValueError, "ships with the package; it takes no path"),
        (dict(name="almanac-qa", n=0), ValueError, "n = 0 edits, expected at least 1"),
    ],
)
def test_wrong_requests_are_named(call, error, message):
    with pytest.raises(error, match=message):
        load_edits(**call)


def test_wrong_files_are_named(tmp_path):
    for content, message in [
        ("{", "is not JSON"),
        ({"a": 1}, "holds dict, expected a non-empty list"),
        ([], "expected a non-empty list"),
        ([ZSRE, 3], "record 1: int, expected an object"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_edits("zsre", path=written(tmp_path, content))
    with pytest.raises(ValueError, match=r"n = 5 edits, but .*edits\.json holds 1"):
        load_edits("zsre", path=written(tmp_path, [ZSRE]), n=5)
    with pytest.raises(ValueError, match="holds no list of non-empty texts"):
        load_background(written(tmp_path, ["text", ""]))
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
    (edit,) = load_edits("zsre", path="someone/zsre", split="train")
    assert asked == [("someone/zsre", "train")] and edit.target == "metal"


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
