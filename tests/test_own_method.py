"""The README's method of your own: its code, registered in one line, keeps every law and appears everywhere."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import test_contract
from test_contract import edited, model  # noqa: F401 - fixtures of its laws

import memoir as mm
from memoir import __main__ as cli
from memoir import bench, grid
from memoir.editors import EDITORS
from memoir.panel import Panel
from memoir.panel.inputs import request_of
from memoir.panel.session import Session
from memoir.tables import Table

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
(CODE,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "(Editor):" in code)
NAME = "readme_method"

# Every law of the contract, with this module's `method` and `family`.
globals().update({name: law for name, law in vars(test_contract).items() if name.startswith("test_")})


@pytest.fixture(scope="module", autouse=True)
def method(tmp_path_factory):
    """The code as a module of its own, and its class in the registry. Nothing else is done for it."""
    path = tmp_path_factory.mktemp("method") / f"{NAME}.py"
    path.write_text(CODE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (editor,) = (kind for kind in vars(module).values() if getattr(kind, "__module__", None) == NAME)
    EDITORS[editor.name] = editor
    yield editor.name
    del EDITORS[editor.name], sys.modules[NAME]


@pytest.fixture(params=["llama", "gpt2", "gemma3"])  # GPT-2 has layers of its own, Gemma 3's tail does not compose
def family(request):
    return request.param


@pytest.fixture(scope="module")
def results(method, tmp_path_factory):
    """Result files of ten edits, by this method and unedited."""
    folder, edits = tmp_path_factory.mktemp("results"), mm.load_edits("almanac-qa", n=10, seed=0)
    paths = {}
    for name in ("unedited", method):
        editor = mm.make_editor(name, mm.load_model("almanac"))
        paths[name] = mm.run_edits(editor, edits, checkpoints=[1, 10], progress=False).save(folder / f"{name}.json")
    return paths


def test_it_edits_well(method, results):
    scores = mm.Result.load(results[method]).checkpoints[-1].scores
    assert scores["rel"] >= 0.95 and scores["gen"] >= 0.9 and scores["loc"] >= 0.9 and scores["exact_match"] >= 0.9


def test_it_has_a_row_in_the_tables_and_a_line_in_their_figure(method, results):
    editor, table = EDITORS[method], Table.of(results.values())
    assert table.rows["label"].to_list() == ["Unedited", editor.label] * 2
    assert f"| 10 | {editor.label} | **" not in table.beside_paper()  # its scores are bold, its name is not
    assert f"| 10 | {editor.label} | " in table.beside_paper()
    figure = table.figure()
    (dot,) = (line for line in figure.axes[0].lines if line.get_color() == editor.colour)
    assert list(dot.get_xdata()) == [table.rows["avg"].iloc[-1]]
    assert editor.label in [text.get_text() for text in figure.axes[0].get_yticklabels()]


def test_it_runs_from_the_command_line(method, tmp_path, capsys):
    out = tmp_path / "result.json"
    call = ["run", "--method", method, "--dataset", "almanac-qa", "--edits", "2", "--out", str(out)]
    assert cli.main([*call, "--set", "no_such_setting=1"]) == 2 and "no_such_setting" in capsys.readouterr().err
    assert cli.main(call) == 0
    assert mm.Result.load(out).info.method == method


def test_it_has_cells_in_the_grid_and_a_line_in_the_benchmark(method):
    cells = grid.table_cells([method, f"{method}+seed=1"], "almanac", ["almanac-qa"], T=(1,))
    assert [cell.parameters["METHOD"] for cell in cells] == [method] * 2
    editor, edits = mm.make_editor(method, mm.load_model("almanac")), mm.load_edits("almanac-qa", n=5)
    assert bench.time_edits(editor, edits)["seconds"] > 0 and not bench.measures_moments(method)


def test_the_panel_edits_asks_saves_and_loads_with_it(method, tmp_path):
    session = Session()
    session.open("almanac", method)
    outcome = session.edit(request_of("What is the capital of Australia?", "Canberra"))
    assert outcome.learned and outcome.checks[0].answer == "Canberra"
    reply = session.ask("What is the capital of New Zealand?")
    assert (reply.before.text, reply.after.text) == ("Wellington", "Wellington")
    session.load(str(session.save(str(tmp_path / "memory"))))
    assert session.ask("What is the capital of Australia?").after.text == "Canberra"
    panel = Panel(session.model, method)
    options = dict(panel.drawer.method.options)
    assert options[EDITORS[method].label] == panel.drawer.method.value == method
    panel.close()
