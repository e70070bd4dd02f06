"""The tables' grid: what it consists of, and which mistakes are refused before the first run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_tables import ENDINGS, result

from memoir import grid
from memoir.audits import audit
from memoir.data import load_edits
from memoir.tables import Table


def test_variants_carry_their_settings():
    assert grid.variant("memoir") == ("memoir", {})
    assert grid.variant("memoir+write=rls+tau=0.6") == ("memoir", {"write": "rls", "tau": 0.6})
    assert grid.variant("memoir+paper+k=7") == ("memoir", {"preset": "paper", "k": 7})
    for wrong in ("memoir/../x", "a--b", "", "memoir+tau.x=1"):
        with pytest.raises(ValueError):
            grid.variant(wrong)


@pytest.mark.parametrize("method", ["memoir", "memoir-rls", "ft"])
def test_an_unknown_preset_is_refused(method):
    with pytest.raises(ValueError, match="preset = 'papers', expected one that"):
        grid.check_settings(*grid.variant(f"{method}+papers"))


# The grid -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [(1,), (10,), (1, 10), (3, 5), (1, 3, 10, 12), (1, 100)])
def test_one_sequence_serves_every_T_and_none_beyond_the_data(tiny_grid, T):
    (cell,) = tiny_grid(T=T)
    expected = sorted({min(n, 12) for n in T})
    assert cell.parameters["N_EDITS"] == expected[-1]
    assert cell.parameters["CHECKPOINTS"] == expected
    separate = dict(cell.parameters["SEPARATE"])
    assert separate.keys() == {1, 10} & set(expected) and all(runs > 1 for runs in separate.values())


def test_a_cell_per_data_set_method_and_seed(tiny_grid):
    cells = tiny_grid(methods=["unedited", "ft", "ft+iterations=3"], seeds=(0, 1))
    assert len({cell.name for cell in cells}) == len(cells) == 6
    assert {cell.parameters["METHOD"] for cell in cells} == {"unedited", "ft"}
    assert [c.inputs["config"]["iterations"] for c in cells if "=" in c.name] == [3, 3]


def test_a_small_model_has_one_thread_wherever_its_cells_run(tiny_grid, monkeypatch):
    """Or else results would depend on how many workers there were; a large one takes what its worker has."""
    assert [cell.threads for cell in tiny_grid()] == [1]
    monkeypatch.setattr(grid, "SMALL", 0)
    assert [cell.threads for cell in tiny_grid()] == [None]


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
        (dict(parameters={"METHOD": "memoir"}), "parameter METHOD is set by the grid"),
    ],
)
def test_mistakes_are_refused_before_the_first_run(tiny_grid, wrong, message):
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        tiny_grid(**wrong)


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("memoir", dict(k=100.5), "k = 100.5, expected a valid integer"),
        ("ft", dict(tau="auto"), "ft has no setting tau"),
    ],
)
def test_values_are_checked_before_there_is_a_model(method, overrides, message):
    with pytest.raises((ValueError, TypeError), match=message):
        grid.check_settings(method, overrides)


@pytest.mark.parametrize("overrides", [dict(tau="auto"), dict(tau=0.5, k=3), {}])
def test_right_values_pass_without_the_settings_that_only_a_model_gives(overrides):
    grid.check_settings("memoir", overrides)


def test_a_table_of_the_finished_cells_of_each_data_set_with_the_audit_of_its_edits(tiny_grid, tmp_path, zsre_file):
    cells = tiny_grid(methods=["unedited", "ft", "grace@1"], T=(1, 4), seeds=(0, 1))
    cells += tiny_grid(datasets=["almanac-qa"], data_path=None)
    for cell in cells[1:]:
        own = cell.parameters
        one = result(own["METHOD"], at=dict.fromkeys(own["CHECKPOINTS"], 0.5))
        info = replace(one.info, model="tiny-llama", dataset=own["DATASET"], seed=own["SEED"])
        replace(one, info=info, extra={"cell": cell.made_from}).save(cell.path(tmp_path, ".json"))
        cell.path(tmp_path, ".ipynb").write_text("{}")
    grid.write_tables(cells, tmp_path)
    assert (tmp_path / "README.md").is_file()
    names = {f"tiny-llama--{dataset}.{end}" for dataset in ("zsre", "almanac-qa") for end in ENDINGS}
    assert {path.name for path in (tmp_path / "tables").iterdir()} == names
    table = Table.load(tmp_path / "tables" / "tiny-llama--zsre.json")
    rows = table.rows[["method", "T", "runs"]].to_records(index=False).tolist()
    assert rows == [("Unedited", 1, 1), ("FT", 1, 2), ("GRACE", 1, 2), ("Unedited", 4, 1), ("FT", 4, 2)]
    assert table.audit == audit(load_edits("zsre", path=zsre_file, n=4, seed=1))  # of the first seed that is there


def test_almanac_needs_no_path(monkeypatch, tiny_grid):
    small = grid.table_cells(["unedited"], "almanac", ["almanac-qa", "almanac-bio"], T=(1, 1000))
    assert {cell.parameters["DATASET"]: cell.parameters["N_EDITS"] for cell in small} == {
        "almanac-qa": 1000,
        "almanac-bio": 600,
    }
    (endless,) = grid.table_cells(["unedited"], "almanac", ["almanac-qa"], T=(1, 1200))
    assert endless.parameters["N_EDITS"] == 1200


def test_long_runs_come_first_and_those_of_a_method_together():
    cells = grid.table_cells(["unedited", "ft"], "almanac", ["almanac-qa", "almanac-bio"], T=(100,), seeds=(0, 1))
    order = [tuple(cell.parameters[name] for name in ("DATASET", "METHOD", "SEED")) for cell in cells]
    assert order == [(d, m, s) for d in ("almanac-bio", "almanac-qa") for m in ("unedited", "ft") for s in (0, 1)]


def test_a_method_may_be_limited_to_the_smaller_T(tiny_grid):
    cells = {cell.name: cell.parameters for cell in tiny_grid(methods=["unedited", "ft@1"], T=(1, 2, 4))}
    assert {name.partition("--")[0]: own["CHECKPOINTS"] for name, own in cells.items()} == {
        "unedited": [1, 2, 4],
        "ft": [1],
    }
    assert next(name for name in cells if name.startswith("ft--")).endswith("--n1--s0")
    for wrong in ("ft@", "ft@0", "ft@x", "ft@1@2"):
        with pytest.raises(ValueError, match="limit"):
            tiny_grid(methods=[wrong])


def test_the_number_of_short_runs_can_be_chosen(tiny_grid):
    assert [cell.parameters["SEPARATE"] for cell in tiny_grid()] == [[[1, 20]]]  # four edits: no T = 10
    assert [cell.parameters["SEPARATE"] for cell in tiny_grid(separate=(3, 2))] == [[[1, 3]]]
    assert [cell.parameters["SEPARATE"] for cell in tiny_grid(separate=(0, 2))] == [[]]
    for wrong in ((1,), (1, -1)):
        with pytest.raises(ValueError, match="separate"):
            tiny_grid(separate=wrong)
