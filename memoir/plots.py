"""Results → figures. Nothing is measured here: what a figure shows stands in a Result or in a table's rows.

One theme and one colour per method for all figures of the house; the colours are told apart by colour-blind eyes, and
every method has a marker of its own as well. Functions return the figure; `save` writes it as PNG and SVG.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memoir import metrics
from memoir.records import Result, write_atomically

# seaborn's "colorblind" palette, with an indigo in the place of its yellow; by the papers' names of the methods.
COLOURS = {
    "MEMOIR": "#d55e00",
    "AlphaEdit": "#0173b2",
    "WISE": "#029e73",
    "GRACE": "#cc78bc",
    "DEFER": "#ca9161",
    "MEMIT": "#56b4e9",
    "ROME": "#332288",
    "FT": "#de8f05",
    "InContext": "#000000",
    "Unedited": "#949494",
}
MARKERS = dict(zip(COLOURS, "o^sDvPX*hp", strict=True))
NAMES = {
    "rel": "reliability",
    "gen": "generalization",
    "loc": "locality",
    "avg": "average of rel., gen. and loc.",
    "ppl": "perplexity of the targets",
    "exact_match": "exact match",
    "loc_same_subject": "locality, same subject",
    "loc_same_template": "locality, same template",
}


@contextmanager
def theme() -> Iterator[None]:
    """The house's look, for the figures made inside only."""
    look = {"figure.dpi": 110, "savefig.dpi": 160, "legend.frameon": False, "svg.hashsalt": "memoir"}
    with (
        sns.axes_style("whitegrid", {"axes.edgecolor": "0.5", "grid.color": "0.9"}),
        sns.plotting_context("notebook", font_scale=1.1),
        plt.rc_context(look),
    ):
        yield


def save(figure: Figure, out: str | os.PathLike) -> list[Path]:
    """Write `<out>.png` and `<out>.svg`; a file name's ending is dropped. The same figure gives the same bytes."""
    stem = Path(out).with_suffix("")
    with theme():
        return [
            write_atomically(
                f"{stem}.{kind}",
                lambda path, kind=kind: figure.savefig(
                    path, format=kind, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None
                ),
            )
            for kind in ("png", "svg")
        ]


def lifelong(result: Result) -> Figure:
    """Scores of all edits made so far against their number, one line per score."""
    at = [checkpoint.edits for checkpoint in result.checkpoints]
    shares = [name for name in NAMES if name != "ppl" and result.checkpoints[-1].scores[name] is not None]
    long_form = "gen" not in shares
    with theme():
        figure, axes = plt.subplots(1, 1 + long_form, figsize=(7.5 + 4 * long_form, 4.2), squeeze=False)
        for name, colour in zip(shares, sns.color_palette("colorblind"), strict=False):
            values = [checkpoint.scores[name] for checkpoint in result.checkpoints]
            axes[0, 0].plot(at, values, "o-", color=colour, label=NAMES[name], clip_on=False)
        share_axis(axes[0, 0], "share")
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1.02, 1))
        if long_form:
            values = [checkpoint.scores["ppl"] for checkpoint in result.checkpoints]
            axes[0, 1].plot(at, values, "o-", color=COLOURS["MEMOIR"])
            axes[0, 1].set(ylabel=NAMES["ppl"], yscale="log")
        for ax in axes.flat:
            edits_axis(ax, at, "edits made")
        figure.suptitle(_title(result))
        return finished(figure)


def retention(result: Result, score: str = "rel", bins: int = 20) -> Figure:
    """Who is forgotten, when: a score of single edits against their place in the sequence, one line per checkpoint."""
    with theme():
        figure, ax = plt.subplots(figsize=(7.5, 4.2))
        colours = sns.color_palette("flare", len(result.checkpoints))
        for checkpoint, colour in zip(result.checkpoints, colours, strict=True):
            values, width = checkpoint.per_edit[score], max(1, round(checkpoint.edits / bins))
            parts = [(start, values[start : start + width]) for start in range(0, len(values), width)]
            places = [start + (len(part) + 1) / 2 for start, part in parts]
            means = [metrics.mean(part) for _, part in parts]
            ax.plot(places, means, "o-", ms=4, color=colour, label=f"after {checkpoint.edits}", clip_on=False)
        share_axis(ax, NAMES[score]) if score != "ppl" else ax.set(ylabel=NAMES[score], yscale="log")
        ax.set(xlabel=f"place of the edit in the sequence (each point: 1/{bins} of them)", xlim=(0, None))
        ax.legend(title="evaluated", loc="upper left", bbox_to_anchor=(1.02, 1))
        ax.set_title(_title(result))
        return finished(figure)


def table_curves(rows: Sequence[dict[str, Any]], paper: Sequence[dict[str, Any]], score: str = "avg") -> Figure:
    """A score against T, one line per method: ours (variants broken, with hollow marks) beside the paper's (dashed).

    Shares stand on one scale, perplexities in each panel on its own. Rows as `memoir.tables` makes them, and as
    `memoir.paper` has them.
    """
    models = dict.fromkeys(row["model"] for row in paper)
    panels = [("ours", rows)] + [(f"paper, {model}", [p for p in paper if p["model"] == model]) for model in models]
    plain = {row["method"]: row["label"] for row in sorted(rows, key=lambda row: -len(row["label"]))}
    broken = {label: LINES[1:][i % 3] for i, label in enumerate(_variants(rows, plain))}
    shown: dict[str, Any] = {}
    with theme():
        figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels) + 1.6, 4.2), sharey=score != "ppl")
        for ax, (title, lines) in zip(axes, panels, strict=True):
            for label in dict.fromkeys(row.get("label", row["method"]) for row in lines):
                own = [row for row in lines if row.get("label", row["method"]) == label]
                method = own[0]["method"]
                is_plain = label == plain.get(method, method)
                (line,) = ax.plot(
                    [row["T"] for row in own],
                    [row[score] if row[score] is not None else float("nan") for row in own],
                    color=COLOURS.get(method, "black"),
                    marker=MARKERS.get(method, "."),
                    linestyle="--" if title != "ours" else broken.get(label, "-"),
                    markerfacecolor="white" if label in broken else None,
                    clip_on=score == "ppl",
                )
                shown.setdefault(method if is_plain else label, line)
            edits_axis(ax, sorted({row["T"] for row in lines}), "edits T")
            if score == "ppl":
                ax.set(yscale="log")
            else:
                share_axis(ax, "")
            ax.set_title(title)
        axes[0].set_ylabel(NAMES[score])
        figure.legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5)
        return finished(figure)


def _variants(rows: Sequence[dict[str, Any]], plain: Mapping[str, str]) -> list[str]:
    """The labels of rows with settings changed, each once."""
    return [label for label in dict.fromkeys(row["label"] for row in rows) if label not in plain.values()]


def _title(result: Result) -> str:
    return f"{result.info.method} on {result.info.model}, {result.info.dataset}"


def share_axis(ax: Axes, label: str) -> None:
    ax.set(ylabel=label, ylim=(-0.02, 1.02), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])


def edits_axis(ax: Axes, at: Sequence[int], label: str) -> None:
    """Numbers of edits, by powers of ten where they span more than one, each with its own tick."""
    if max(at) >= 10 * min(at):
        ax.set_xscale("log")
    ax.set_xticks(at, labels=[str(n) for n in at])
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.set_xlabel(label)


def finished(figure: Figure) -> Figure:
    """Laid out, and closed: a notebook then shows it once, as the value of its cell."""
    figure.tight_layout()
    plt.close(figure)
    return figure


# Looking inside ------------------------------------------------------------------------------------------------------

LINES = ("-", ":", "--", "-.")  # a method plain, then its variants
KINDS = {  # prompt kind → what it is called, and its colour
    "edited": ("edited", "#000000"),
    "rephrase": ("rephrased", "#0173b2"),
    "unrelated": ("unrelated", "#949494"),
    "same_subject": ("same subject", "#029e73"),
    "same_template": ("same template", "#cc78bc"),
}


def styles(labels: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Line settings by label, from label → method: one colour per method, one kind of line per variant of it."""
    seen: dict[str, int] = {}
    found = {}
    for label, method in labels.items():
        number = seen[method] = seen.get(method, -1) + 1
        found[label] = {
            "color": COLOURS.get(method, "black"),
            "linestyle": LINES[number % len(LINES)],
            "marker": MARKERS.get(method, "."),
            "markevery": 0.12,
            "label": label,
        }
    return found
