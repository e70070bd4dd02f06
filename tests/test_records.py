from __future__ import annotations

import json
import os

import pytest

from memoir.records import (
    Checkpoint,
    EditRequest,
    Probe,
    Result,
    RunInfo,
    read_json,
    read_json_lines,
    write_atomically,
    write_json,
)

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
        "seconds_per_edit": 0.1,
        "peak_bytes": 5,
    }


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


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing\.json"):
        read_json(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n{\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2 is not JSON"):
        list(read_json_lines(tmp_path / "lines.jsonl"))
