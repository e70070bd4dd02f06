"""Figures of results and tables. A figure only shows numbers that a Result or a table holds; it measures nothing.

All figures share one theme. Each method has its own colour and marker, which its class defines. Functions return the
figure; `save` writes it as PNG and SVG.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from memoir import metrics
from memoir.editors import EDITORS
from memoir.editors.base import Editor
from memoir.files import write_atomically
from memoir.records import Result

NAMES = {  # score → its name on an axis
    "rel": "reliability",
    "gen": "generalization",
    "loc": "locality",
    "avg": "average of rel., gen. and loc.",
    "ppl": "perplexity of the targets",
    "generated": "generated answers",
    "loc_same_subject": "locality, same subject",
    "loc_same_template": "locality, same template",
}
LINES = ("-", ":", "--", "-.")  # the plain method, then its variants
PARTS = 20  # of a sequence, in the figure of what is forgotten
KINDS = {  # prompt kind → its name and its colour
    "edited": ("edited", "#000000"),
    "rephrase": ("rephrased", "#0173b2"),
    "unrelated": ("unrelated", "#949494"),
    "same_subject": ("same subject", "#029e73"),
    "same_template": ("same template", "#cc78bc"),
}


# Style ---------------------------------------------------------------------------------------------------------------


@contextmanager
def theme() -> Iterator[None]:
    """The look of all figures. It applies only to figures made inside the `with` block."""
    look = {"figure.dpi": 110, "savefig.dpi": 160, "legend.frameon": False, "svg.hashsalt": "memoir"}
    with (
        sns.axes_style("whitegrid", {"axes.edgecolor": "0.5", "grid.color": "0.9"}),
        sns.plotting_context("notebook", font_scale=1.1),
        plt.rc_context(look),
    ):
        yield


def save(figure: Figure, out: str | os.PathLike) -> list[Path]:
    """Write `<out>.png` and `<out>.svg`, without the file ending of `out`. The same figure gives the same bytes."""
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


def proper_name(spec: str) -> str:
    """A method's label for its name, with the settings of a variant behind it; other texts stay."""
    method, *settings = spec.split("+")
    return "+".join([EDITORS[method].label if method in EDITORS else method, *settings])


def method_style(method: str) -> dict[str, str]:
    """Colour and marker of a method, given by name or label; a black dot if the method is not registered."""
    known = EDITORS | {editor.label: editor for editor in EDITORS.values()}
    editor = known.get(method, Editor)
    return {"color": editor.colour, "marker": editor.marker}


def share_axis(ax: Axes, label: str) -> None:
    """Set up the y axis for shares, from 0 to 1."""
    ax.set(ylabel=label, ylim=(-0.02, 1.02), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])


def edits_axis(ax: Axes, counts: Sequence[int], label: str) -> None:
    """Set up the x axis for numbers of edits, one tick for each; on a log scale if they span a factor of ten."""
    if max(counts) >= 10 * min(counts):
        ax.set_xscale("log")
    ax.set_xticks(counts, labels=[str(count) for count in counts])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)


def finished(figure: Figure) -> Figure:
    """Lay the figure out and close it, so that a notebook shows it only once: as the value of its cell."""
    figure.tight_layout()
    plt.close(figure)
    return figure


# Figures -------------------------------------------------------------------------------------------------------------


def lifelong(result: Result) -> Figure:
    """Scores of all edits made so far against the number of edits, one line per score."""
    counts = [checkpoint.edits for checkpoint in result.checkpoints]
    shares = [name for name in NAMES if name != "ppl" and result.checkpoints[-1].scores.get(name) is not None]
    long_form = "gen" not in shares
    with theme():
        figure, axes = plt.subplots(1, 1 + long_form, figsize=(7.5 + 4 * long_form, 4.2), squeeze=False)
        for name, colour in zip(shares, sns.color_palette("colorblind"), strict=False):
            values = [checkpoint.scores.get(name) for checkpoint in result.checkpoints]
            axes[0, 0].plot(counts, values, "o-", color=colour, label=NAMES[name], clip_on=False)
        share_axis(axes[0, 0], "share")
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1.02, 1))
        if long_form:
            values = [checkpoint.scores["ppl"] for checkpoint in result.checkpoints]
            axes[0, 1].plot(counts, values, **method_style(result.info.method))
            axes[0, 1].set(ylabel=NAMES["ppl"], yscale="log")
        for ax in axes.flat:
            edits_axis(ax, counts, "edits made")
        figure.suptitle(_title(result))
        return finished(figure)


def retention(result: Result) -> Figure:
    """Which edits are forgotten, and when: the reliability of edits against their place in the sequence, one line per
    checkpoint. Each point is the mean over one of `PARTS` equal parts of the sequence."""
    with theme():
        figure, ax = plt.subplots(figsize=(7.5, 4.2))
        colours = sns.color_palette("flare", len(result.checkpoints))
        for checkpoint, colour in zip(result.checkpoints, colours, strict=True):
            values, width = checkpoint.per_edit["rel"], max(1, round(checkpoint.edits / PARTS))
            parts = [(start, values[start : start + width]) for start in range(0, len(values), width)]
            places = [start + (len(part) + 1) / 2 for start, part in parts]
            means = [metrics.mean(part) for _, part in parts]
            ax.plot(places, means, "o-", ms=4, color=colour, label=str(checkpoint.edits), clip_on=False)
        share_axis(ax, NAMES["rel"])
        ax.set(xlabel="place of the edit in the sequence", xlim=(0, None), title=_title(result))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(title="evaluated after edit", loc="upper left", bbox_to_anchor=(1.02, 1))
        return finished(figure)


def table_dots(rows: pd.DataFrame, paper: pd.DataFrame, score: str = "avg") -> Figure:
    """A score after T edits, one row per method: ours as a dot in the method's colour, the paper's as hollow
    markers on the same row, if the paper has the method at that T. The best of ours stands at the top.

    rows   the rows of a `memoir.tables.Table` with one T; rows of changed settings are left out if there are others
    paper  its `paper`
    """
    (last,) = rows["T"].unique()
    own = rows[rows[score].notna()]
    own = own if own["label"].str.contains("=").all() else own[~own["label"].str.contains("=")]
    own = own.sort_values(score, ascending=score != "ppl", kind="stable").reset_index(drop=True)
    theirs = {model: known.set_index("method")[score] for model, known in paper[paper["T"] == last].groupby("model")}
    with theme():
        figure, ax = plt.subplots(figsize=(6.6, 1.7 + 0.4 * len(own)))
        for y, row in own.iterrows():
            look = {"ls": "", "clip_on": False}
            for (model, known), marker in zip(theirs.items(), "Ds", strict=False):
                if row["method"] in known.index and "=" not in row["label"]:
                    hollow = {"color": "0.3", "mfc": "none", "mew": 1.5, "ms": 7, "label": f"paper, {model}"}
                    ax.plot(known[row["method"]], y, marker, **hollow, **look, zorder=5)
            ax.plot(row[score], y, "o", color=method_style(row["method"])["color"], ms=11, **look, zorder=4)
        ax.set_yticks(range(len(own)), labels=own["label"])
        for label in ax.get_yticklabels():
            label.set_fontweight("bold" if label.get_text().startswith("MEMOIR") else "normal")
        ax.set(ylim=(-0.6, len(own) - 0.4), title=f"After {last:,} edit{'s' if last > 1 else ''}")
        if score == "ppl":
            ax.set(xscale="log", xlabel=f"{NAMES[score]} (lower is better)")
        else:
            ax.set(xlim=(-0.02, 1.02), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1], xlabel=NAMES[score])
        named = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ours = ax.plot([], [], "o", color="0.2", ms=11)[0]
        legend = {"ours": ours} | named
        figure.legend(legend.values(), legend.keys(), loc="lower center", ncols=3, handletextpad=0.3, columnspacing=1.5)
        figure.tight_layout(rect=(0, 0.42 / figure.get_figheight(), 1, 1))
        plt.close(figure)
        return figure


def _title(result: Result) -> str:
    return f"{proper_name(result.info.method)} on {result.info.model}, {result.info.dataset}"
