"""Tables: means over runs against NumPy, rankings against brute force, bold where it belongs, links that hold."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memoir import paper, plots
from memoir.audits import audit
from memoir.editors import EDITORS
from memoir.editors.unedited import Unedited
from memoir.evaluation import SCORES
from memoir.files import read_json, write_json
from memoir.records import Checkpoint, EditRequest, Result, RunInfo
from memoir.tables import Table, compare, labels, markdown, meaning, rows

ENDINGS = ("json", "md", "png", "svg")  # of the files of a table


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
    table = rows([
        result(at={1: 0.0, 10: 0.4, 100: 0.9}, separate=[(1, [0.2, 0.6, 1.0])]),
        result(at={10: 0.6, 100: 0.8}, separate=[(1, [0.4])]),
        result("ft", at={100: 0.1}),
    ])  # fmt: skip
    by_place = {(row["method"], row["T"]): row for row in table.to_dict("records")}
    assert {place: row["runs"] for place, row in by_place.items()} == {
        ("MEMOIR", 1): 4, ("MEMOIR", 10): 2, ("MEMOIR", 100): 2, ("FT", 100): 1
    }  # fmt: skip
    one, ten, hundred = (by_place["MEMOIR", T] for T in (1, 10, 100))
    assert one["avg"] == pytest.approx(np.mean([0.2, 0.6, 1.0, 0.4]))
    assert ten["avg"] == pytest.approx(0.5) and one["seconds_per_edit"] == pytest.approx(0.1)
    # The edits of a run are all alike, and runs differ only in Rel., which is half of Avg. here.
    ft = by_place["FT", 100]
    assert ft["low"] == pytest.approx(0.3) == ft["high"]
    assert (hundred["low"], hundred["high"]) == pytest.approx((0.65, 0.7))
    assert 0.35 <= one["low"] < (np.mean([0.2, 0.6, 1.0, 0.4]) + 0.5) / 2 < one["high"] <= 0.75


def test_rows_stand_by_T_and_in_the_order_of_the_registry():
    methods = ["unheard-of", *reversed(EDITORS)]
    table = rows(result(method, at={10: 0.5, 100: 0.5}) for method in methods)
    order = [*(editor.label for editor in EDITORS.values()), "unheard-of"]
    assert table["T"].to_list() == [10] * len(order) + [100] * len(order)
    assert table["method"].to_list() == 2 * order


def test_the_perplexity_of_a_broken_model_is_not_a_missing_one():
    (checkpoint,) = (whole := result()).checkpoints
    broken = replace(whole, checkpoints=(replace(checkpoint, scores=checkpoint.scores | {"ppl": math.nan}),))
    (ppl,) = rows([whole, broken])["ppl"]
    assert ppl == math.inf


def test_labels_tell_variants_apart(monkeypatch):
    assert labels(result()) == ("MEMOIR", "MEMOIR")
    assert labels(result(overrides={"write": "rls", "tau": 0.5})) == ("MEMOIR", "MEMOIR (write=rls, tau=0.5)")
    assert labels(result("ft", config={"variant": "FT-M"}, overrides={})) == ("FT", "FT (FT-M)")
    assert labels(result("ft", config={"batch_size": 100})) == ("FT", "FT (100 edits at a time)")
    assert labels(result("ft", config={"batch_size": 9}, overrides={"batch_size": 9}))[1] == "FT (batch_size=9)"
    by_rls = type("Mine", (Unedited,), {"name": "mine", "label": "Mine (rls)", "write_rule": "rls"})
    monkeypatch.setitem(EDITORS, "mine", by_rls)
    assert labels(result("mine", overrides={"write": "rls"})) == ("Mine (rls)", "Mine (rls)")


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
    assert text.startswith(f"{agreeing} of {total} pairs are in the paper's order")
    assert (f" and {tied} {'is' if tied == 1 else 'are'} tied;" in text) == (tied > 0)
    places = {
        name: [1 + sorted(scores.values(), reverse=True).index(scores[name]) for scores in (ours, theirs)]
        for name in names
    }
    largest = max(abs(here - there) for here, there in places.values())
    farthest = [
        name
        for name, (here, there) in places.items()
        if f"; {name} differs most: rank {here} here, {there} in the paper" in text
    ]
    assert len(farthest) == (largest >= 3)
    assert all(abs(places[name][0] - places[name][1]) == largest for name in farthest)


def test_compare_names_all_who_are_best():
    assert "; a and b are best, in the paper b" in compare({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.6})


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


def test_scores_beyond_the_papers_stand_below():
    (checkpoint,) = (plain := result()).checkpoints
    scores = {"begins": 0.5, "exact_match": 0.25, "text_ppl": 1.5, "text_ppl_unedited": 1.25}
    extended = replace(plain, checkpoints=(replace(checkpoint, scores=checkpoint.scores | scores),))
    assert table(extended).beyond_paper() == (
        "| T | Method | Begins | Exact match | Perplexity of plain text: before | Perplexity of plain text: after |\n"
        "| --- | --- | --- | --- | --- | --- |\n| 100 | MEMOIR | 0.500 | 0.250 | 1.25 | 1.50 |\n"
    )


def test_generated_answers_stand_in_the_table_and_older_results_have_none():
    (checkpoint,) = (older := result()).checkpoints
    header, _, line = table(older).beside_paper().splitlines()[:3]
    assert "Generated" not in header and "Exact match" in table(older).beyond_paper()
    newer = replace(older, checkpoints=(replace(checkpoint, scores=checkpoint.scores | {"generated": 0.125}),))
    header, _, line = table(newer).beside_paper().splitlines()[:3]
    shown = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert shown["Generated"] == "0.125" and "Generated" not in table(newer).beyond_paper()
    # Scores of older versions that no longer exist, and scores that older versions did not measure.
    scores = {name: value for name, value in checkpoint.scores.items() if name not in ("generated", "text_ppl")}
    scores |= {"unrelated_ppl": 7e5, "unrelated_ppl_unedited": 6e5}
    oldest = replace(older, checkpoints=(replace(checkpoint, scores=scores),))
    assert table(oldest).page("x.png") == table(older).page("x.png")
    assert plots.lifelong(oldest).axes


def test_long_form_is_ranked_by_perplexity():
    better, worse = result("memoir", gen=None), result("ft", gen=None)
    (checkpoint,) = worse.checkpoints
    worse = replace(worse, checkpoints=(replace(checkpoint, scores=checkpoint.scores | {"ppl": 123456.0}),))
    long_form = Table("almanac", "almanac-bio", rows([better, worse]))
    assert (long_form.name, long_form.score) == ("Table 2", "ppl")
    text = long_form.beside_paper()
    assert "**2.00 [2.00, 2.00]**" in text and "1.2e+05" in text and "1.07 / 1.00" in text


def test_agreement_speaks_of_each_of_the_papers_models():
    text = table(result("ft", at={1000: 0.5}), result("grace", at={1000: 0.1}), result(at={1000: 0.94})).agreement()
    assert text.splitlines() == [
        f"- T = 1000, against the paper's {model}: 2 of 3 pairs are in the paper's order; MEMOIR is best in both."
        for model in paper.MODELS
    ]


def test_a_saved_table_is_read_back(tmp_path):
    own = table(result(at={1: 0.9, 100: 0.8}), result("ft", at={1: 0.9, 100: 0.2}))
    audited = replace(own, audit=audit([EditRequest(prompt="Who?", target="Ada")]))
    for one in (own, audited):
        out = tmp_path / "a-3.1--qa.json"  # the point belongs to the name
        one.save(out)
        assert {path.name for path in tmp_path.iterdir()} == {f"a-3.1--qa.{end}" for end in ENDINGS}
        again = Table.load(out)
        pd.testing.assert_frame_equal(again.rows, one.rows)
        assert (again.model, again.dataset, again.audit) == ("almanac", "almanac-qa", one.audit)
    older = read_json(out)
    older["rows"] = [{name: value for name, value in row.items() if name != "known"} for row in older["rows"]]
    write_json(out, {"model": "almanac", "dataset": "almanac-qa", "rows": older["rows"]})
    assert Table.load(out).rows["known"].isna().all() and Table.load(out).audit is None


def test_what_the_model_knew_stands_beside_the_table_and_a_clean_set_of_edits_gets_no_line():
    own = replace(table(result(at={1: 0.9, 100: 0.8})), audit=audit([EditRequest(prompt="Who?", target="Ada")]))
    flaws = own.about_the_edits()
    assert "Edits without a locality prompt: 1." in flaws and "knew" not in flaws
    known = own.rows.assign(known=[1.0, 0.25])
    assert "- The unedited model knew 25% of the true answers.\n" in replace(own, rows=known).about_the_edits()
    assert replace(own, audit=None).about_the_edits() == ""


def test_a_table_keeps_summaries_of_its_runs_and_no_score_of_a_single_edit(tmp_path):
    result(at={10: 0.5, 100: 0.8}, separate=[(1, [0.2, 0.6])], overrides={"tau": 0.5}).save(tmp_path / "a.json")
    (run,) = Table.of([tmp_path / "a.json"]).runs
    assert (run["label"], run["method"], run["seed"]) == ("MEMOIR (tau=0.5)", "memoir", 0)
    assert [each["edits"] for each in run["checkpoints"]] == [10, 100] and run["separate"] == [[1, 2]]
    assert run["checkpoints"][1]["scores"]["avg"] == 0.8 and "'per_edit'" not in str(run)


def test_a_table_is_saved_with_its_page_and_figure_and_each_time_alike(tmp_path):
    for place, (method, average) in enumerate({"memoir": 0.8, "ft": 0.2, "unheard-of": 0.5}.items()):
        result(method, at={1: 0.9, 100: average}).save(tmp_path / f"{place}.json")
    found = audit([EditRequest(prompt="Who?", target=" Ada")])
    saved = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        replace(Table.of(str(tmp_path / "*.json")), audit=found).save(folder / "qa.json")
        saved.append({path.name: path.read_bytes() for path in folder.iterdir()})
    files = saved[0]
    assert files == saved[1] and files.keys() == {f"qa.{end}" for end in ENDINGS}
    assert len(read_json(tmp_path / "once" / "qa.json")["rows"]) == 6
    page = files["qa.md"].decode()
    assert "![Table 1](qa.png)" in page and all(line in page for line in found.lines())


def test_the_figure_has_a_dot_per_method_at_the_most_edits_beside_the_papers():
    variant = result("memoir", at={1: 0.8, 1000: 0.7}, overrides={"tau": 0.5})
    slow = result("rome", at={1: 0.9, 10: 0.9})
    own = table(
        result(at={1: 0.9, 1000: 0.8}), variant, slow, result("ft", at={1000: 0.2}), result("new", at={1000: 0.5})
    )
    figure = own.figure()
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["FT", "new", "MEMOIR"]  # the best at the top
    assert [label.get_fontweight() for label in ax.get_yticklabels()] == ["normal", "normal", "bold"]
    dots = {(*line.get_xdata(), *line.get_ydata()): line for line in ax.lines if line.get_xdata().size}
    colours = [dots[place].get_color() for place in ((0.2, 0), (0.5, 1), (0.8, 2))]
    assert colours == [EDITORS["ft"].colour, "#000000", EDITORS["memoir"].colour]
    known = own.paper[own.paper["T"] == 1000].set_index(["model", "method"])["avg"]
    theirs = {(known[model, method], y) for model in paper.MODELS for method, y in (("FT", 0), ("MEMOIR", 2))}
    assert theirs == dots.keys() - {(0.2, 0), (0.5, 1), (0.8, 2)}
    assert table(variant).figure().axes[0].get_yticklabels()


def test_titles_call_methods_as_the_paper_does():
    for figure in (plots.lifelong(result()), plots.retention(result())):
        titles = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
        assert "MEMOIR on almanac, almanac-qa" in titles


def test_table_of_nothing_or_of_two_models_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results"):
        Table.of(str(tmp_path / "*.json"))
    other = result()
    result().save(tmp_path / "a.json")
    replace(other, info=replace(other.info, model="else")).save(tmp_path / "b.json")
    with pytest.raises(ValueError, match="one model and data set"):
        Table.of([tmp_path / "a.json", tmp_path / "b.json"])


def test_meaning_speaks_of_forgetting_only_where_there_is_some():
    assert "not forgotten" in meaning(result(at={100: 0.9}))
    (checkpoint,) = result(at={100: 0.9}).checkpoints
    faded = replace(checkpoint, per_edit={"rel": [0.0] * 50 + [1.0] * 50})
    text = meaning(replace(result(), checkpoints=(faded,)))
    assert "faded" in text and "The first 10 edits score 0.0% now, the last 100.0%" in text
    assert "The first edit scores 90.0% now" in meaning(result(at={3: 0.9}))


def test_markdown_keeps_its_columns():
    assert markdown([{"a": "x|y", "b": None}]) == "| a | b |\n| --- | --- |\n| x\\|y | – |\n"


def test_the_papers_tables_are_whole():
    for name, key, last in (("table1", "avg", 1000), ("table2", "loc", 600)):
        known = paper.read(name)
        cells = {(row["model"], row["method"], row["T"]) for row in known}
        assert len(known) == len(cells) == 2 * 8 * 4
        assert {T for *_, T in cells} == {1, 10, 100, last} and {model for model, *_ in cells} == set(paper.MODELS)
        assert all(0 <= row[key] <= 1 for row in known if row[key] is not None)
    for row in paper.read("table1"):
        assert row["avg"] == pytest.approx((row["rel"] + row["gen"] + row["loc"]) / 3, abs=0.011)
