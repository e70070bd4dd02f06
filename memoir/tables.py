"""Results → the paper's two tables, ours beside the paper's, and sentences filled from the numbers.

A row is a dict: method (as the paper calls it), label (with the settings of a variant), T, runs, the scores of `run.py`
as means over the runs, low and high (the 95 % bootstrap interval of what methods are ranked by: Avg., in long form
perplexity; None for a single value) and seconds_per_edit.
"""

from __future__ import annotations

import csv
import io
import os
import re
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
    "routing_recall": "Routing recall",
    "routing_precision": "Routing precision",
    "unrelated_ppl": "Perplexity, unrelated",
}
BEYOND = (  # what the paper does not measure
    "exact_match",
    "loc_same_subject",
    "loc_same_template",
    "routing_recall",
    "routing_precision",
    "unrelated_ppl",
)
PROTOCOL = (
    "Every score is of all T edits, after the last of them. Rel. and Gen.: share of target tokens that are the argmax "
    "under teacher forcing, on the edits' own prompts and on rephrased ones. Loc.: share of answer tokens on unrelated "
    "prompts that are as the unedited model's. In brackets: 95 % bootstrap interval over runs and their edits. Exact "
    "match: free greedy generation, natural stop, equal to the target; teacher forcing alone leaks content and length. "
    "Loc., same subject and same template, ask the hard way. Routing: how many of the prompts that should read an edit "
    "read the right one, and how many of those that read any. Perplexity, unrelated: of the true answers to unrelated "
    "prompts, before and after. Changes of weights are kept in float32 beside the frozen model, which is kinder "
    "to the baselines than rounding them into bfloat16 weights."
)

# What may make a method fare otherwise on the almanac than in the paper; told where it does.
_SMALL_WORLD = (
    "ROME, MEMIT and AlphaEdit write where the almanac recalls, at the token that predicts, and the texts behind their "
    "C are nearly all that it can be asked: what C protects is everything, which no sample of a real model's text is."
)
REASONS = {
    "FT": "FT learns every token of the target (FT-M), close to the head: it keeps the answers and loses the rest.",
    "ROME": _SMALL_WORLD,
    "MEMIT": _SMALL_WORLD,
    "AlphaEdit": _SMALL_WORLD,
    "DEFER": "DEFER's gate has to tell a few kinds of question apart, which one linear unit can.",
    "GRACE": "GRACE's radius is the validation edits': at the published ε_init = 1 no other wording reaches a key.",
    "WISE": "WISE's margins are multiples of the output's size, chosen on validation edits, and its prompts are short.",
    "MEMOIR": "MEMOIR's τ and feature were chosen on validation edits of the same kind.",
}


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
        theirs = ("ppl", "loc") if self.long_form else ("rel", "gen", "loc", "avg")
        lines = []
        for row in self.rows:
            line = {"T": row["T"], "Method": row["label"]}
            for name in theirs:
                text = number(name, row[name], 3)
                if name == key and row["low"] is not None:
                    text += f" [{number(name, row['low'], 3)}, {number(name, row['high'], 3)}]"
                line[HEADINGS[name]] = f"**{text}**" if name == key and self.is_best(row) else text
            line["Runs"] = row["runs"]
            line["Seconds per edit"] = None if row["seconds_per_edit"] is None else f"{row['seconds_per_edit']:.3f}"
            for model in paper.MODELS:
                here = (model, row["method"], row["T"])
                # The paper's figures are of its methods as they are, not of a row with settings changed.
                same = [p for p in known if (p["model"], p["method"], p["T"]) == here and "=" not in row["label"]]
                figures = [number(name, same[0][name], 2) for name in theirs] if same else []
                line[f"Paper, {model}: {' / '.join(HEADINGS[name] for name in theirs)}"] = " / ".join(figures) or None
            lines.append(line)
        return markdown(lines)

    def beyond_paper(self) -> str:
        """Method × T as Markdown: what the paper does not measure, as far as the data defines it."""
        shown = [name for name in BEYOND if any(row[name] is not None for row in self.rows)]
        lines = []
        for row in self.rows:
            line = {"T": row["T"], "Method": row["label"]} | {HEADINGS[n]: number(n, row[n], 3) for n in shown}
            if "unrelated_ppl" in shown:
                before = number("ppl", row["unrelated_ppl_unedited"], 3)
                line[HEADINGS["unrelated_ppl"]] = f"{before} → {number('ppl', row['unrelated_ppl'], 3)}"
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
        """Where our order of methods is the paper's and where not, T by T, as Markdown; and why, where the almanac is
        another world than the paper's."""
        sentences = []
        for T in sorted({row["T"] for row in self.rows}):
            own = self._own(T)
            told = [
                f"{model}: {text}"
                for model in paper.MODELS
                if (text := compare(own, self._theirs(model, T), lower_is_better=self.long_form))
            ]
            sentences += [f"- T = {T}. {'. '.join(told)}.\n"] if told else []
        return "".join(sentences) + (f"\n{self.why()}\n" if self.dataset.startswith("almanac") and sentences else "")

    def why(self) -> str:
        """Which methods fare otherwise here than in the paper after the most edits, and what it is that differs."""
        T = max(row["T"] for row in self.rows)
        own, theirs = self._own(T), [self._theirs(model, T) for model in paper.MODELS]
        better, worse, reasons = [], [], []
        for method in METHODS:
            known = [scores[method] for scores in theirs if scores.get(method) is not None]
            if not known or own.get(method) is None:
                continue
            if self.long_form:
                gain = min(known) > 1.2 * own[method], own[method] > 1.2 * max(known)
            else:
                gain = own[method] > max(known) + 0.05, own[method] < min(known) - 0.05
            if any(gain):
                figures = ", ".join(number(self.score, value, 2) for value in known)
                told = f"{method} ({number(self.score, own[method], 2)} for {figures})"
                (better if gain[0] else worse).append(told)
                if REASONS[method] not in reasons:
                    reasons.append(REASONS[method])
        if not better + worse:
            return f"After {T} edits no method fares much otherwise here than in the paper."
        told = [f"better {listed(better)}"] * bool(better) + [f"worse {listed(worse)}"] * bool(worse)
        return f"After {T} edits these fare otherwise than in the paper: {'; '.join(told)}. {' '.join(reasons)}"

    def _theirs(self, model: str, T: int) -> dict[str, float | None]:
        return {p["method"]: p[self.score] for p in self.paper if (p["model"], p["T"]) == (model, T)}

    def _own(self, T: int) -> dict[str, float | None]:
        """Method → score at T; of variants of a method, the one with the shortest label: its plain form."""
        own = [row for row in self.rows if row["T"] == T]
        return {row["method"]: row[self.score] for row in sorted(own, key=lambda row: len(row["label"]), reverse=True)}

    def page(self, figure: str) -> str:
        """All of it as Markdown; `figure` is the image file."""
        most = max(row["T"] for row in self.rows)
        head = f"## {self.name}: {self.dataset} on {self.model}, up to {most:,} edits"
        return (
            f"{head}\n\n{self.beside_paper()}\n![{self.name}]({figure})\n\n{self.agreement()}\n"
            f"What the paper does not measure:\n\n{self.beyond_paper()}"
        )

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
        for edits, scores, per_edit, seconds in _measured(result):
            row = runs.setdefault((label, edits), {"method": name, "scores": [], "per_edit": [], "seconds": []})
            row["scores"] += scores
            row["per_edit"] += per_edit
            row["seconds"] += [seconds] * len(scores)
    order = [*METHODS, *sorted({row["method"] for row in runs.values()} - set(METHODS))]
    found = []
    for (label, edits), row in runs.items():
        low, high = metrics.bootstrap_interval([_ranked_by(run) for run in row["per_edit"]]) or (None, None)
        found.append(
            {
                "method": row["method"],
                "label": label,
                "T": edits,
                "runs": len(row["scores"]),
                **{name: metrics.mean([scores.get(name) for scores in row["scores"]]) for name in SCORES},
                "low": low,
                "high": high,
                "seconds_per_edit": metrics.mean(row["seconds"]),
            }
        )
    return sorted(found, key=lambda row: (row["T"], order.index(row["method"]), row["label"]))


def labels(result: Result) -> tuple[str, str]:
    """The method as the paper calls it, and what a row of it is called: with its variant and changed settings."""
    method = EDITORS[result.info.method].__name__
    changed = result.extra.get("cell", {}).get("parameters", {}).get("OVERRIDES", {})
    shown = [result.info.config["variant"]] if "variant" in result.info.config else []
    shown += [f"{name}={value}" for name, value in changed.items() if name != "variant"]
    return method, f"{method} ({', '.join(shown)})" if shown else method


def _measured(result: Result) -> Iterable[tuple[int, list[dict], list[dict], float | None]]:
    """(T, scores of each run, those of its edits, seconds per edit): the separate short runs, then the long one's other
    checkpoints."""
    separate = {short["edits"]: short for short in result.extra.get("separate", [])}
    for edits, short in separate.items():
        yield edits, short["scores"], short["per_edit"], short["seconds_per_edit"]
    for checkpoint in result.checkpoints:
        if checkpoint.edits not in separate:
            yield checkpoint.edits, [checkpoint.scores], [checkpoint.per_edit], result.seconds_per_edit


def _ranked_by(per_edit: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """One value per edit of what methods are ranked by: Avg., in long form perplexity."""
    if metrics.mean(per_edit["gen"]) is None:
        return list(per_edit["ppl"])
    return [metrics.average(*each) for each in zip(per_edit["rel"], per_edit["gen"], per_edit["loc"], strict=True)]


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
    if name.endswith("ppl"):
        return f"{value:.1e}" if value >= 1000 else f"{value:.2f}"
    return f"{value:.{digits}f}"


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
    signs = [(ours[a] - ours[b]) * (theirs[a] - theirs[b]) for a, b in pairs]
    agreeing, tied = sum(x > 0 for x in signs), sum(x == 0 for x in signs)
    text = f"{agreeing} of {len(pairs)} pairs stand in the paper's order" + (f", {tied} are tied" if tied else "")
    best, paper_best = (
        [name for name in shared if sign * scores[name] == max(sign * scores[other] for other in shared)]
        for scores in (ours, theirs)
    )
    text += f"; best is {listed(best)}" + (" in both" if best == paper_best else f", there {listed(paper_best)}")
    places = [
        {name: sum(sign * scores[other] > sign * scores[name] for other in shared) + 1 for name in shared}
        for scores in (ours, theirs)
    ]
    moved = [name for name in shared if abs(places[0][name] - places[1][name]) >= 3]
    if moved:
        text += f"; out of place: {listed([f'{n} (place {places[0][n]}, there {places[1][n]})' for n in moved])}"
    return text


def listed(parts: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


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


def write_tables(groups: Mapping[tuple[str, str], Sequence[Path]], reports: Path) -> None:
    """Write the table of each (model, data set) from the paths of its results, then the reports' README."""
    from memoir import plots

    for (model, dataset), paths in groups.items():
        table, out = Table.of(paths), Path(reports) / "tables" / f"{model}--{dataset}.json"
        plots.save(plots.table_curves(table.rows, table.paper, table.score), out)
        table.save(out)
    write_readme(reports)


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
