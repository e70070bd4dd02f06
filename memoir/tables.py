"""Results → the paper's two tables, ours beside the paper's, and sentences filled from the numbers.

A row is a dict: method (as the paper calls it), label (with the settings of a variant), T, runs, the scores of `run.py`
as means over the runs, spread (standard deviation of Avg. over the runs; None for a single one) and seconds_per_edit.
"""

from __future__ import annotations

import csv
import io
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob
from itertools import combinations
from pathlib import Path
from typing import Any

from memoir import metrics, paper
from memoir.editors import EDITORS
from memoir.editors.base import Editor
from memoir.records import EditRequest, Result, write_atomically, write_json
from memoir.run import SCORES

# The paper's order of methods; what it does not have stands before them.
METHODS = ("Unedited", "InContext", "FT", "ROME", "MEMIT", "DEFER", "GRACE", "WISE", "AlphaEdit", "MEMOIR")
HEADINGS = {
    "rel": "Rel.",
    "gen": "Gen.",
    "loc": "Loc.",
    "avg": "Avg.",
    "ppl": "Perplexity",
    "exact_match": "Exact match",
    "loc_same_subject": "Loc., same subject",
    "loc_same_template": "Loc., same template",
}
PROTOCOL = (
    "Every score is of all T edits, after the last of them. Rel. and Gen.: share of target tokens that are the argmax "
    "under teacher forcing, on the edits' own prompts and on rephrased ones. Loc.: share of answer tokens on unrelated "
    "prompts that are as the unedited model's; the last two Loc. ask the hard way, about the same subject and in the "
    "same words. Exact match: free greedy generation, natural stop. Changes of weights are kept in float32 beside the "
    "frozen model, which is kinder to the baselines than rounding them into bfloat16 weights."
)


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Table 1 or, where there is nothing to rephrase and perplexity counts, Table 2, of one model and data set."""

    model: str
    dataset: str
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, results: str | Iterable[str | os.PathLike]) -> Table:
        """The table of result files, or of a pattern like `reports/edit/*--almanac--almanac-qa--*.json`."""
        paths = sorted(glob(results)) if isinstance(results, str) else list(results)
        if not paths:
            raise FileNotFoundError(f"no results to make a table of: {results}")
        found = [Result.load(path) for path in paths]
        subjects = sorted({(result.info.model, result.info.dataset) for result in found})
        if len(subjects) > 1:
            raise ValueError(f"results of {subjects}, expected one model and data set")
        return cls(*subjects[0], rows(found))

    @property
    def long_form(self) -> bool:
        return all(row["gen"] is None for row in self.rows)

    @property
    def name(self) -> str:
        return "Table 2" if self.long_form else "Table 1"

    @property
    def score(self) -> str:
        """The one by which methods are ranked."""
        return "ppl" if self.long_form else "avg"

    @property
    def paper(self) -> list[dict[str, Any]]:
        """The paper's rows."""
        return paper.read("table2" if self.long_form else "table1")

    def beside_paper(self) -> str:
        """Method × T as Markdown, the best average of each T in bold, the paper's figures beside."""
        known, key = self.paper, self.score
        shown = ("ppl", "loc", "exact_match") if self.long_form else tuple(name for name in HEADINGS if name != "ppl")
        theirs = ("ppl", "loc") if self.long_form else ("rel", "gen", "loc", "avg")
        lines = []
        for row in self.rows:
            line = {"T": row["T"], "Method": row["label"]}
            for name in shown:
                text = number(name, row[name], 3)
                if name == "avg" and row["spread"] is not None:
                    text += f" ± {row['spread']:.3f}"
                line[HEADINGS[name]] = f"**{text}**" if name == key and self.is_best(row) else text
            line["Seconds per edit"] = None if row["seconds_per_edit"] is None else f"{row['seconds_per_edit']:.3f}"
            line["Runs"] = row["runs"]
            for model in paper.MODELS:
                same = [p for p in known if (p["model"], p["method"], p["T"]) == (model, row["method"], row["T"])]
                figures = [number(name, same[0][name], 2) for name in theirs] if same else []
                line[f"Paper, {model}: {' / '.join(HEADINGS[name] for name in theirs)}"] = " / ".join(figures) or None
            lines.append(line)
        return markdown(lines)

    def is_best(self, row: dict[str, Any]) -> bool:
        """Best of the methods at its T, as far as the printed digits tell."""
        key = self.score
        if row["method"] == "Unedited" or row[key] is None:
            return False
        rivals = [r[key] for r in self.rows if r["T"] == row["T"] and r["method"] != "Unedited" and r[key] is not None]
        best = min(rivals) if key == "ppl" else max(rivals)
        return number(key, row[key], 3) == number(key, best, 3)

    def agreement(self) -> str:
        """Where our order of methods is the paper's and where not, per T and model of the paper, in words."""
        sentences = []
        for T in sorted({row["T"] for row in self.rows}):
            for model in paper.MODELS:
                theirs = {p["method"]: p[self.score] for p in self.paper if (p["model"], p["T"]) == (model, T)}
                if text := compare(self._own(T), theirs, lower_is_better=self.long_form):
                    sentences.append(f"- T = {T}, {model}: {text}.\n")
        return "".join(sentences)

    def _own(self, T: int) -> dict[str, float | None]:
        """Method → score at T; of variants of a method, the one with the shortest label: its plain form."""
        own = [row for row in self.rows if row["T"] == T]
        return {row["method"]: row[self.score] for row in sorted(own, key=lambda row: len(row["label"]), reverse=True)}

    def page(self, figure: str) -> str:
        """All of it as Markdown; `figure` is the image file."""
        head = f"## {self.name}: {self.dataset} on {self.model}"
        return f"{head}\n\n{self.beside_paper()}\n![{self.name}]({figure})\n\n{self.agreement()}"

    def save(self, out: str | os.PathLike) -> None:
        """Write the JSON file `out`, and Markdown and CSV beside it; `plots.save` draws the figure that they show."""
        stem = Path(out).with_suffix("")
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(lines, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        texts = {"md": self.page(f"{stem.name}.png"), "csv": lines.getvalue()}
        for ending, text in texts.items():
            write_atomically(f"{stem}.{ending}", lambda path, text=text: path.write_text(text, encoding="utf-8"))
        write_json(out, asdict(self))


def rows(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Rows by T, in the paper's order of methods. Runs of the same variant and T are pooled."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for result in results:
        name, label = labels(result)
        for edits, scores, seconds in _measured(result):
            row = runs.setdefault((label, edits), {"method": name, "scores": [], "seconds": []})
            row["scores"] += scores
            row["seconds"] += [seconds] * len(scores)
    order = [*METHODS, *sorted({row["method"] for row in runs.values()} - set(METHODS))]
    found = [
        {
            "method": row["method"],
            "label": label,
            "T": edits,
            "runs": len(row["scores"]),
            **{name: metrics.mean([scores.get(name) for scores in row["scores"]]) for name in SCORES},
            "spread": _spread([scores.get("avg") for scores in row["scores"]]),
            "seconds_per_edit": metrics.mean(row["seconds"]),
        }
        for (label, edits), row in runs.items()
    ]
    return sorted(found, key=lambda row: (row["T"], order.index(row["method"]), row["label"]))


def labels(result: Result) -> tuple[str, str]:
    """The method as the paper calls it, and what a row of it is called: with its variant and changed settings."""
    method = EDITORS[result.info.method].__name__
    changed = result.extra.get("cell", {}).get("parameters", {}).get("OVERRIDES", {})
    shown = [result.info.config["variant"]] if "variant" in result.info.config else []
    shown += [f"{name}={value}" for name, value in changed.items() if name != "variant"]
    return method, f"{method} ({', '.join(shown)})" if shown else method


def _measured(result: Result) -> Iterable[tuple[int, list[dict[str, float | None]], float | None]]:
    """(T, scores of each run, seconds per edit): the separate short runs, then the long one's other checkpoints."""
    separate = {short["edits"]: short for short in result.extra.get("separate", [])}
    for edits, short in separate.items():
        yield edits, short["scores"], short["seconds_per_edit"]
    for checkpoint in result.checkpoints:
        if checkpoint.edits not in separate:
            yield checkpoint.edits, [checkpoint.scores], result.seconds_per_edit


def _spread(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


# Markdown ------------------------------------------------------------------------------------------------------------


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """Dicts with the same keys as a Markdown table."""
    head = list(table[0])
    lines = [head, ["---"] * len(head), *([_cell(row[key]) for key in head] for row in table)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def number(name: str, value: float | None, digits: int) -> str:
    """A score as text; perplexities beyond a thousand by their power of ten."""
    if value is None:
        return "–"
    return f"{value:.1e}" if name == "ppl" and value >= 1000 else f"{value:.{2 if name == 'ppl' else digits}f}"


# Sentences -----------------------------------------------------------------------------------------------------------


def compare(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], *, lower_is_better: bool = False
) -> str:
    """How two rankings of the same things agree, in words; "" where they share less than two things."""
    sign = -1 if lower_is_better else 1
    shared = [name for name in theirs if theirs[name] is not None and ours.get(name) is not None]
    pairs = list(combinations(shared, 2))
    if not pairs:
        return ""
    gaps = {(a, b): (sign * (ours[a] - ours[b]), sign * (theirs[a] - theirs[b])) for a, b in pairs}
    against = [(a, b) if mine > 0 else (b, a) for (a, b), (mine, other) in gaps.items() if mine * other < 0]
    tied = sum(mine * other == 0 for mine, other in gaps.values())
    text = f"{len(pairs) - len(against) - tied} of {len(pairs)} pairs stand in the paper's order"
    text += f", {tied} are tied" if tied else ""
    best, paper_best = (
        [name for name in shared if sign * scores[name] == max(sign * scores[other] for other in shared)]
        for scores in (ours, theirs)
    )
    text += f"; best is {' and '.join(best)}"
    text += " in both" if best == paper_best else f", in the paper {' and '.join(paper_best)}"
    return text + (f"; the other way round: {', '.join(f'{a} before {b}' for a, b in against)}" if against else "")


def meaning(result: Result) -> str:
    """Two sentences on one sequence of edits."""
    method, last = labels(result)[1], result.checkpoints[-1]
    rel, gen, loc, ppl = (last.scores[name] for name in ("rel", "gen", "loc", "ppl"))
    told = [f"reproduces {rel:.1%} of the tokens of all its targets"]
    told += [f"{gen:.1%} behind a rephrased prompt"] if gen is not None else [f"at a perplexity of {ppl:.3g}"]
    told += [f"and leaves {loc:.1%} of unrelated answers as they were"] if loc is not None else []
    share = max(1, last.edits // 10)
    early, late = (metrics.mean(part) for part in (last.per_edit["rel"][:share], last.per_edit["rel"][-share:]))
    drift = early - late
    verdict = "nothing that counts is forgotten" if drift > -0.02 else "the earlier edits fade under the later ones"
    return (
        f"After {last.edits} edits {method} {', '.join(told)}. The first {_edits(share)} now at {early:.1%}, "
        f"the last at {late:.1%}: {verdict}."
    )


def _edits(count: int) -> str:
    return "edit stands" if count == 1 else f"{count} edits stand"


def before_and_after(editor: Editor, edits: Sequence[EditRequest], n: int = 3) -> str:
    """What the model answers without and with the editor: the first n edits, each with its probes, as Markdown."""
    asked = []
    for edit in edits[:n]:
        asked.append(("edited", edit.prompt, edit.target))
        asked += [(probe.kind.replace("_", " "), probe.prompt, probe.answer) for probe in edit.probes]
    prompts = [prompt for _, prompt, _ in asked]
    with editor.detached() as model:
        before = model.generate(prompts)
    after = editor.model.generate(prompts)
    return markdown(
        [
            {"Asked": kind, "Prompt": _short(prompt), "Before": _short(b), "After": _short(a), "Target": _short(answer)}
            for (kind, prompt, answer), b, a in zip(asked, before, after, strict=True)
        ]
    )


def _short(text: str, width: int = 90) -> str:
    return text if len(text) <= width else f"… {text[-width:].partition(' ')[2]}"


# Files ---------------------------------------------------------------------------------------------------------------


def write_readme(reports: str | os.PathLike) -> Path:
    """`README.md` of a reports folder, out of the Markdown that its notebooks left: the tables first."""
    reports = Path(reports)
    pages = [(page.parent.name, page.read_text(encoding="utf-8")) for page in reports.glob("*/*.md")]
    pages.sort(key=lambda page: (page[0] != "tables", page))
    parts = ["# Reports\n", f"{PROTOCOL}\n"]
    for folder, text in pages:
        text = re.sub(r'(\]\(|src=")(?!https?:|#)', rf"\g<1>{folder}/", text)
        parts.append(text.rstrip() + "\n")
    return write_atomically(reports / "README.md", lambda path: path.write_text("\n".join(parts), encoding="utf-8"))
