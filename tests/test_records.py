from __future__ import annotations

import gzip
import json
import os

import pytest

from memoir.files import read_json, read_records, write_atomically, write_json
from memoir.records import Checkpoint, EditRequest, Probe, Result, RunInfo, listed

EDIT = EditRequest(
    prompt="The capital is",
    target="Brno",
    subject="capital",
    probes=(Probe(kind="rephrase", prompt="Which city?", answer="Brno"),),
)


def result(**changes) -> Result:
    info = RunInfo(
        method="memoir",
        model="m",
        model_fingerprint="f",
        dataset="d",
        edits=1,
        seed=0,
        dtype="float32",
        device="cpu",
        config={"k": 3},
        protocol={},
        commit="c",
        dirty=False,
        versions={},
        started="2026-01-01",
    )
    checkpoint = Checkpoint(edits=1, scores={"rel": 1.0, "gen": None}, per_edit={"rel": [1.0], "gen": [None]})
    fields = dict(info=info, checkpoints=(checkpoint,), edit_ids=("a",), seconds_per_edit=0.1, peak_bytes=5)
    return Result(**fields | changes)


def test_records_survive_json():
    assert EditRequest.from_json(json.loads(json.dumps(EDIT.to_json()))) == EDIT
    assert Result.from_json(json.loads(json.dumps(result().to_json()))) == result()
    assert result().summary() == {
        "method": "memoir",
        "model": "m",
        "dataset": "d",
        "edits": 1,
        "seed": 0,
        "rel": 1.0,
        "gen": None,
        "replaced": 0,
        "skipped": 0,
        "tau": None,
        "seconds_per_edit": 0.1,
        "peak_bytes": 5,
    }


def test_a_summary_counts_each_edit_that_was_replaced():
    conflicts = (
        {"edit_id": "c", "with": ["a", "b"], "replaced": ["a", "b"]},
        {"edit_id": "d", "with": ["c"], "replaced": []},  # kept beside it
        {"edit_id": "e", "with": [], "replaced": ["d", "e"]},  # "e" was made before
    )
    summary = result(conflicts=conflicts, tau=0.6).summary()
    assert (summary["replaced"], summary["tau"]) == (3, 0.6)


def test_results_of_older_versions_are_read():
    """These have other scores, and neither τ nor conflicts."""
    data = json.loads(json.dumps(result().to_json()))
    data["checkpoints"][0]["scores"] |= {"unrelated_ppl": 7e5, "unrelated_ppl_unedited": 6e5}
    del data["tau"], data["conflicts"]
    summary = Result.from_json(data).summary()
    assert summary["unrelated_ppl"] == 7e5 and summary["tau"] is None and summary["replaced"] == 0


def test_ids_tell_edits_apart_and_stay():
    other = EditRequest(prompt=EDIT.prompt, target="Olomouc")
    assert EDIT.id == EditRequest(prompt=EDIT.prompt, target=EDIT.target).id != other.id
    assert EditRequest(prompt="a", target="b", id="mine").id == "mine"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(prompt="", target="b"), ValueError, "edit: prompt is empty, expected text"),
        (dict(prompt="a", target=" ", id="x"), ValueError, "edit 'x': target is empty, expected text"),
        (dict(prompt="a", target=3), TypeError, "edit: target is int, expected text"),
    ],
)
def test_bad_edits_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        EditRequest(**fields)


def test_bad_probes_and_results_are_named():
    with pytest.raises(ValueError, match="probe kind 'other' is unknown; expected one of rephrase, unrelated"):
        Probe(kind="other", prompt="a", answer="b")
    with pytest.raises(ValueError, match=r"unknown keys \['surprise'\]"):
        Result.from_json(result().to_json() | {"surprise": 1})


def test_lists_of_numbers_take_one_line_and_read_as_they_were(tmp_path):
    tricky = {"a": [1, 2.5, None, True], "b": ["[\n 1\n]", '"'], "c": [[1], [], {"d": [2]}], "e": "[\n1\n]"}
    path = write_json(tmp_path / "tricky.json", tricky)
    assert read_json(path) == tricky and '"a": [1, 2.5, null, true]' in path.read_text()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "deep" / "file.json", {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert read_json(path) == {"a": 1} and os.listdir(path.parent) == ["file.json"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_json_is_read_however_it_is_written(tmp_path, mark, packed):
    values = [{"a": "ä\u2028"}, {"b": [1, None]}]
    forms = {
        "indented.json": json.dumps(values, indent=1),
        "lines.json": "\n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n\n",
        "windows.jsonl": "\r\n".join(json.dumps(value) for value in values),
    }
    for name, text in forms.items():
        data = (mark + text).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
        assert read_records(tmp_path / name) == values, name
    assert read_json(tmp_path / "indented.json") == values


def test_one_line_is_one_record_of_json_lines_and_an_object_of_json(tmp_path):
    for name, expected in {"one.jsonl": [{"a": 1}], "one.jsonl.gz": [{"a": 1}], "one.json": {"a": 1}}.items():
        (tmp_path / name).write_text('{"a": 1}\n')
        assert read_records(tmp_path / name) == expected


def test_many_problems_are_listed_up_to_ten():
    assert listed(["a", "b"]) == "a\nb"
    assert listed([str(i) for i in range(13)]).splitlines() == [*map(str, range(10)), "and 3 more"]
