"""Results → the paper's two tables, our numbers beside the paper's, and sentences that state the numbers.

A table has one row for each method, variant and number of edits T: method (the paper's name), label (with the settings
that differ from the preset), T, runs, skipped (the bad records that a run left out, at most), the scores of `run.py` as
means over the runs, low and high (the 95 % bootstrap interval of the score that ranks the methods: Avg., or perplexity
in long form) and seconds_per_edit.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from memoir import metrics, paper, plots
from memoir.audits import Audit
from memoir.editors import EDITORS
from memoir.editors.base import Editor
from memoir.editors.unedited import Unedited
from memoir.evaluation import SCORES
from memoir.files import read_json, write_atomically, write_json
from memoir.records import EditRequest, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADINGS = SCORES
MAIN = ("rel", "gen", "loc", "avg", "ppl", "generated")  # scores in the table itself
BEYOND = [name for name in SCORES if name not in MAIN]  # scores below it: the paper does not report them
NOTE = (
    "In brackets: 95 % bootstrap interval over runs and their edits. Weight changes stay in float32 beside the frozen "
    "model, which favours the baselines over rounding them into bfloat16 weights."
)


# Rows ----------------------------------------------------------------------------------------------------------------


def rows(results: Iterable[Result]) -> pd.DataFrame:
    """The rows of a table, by T and in the registry's order of methods. Runs of the same label and T are pooled."""
    runs = pd.DataFrame([run for result in results for run in _runs(result)])
    means = [*SCORES, "seconds_per_edit"]
    runs[means] = runs[means].astype(float)  # a score that no run has would otherwise be a column of objects
    groups = runs.groupby(["method", "label", "T"])
    table = groups[means].mean()
    table.insert(0, "runs", groups.size())
    table["skipped"] = groups["skipped"].max()
    intervals = [metrics.bootstrap_interval(list(scores)) or (None, None) for _, scores in groups["ranked"]]
    table[["low", "high"]] = pd.DataFrame(intervals, index=table.index, dtype=float)
    order = {editor.label: place for place, editor in enumerate(EDITORS.values())}
    table = table.reset_index()
    table["place"] = table["method"].map(order).fillna(len(order))
    return table.sort_values(["T", "place", "label"], ignore_index=True).drop(columns="place")


def _runs(result: Result) -> list[dict[str, Any]]:
    """One dict per run: the long run at its checkpoints, or separate short runs for the T that have some. If a run
    skipped edits, its last checkpoint is reported under the requested T."""
    method, label = labels(result)
    last = result.checkpoints[-1].edits
    asked = {last: result.extra.get("cell", {}).get("parameters", {}).get("N_EDITS", last)}
    measured = {
        asked.get(c.edits, c.edits): ([c.scores], [c.per_edit], result.seconds_per_edit) for c in result.checkpoints
    }
    for short in result.extra.get("separate", []):
        measured[short["edits"]] = short["scores"], short["per_edit"], short["seconds_per_edit"]
    return [
        {"method": method, "label": label, "T": T, "seconds_per_edit": seconds, "ranked": _ranked_by(per_edit)}
        | {"skipped": len(result.skipped)}
        | {name: _no_nan(scores.get(name)) for name in SCORES}
        for T, (runs, edits, seconds) in measured.items()
        for scores, per_edit in zip(runs, edits, strict=True)
    ]


def _no_nan(score: float | None) -> float | None:
    """The score, with ∞ for NaN: the perplexity of a broken model must not count as a missing value."""
    return math.inf if score is not None and math.isnan(score) else score


def labels(result: Result) -> tuple[str, str]:
    """The method's label, and the row's label, which adds the variant and the changed settings in brackets."""
    editor = EDITORS.get(result.info.method)
    method = editor.label if editor else result.info.method
    changed = dict(result.extra.get("cell", {}).get("parameters", {}).get("OVERRIDES", {}))
    changed.pop("variant", None)
    if changed.get("write") == getattr(editor, "write_rule", ""):
        del changed["write"]  # the label names it
    shown = [result.info.config["variant"]] if "variant" in result.info.config else []
    if (size := result.info.config.get("batch_size", 1)) > 1 and "batch_size" not in changed:
        shown.append(f"{size} edits at a time")  # all other methods edit one at a time
    shown += [str(value) if name == "preset" else f"{name}={value}" for name, value in changed.items()]
    return method, f"{method} ({', '.join(shown)})" if shown else method


def _ranked_by(per_edit: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """One value per edit of the score that ranks the methods: Avg., or perplexity in long form."""
    if metrics.mean(per_edit["gen"]) is None:
        return list(per_edit["ppl"])
    return [metrics.average(*scores) for scores in zip(per_edit["rel"], per_edit["gen"], per_edit["loc"], strict=True)]


# Tables --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Table:
    """Table 1 of one model and data set, or Table 2 if the data set has no rephrased prompts (long form).

    runs   summaries of the runs behind the rows, from `run_summary`
    audit  of the `main_T` edits
    """

    model: str
    dataset: str
    rows: pd.DataFrame
    runs: Sequence[Mapping[str, Any]] = ()
    audit: Audit | None = None

    @classmethod
    def of(cls, results: str | Iterable[str | os.PathLike]) -> Table:
        """The table of result files, or of a pattern like `out/edit/*--almanac--almanac-qa--*.json`.

        FileNotFoundError without results; ValueError if they are not all of one model and data set.
        """
        paths = sorted(glob(results)) if isinstance(results, str) else list(results)
        if not paths:
            raise FileNotFoundError(f"no results to make a table of: {results}")
        loaded = [Result.load(path) for path in paths]
        subjects = sorted({(result.info.model, result.info.dataset) for result in loaded})
        if len(subjects) > 1:
            raise ValueError(f"results of {subjects}, expected one model and data set")
        return cls(*subjects[0], rows(loaded), [run_summary(result) for result in loaded])

    @classmethod
    def load(cls, path: str | os.PathLike) -> Table:
        """A table from the JSON file that `save` wrote."""
        data = read_json(path)
        frame = pd.DataFrame(data["rows"])
        numbers = [*SCORES, "low", "high", "seconds_per_edit"]  # older tables lack some
        frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, "skipped", *numbers])))
        frame["skipped"] = frame["skipped"].fillna(0).astype(int)
        frame[numbers] = frame[numbers].astype(float)
        audit = Audit.from_json(data["audit"]) if data.get("audit") else None
        return cls(data["model"], data["dataset"], frame, data.get("runs", ()), audit)

    @property
    def long_form(self) -> bool:
        return bool(self.rows["gen"].isna().all())

    @property
    def name(self) -> str:
        return "Table 2" if self.long_form else "Table 1"

    @property
    def score(self) -> str:
        """The score that ranks the methods."""
        return "ppl" if self.long_form else "avg"

    @property
    def shown(self) -> list[str]:
        """The scores that the paper reports."""
        return ["ppl", "loc"] if self.long_form else ["rel", "gen", "loc", "avg"]

    @property
    def main_T(self) -> int:
        """The most edits that at least half of the methods reached: the T of figure and front page."""
        reached = self.rows.groupby("label")["T"].max()
        return max(T for T in self.rows["T"] if (reached >= T).mean() >= 0.5)

    @property
    def main(self) -> pd.DataFrame:
        """The rows of `main_T`."""
        return self.rows[self.rows["T"] == self.main_T]

    @property
    def paper(self) -> pd.DataFrame:
        """The paper's rows, on ZsRE or SelfCheckGPT: model, method, T and scores. CounterFact's tasks are so unlike
        ZsRE's that nothing stands beside them."""
        rows = pd.DataFrame(paper.read("table2" if self.long_form else "table1"))
        return rows[:0] if self.dataset == "counterfact" else rows

    @property
    def best(self) -> pd.Series:
        """Whether a row has the best score of its T, to the printed digits. The unedited model does not compete."""
        score = self.rows[self.score].where(self.rows["method"] != Unedited.label)
        best = score.groupby(self.rows["T"]).transform("min" if self.long_form else "max")
        printed, best_printed = (values.map(lambda value: number(self.score, value)) for values in (score, best))
        return score.notna() & (printed == best_printed)

    def ranked(self, T: int) -> pd.DataFrame:
        """The rows of one T that have the score, the best first."""
        rows = self.rows[(self.rows["T"] == T) & self.rows[self.score].notna()]
        return rows.sort_values(self.score, ascending=self.long_form, kind="stable")

    def beside_paper(self) -> str:
        """Method × T as Markdown, with the best score of each T in bold and the paper's numbers beside ours."""
        table = self.texts([*self.shown, *self.measured(["generated"])])
        for row, is_best in zip(self.rows.index, self.best, strict=True):
            low, high = (number(self.score, self.rows[end][row]) for end in ("low", "high"))
            text = table[HEADINGS[self.score]][row] + (f" [{low}, {high}]" if low != "–" else "")
            table.loc[row, HEADINGS[self.score]] = f"**{text}**" if is_best else text
        table["Runs"] = self.rows["runs"]
        if self.rows["skipped"].any():
            table["Bad records left out"] = self.rows["skipped"]
        table["Seconds per edit"] = [number("seconds", seconds) for seconds in self.rows["seconds_per_edit"]]
        for model, texts in self.paper_texts(self.shown).items():
            table[f"Paper, {model}: {' / '.join(HEADINGS[name] for name in self.shown)}"] = texts
        return markdown(table)

    def beyond_paper(self) -> str:
        """Method × T as Markdown: the scores that the paper does not measure, if the data set defines them."""
        return markdown(self.texts(self.measured(BEYOND)))

    def measured(self, names: Sequence[str]) -> list[str]:
        """Those of some scores that the data set defines; older results lack some."""
        return [name for name in names if self.rows[name].notna().any()]

    def texts(self, shown: Sequence[str]) -> pd.DataFrame:
        """T, method and these scores as text."""
        scores = {HEADINGS[name]: [number(name, value) for value in self.rows[name]] for name in shown}
        return pd.DataFrame({"T": self.rows["T"], "Method": self.rows["label"], **scores})

    def paper_texts(self, shown: Sequence[str]) -> dict[str, pd.Series]:
        """Model of the paper → these scores beside each row as text, where the paper has the method at that T."""
        changed, texts = self.rows["label"].str.contains("="), {}
        for model, known in self.paper.groupby("model", sort=False):
            theirs = known.apply(lambda row: " / ".join(number(name, row[name], 2) for name in shown), axis=1)
            known = known[["method", "T"]].assign(text=theirs)
            beside = self.rows[["method", "T"]].merge(known, how="left", on=["method", "T"])["text"]
            texts[model] = beside.mask(changed)  # the paper has each method with its own settings only
        return texts

    def agreement(self) -> str:
        """How well our ranking of the methods agrees with the paper's, for each T, as a Markdown list."""
        lines = []
        for T, own in self.rows.groupby("T"):
            # Of a method's labels, in alphabetical order, the first is the plain one.
            ours = own.drop_duplicates("method").set_index("method")[self.score]
            for model, known in self.paper[self.paper["T"] == T].groupby("model", sort=False):
                theirs = known.set_index("method")[self.score]
                if text := compare(ours, theirs, lower_is_better=self.long_form):
                    lines.append(f"- T = {T}, against the paper's {model}: {text}.\n")
        return "".join(lines)

    def figure(self) -> Figure:
        """The rows of `main_T`, beside the paper's."""
        return plots.table_dots(self.main, self.paper, self.score)

    def page(self, figure: str) -> str:
        """The whole table as Markdown. `figure` is the name of its image file."""
        return (
            f"# {self.name}: {self.dataset} on {self.model}, up to {self.rows['T'].max():,} edits\n\n"
            f"{self.about_the_edits()}![{self.name}]({figure})\n\n{self.all_T()}\n{NOTE}\n"
        )

    def all_T(self) -> str:
        """Both tables with every T, and how our ranking agrees with the paper's, as Markdown."""
        beyond = f"Scores that the paper does not report:\n\n{self.beyond_paper()}"
        return f"{self.beside_paper()}\n{self.agreement()}\n{beyond}"

    def about_the_edits(self) -> str:
        """What the audit of the edits found, as a Markdown list; nothing where it found nothing."""
        found = self.audit.lines() if self.audit else []
        known = self.main["known"].dropna()
        if found and len(known):  # the same for every method, since the unedited model is asked
            found.append(f"The unedited model knew {known.iloc[0]:.0%} of the true answers.")
        return "About the edits:\n\n" + "".join(f"- {line}\n" for line in found) + "\n" if len(found) > 1 else ""

    def save(self, out: str | os.PathLike) -> None:
        """Write the JSON file `out`, and beside it Markdown and its figure, `<out>.png` and `<out>.svg`."""
        stem = Path(out).with_suffix("")
        plots.save(self.figure(), out)
        page = self.page(f"{stem.name}.png")
        write_atomically(f"{stem}.md", lambda path: path.write_text(page, encoding="utf-8"))
        records = self.rows.astype(object).where(self.rows.notna(), None).to_dict("records")
        audit = self.audit.to_json() if self.audit else None
        data = {"model": self.model, "dataset": self.dataset, "rows": records, "audit": audit, "runs": list(self.runs)}
        write_json(out, data)


def run_summary(result: Result) -> dict[str, Any]:
    """A run without its scores edit by edit: where it comes from, and its scores at each number of edits. Of absolute
    paths only the names stay: tables are published, and folders are private."""
    cell = result.extra.get("cell", {}).get("parameters", {})
    return {
        "label": labels(result)[1],
        **{name: value for name, value in vars(result.info).items() if name != "protocol"},
        "parameters": {
            name: _without_folder(cell[name]) for name in ("METHOD", "OVERRIDES", "MODEL", "DATA_PATH") if name in cell
        },
        "command": shlex.join(map(_without_folder, shlex.split(result.extra.get("command") or ""))) or None,
        "tau": result.tau,
        "skipped": len(result.skipped),
        "seconds_per_edit": result.seconds_per_edit,
        "peak_bytes": result.peak_bytes,
        "checkpoints": [{"edits": each.edits, "scores": each.scores} for each in result.checkpoints],
        "separate": [[each["edits"], len(each["scores"])] for each in result.extra.get("separate", [])],
    }


def _without_folder(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


# Markdown ------------------------------------------------------------------------------------------------------------


def markdown(table: pd.DataFrame | Sequence[Mapping[str, Any]]) -> str:
    """A DataFrame, or dicts with the same keys, as a Markdown table."""
    frame = pd.DataFrame(table, dtype=object)
    cells = frame.map(lambda value: "–" if pd.isna(value) else str(value).replace("|", "\\|").replace("\n", " "))
    lines = [list(frame.columns), ["---"] * len(frame.columns), *cells.to_numpy().tolist()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(name: str, value: float | None, digits: int = 3) -> str:
    """A score as text. Perplexities from 1000 on are in scientific notation."""
    if pd.isna(value):
        return "–"
    if name.endswith(("ppl", "ppl_unedited")):
        return f"{value:.1e}" if value >= 1000 else f"{value:.2f}"
    return f"{value:.{digits}f}"


def before_and_after(editor: Editor, edits: Sequence[EditRequest], n: int = 3) -> str:
    """The model's answers without and with the editor, for the first n edits and their probes, as Markdown."""
    rows = []
    for edit in edits[:n]:
        rows.append({"Asked": "edited", "Prompt": edit.prompt, "Target": edit.target})
        rows += [{"Asked": p.kind.replace("_", " "), "Prompt": p.prompt, "Target": p.answer} for p in edit.probes]
    table = pd.DataFrame(rows)
    prompts = table["Prompt"].to_list()
    with editor.detached() as model:
        table.insert(2, "Before", model.generate(prompts))
    table.insert(3, "After", editor.model.generate(prompts))
    return markdown(table.map(_short))


def _short(text: str, width: int = 90) -> str:
    return text if len(text) <= width else f"… {text[-width:].partition(' ')[2]}"


# Sentences -----------------------------------------------------------------------------------------------------------


def compare(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None], *, lower_is_better: bool = False
) -> str:
    """How well two rankings of the same things agree, in words; "" if they share fewer than two things."""
    scores = pd.DataFrame({"ours": dict(ours), "theirs": dict(theirs)}, index=list(theirs.keys()), dtype=float).dropna()
    changes = [scores.loc[a] - scores.loc[b] for a, b in combinations(scores.index, 2)]
    if not changes:
        return ""
    agreeing = sum(change["ours"] * change["theirs"] > 0 for change in changes)
    tied = sum(change["ours"] * change["theirs"] == 0 for change in changes)
    ranks = scores.rank(method="min", ascending=lower_is_better).astype(int)
    best, their_best = (ranks.index[ranks[side] == 1].to_list() for side in ("ours", "theirs"))
    text = f"{agreeing} of {len(changes)} pairs are in the paper's order"
    text += f" and {tied} {_be(tied)} tied" if tied else ""
    text += f"; {listed(best)} {_be(len(best))} best"
    text += " in both" if best == their_best else f", in the paper {listed(their_best)}"
    distance = (ranks["ours"] - ranks["theirs"]).abs()
    if distance.max() >= 3:
        far = ranks.loc[distance.idxmax()]
        text += f"; {far.name} differs most: rank {far['ours']} here, {far['theirs']} in the paper"
    return text


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def listed(parts: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def meaning(result: Result) -> str:
    """Two sentences on one sequence of edits: its scores, and whether early edits are forgotten."""
    last, method = result.checkpoints[-1], labels(result)[1]
    rel, gen, loc, ppl = (last.scores[name] for name in ("rel", "gen", "loc", "ppl"))
    rephrased = f" ({gen:.1%} after a rephrased prompt)" if gen is not None else f" at a perplexity of {ppl:.3g}"
    unrelated = f" and leaves {loc:.1%} of unrelated answers unchanged" if loc is not None else ""
    share = max(1, last.edits // 10)
    early, late = (metrics.mean(part) for part in (last.per_edit["rel"][:share], last.per_edit["rel"][-share:]))
    edits = "edit scores" if share == 1 else f"{share} edits score"
    verdict = "the early edits have faded" if late - early > 0.02 else "the early edits are not forgotten"
    return (
        f"After {last.edits} edits, {method} gives {rel:.1%} of the target tokens{rephrased}{unrelated}. "
        f"The first {edits} {early:.1%} now, the last {late:.1%}: {verdict}."
    )
