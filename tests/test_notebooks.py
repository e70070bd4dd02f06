"""The notebooks: tidy as sources, and executed as the command line executes them."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from test_tables import result

from memoir import __main__ as cli
from memoir.batch import Cell, run_cells
from memoir.data import load_edits
from memoir.files import read_json
from memoir.records import Result

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.ipynb"))
MEMOIR = "memoir+feature=last+prefixes=1+iterations=3"
ROME = "rome+layer=1+moments=background+prefixes=0+value_steps=2"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_are_tidy(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    first, *rest = notebook.cells
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0] is next(cell for cell in rest if cell.cell_type == "code")
    lines = tagged[0].source.splitlines()
    for node in ast.parse(tagged[0].source).body:
        assert isinstance(node, ast.Assign) and re.fullmatch("[A-Z_]+", node.targets[0].id)
        assert any("  # " in lines[place - 1] for place in (node.lineno, node.end_lineno)), "a comment per parameter"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            assert not re.search(r"^\s*(def|class) ", cell.source, re.MULTILINE), "logic lives in the package"


def command(tiny_model, zsre_file, reports, *more: str) -> list[str]:
    return [
        "tables", "--model", str(tiny_model("llama")), "--dataset", "zsre", "--data-path", str(zsre_file),
        "--out", str(reports), *more,
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own; gives its exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def main(call: list[str]) -> tuple[int, str]:
        return cli.main(call), capsys.readouterr().err

    return main


@pytest.mark.notebook
def test_tables_end_to_end(run, tiny_model, zsre_file, tmp_path):
    """One failing cell (its layer does not exist) stops no other; a second call runs only that cell. Two bad records
    are left out and counted: one that nobody can read, and one that ROME refuses, as its subject is not in its prompt.
    """
    records = json.loads(zsre_file.read_text())
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([*records, records[0] | {"alt": None}, records[1] | {"subject": "Nobody"}]))
    methods = f"unedited,{MEMOIR},{MEMOIR}+layer=7,{ROME}"
    call = command(tiny_model, bad, "reports", "--methods", methods, "--T", "1,4,13", "--separate", "9,0")
    code, told = run(call)
    assert code == 2 and "record 12: key 'alt' holds null, expected text" in told
    call += ["--skip-bad"]
    code, told = run(call)
    assert code == 1, told
    failures = [line for line in told.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 1 and "+layer=7" in failures[0] and "layer 7 does not exist" in failures[0]
    reports = tmp_path / "reports"
    names = {f"{method}--tiny-llama--zsre--n13--s0" for method in ("unedited", MEMOIR, ROME)}
    files = {path.name: path for path in (reports / "edit").iterdir() if path.is_file()}
    assert files.keys() == {f"{name}{ending}" for name in names for ending in (".json", ".ipynb")}

    drawn = [load_edits("zsre", path=bad, n=1, seed=seed, skip_bad=True)[0].subject for seed in range(9)]
    asked = [subject for subject in drawn if subject != "Nobody"]
    for name in names:
        result = Result.load(files[f"{name}.json"])
        skipped = 2 if name.startswith(ROME) else 1
        assert [checkpoint.edits for checkpoint in result.checkpoints] == [1, 4, 14 - skipped]
        assert len(result.skipped) == skipped
        (separate,) = result.extra["separate"]
        assert separate["edits"] == 1 and len(separate["scores"]) == (len(asked) if skipped == 2 else 9)
        executed = files[f"{name}.ipynb"].read_text()
        assert "image/png" in executed and "it/s]" not in executed and "unfinished" not in executed.split("OUT")[0]
    before = Result.load(files["unedited--tiny-llama--zsre--n13--s0.json"]).checkpoints[-1].scores
    assert before["loc"] == 1.0 and before["rel"] < 0.5
    assert "does not occur in prompt" in Result.load(files[f"{ROME}--tiny-llama--zsre--n13--s0.json"]).skipped[1]

    table = read_json(reports / "tables" / "tiny-llama--zsre.json")
    assert [(row["T"], row["runs"]) for row in table["rows"] if row["method"] == "MEMOIR"] == [(1, 9), (4, 1), (13, 1)]
    skipped = {row["method"]: row["skipped"] for row in table["rows"] if row["T"] == 13}
    assert skipped == {"Unedited": 1, "MEMOIR": 1, "ROME": 2}
    readme = (reports / "README.md").read_text()
    shown = [Path(part).name if part.startswith("/") else part for part in call]  # folders are private
    assert f"made by:\n\n```sh\n{shlex.join(['python', '-m', 'memoir', *shown])}\n```" in readme
    assert '"tables/tiny-llama--zsre.png"' in readme and (reports / "tables" / "tiny-llama--zsre.png").is_file()
    assert "| Bad records left out |" in readme

    stamps = {name: path.stat().st_mtime_ns for name, path in files.items()}
    code, told = run(call)
    assert code == 1 and "3 of 4 cells are finished already" in told
    assert {name: path.stat().st_mtime_ns for name, path in files.items()} == stamps


@pytest.mark.notebook
def test_the_tables_notebook_shows_results_at_several_T(tmp_path):
    result(at={1: 0.9, 10: 0.5}).save(tmp_path / "a.json")
    cell = Cell("tables", "x", {"RESULTS": str(tmp_path / "*.json")}, gpu=False)
    assert run_cells([cell], tmp_path / "out") == {}
    assert "image/png" in (tmp_path / "out" / "tables" / "x.ipynb").read_text()
    assert {path.suffix for path in (tmp_path / "out" / "tables").iterdir()} >= {".json", ".md", ".png", ".svg"}


def test_a_killed_batch_goes_on_where_it_stopped(run, tiny_model, zsre_file, tmp_path):
    reports = tmp_path / "reports"
    call = command(
        tiny_model, zsre_file, reports, "--methods", "unedited", "--T", "3", "--seeds", "0,1", "--workers", "1"
    )
    edit = reports / "edit"

    def second_cell_runs() -> bool:
        finished = {path.stem for path in edit.glob("*.json") if "cell" in read_json(path)["extra"]}
        return bool(finished) and any(path.stem not in finished for path in edit.glob(".unfinished/*.ipynb"))

    batch = subprocess.Popen(
        [sys.executable, "-m", "memoir", *call], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(second_cell_runs, batch)
    finally:
        os.kill(batch.pid, signal.SIGKILL)
        batch.wait()
    kept = {path: path.stat().st_mtime_ns for path in edit.glob("*.json")}
    assert len(kept) == 1
    for path in (*edit.glob("*.json"), *edit.glob("*.ipynb")):
        json.loads(path.read_text())

    code, told = run(call)
    assert code == 0, told
    assert "1 of 2 cells are finished already" in told
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(edit.glob("*.json"))) == len(list(edit.glob("*.ipynb"))) == 2
    assert not list(reports.rglob("*.tmp")) and not (edit / ".unfinished").exists()


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):  # a file that is just being moved
            if condition():
                return
        assert process.poll() is None, "the batch ended before it could be killed"
        time.sleep(0.05)
    pytest.fail(f"still waiting after {seconds} s")
