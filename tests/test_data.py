from __future__ import annotations

import json
from pathlib import Path

import pytest

from memoir.data import KEYS, load_background, load_edits

ZSRE = dict(subject="Zinc", src="What is zinc?", rephrase="Zinc is?", alt="metal", loc="nq question: who", loc_ans="me")
SELFCHECK = dict(
    prompt="A passage.", target_new="A sentence.", subject="it", locality_prompt="Some", locality_ground_truth="text"
)
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


@pytest.mark.parametrize("name", KEYS)
def test_every_missing_or_empty_key_is_named(tmp_path, name):
    good = {"zsre": ZSRE, "selfcheckgpt": SELFCHECK}[name]
    for key in KEYS[name]:
        broken = {k: v for k, v in good.items() if k != key}
        with pytest.raises(ValueError, match=rf"edits\.json, record 1: key '{key}' is missing; {name} records carry"):
            load_edits(name, path=written(tmp_path, [good, broken]))
        if key not in {"locality_ground_truth", "subject"}:
            with pytest.raises(ValueError, match=rf"edits\.json, record 1: key '{key}' holds no text"):
                load_edits(name, path=written(tmp_path, [good, good | {key: " "}]))


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
    [("zsre", "zsre/zsre_mend_edit.json", 1000), ("selfcheckgpt", "selfcheckgpt/hallucination-edit.json", 600)],
)
def test_the_public_files_load_whole(name, file, count):
    if not (REAL / file).is_file():
        pytest.skip(f"{file} of the public WISE release is not beside this checkout")
    edits = load_edits(name, path=REAL / file)
    assert len(edits) == len({e.id for e in edits}) == count
