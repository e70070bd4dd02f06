"""The grid of notebooks: what it consists of, what counts as finished, and that one failure stops no other."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memoir import batch
from memoir.batch import Cell, table_cells

LITERALS = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.none(), st.text()
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), LITERALS))
def test_settings_read_python_literals(values):
    assert batch.settings(f"{name}={value!r}" for name, value in values.items()) == values


def test_settings_read_the_rest_as_text():
    assert batch.settings(["write=rls", "a=b=c", "path=/x y"]) == {"write": "rls", "a": "b=c", "path": "/x y"}


@pytest.mark.parametrize("pair", ["tau", "=1", "a b=1", ""])
def test_settings_refuse_what_is_no_pair(pair):
    with pytest.raises(ValueError, match="expected name=value"):
        batch.settings([pair])


def test_variants_carry_their_settings():
    assert batch.variant("memoir") == ("memoir", {})
    assert batch.variant("memoir+write=rls+tau=0.6") == ("memoir", {"write": "rls", "tau": 0.6})
    for wrong in ("memoir/../x", "a--b", "", "memoir+tau"):
        with pytest.raises(ValueError):
            batch.variant(wrong)


# The grid ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def grid(tiny_model, zsre_file):
    """Makes cells for `unedited` on a tiny model; keyword arguments override anything."""

    def cells(**given):
        settings = dict(methods=["unedited"], model=str(tiny_model("llama")), datasets=["zsre"], T=(1, 4)) | given
        settings.setdefault("data_path", str(zsre_file))
        return table_cells(
            settings.pop("methods"), settings.pop("model"), settings.pop("datasets"), T=settings.pop("T"), **settings
        )

    return cells


@pytest.mark.parametrize("T", [(1,), (10,), (1, 10), (3, 5), (1, 3, 10, 12), (1, 100)])
def test_one_sequence_serves_every_T_and_none_beyond_the_data(grid, T):
    (cell,) = grid(T=T)
    expected = sorted({min(n, 12) for n in T})
    assert cell.parameters["N_EDITS"] == expected[-1]
    assert cell.parameters["CHECKPOINTS"] == expected
    separate = dict(cell.parameters["SEPARATE"])
    assert separate.keys() == {1, 10} & set(expected) and all(runs > 1 for runs in separate.values())


def test_a_cell_per_data_set_method_and_seed(grid):
    cells = grid(methods=["unedited", "ft", "ft+iterations=3"], seeds=(0, 1))
    assert len({cell.name for cell in cells}) == len(cells) == 6
    assert {cell.parameters["METHOD"] for cell in cells} == {"unedited", "ft"}
    assert [c.inputs["config"]["iterations"] for c in cells if "=" in c.name] == [3, 3]


def test_a_small_model_has_one_thread_wherever_its_cells_run(grid, monkeypatch):
    """Or else results would depend on how many workers there were; a large one takes what its worker has."""
    assert [cell.threads for cell in grid()] == [1]
    monkeypatch.setattr(batch, "SMALL", 0)
    assert [cell.threads for cell in grid()] == [None]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(methods=["mmoir"]), "mmoir.*expected one of"),
        (dict(methods=["ft+tau=1"]), "ft has no setting tau"),
        (dict(methods=["memoir+tau=7+k=4+layer=0"]), "tau = 7"),
        (dict(methods=[]), "at least one"),
        (dict(datasets=["zsrre"]), "zsrre.*expected one of"),
        (dict(datasets=["zsre", "selfcheckgpt"]), "one by one"),
        (dict(T=(0,)), "at least 1"),
        (dict(model="./nowhere"), "nowhere"),
        (dict(data_path="./nowhere.json"), "nowhere.json"),
        (dict(background="./nowhere.json"), "nowhere.json"),
        (dict(parameters={"TAU": 1}), "no parameter TAU"),
    ],
)
def test_mistakes_are_refused_before_the_first_run(grid, wrong, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        grid(**wrong)


def test_almanac_needs_no_path(monkeypatch, grid):
    small = table_cells(["unedited"], "almanac", ["almanac-qa", "almanac-bio"], T=(1, 1000))
    assert {cell.parameters["DATASET"]: cell.parameters["N_EDITS"] for cell in small} == {
        "almanac-qa": 1000,
        "almanac-bio": 600,
    }
    (endless,) = table_cells(["unedited"], "almanac", ["almanac-qa"], T=(1, 1200))
    assert endless.parameters["N_EDITS"] == 1200


def test_long_runs_come_first_and_those_of_a_method_together():
    cells = table_cells(["unedited", "ft"], "almanac", ["almanac-qa", "almanac-bio"], T=(100,), seeds=(0, 1))
    order = [tuple(cell.parameters[name] for name in ("DATASET", "METHOD", "SEED")) for cell in cells]
    assert order == [(d, m, s) for d in ("almanac-bio", "almanac-qa") for m in ("unedited", "ft") for s in (0, 1)]


# Finished or not -----------------------------------------------------------------------------------------------------


def finish(cell: Cell, reports) -> None:
    """Leave what a run of the cell leaves."""
    for ending, text in ((".ipynb", "{}"), (".json", json.dumps({"extra": {"cell": cell.made_from}}))):
        cell.path(reports, ending).parent.mkdir(parents=True, exist_ok=True)
        cell.path(reports, ending).write_text(text)


def test_finished_means_both_files_made_from_the_same(grid, tmp_path, zsre_file, tiny_model):
    (cell,) = grid()
    assert not cell.finished(tmp_path)
    finish(cell, tmp_path)
    assert cell.finished(tmp_path) and grid()[0].finished(tmp_path)

    other_data = tmp_path / "zsre.json"
    other_data.write_text(zsre_file.read_text().replace("oboe", "horn"))
    changes = [
        dict(T=(1, 2, 4)),
        dict(methods=["ft"]),
        dict(seeds=(1,)),
        dict(chat=False, dtype="bfloat16"),
        dict(data_path=str(other_data)),
        dict(model=str(tiny_model("mistral"))),
        dict(methods=["unedited+learn_stop=True"]),
    ]
    for change in changes:
        (changed,) = grid(**change)
        moved = Cell(cell.notebook, cell.name, changed.parameters, changed.inputs)
        assert not moved.finished(tmp_path), change

    text = cell.path(tmp_path, ".json").read_text()
    cell.path(tmp_path, ".json").write_text(text[:-5])
    assert not cell.finished(tmp_path)
    cell.path(tmp_path, ".json").write_text(text)
    cell.path(tmp_path, ".ipynb").unlink()
    assert not cell.finished(tmp_path)


def test_failures_stop_no_other_and_finished_cells_are_skipped(grid, tmp_path, monkeypatch, capsys):
    cells = grid(seeds=(0, 1, 2, 3))
    finish(cells[0], tmp_path)
    ran = []

    def execute(cell, reports, folder):
        ran.append(cell.name)
        if cell is cells[2]:
            raise RuntimeError("two\nlines")
        finish(cell, reports)

    monkeypatch.setattr(batch, "execute", execute)
    failures = batch.run_cells(cells, tmp_path)
    assert sorted(ran) == sorted(cell.name for cell in cells[1:])
    assert list(failures) == [cells[2].name] and "RuntimeError: two lines" in failures[cells[2].name]
    assert "1 of 4 cells are finished already" in capsys.readouterr().err

    ran.clear()
    monkeypatch.setattr(batch, "execute", lambda cell, reports, folder: ran.append(cell.name))
    assert batch.run_cells(cells, tmp_path) == {} and ran == [cells[2].name]
    ran.clear()
    batch.run_cells(cells, tmp_path, fresh=True)
    assert len(ran) == 4


def test_unknown_parameters_are_refused_before_the_first_run(grid, tmp_path, monkeypatch):
    cells = grid(seeds=(0, 1))
    cells.append(Cell(notebook="edit", name="x", parameters={"METHOD": "ft", "THRESHOLD": 1}))
    ran = []
    monkeypatch.setattr(batch, "execute", lambda cell, *_: ran.append(cell))
    with pytest.raises(ValueError, match=r"edit.ipynb has no parameter THRESHOLD; expected METHOD"):
        batch.run_cells(cells, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no notebook nope\.ipynb"):
        batch.run_cells([Cell(notebook="nope", name="x", parameters={})], tmp_path)
    assert not ran
