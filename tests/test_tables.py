"""Tables: means over runs against NumPy, rankings against brute force, bold where it belongs, links that hold."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memoir import paper, plots
from memoir.records import Checkpoint, Result, RunInfo, read_json
from memoir.run import SCORES
from memoir.tables import REASONS, Table, compare, labels, markdown, meaning, rows, write_readme


def scores(avg: float | None, gen: float | None = 0.5, ppl: float = 2.0) -> dict[str, float | None]:
    return dict.fromkeys(SCORES) | {"rel": avg, "gen": gen, "loc": 1.0, "avg": avg, "ppl": ppl, "exact_match": avg}


def per_edit(avg: float, gen: float | None, n: int) -> dict[str, list[float | None]]:
    """Scores of n edits that are all alike."""
    return {"rel": [avg] * n, "gen": [gen] * n, "loc": [None] * n, "ppl": [2.0] * n}


def result(method="memoir", at=None, separate=(), overrides=None, config=None, gen=0.5) -> Result:
    """A result with scores `at` = {edits: avg} and separate runs [(edits, [avg, …])]."""
    at = at or {100: 0.9}
    info = RunInfo(
        method=method, model="almanac", model_fingerprint="", dataset="almanac-qa", edits=max(at), seed=0,
        dtype="float32", device="cpu", config=config or {}, protocol={}, commit="", dirty=None, versions={}, started="",
    )  # fmt: skip
    extra = {
        "separate": [
            {
                "edits": n,
                "scores": [scores(a, gen) for a in avgs],
                "per_edit": [per_edit(a, gen, n) for a in avgs],
                "seconds_per_edit": 0.1,
            }
            for n, avgs in separate
        ]
    }
    if overrides is not None:
        extra["cell"] = {"parameters": {"OVERRIDES": overrides}}
    checkpoints = tuple(
        Checkpoint(edits=n, scores=scores(avg, gen), per_edit=per_edit(avg, gen, n)) for n, avg in at.items()
    )
    return Result(info=info, checkpoints=checkpoints, edit_ids=(), seconds_per_edit=0.2, peak_bytes=1, extra=extra)


def test_rows_pool_runs_and_prefer_separate_ones():
    found = rows([
        result(at={1: 0.0, 10: 0.4, 100: 0.9}, separate=[(1, [0.2, 0.6, 1.0])]),
        result(at={10: 0.6, 100: 0.8}, separate=[(1, [0.4])]),
        result("ft", at={100: 0.1}),
    ])  # fmt: skip
    assert [(row["method"], row["T"], row["runs"]) for row in found] == [
        ("MEMOIR", 1, 4), ("MEMOIR", 10, 2), ("FT", 100, 1), ("MEMOIR", 100, 2)
    ]  # fmt: skip
    one, ten, ft, hundred = found
    assert one["avg"] == pytest.approx(np.mean([0.2, 0.6, 1.0, 0.4]))
    assert ten["avg"] == pytest.approx(0.5) and one["seconds_per_edit"] == pytest.approx(0.1)
    # Edits of one run are alike here, and of Avg. only rel. differs between runs, by half.
    assert ft["low"] == pytest.approx(0.3) == ft["high"] and (hundred["low"], hundred["high"]) == pytest.approx(
        (0.65, 0.7)
    )
    assert 0.35 <= one["low"] < (np.mean([0.2, 0.6, 1.0, 0.4]) + 0.5) / 2 < one["high"] <= 0.75


def test_labels_tell_variants_apart():
    assert labels(result()) == ("MEMOIR", "MEMOIR")
    assert labels(result(overrides={"write": "rls"})) == ("MEMOIR", "MEMOIR (write=rls)")
    assert labels(result("ft", config={"variant": "FT-M"}, overrides={})) == ("FT", "FT (FT-M)")


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.randoms(use_true_random=False), st.booleans())
def test_compare_counts_pairs_as_brute_force(theirs, random, lower_is_better):
    ours = [random.randrange(4) for _ in theirs]
    names = [f"m{i}" for i in range(len(theirs))]
    text = compare(
        dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)), lower_is_better=lower_is_better
    )
    sign = -1 if lower_is_better else 1
    ours, theirs = (dict(zip(names, [sign * x for x in values], strict=True)) for values in (ours, theirs))
    agreeing = sum(ours[a] > ours[b] and theirs[a] > theirs[b] for a, b in permutations(names, 2))
    against = sum(ours[a] > ours[b] and theirs[a] < theirs[b] for a, b in permutations(names, 2))
    total = len(names) * (len(names) - 1) // 2
    tied = total - agreeing - against
    assert text.startswith(f"{agreeing} of {total} pairs stand in the paper's order")
    assert (f", {tied} are tied;" in text) == (tied > 0)
    for name in names:
        here, there = (sorted(scores.values(), reverse=True).index(scores[name]) + 1 for scores in (ours, theirs))
        assert (f"{name} (place {here}, there {there})" in text) == (abs(here - there) >= 3)


def test_compare_names_all_who_are_best():
    assert "; best is a and b, there b" in compare({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.6})


def test_compare_ignores_what_only_one_side_has():
    assert compare({"a": 1.0, "b": None}, {"a": 1.0, "b": 2.0, "c": 3.0}) == ""


def table(*results: Result) -> Table:
    return Table("almanac", "almanac-qa", rows(results))


def test_the_best_average_of_each_T_is_bold_and_the_unedited_model_is_no_rival():
    text = table(
        result("unedited", at={10: 0.99, 100: 0.99}),
        result("ft", at={10: 0.5, 100: 0.9}),
        result("memoir", at={10: 0.7, 100: 0.9}),
    ).beside_paper()
    lines = {tuple(line.split(" | ")[:2]): line for line in text.splitlines()}
    bold = {key for key, line in lines.items() if "**" in line}
    assert bold == {("| 10", "MEMOIR"), ("| 100", "MEMOIR"), ("| 100", "FT")}
    assert "**0.700 [0.600, 0.600]**" in lines["| 10", "MEMOIR"]


def test_the_papers_figures_stand_beside_ours():
    text = table(result("ft", at={1000: 0.5}), result("memoir", at={100: 0.7, 1000: 0.9})).beside_paper()
    line = next(line for line in text.splitlines() if line.startswith("| 1000 | MEMOIR"))
    assert "0.94 / 0.85 / 1.00 / 0.93" in line and "0.94 / 0.89 / 1.00 / 0.94" in line
    assert "| 1 |" in line  # how many runs
    changed = table(result("memoir", at={1000: 0.9}, overrides={"routing": False})).beside_paper()
    assert "MEMOIR (routing=False)" in changed and "0.94 / 0.85" not in changed


def test_what_the_paper_does_not_measure_stands_below():
    (checkpoint,) = (found := result()).checkpoints
    honest = {"exact_match": 0.25, "unrelated_ppl": 1.5, "unrelated_ppl_unedited": 1.25}
    found = replace(found, checkpoints=(replace(checkpoint, scores=checkpoint.scores | honest),))
    assert table(found).beyond_paper() == (
        "| T | Method | Exact match | Perplexity, unrelated |\n| --- | --- | --- | --- |\n"
        "| 100 | MEMOIR | 0.250 | 1.25 → 1.50 |\n"
    )


def test_long_form_is_ranked_by_perplexity():
    better, worse = result("memoir", gen=None), result("ft", gen=None)
    (checkpoint,) = worse.checkpoints
    worse = replace(worse, checkpoints=(replace(checkpoint, scores=checkpoint.scores | {"ppl": 123456.0}),))
    found = Table("almanac", "almanac-bio", rows([better, worse]))
    assert (found.name, found.score) == ("Table 2", "ppl")
    text = found.beside_paper()
    assert "**2.00 [2.00, 2.00]**" in text and "1.2e+05" in text and "1.07 / 1.00" in text


def test_what_fares_otherwise_than_in_the_paper_is_told_with_its_figures_and_why():
    found = table(result("ft", at={1000: 0.5}), result("grace", at={1000: 0.1}), result("memoir", at={1000: 0.94}))
    text = found.agreement()
    assert "T = 1000. LLaMA-3-8B: 2 of 3 pairs" in text
    assert "better FT (0.50 for 0.09, 0.10); worse GRACE (0.10 for" in text and "MEMOIR (" not in found.why()
    assert REASONS["FT"] in text and REASONS["GRACE"] in text and REASONS["ROME"] not in text
    elsewhere = Table("llama", "zsre", found.rows)
    assert REASONS["FT"] not in elsewhere.agreement()


def test_table_files(tmp_path):
    found = table(result("memoir", at={1: 0.9, 100: 0.8}), result("ft", at={1: 0.9, 100: 0.2}))
    out = tmp_path / "tables" / "a-3.1--qa.json"  # the point belongs to the name
    found.save(out)
    figure = plots.table_curves(found.rows, found.paper, found.score)
    first = [path.read_bytes() for path in plots.save(figure, out)]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        f"a-3.1--qa.{kind}" for kind in ("csv", "json", "md", "png", "svg")
    ]
    assert [path.read_bytes() for path in plots.save(figure, out)] == first
    assert read_json(out)["rows"] == found.rows
    with out.with_name("a-3.1--qa.csv").open() as lines:
        assert [float(row["avg"]) for row in csv.DictReader(lines)] == [row["avg"] for row in found.rows]

    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "x.md").write_text("## Aside\n\n[site](https://example.org)\n")
    text = write_readme(tmp_path).read_text()
    assert "![Table 1](tables/a-3.1--qa.png)" in text and "(https://example.org)" in text
    assert text.index("Table 1") < text.index("Aside")


def test_table_of_nothing_or_of_two_models_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results"):
        Table.of(str(tmp_path / "*.json"))
    other = result()
    result().save(tmp_path / "a.json")
    replace(other, info=replace(other.info, model="else")).save(tmp_path / "b.json")
    with pytest.raises(ValueError, match="one model and data set"):
        Table.of([tmp_path / "a.json", tmp_path / "b.json"])


def test_meaning_speaks_of_forgetting_only_where_there_is_some():
    assert "forgotten" in meaning(result(at={100: 0.9}))
    (checkpoint,) = result(at={100: 0.9}).checkpoints
    faded = replace(checkpoint, per_edit={"rel": [0.0] * 50 + [1.0] * 50})
    text = meaning(replace(result(), checkpoints=(faded,)))
    assert "fade" in text and "10 edits stand now at 0.0%, the last at 100.0%" in text


def test_markdown_keeps_its_columns():
    assert markdown([{"a": "x|y", "b": None}]) == "| a | b |\n| --- | --- |\n| x\\|y | – |\n"


def test_the_papers_tables_are_whole():
    for name, key, last in (("table1", "avg", 1000), ("table2", "loc", 600)):
        found = paper.read(name)
        cells = {(row["model"], row["method"], row["T"]) for row in found}
        assert len(found) == len(cells) == 2 * 8 * 4
        assert {T for *_, T in cells} == {1, 10, 100, last} and {model for model, *_ in cells} == set(paper.MODELS)
        assert all(0 <= row[key] <= 1 for row in found if row[key] is not None)
    for row in paper.read("table1"):
        assert row["avg"] == pytest.approx((row["rel"] + row["gen"] + row["loc"]) / 3, abs=0.011)
