"""The front page: what comes to the front, what the headline claims, and that every link of a published page holds."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_tables import result

from memoir import __main__ as cli
from memoir import frontpage
from memoir.audits import audit
from memoir.files import write_json
from memoir.records import EditRequest, Probe, Result
from memoir.tables import Table


def edits(*targets: str) -> list[EditRequest]:
    probe = Probe(kind="rephrase", prompt="Where does Ada live?", answer="Rome")
    return [EditRequest(prompt="Where is Ada?", target=t, subject="Ada", probes=(probe,), id=t) for t in targets]


def reports_of(folder: Path, *results, dataset="zsre", model="smollm2", audited=None) -> Path:
    """A folder with the table of these results."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    paths = []
    for place, one in enumerate(results):
        cell = {"METHOD": one.info.method, "OVERRIDES": {}, "MODEL": model, "DATA_PATH": None, "CHECKPOINTS": []}
        info = replace(one.info, model=model, dataset=dataset, commit="abcdefghij", started="2026-11-27T10:00:00")
        extra = one.extra | {"cell": {"parameters": cell}}
        paths.append(replace(one, info=info, extra=extra).save(folder / "runs" / f"{model}-{dataset}-{place}.json"))
    table = replace(Table.of(paths), audit=audit(audited) if audited else None)
    table.save(folder / "tables" / f"{model}--{dataset}.json")
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """A real model's table, the almanac's, and two notebooks that were run."""
    folder = tmp_path / "out"
    slow = result("rome", at={1: 0.9, 10: 0.4}, separate=[(1, [0.9])])
    best, other = result(at={1: 0.9, 1000: 0.8}, separate=[(1, [0.9, 0.8])]), result("grace", at={1: 0.9, 1000: 0.2})
    reports_of(folder, other, best, slow, result("unedited", at={1000: 0.95}), audited=edits("Oslo", "Bonn"))
    reports_of(folder, result(at={1: 0.9, 1000: 0.99}), dataset="almanac-qa", model="almanac")
    for notebook, figure in (("columns", "drift"), ("speed", "questions")):
        stem = folder / notebook / f"{notebook}--almanac--almanac-qa"
        stem.parent.mkdir()
        Path(f"{stem}--{figure}.png").write_bytes(b"png")
        stem.with_suffix(".ipynb").write_text("{}")
        stem.with_suffix(".md").write_text(
            f"# X\n\n![x]({stem.name}--{figure}.png)\n\n[The notebook]({stem.name}.ipynb)\n"
        )
        write_json(stem.with_suffix(".json"), {"title": "X", "meaning": f"One claim on {notebook}. A caveat."})
    frontpage.write(folder)
    return folder


def test_the_real_model_comes_to_the_front_with_a_headline_from_its_numbers(out):
    text = (out / "README.md").read_text()
    assert text.startswith("# 1,000 edits of ZsRE in SmolLM2-135M-Instruct\n")
    headline = text.splitlines()[2]
    assert headline == (
        "MEMOIR answers 80% of its edits, 50% of their rephrased prompts, and 100% of unrelated prompts as before: an "
        "average of 0.80. The best of the other methods is GRACE, with an average of 0.20."
    )
    assert "[Table 1, almanac-qa on the almanac's model](tables/almanac--almanac-qa.md): MEMOIR answers 99%" in text


@pytest.mark.parametrize(
    ("ours", "theirs", "end"),
    [(0.5, 0.9, "The best of all methods is FT, with an average of 0.90."), (0.5, 0.5, "FT is level with it.")],
)
def test_the_headline_admits_a_better_method_and_a_tie(tmp_path, ours, theirs, end):
    runs = [result(at={100: ours}), result("ft", at={100: theirs}), result("unedited", at={100: 1.0})]
    paths = [run.save(tmp_path / f"{place}.json") for place, run in enumerate(runs)]
    assert frontpage.headline(Table.of(paths)).endswith(end)


def test_one_table_at_the_most_edits_says_what_is_missing_and_what_the_edits_allow(out):
    text = (out / "README.md").read_text()
    front = text[: text.index("<details>")]
    lines = [line for line in front.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells[2:]] == ["Unedited", "GRACE", "**MEMOIR**", "ROME: run to T = 10 only", "Ceiling"]
    table = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    assert table["**MEMOIR**"]["Avg."] == "**0.800**" and table["**MEMOIR**"]["Paper's avg., LLaMA-3-8B"] == "0.93"
    assert table["Ceiling"]["Gen."] == "0.50"
    assert "Not run: FT, MEMIT, DEFER, WISE and AlphaEdit." in front
    assert "| 1 | GRACE |" not in front and "| 1 | GRACE |" in text  # all T are behind the fold


def test_one_long_run_does_not_push_the_methods_off_the_front(tmp_path):
    """Three of four methods stop at T = 100; of two, one is half."""
    long, *short = [
        result(at={100: 0.9, 1000: 0.8}),
        *(result(name, at={100: 0.5}) for name in ("ft", "grace", "rome")),
    ]
    text = frontpage.write(reports_of(tmp_path / "four", long, *short)).read_text()
    front = text[: text.index("<details>")]
    assert text.startswith("# 100 edits of ZsRE") and "average of 0.90" in front and "run to T" not in front
    assert "| 1000 | MEMOIR |" in text and "loc. after 1,000 edits: MEMOIR 0.80.\n" in front
    text = frontpage.write(reports_of(tmp_path / "two", long, short[0])).read_text()
    assert (
        text.startswith("# 1,000 edits of ZsRE")
        and "FT: run to T = 100 only" in text
        and " after 1,000 edits:" not in text
    )


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_front_table_tells_runs_where_methods_differ_in_them(tmp_path, seeds):
    one = result(at={100: 0.8})
    ours = [replace(one, info=replace(one.info, seed=seed)) for seed in seeds]
    reports_of(tmp_path, *ours, result("ft", at={100: 0.2}))
    (head, *rows) = [
        line for line in frontpage.front_table(Table.load(next(tmp_path.glob("tables/*.json")))).splitlines()
    ]
    assert ("| Runs |" in head) == (len(seeds) > 1)
    assert any("| 3 |" in row for row in rows) == (len(seeds) > 1)


def test_cards_have_a_question_a_sentence_a_picture_and_a_link(out):
    text = (out / "README.md").read_text()
    assert text.count("<td ") == 2
    for notebook, figure in (("columns", "drift"), ("speed", "questions")):
        question = frontpage.CARDS[notebook][0]
        assert f"<b>{question}</b>" in text and f"<br>One claim on {notebook}.<br>" in text
        assert f'src="{notebook}/{notebook}--almanac--almanac-qa--{figure}.png"' in text
    assert "A caveat" not in text


@pytest.mark.parametrize(
    ("commands", "told"),
    [
        ((None, None, None), None),  # as in older results
        (("a --seeds 0", "a --seeds 0", "b --chat"), "They were made by:\n\n```sh\na --seeds 0\nb --chat\n```\n"),
        (("a --data-path /somewhere/b.json",) * 3, "They were made by:\n\n```sh\na --data-path b.json\n```\n"),
        (("a", None, "a"), "2 of them were made by:\n\n```sh\na\n```\n"),
    ],
)
def test_the_page_shows_each_command_that_made_its_runs_without_folders(tmp_path, commands, told):
    runs = [result(at={100: 0.8 - place / 10}) for place in range(len(commands))]
    runs = [replace(run, extra=run.extra | {"command": one}) for run, one in zip(runs, commands, strict=True)]
    text = frontpage.write(reports_of(tmp_path, *runs)).read_text()
    assert "3 runs, 2026-11-27" in text and "made by" not in text if told is None else told in text


def test_the_histogram_beside_the_table_is_that_of_its_data_set_if_there_is_one(out):
    def shown() -> list[str]:
        return re.findall(r'src="(overlap/[^"]+)"', frontpage.write(out).read_text())

    (out / "overlap").mkdir()
    assert shown() == []
    for dataset in ("atlas", "zsre"):
        name = f"overlap--smollm2--{dataset}--histograms.png"
        (out / "overlap" / name).write_bytes(b"png")
        assert shown() == [f"overlap/{name}"]
    (out / "overlap" / "overlap--smollm2--a--histograms.png").write_bytes(b"png")
    assert shown() == ["overlap/overlap--smollm2--zsre--histograms.png"]


@pytest.mark.parametrize("commit", [None, "unknown"])  # outside a checkout; older results say it in words
def test_runs_of_an_unknown_commit_are_shown_as_that(tmp_path, commit):
    run = replace(result(at={1000: 0.8}), info=replace(result().info, commit=commit))
    assert Result.load(run.save(tmp_path / "r.json")).info.commit == commit
    Table.of([tmp_path / "r.json"]).save(tmp_path / "tables" / "m--d.json")
    assert "of commit unknown" in frontpage.write(tmp_path).read_text()


def test_what_is_published_has_no_dead_link_no_run_and_no_executed_notebook(out, capsys):
    reports = out.parent / "reports"
    assert cli.main(["publish", "--out", str(out), "--to", str(reports)]) == 0
    files = [path for path in reports.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".ipynb" or path.parent.name == "runs"]
    for page in (path for path in files if path.suffix == ".md"):
        links = re.findall(r'(?:\]\(|src="|href=")([^)"]+)', page.read_text())
        assert links
        for link in links:
            target = Path(os.path.normpath(page.parent / link))
            source = re.fullmatch(r"\.\./\.\./notebooks/(\w+)\.ipynb", link)
            assert source and source[1] in frontpage.CARDS if source else target.is_file(), (page, link)
    assert f"{len(files)} files" in capsys.readouterr().out


def test_publishing_again_takes_away_what_the_page_led_to_and_leaves_what_others_put_there(out, tmp_path):
    reports, thesis = tmp_path / "reports", tmp_path / "thesis.md"
    frontpage.publish(out, reports)
    files = sorted(path for path in reports.rglob("*") if path.is_file())
    (reports / "columns" / "stale.png").write_bytes(b"x")
    (reports / "by-hand.json").write_text("{}")
    thesis.write_text("x")
    page = reports / "README.md"
    page.write_text(f"{page.read_text()}\n[old](columns/stale.png) [outside](../thesis.md) [away]({thesis})\n")
    frontpage.publish(out, reports)
    now = sorted(path for path in reports.rglob("*") if path.is_file())
    assert now == sorted([*files, reports / "by-hand.json"]) and thesis.is_file()


def test_a_folder_of_other_things_is_never_replaced(out, tmp_path, capsys):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    assert cli.main(["publish", "--out", str(out), "--to", str(precious)]) == 2
    assert "holds other files" in capsys.readouterr().err and (precious / "thesis.tex").is_file()
    assert cli.main(["publish", "--out", str(tmp_path / "nothing"), "--to", str(tmp_path / "new")]) == 2
    assert "nothing has no README.md; run `make tables` first" in capsys.readouterr().err


def test_an_empty_folder_has_a_front_page_too(tmp_path):
    text = frontpage.write(tmp_path).read_text()
    assert text.startswith("# Reports\n") and "token" in text
