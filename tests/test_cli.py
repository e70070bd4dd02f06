"""The command line: one run and its last line; mistakes end with code 2 and one line, before a model is loaded."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys

import pytest

from memoir import __main__ as cli
from memoir import files
from memoir.editors import load_editor
from memoir.editors.memoir import MEMOIR
from memoir.models import load_model
from memoir.records import BadInput, Result

KEYS = {
    "method", "model", "dataset", "edits", "rel", "gen", "loc", "avg", "ppl", "exact_match", "loc_same_subject",
    "loc_same_template", "seconds_per_edit", "peak_bytes",
    "generated",
    "begins",
    "replaced",
    "skipped",
    "tau",
}  # fmt: skip


@pytest.fixture
def arguments(tiny_model, zsre_file, tmp_path):
    """Arguments of a small run; keyword arguments override or, as None, leave out."""

    def make(**given):
        options = {
            "method": "memoir",
            "model": tiny_model("llama"),
            "dataset": "zsre",
            "data-path": zsre_file,
            "edits": 3,
            "set": ["feature=last", "prefixes=1", "iterations=3"],
            "out": tmp_path / "deep" / "result.json",
        } | {name.replace("_", "-"): value for name, value in given.items()}
        flags = []
        for name, value in options.items():
            if value is not None:
                flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return ["run", *flags]

    return make


def test_run_prints_one_line_of_json_last(arguments, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "memoir", *arguments(checkpoints="1,2", seed=7)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert summary.keys() >= KEYS
    assert (summary["method"], summary["model"], summary["dataset"]) == ("memoir", "tiny-llama", "zsre")
    assert summary["edits"] == 3 and summary["seconds_per_edit"] > 0 and summary["peak_bytes"] > 0
    assert summary["loc_same_subject"] is None  # ZsRE has no such probe
    result = Result.load(tmp_path / "deep" / "result.json")
    assert [checkpoint.edits for checkpoint in result.checkpoints] == [1, 2, 3]
    assert result.info.seed == 7 and result.info.config["feature"] == "last"
    assert {name: summary[name] for name in ("rel", "gen", "loc")} == {
        name: result.checkpoints[-1].scores[name] for name in ("rel", "gen", "loc")
    }


def test_numbers_that_are_not_finite_are_null():
    found = cli.finite({"ppl": math.inf, "rel": math.nan, "loc": 0.5, "gen": None, "edits": 3, "model": "x"})
    assert found == {"ppl": None, "rel": None, "loc": 0.5, "gen": None, "edits": 3, "model": "x"}


def test_calibrate_prints_a_threshold_that_so_many_unrelated_texts_pass(capsys, tiny_model, zsre_file, tmp_path):
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([f"Text {i} about {7 * i} {'ABCDE'[i % 5]}" for i in range(40)]))
    command = ["calibrate", "--model", str(tiny_model("llama")), "--background", str(texts), "--share", "0.1"]
    assert cli.main(command) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        0 < alone["tau"] < 1 and alone["edits"] == 0 and alone["reads"] == {"background": pytest.approx(0.1, abs=0.1)}
    )
    assert cli.main([*command, "--dataset", "zsre", "--data-path", str(zsre_file), "--edits", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stored = json.loads(lines[-1])
    assert stored["edits"] == 5 and set(stored["reads"]) == {"background", "rephrase", "unrelated"}
    assert any(line.startswith("rephrase: ") and "at or above τ" in line for line in lines)
    assert cli.main([*command, "--share", "2"]) == 2
    assert "unrelated_share = 2.0" in mistake(capsys)


def mistake(capsys) -> str:
    """The one line that says what is wrong; reading a model shows a progress bar above it."""
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if line and "%|" not in line and "\x1b[" not in line]
    assert len(lines) == 1 and lines[0].startswith("memoir: ")
    return lines[-1]


@pytest.mark.parametrize(
    "wrong", [["fly"], ["run"], ["run", "--edits", "many"], ["tables", "--T", "1,x"], ["run", "-x"]]
)
def test_unreadable_arguments_end_with_code_2_and_one_line(capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        cli.main(wrong)
    assert ended.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--dataset", "zsre"], "path"),
        (["--methods", "ft", "--parameter", "METHOD=memoir"], "METHOD"),
    ],
)
def test_tables_refuse_mistakes_before_the_first_run(capsys, tmp_path, wrong, named):
    assert cli.main(["tables", "--out", str(tmp_path / "reports"), *wrong]) == 2
    assert named in mistake(capsys)
    assert not (tmp_path / "reports").exists()


def test_a_wrong_value_is_refused_before_a_model_is_looked_for(arguments, capsys):
    assert cli.main(arguments(model="./nowhere", set=["k=100.5"])) == 2
    assert "k = 100.5" in mistake(capsys)


def test_debug_shows_where_a_mistake_was_found(arguments, tmp_path):
    with pytest.raises(BadInput, match="taau") as found:
        cli.main([*arguments(set=["taau=1"]), "--debug"])
    assert isinstance(found.value.__cause__, TypeError)


def test_a_result_that_cannot_be_saved_costs_no_summary_and_the_same_command_saves_it(
    arguments, capsys, monkeypatch, tmp_path
):
    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Result, "save", full)
        assert cli.main(arguments()) == 1
    printed = capsys.readouterr()
    summary = json.loads(printed.out.splitlines()[-1])
    assert summary.keys() >= KEYS
    assert "No space left" in printed.err and "holds the first 3 edits; the same command goes on" in printed.err
    monkeypatch.setattr(MEMOIR, "write", None)  # there is nothing left to write
    assert cli.main(arguments()) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    timeless = {"seconds_per_edit", "peak_bytes"}
    assert {k: again[k] for k in again.keys() - timeless} == {k: summary[k] for k in summary.keys() - timeless}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]


def test_a_full_disk_is_told_before_the_work(arguments, capsys, monkeypatch, tmp_path):
    """The error of a write names no file, unlike that of a folder that cannot be made."""

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "try_writing", full)
    assert cli.main(arguments()) == 2
    out = tmp_path / "deep" / "result.json"
    assert mistake(capsys).endswith(f"{out} cannot be written: No space left on device; expected another --out")


def test_a_changed_command_in_the_same_place_is_refused_by_name(arguments, capsys, monkeypatch, tmp_path, tiny_model):
    with monkeypatch.context() as patched:
        patched.setattr(Result, "save", lambda self, path: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        assert cli.main(arguments()) == 1
    assert "not all was saved" in capsys.readouterr().err
    text = tmp_path / "background.txt"
    text.write_text("One thing.\nAnother thing.\n")
    settings = ["feature=last", "prefixes=1", "iterations=4"]
    for change, named in (
        (dict(set=settings), "differ in iterations"),
        (dict(method="ft", set=None), "holds a run of memoir with other settings than this ft"),
        (dict(background=text), "differ in background"),
        (dict(seed=1), "its edit 1 is"),
        (dict(edits=2), "a run of 3 edits, and the stream ended after 2"),
        (dict(model=tiny_model("mistral")), "was written on tiny-llama"),
        (dict(dtype="bfloat16"), "was written on tiny-llama"),
    ):
        assert cli.main(arguments(**change)) == 2
        line = mistake(capsys)
        assert named in line and "choose another --out, or delete" in line
        assert not (tmp_path / "deep" / "result.json").exists()
    assert cli.main(arguments()) == 0


def test_a_run_keeps_its_memory_where_it_is_told_to(arguments, tmp_path, tiny_model):
    assert cli.main(arguments(save_to=tmp_path / "memory")) == 0
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["result.json"]
    assert len(load_editor(tmp_path / "memory", load_model(tiny_model("llama"))).edits) == 3


def test_of_two_runs_in_one_place_the_second_says_who_is_there(arguments, capsys, tmp_path):
    with files.sole_writer(tmp_path / "deep" / "result.json.run"):
        assert cli.main(arguments()) == 2
    assert f"another run is writing here: {tmp_path / 'deep' / 'result.json.run'} (process {os.getpid()} on" in mistake(
        capsys
    )


def test_a_folder_that_another_run_writes_to_is_refused(capsys, tmp_path):
    with files.sole_writer(tmp_path):
        assert cli.main(["tables", "--methods", "unedited", "--workers", "1", "--out", str(tmp_path)]) == 2
    assert "another run is writing here" in mistake(capsys)


def test_help_imports_nothing_heavy():
    code = """
import contextlib, sys
from memoir import __main__ as cli
with contextlib.suppress(SystemExit):
    cli.main(["--help"])
print(sorted({"torch", "transformers", "matplotlib", "papermill"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run | tables | report | publish | …" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_bench_takes_a_model_and_its_data(monkeypatch, capsys, tiny_model, zsre_file):
    asked, folder, file = {}, str(tiny_model("llama")), str(zsre_file)

    def measure(name, dataset, **options):
        asked.update(options, name=name, dataset=dataset)
        return {"summary": {"ratio": 2.0}}

    monkeypatch.setattr("memoir.bench.measure", measure)
    options = ["--model", folder, "--dataset", "zsre", "--data-path", file, "--quick", "--methods", "ft"]
    assert cli.main(["bench", *options]) == 0
    assert asked == {"name": folder, "dataset": "zsre", "data_path": file, "quick": True, "methods": ["ft"]}
    assert json.loads(capsys.readouterr().out) == {"ratio": 2.0}
    asked.clear()
    for wrong in (["--model", "./nowhere"], ["--data-path", "./nowhere.json"], ["--out", "/proc/nowhere/b.json"]):
        assert cli.main(["bench", *options, *wrong]) == 2
        assert "nowhere" in mistake(capsys) and not asked
    monkeypatch.setattr(
        files, "write_atomically", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space"))
    )
    assert cli.main(["bench", *options, "--out", str(zsre_file.with_name("b.json"))]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"ratio": 2.0} and "No space" in printed.err
