"""The exploring notebooks, executed through papermill with small parameters: what they leave, and how they fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memoir import frontpage, report
from memoir.__main__ import main
from memoir.batch import run_cells
from memoir.editors import make_editor
from memoir.files import read_json
from memoir.models import load_model

pytestmark = pytest.mark.notebook

SMALL = {
    "columns": {"N_EDITS": 5},
    "overlap": {"N_EDITS": 12, "N_EDITS_WRITTEN": 6, "K_FACTORS": [0.5, 1], "OVERRIDES": {"prefixes": 0}},
    "retention": {"N_EDITS": 6, "STEP": 2, "METHODS": ["memoir+prefixes=0", "memoir+prefixes=0+write=rls", "ft"]},
    "ablations": {"N_EDITS": 5, "CHECKPOINTS": [2], "OVERRIDES": {"prefixes": 0}},
    "capacity": {
        "N_EDITS": 20,
        "N_RUN": 8,
        "N_FIT": 6,
        "CHECKPOINTS": [4],
        "RUNS": [[64, "sgd"], [64, "rls"]],
        "WIDTHS": [1, 2],
        "KNOWN": {"k = 64, sgd": {"12": 0.5}},
    },
    "speed": {
        "METHODS": ["memoir", "grace"],
        "N_EDITS": 5,
        "N_PLAIN": 3,
        "ROUNDS": 1,
        "COUNTS": [20, 40],
        "MASKS": [100, 2000],
    },
}
FIGURES = {
    "columns": {"use", "drift"},
    "overlap": {"histograms", "features", "fingerprints", "tau"},
    "retention": {"scores", "drift"},
    "ablations": {"parts", "settings"},
    "capacity": {"check", "width"},
    "speed": {"edits", "questions", "shapes"},
}
CARDS = {
    "columns": "drift",
    "overlap": "tau",
    "retention": "scores",
    "ablations": "parts",
    "capacity": "check",
    "speed": "questions",
}


def together(name: str) -> pytest.MarkDecorator:
    """One process for all tests of a notebook, which runs once for them."""
    return pytest.mark.xdist_group(name)


EACH = pytest.mark.parametrize("name", [pytest.param(name, marks=together(name)) for name in report.NOTEBOOKS])


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """`reports(name)`: the reports folder, after that notebook has run once."""
    folder = tmp_path_factory.mktemp("reports")
    done = set()

    def run(name: str) -> Path:
        if name not in done:
            done.add(name)
            assert run_cells(report.cells([name], SMALL[name]), folder) == {}
            frontpage.write(folder)
        return folder

    return run


def left(reports, name: str):
    return read_json(reports(name) / name / f"{name}--almanac--almanac-qa.json")


@EACH
def test_every_notebook_leaves_its_figures_a_page_a_card_and_its_notebook(reports, name):
    folder, stem = reports(name), f"{name}--almanac--almanac-qa"
    assert left(reports, name)["extra"]["cell"]["parameters"] == SMALL[name]
    kinds = {"png": b"\x89PNG", "svg": b"<?xml"}
    for figure in FIGURES[name]:
        for kind, magic in kinds.items():
            assert (folder / name / f"{stem}--{figure}.{kind}").read_bytes().startswith(magic)
    page = (folder / name / f"{stem}.md").read_text()
    links = re.findall(r'(?:src="|\]\()([^")]+)', page)
    assert len(links) == 2 * len(FIGURES[name]) + 1
    assert all((folder / name / link).is_file() for link in links)
    assert left(reports, name)["meaning"] in page
    card = re.findall(rf'(?:src|href)="({name}/[^"]+)"', (folder / "README.md").read_text())
    assert set(card) == {f"{name}/{stem}.md", f"{name}/{stem}--{CARDS[name]}.png"}


@EACH
def test_every_notebook_says_where_its_numbers_come_from(reports, name):
    found = left(reports, name)
    info = found["chosen"]["info"] if name == "overlap" else found["info"]
    for one in [info] if "commit" in info else info.values():
        assert {"method", "model_fingerprint", "commit", "seed", "config", "versions", "started"} <= one.keys()


@together("columns")
def test_columns(reports):
    found = left(reports, "columns")["variants"]
    assert list(found) == ["MEMOIR", "MEMOIR, no permutation", "FT"]
    for name, variant in found.items():
        assert len(variant["first_edit_reading_moved"]) == 5
        assert sum(variant["edits_per_column"]) == pytest.approx(5 * variant["columns_per_edit"])
        assert variant["columns_per_edit"] <= (1024 if name != "FT" else 4096)


@together("overlap")
def test_overlap_picks_a_tau_that_an_editor_takes(reports):
    found = left(reports, "overlap")
    chosen = read_json(reports("overlap") / "overlap" / "tau--almanac--almanac-qa.json")
    assert chosen == found["chosen"]
    assert {row["feature"] for row in found["choices"]} == {"last", "mean", "mean_centred"}
    assert {row["k"] for row in found["choices"]} == {512, 1024}
    assert found["fingerprints"].keys() == {"almanac-qa"}  # the other sets have no files here
    assert found["by_tau"].keys() == {"tau", "rel", "gen", "loc", "loc_same_subject", "loc_same_template"}
    editor = make_editor("memoir", load_model("almanac"), tau=chosen["tau"])
    assert editor.memory.tau == chosen["tau"] and 0.3 < chosen["tau"] < 1


def test_overlap_picks_tau_without_writing_an_edit_even_on_the_first_block(tmp_path):
    """No block comes before it, so none can tell subjects apart, and that figure is missing."""
    parameters = SMALL["overlap"] | {"N_EDITS_WRITTEN": 0, "OVERRIDES": {"prefixes": 0, "layer": 0}}
    assert run_cells(report.cells(["overlap"], parameters), tmp_path) == {}
    found = read_json(tmp_path / "overlap" / "overlap--almanac--almanac-qa.json")
    assert read_json(tmp_path / "overlap" / "tau--almanac--almanac-qa.json") == found["chosen"]
    assert "by_tau" not in found
    assert len(list((tmp_path / "overlap").glob("*.png"))) == 2


@together("retention")
def test_retention(reports):
    found = left(reports, "retention")
    assert found["checkpoints"] == [2, 4, 6]
    assert list(found["methods"]) == ["MEMOIR+prefixes=0", "MEMOIR+prefixes=0+write=rls", "FT"]
    for method in found["methods"].values():
        assert method["later_edits"] == [0.5, 2.5, 4.5]
        assert len(method["last_rel"]) == 6 and method["margin_drift"][0] == 0
        assert all(
            (rel == 1) == (margin > 0) for rel, margin in zip(method["last_rel"], method["last_margin"], strict=True)
        )


@together("ablations")
def test_ablations(reports):
    rows = left(reports, "ablations")["rows"]
    parts = [(row["label"], row["T"]) for row in rows if row["group"] == "part"]
    assert parts[:2] == [("full", 2), ("full", 5)] and len(parts) == 8
    labels = {group: {row["label"] for row in rows if row["group"] == group} for group in ("k", "feature", "layer")}
    assert labels["k"] == {"256", "512", "1024", "2048"}
    assert labels["feature"] == {"mean", "mean_centred", "last"}
    assert labels["layer"] == {"0", "1", "2", "3"}
    recursions = {row["label"]: row for row in rows if row["group"] == "recursion"}
    assert list(recursions) == ["MEMOIR (rls)", "RLSEdit"]
    assert all(row["T"] == 5 for row in recursions.values())


@together("capacity")
def test_capacity(reports):
    found = left(reports, "capacity")
    asked = [(row["write"], row["T"], row["reliability"] is not None) for row in found["checks"]]
    assert asked == [
        *[("sgd", 4, True), ("sgd", 8, True), ("sgd", 12, True), ("sgd", 20, False)],
        *[("rls", 4, True), ("rls", 8, True), ("rls", 20, False)],
    ]
    assert [row["T"] for row in found["fitted"]] == [4, 6, 4, 6] and found["bearable"] > 0
    assert all(0 <= row["reliability_predicted"] <= 1 for row in (*found["checks"], *found["widths"]))


@together("speed")
def test_speed(reports):
    record = left(reports, "speed")
    assert list(record["methods"]) == ["memoir", "grace"]
    assert all(row["seconds"] > 0 and row["iterations"] >= 1 for row in record["methods"].values())
    assert set(record["plain"]) == {"memoir", "plain", "plain, frozen"}
    assert [row["edits"] for row in record["overhead"]] == [20, 40]
    assert [row["masks"] for row in record["search"]] == [100, 2000]


@pytest.mark.parametrize(
    ("model", "name"),
    [("smollm2", "smollm2"), ("~/models/Llama-3.2-1B", "Llama-3.2-1B"), ("x/a.Q4_1.gguf", "a.Q4_1"), ("org/b", "b")],
)
def test_what_a_notebook_leaves_is_named_by_the_model_as_tables_are(model, name):
    (cell,) = report.cells(["columns"], {"MODEL": model, "DATASET": "zsre"})
    assert cell.name == f"columns--{name}--zsre"


# How they fail -------------------------------------------------------------------------------------------------------


def said(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["report", *arguments])
    return code, capsys.readouterr().err


def test_an_unknown_notebook_is_refused_before_anything_runs(capsys, tmp_path):
    code, text = said(capsys, "--only", "colums", "--out", str(tmp_path / "out"))
    assert code == 2 and "no exploring notebook colums; expected one of columns, overlap" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", report.NOTEBOOKS)
def test_an_unknown_parameter_is_refused_before_anything_runs(capsys, tmp_path, name):
    code, text = said(capsys, "--only", name, "--parameter", "N_EDIT=3", "--out", str(tmp_path / "out"))
    assert code == 2 and f"{name}.ipynb has no parameter N_EDIT; expected MODEL" in text.replace("METHODS, ", "")
    assert not (tmp_path / "out").exists()


def test_a_missing_data_file_is_named(capsys, tmp_path):
    missing = tmp_path / "zsre.json"
    options = ["DATASET=zsre", f"DATA_PATH={missing}"]
    code, text = said(capsys, "--only", "columns", "--parameter", *options, "--out", str(tmp_path / "out"))
    assert code == 1 and f"failed: columns--almanac--zsre: FileNotFoundError: no such file: {missing}" in text
