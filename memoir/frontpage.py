"""The front page of a reports folder: one model's result, six cards, and how it was measured.

`write` reads what tables and notebooks left in the folder; it measures nothing. `publish` copies the page and all that
it leads to into another folder, without executed notebooks and without the results of single runs; what others have put
there stays.
"""

from __future__ import annotations

import html
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from memoir import plots
from memoir.files import read_json, write_atomically
from memoir.metrics import PROTOCOL
from memoir.tables import HEADINGS, NOTE, Table, listed, markdown, number

CARDS = {  # notebook → its question, and its figures for the card, the first one that is there
    "columns": ("Do later edits overwrite the first one?", ("drift",)),
    "overlap": ("What does the threshold τ trade?", ("tau", "histograms")),
    "retention": ("Which method forgets?", ("scores",)),
    "ablations": ("Which part of MEMOIR does what?", ("parts",)),
    "capacity": ("How many edits fit?", ("check",)),
    "speed": ("What does a memory full of edits cost?", ("questions",)),
}
NAMES = {
    "smollm2": "SmolLM2-135M-Instruct",
    "almanac": "the almanac's model",
    "zsre": "ZsRE",
    "selfcheckgpt": "SelfCheckGPT",
    "counterfact": "CounterFact",
    "atlas": "the atlas",
}
MARK = "<!-- Written by memoir, which replaces this page and all that it leads to: see `python -m memoir publish`. -->"
FRONT = ("zsre", "counterfact", "atlas")  # data sets in the order in which they come to the front
NO_METHODS = ("Unedited", "InContext")  # baselines left out of the ranking


def write(reports: str | os.PathLike) -> Path:
    """Write `README.md` of a reports folder."""
    reports = Path(reports)
    loaded = {path.stem: Table.load(path) for path in sorted((reports / "tables").glob("*.json"))}
    front = max(loaded, key=lambda stem: _rank(loaded[stem]), default=None)
    parts = ["# Reports\n"]
    if front is not None:
        table = loaded[front]
        parts = [f"# {_title(table)}\n", f"{headline(table)}\n", beyond(table), _figures(reports, front, table)]
        parts += [front_table(table), _left_out(table), table.about_the_edits()]
        parts += [f"<details><summary>All T</summary>\n\n{table.all_T()}\n</details>\n"]
    if cards := _cards(reports, loaded[front].model if front else ""):
        parts += [f"## Six questions\n\n{cards}\n"]
    if others := [stem for stem in loaded if stem != front]:
        lines = [f"- [{_subject(loaded[stem])}](tables/{stem}.md): {headline(loaded[stem])}\n" for stem in others]
        parts += ["## Other tables\n", "".join(lines)]
    if front is not None:
        parts += ["## How this was measured\n", _provenance(loaded[front])]
    measures = markdown([{"Score": score, "Measured as": measure} for score, measure in PROTOCOL.items()])
    parts += [f"<details><summary>What the scores mean</summary>\n\n{measures}\n{NOTE}\n</details>\n"]
    text = "\n".join(part for part in [*parts, MARK + "\n"] if part)
    return write_atomically(reports / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def _rank(table: Table) -> tuple:
    """A real model comes before the almanac's, Table 1 before Table 2, more edits before fewer."""
    place = FRONT.index(table.dataset) if table.dataset in FRONT else len(FRONT)
    return table.model != "almanac", not table.long_form, table.main_T, -place, table.model


# Words ---------------------------------------------------------------------------------------------------------------


def _named(name: str) -> str:
    return NAMES.get(name, name)


def _subject(table: Table) -> str:
    return f"{table.name}, {_named(table.dataset)} on {_named(table.model)}"


def _title(table: Table) -> str:
    last = table.main_T
    return f"{last:,} edit{'s' if last > 1 else ''} of {_named(table.dataset)} in {_named(table.model)}"


def headline(table: Table) -> str:
    """Two sentences on the scores: what MEMOIR reaches, and how far the best other method is."""
    ranked = table.ranked(table.main_T)
    ranked = ranked[~ranked["method"].isin(NO_METHODS)]
    ours = ranked["label"].str.startswith("MEMOIR")
    leaders = [rows.iloc[0] for rows in (ranked[ours], ranked[~ours]) if len(rows)]
    if not leaders:
        return "No method of editing was run."
    best, rival = [*leaders, None][:2]
    if table.long_form:
        text = f"{best['label']} brings the corrected texts to {_ranked_as(table, best)}"
        text += f" and keeps {_percent(best['loc'])} of unrelated answers." if pd.notna(best["loc"]) else "."
    else:
        text = (
            f"{best['label']} answers {_percent(best['rel'])} of its edits, {_percent(best['gen'])} of their rephrased "
            f"prompts, and {_percent(best['loc'])} of unrelated prompts as before: {_ranked_as(table, best)}."
        )
    if rival is None:
        return text
    if _ranked_as(table, best) == _ranked_as(table, rival):
        return f"{text} {rival['label']} is level with it."
    ahead = (best[table.score] < rival[table.score]) == table.long_form
    which = "the other methods" if ahead else "all methods"
    return f"{text} The best of {which} is {rival['label']}, with {_ranked_as(table, rival)}."


def beyond(table: Table) -> str:
    """The methods at the most edits, the best first, where fewer than half of them made so many."""
    last = table.rows["T"].max()
    if last == table.main_T:
        return ""
    ranked = table.ranked(last)
    scores = [f"{row['label']} {number(table.score, row[table.score], 2)}" for _, row in ranked.iterrows()]
    return f"The {plots.NAMES[table.score]} after {last:,} edits: {', '.join(scores)}.\n"


def _ranked_as(table: Table, row: pd.Series) -> str:
    """The score that ranks the methods, in words."""
    return f"{'a perplexity' if table.long_form else 'an average'} of {number(table.score, row[table.score], 2)}"


def _percent(share: float) -> str:
    """A share as text; only what is 1 is called 100%."""
    if pd.isna(share):
        return "–"
    text = f"{share:.0%}" if share < 0.995 or share == 1 else f"{share:.1%}"
    return "nearly 100%" if text == "100.0%" else text


# Parts of the page ---------------------------------------------------------------------------------------------------


def _figures(reports: Path, stem: str, table: Table) -> str:
    images = [(f"tables/{stem}.png", f"tables/{stem}.md", f"Scores of the methods, {_subject(table)}")]
    own = f"overlap--{table.model}--{table.dataset}--histograms.png"
    found = (reports / "overlap").glob(f"overlap--{table.model}--*--histograms.png")
    for path in sorted(found, key=lambda path: (path.name != own, path.name))[:1]:
        page = path.name.replace("--histograms.png", ".md")
        images.insert(0, (f"overlap/{path.name}", f"overlap/{page}", "Overlap of prompts with the nearest edit"))
    return "".join(f'[<img src="{image}" alt="{alt}" width="480">]({page})\n' for image, page, alt in images)


def front_table(table: Table) -> str:
    """The scores at `main_T` edits, one row per method, with the ceiling that the edits set and the paper's score."""
    here, heading = table.main, HEADINGS[table.score]
    texts = table.texts([*table.shown, *table.measured(["generated"])]).loc[here.index].drop(columns="T")
    texts["Method"] = [f"**{label}**" if label.startswith("MEMOIR") else label for label in here["label"]]
    texts[heading] = texts[heading].mask(table.best, "**" + texts[heading] + "**")
    if here["skipped"].any():
        texts["Bad records left out"] = here["skipped"]
    if here["runs"].nunique() > 1:
        texts["Runs"] = here["runs"]
    texts["Seconds per edit"] = [number("seconds", seconds, 2) for seconds in here["seconds_per_edit"]]
    for model, theirs in table.paper_texts([table.score]).items():
        texts[f"Paper's {heading.lower()}, {model}"] = theirs
    lines = texts.to_dict("records")
    for label, own in table.rows[~table.rows["label"].isin(here["label"])].groupby("label", sort=False):
        lines.append(dict.fromkeys(lines[0], "–") | {"Method": f"{label}: run to T = {own['T'].max():,} only"})
    if table.audit and table.audit.ceiling and table.audit.ceiling[0] < 1:
        lines.append(dict.fromkeys(lines[0], "–") | {"Method": "Ceiling", HEADINGS["gen"]: table.audit.ceiling_text})
    return markdown(lines)


def _left_out(table: Table) -> str:
    """The paper's methods that were not run at all."""
    known = list(dict.fromkeys(table.paper["method"]))
    missing = [method for method in known if method not in set(table.rows["method"])]
    return f"Not run: {listed(missing)}.\n" if missing else ""


def _cards(reports: Path, model: str) -> str:
    """Question, sentence, thumbnail and link of each notebook that was run, three in a row."""
    cells = []
    for notebook, (question, figures) in CARDS.items():
        pages = [path for path in sorted((reports / notebook).glob(f"{notebook}--*.md")) if _result(path)]
        if not pages:
            continue
        page = next((path for path in pages if path.stem.startswith(f"{notebook}--{model}--")), pages[0])
        found = _result(page)
        sentence = html.escape(re.split(r"(?<=\.)\s", found["meaning"], maxsplit=1)[0])
        images = (f"{page.stem}--{figure}.png" for figure in figures)
        image = next((name for name in images if page.with_name(name).is_file()), None)
        link = f"{notebook}/{page.name}"
        thumbnail = (
            f'<br><a href="{link}"><img src="{notebook}/{image}" alt="{question}" width="280"></a>' if image else ""
        )
        cells.append(f'<td width="33%"><a href="{link}"><b>{question}</b></a><br>{sentence}{thumbnail}</td>')
    rows = ["\n".join(cells[start : start + 3]) for start in range(0, len(cells), 3)]
    return "<table>\n" + "".join(f"<tr>\n{row}\n</tr>\n" for row in rows) + "</table>" if rows else ""


def _result(page: Path) -> dict[str, Any] | None:
    try:
        found = read_json(page.with_suffix(".json"))
    except (OSError, ValueError):
        return None
    return found if "meaning" in found else None


def _provenance(table: Table) -> str:
    """Where the numbers of a table come from, and the commands that made them, as far as they are known."""
    if not table.runs:
        return ""
    runs = table.runs
    devices, dtypes = ({run[name] for run in runs} for name in ("device", "dtype"))
    commits = {(run["commit"] or "unknown")[:7] for run in runs}
    days = sorted({run["started"][:10] for run in runs})
    between = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    text = (
        f"{len(runs)} runs, {between}, on {listed(sorted(devices))} in {listed(sorted(dtypes))}, torch "
        f"{listed(sorted({str(run['versions'].get('torch')) for run in runs}))}, of commit "
        f"{listed(sorted(commits))}."
    )
    told = [run["command"] for run in runs if run.get("command")]  # older runs have none
    if not told:
        return f"{text}\n"
    whose = "They were" if len(told) == len(runs) else f"{len(told)} of them were"
    commands = "\n".join(dict.fromkeys(told))
    return f"{text} {whose} made by:\n\n```sh\n{commands}\n```\n"


# Publishing ----------------------------------------------------------------------------------------------------------


def publish(out: str | os.PathLike, reports: str | os.PathLike) -> list[Path]:
    """Replace the front page of the folder `reports`, and all that it led to, by those of `out`; returns the files.
    Pages link the source notebooks in place of the executed ones."""
    out, reports = Path(out), Path(reports)
    if not (out / "README.md").is_file():
        raise FileNotFoundError(f"{out} has no README.md; run `make tables` first")
    old = reports / "README.md"
    if reports.exists() and any(reports.iterdir()) and not (old.is_file() and MARK in old.read_text(encoding="utf-8")):
        raise ValueError(f"{reports} holds other files than reports; expected an empty or a new folder")
    files = _led_to(out)
    for file in _led_to(reports) - files:
        (reports / file).unlink()
    for file in files:
        (reports / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / file, reports / file)
        if file.suffix == ".md":
            text = (out / file).read_text(encoding="utf-8")
            text = re.sub(r"\]\((\w+)--[^)]*\.ipynb\)", r"](../../notebooks/\1.ipynb)", text)
            (reports / file).write_text(text, encoding="utf-8")
    return [reports / file for file in sorted(files)]


def _led_to(folder: Path) -> set[Path]:
    """The front page of a folder and what it leads to in there, with the data of each page, but no notebooks."""
    files, todo = set(), [Path("README.md")]
    while todo:
        file = todo.pop()
        inside = not file.is_absolute() and ".." not in file.parts
        if file in files or file.suffix == ".ipynb" or not inside or not (folder / file).is_file():
            continue
        files.add(file)
        if file.suffix == ".md":
            links = re.findall(r'(?:\]\(|src="|href=")([^)"#]+)', (folder / file).read_text(encoding="utf-8"))
            todo += [Path(os.path.normpath(file.parent / link)) for link in links if "://" not in link]
            todo.append(file.with_suffix(".json"))
    return files
