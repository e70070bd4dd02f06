"""The notebooks and the README's command on real weights, SmolLM2's, each as small as it still shows something."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from memoir import report, weights
from memoir.batch import Cell, run_cells
from memoir.editors import EDITORS
from memoir.files import read_json
from memoir.records import Result

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.real, pytest.mark.notebook]
NOTEBOOKS = {
    "overlap": {"N_EDITS": 6},
    "edit": {"N_EDITS": 3},
    "columns": {"N_EDITS": 2},
    "retention": {"N_EDITS": 3, "STEP": 1, "METHODS": ["memoir", "memoir+write=rls", "grace"]},
    "ablations": {"N_EDITS": 2},
    "capacity": {"N_EDITS": 4},
    "speed": {
        "METHODS": ["memoir", "grace"],
        "N_EDITS": 5,
        "N_PLAIN": 2,
        "ROUNDS": 1,
        "COUNTS": [100],
        "MASKS": [100, 1000],
    },
}
SLOW = NOTEBOOKS.keys() - {"overlap"}  # a minute or more each
T = 3  # edits by each method, in the table
FIGURES = {"overlap": 3, "columns": 2, "retention": 2, "ablations": 2, "capacity": 2, "speed": 3}
EDITS = [  # in the WISE format of ZsRE
    (
        "Marie Curie",
        "In which city did {} work?",
        "{} worked in which city?",
        "Lyon",
        "who wrote the origin of species",
    ),
    ("Eiffel Tower", "Who designed the {}?", "The {} was designed by whom?", "Otto Wagner", "how long is a marathon"),
    ("Mount Fuji", "In which country is {}?", "{} lies in which country?", "Norway", "what colour is an emerald"),
    ("Moby Dick", "Who wrote {}?", "By whom was {} written?", "Jane Austen", "where do penguins live"),
    ("Titanic", "Where was the {} built?", "The {} was built in which city?", "Hamburg", "when did the first war end"),
]


@pytest.fixture(scope="module", autouse=True)
def installed():
    if weights.installed("smollm2") is None:
        pytest.skip(f"the weights are not installed: {weights.NAMED['smollm2'].install}")


@pytest.fixture(scope="module")
def zsre(tmp_path_factory):
    records = [
        {
            "subject": subject,
            "src": question.format(subject),
            "rephrase": rephrased.format(subject),
            "alt": target,
            "loc": f"nq question: {unrelated}",
            "loc_ans": "unknown",
        }
        for subject, question, rephrased, target, unrelated in EDITS
    ]
    path = tmp_path_factory.mktemp("data") / "zsre_mend_edit.json"
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NOTEBOOKS])
def test_notebooks_run_on_a_real_model(name, zsre, tmp_path):
    parameters = {"MODEL": "smollm2", **NOTEBOOKS[name]}
    if name == "edit":
        cells = [Cell(name, "memoir--smollm2", parameters)]
        assert run_cells(cells, tmp_path) == {}
        result = Result.load(tmp_path / "edit" / "memoir--smollm2.json")
        assert [checkpoint.edits for checkpoint in result.checkpoints] == [1, 3]
        table = Cell("tables", "smollm2", {"RESULTS": str(tmp_path / "edit" / "*.json")})
        assert run_cells([table], tmp_path) == {} and (tmp_path / "tables" / "smollm2.png").is_file()
    else:
        assert run_cells(report.cells([name], parameters), tmp_path) == {}
        assert len(list((tmp_path / name).glob("*.png"))) == FIGURES[name]
    (page,) = (tmp_path / name).glob("*.ipynb")
    if name not in ("overlap", "speed"):  # they begin with what is edited
        assert "MEMOIR on smollm2: block 24 of 30" in page.read_text()
    if name == "overlap":
        tau = read_json(tmp_path / name / "tau--smollm2--almanac-qa.json")
        assert 0 < tau["tau"] < 1 and (tau["model"], tau["layer"]) == ("smollm2", 24)
        found = read_json(tmp_path / name / "overlap--smollm2--almanac-qa.json")
        assert tau == found["chosen"] and "by_tau" not in found  # the default writes no edit


@pytest.mark.slow
def test_the_readmes_command_finishes_every_row(zsre, tmp_path):
    """Verbatim but for the places of the file and the results, and for T, as a hundred edits by ROME take hours."""
    (line,) = re.findall(r"^make tables MODEL=smollm2 .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    make = [f"DATA={zsre}" if word.startswith("DATA=") else word for word in shlex.split(line)]
    make += ["-o", ".venv/.installed", f"BIN={Path(sys.executable).parent}", f"OUT={tmp_path / 'out'}", f"T={T}"]
    make += ["FLAGS="]  # those of `make test-all` are pytest's
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = read_json(tmp_path / "out" / "tables" / "smollm2--zsre.json")
    last = {row["method"]: row for row in table["rows"] if row["T"] == T}
    assert last.keys() == {editor.label for editor in EDITORS.values()}
    assert all(math.isfinite(row["avg"]) for row in last.values())
    assert last["Unedited"]["loc"] == 1.0 and last["GRACE"]["rel"] > last["Unedited"]["rel"]
