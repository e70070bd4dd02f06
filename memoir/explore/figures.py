"""The exploring notebooks' figures. Nothing is computed here: a figure shows what the other modules return."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from memoir.editors import EDITORS
from memoir.explore.columns import ColumnWrites
from memoir.explore.overlap import Overlaps, trade
from memoir.explore.retention import Retention
from memoir.plots import KINDS, LINES, NAMES, edits_axis, finished, method_style, share_axis, theme

HIGHLIGHT = EDITORS["memoir"].colour
SCORES = {  # of the ablations: colour and marker
    "rel": ("#0173b2", "o"),
    "gen": ("#de8f05", "s"),
    "loc": ("#029e73", "^"),
    "loc_same_subject": ("#cc78bc", "D"),
}


# Columns -------------------------------------------------------------------------------------------------------------


def column_use(writes: Mapping[str, ColumnWrites], methods: Mapping[str, str]) -> Figure:
    """How many edits wrote into each column; label → method."""
    counts = {label: np.sort(found.columns.sum(0))[::-1] for label, found in writes.items()}
    curves = {label: (np.arange(1, len(count) + 1), count) for label, count in counts.items()}
    words = {"title": "Edits per column", "xlabel": "columns, most used first", "ylabel": "edits that wrote into it"}
    return _method_lines(curves, methods, ylim=(0, None), **words)


def column_drift(writes: Mapping[str, ColumnWrites], methods: Mapping[str, str]) -> Figure:
    """How far later edits move the output that the first edit reads; label → method."""
    curves = {label: (np.arange(1, len(found.read) + 1), found.read) for label, found in writes.items()}
    words = {"title": "Drift of what the first edit reads", "xlabel": "edits made", "ylabel": "relative change"}
    return _method_lines(curves, methods, ylim=(0, None), **words)


# Overlap -------------------------------------------------------------------------------------------------------------


def overlap_histograms(
    ratio: Mapping[str, Sequence[float]], chance: float, tau: float, paper: Sequence[dict]
) -> Figure:
    """R_match by kind of prompt, one row each, and the paper's ranges under them.

    ratio   prompt kind → R_match of each prompt
    chance  k/D, the overlap of two unrelated masks
    paper   rows of `memoir.paper.read("overlap")`
    """
    bins = np.linspace(0, 1, 51)
    with theme():
        figure, axes = plt.subplots(
            len(ratio) + 1, 1, figsize=(8.5, len(ratio) + 3), sharex=True, height_ratios=[1] * len(ratio) + [1.4]
        )
        *histograms, paper_ax = axes
        for ax, (kind, values) in zip(histograms, ratio.items(), strict=True):
            name, colour = KINDS[kind]
            ax.hist(values, bins, color=colour, weights=np.full(len(values), 1 / len(values)))
            ax.set_ylabel(name, rotation=0, ha="right", va="center")
            ax.set_yticks([])
            ax.axvline(chance, color="0.3", ls=":", lw=1.5)
            ax.axvline(tau, color=HIGHLIGHT, lw=1.5)
        # The words stand outside of the two lines, so that they never meet.
        sides = ("right", "left") if chance < tau else ("left", "right")
        notes = ((chance, f"chance k/D = {chance:.2f}", "0.3"), (tau, f"τ = {tau:.2f}", HIGHLIGHT))
        for (x, text, colour), side in zip(notes, sides, strict=True):
            at = {"xycoords": ("data", "axes fraction"), "ha": side, "va": "bottom"}
            histograms[0].annotate(text, (x, 1.04), color=colour, **at)
        for y, row in enumerate(paper):
            paper_ax.plot([row["low"], row["high"]], [y, y], color="0.35", lw=6, solid_capstyle="butt")
        labels = [f"{row['dataset']}, {row['prompts']}" for row in paper]
        paper_ax.set_yticks(range(len(paper)), labels=labels, fontsize="small")
        paper_ax.set(
            ylim=(len(paper) - 0.4, -0.6), xlim=(0, 1.01), xlabel="overlap ratio R_match with the nearest edit"
        )
        paper_ax.text(
            0.99, 0.94, "the paper's ranges; chance 0.286", transform=paper_ax.transAxes, ha="right", va="top"
        )
        figure.suptitle("Share of prompts by their overlap with the nearest edit")
        finished(figure)
        figure.subplots_adjust(hspace=0.25)
        return figure


def overlap_features(choices: Sequence[Mapping[str, Any]]) -> Figure:
    """Features and k side by side: rows with feature, k and auroc, the worst over the kinds of prompts."""
    widths = sorted({row["k"] for row in choices})
    with theme():
        figure, ax = _single()
        for feature, marker, colour in zip(
            dict.fromkeys(row["feature"] for row in choices), "os^", sns.color_palette("colorblind"), strict=False
        ):
            own = [row for row in choices if row["feature"] == feature]
            name = feature.replace("_", ", ")
            ax.plot([row["k"] for row in own], [row["auroc"] for row in own], marker=marker, color=colour, label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, labels=widths)
        ax.set(title="Telling rephrased prompts from others", xlabel="columns k in a mask")
        ax.set(ylabel="AUROC against the worst kind", ylim=(None, 1.01))
        _legend_outside(ax, "prompt feature")
        return finished(figure)


def overlap_tau(taus: Sequence[float], scores: Mapping[str, Sequence[float]], tau: float, edits: int) -> Figure:
    """Scores of so many edits as a function of τ, and the τ that was chosen."""
    dashes = (*LINES, (0, (1, 1)))  # so that overlapping curves stay visible
    with theme():
        figure, ax = _single()
        for (name, values), colour, line in zip(scores.items(), sns.color_palette("colorblind"), dashes, strict=False):
            ax.plot(taus, values, color=colour, ls=line, lw=2.5, label=NAMES[name])
        ax.axvline(tau, color="0.3", lw=1.5)
        share_axis(ax, "share")
        ax.set(title=f"What τ trades, {edits} edits (chosen: {tau:.2f})", xlabel="threshold τ", xlim=(0, 1))
        _legend_outside(ax)
        return finished(figure)


def fingerprint_trade(found: Mapping[str, Mapping[str, Overlaps]]) -> Figure:
    """What τ trades with each fingerprint, one panel per edit set: edit set → fingerprint → overlaps."""
    with theme():
        figure, axes = plt.subplots(1, len(found), figsize=(1.5 + 4.2 * len(found), 4.4), sharey=True, squeeze=False)
        for ax, (name, overlaps) in zip(axes[0], found.items(), strict=True):
            for (label, own), line in zip(overlaps.items(), LINES, strict=False):
                ax.plot(*trade(own), ls=line, lw=2.5, label=label)
            ax.axvline(0.05, color="0.3", ls=":", lw=1.5)
            share_axis(ax, "rephrased: read their own edit" if ax is axes[0, 0] else "")
            ax.set(title=name, xlabel="others: read some edit", xlim=(0, 0.5))
        _legend_outside(axes[0, -1], "mask of")
        return finished(figure)


# Retention -----------------------------------------------------------------------------------------------------------


def retention_scores(kept: Mapping[str, Retention], methods: Mapping[str, str]) -> Figure:
    """Reliability of edits against the number of edits made since; label → method."""
    curves = {label: found.by_age(found.rel) for label, found in kept.items()}
    words = {"title": "Who forgets", "xlabel": "later edits", "ylabel": NAMES["rel"]}
    return _method_lines(curves, methods, ylim=(-0.02, 1.02), **words)


def retention_drift(kept: Mapping[str, Retention], methods: Mapping[str, str]) -> Figure:
    """Drift of the answers' logit margins against the number of edits made since; label → method."""
    curves = {label: found.by_age(found.drift) for label, found in kept.items()}
    words = {"title": "How far answers drift", "xlabel": "later edits", "ylabel": "change of the logit margin"}
    lowest = min(drift.min() for _, drift in curves.values())
    if lowest < -20:  # a method that breaks down should not flatten the others
        ticks = [tick for tick in (-300, -100, -30, -10, -5, 0, 5, 10) if tick >= lowest]
        words |= {"yscale": "symlog", "yticks": ticks, "yticklabels": ticks}
    return _method_lines(curves, methods, **words)


# Ablations -----------------------------------------------------------------------------------------------------------


def ablation_parts(rows: Sequence[Mapping[str, Any]], paper: Sequence[Mapping[str, Any]]) -> Figure:
    """MEMOIR with a part taken out, ours and the paper's (hollow).

    rows   group, label, T and scores of every variant
    paper  rows of `memoir.paper.read("ablation")`
    """
    last = max(row["T"] for row in rows)
    parts = [row for row in rows if row["group"] == "part" and row["T"] == last]
    theirs = {row["variant"]: row for row in paper}
    shown = [name for name in SCORES if parts[0][name] is not None]
    with theme():
        figure, ax = _single(height=4.6)
        for name, offset in zip(shown, np.linspace(-0.24, 0.24, len(shown)), strict=True):
            colour, marker = SCORES[name]
            y = np.arange(len(parts)) + offset
            look = {"marker": marker, "color": colour, "ls": "", "ms": 8, "clip_on": False}
            ax.plot([row[name] for row in parts], y, **look, label=NAMES[name], zorder=3)
            if name in paper[0]:
                ax.plot([theirs[row["label"]][name] for row in parts], y, **look, mfc="white", zorder=2)
        ax.set_yticks(range(len(parts)), labels=[textwrap.fill(row["label"], 16) for row in parts])
        ax.set(title=f"After {last} edits (hollow: paper, {paper[0]['T']})", xlabel="share", xlim=(-0.02, 1.04))
        ax.invert_yaxis()
        _legend_outside(ax)
        return finished(figure)


def ablation_settings(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """MEMOIR with another k, feature or block: rows with group, label, T and scores of every variant."""
    last = max(row["T"] for row in rows)
    groups = {"k": "columns k in a mask", "feature": "prompt feature", "layer": "block edited"}
    with theme():
        figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True)
        for ax, (group, title) in zip(axes, groups.items(), strict=True):
            own = [row for row in rows if row["group"] == group and row["T"] == last]
            for number, (name, (colour, marker)) in enumerate(SCORES.items()):
                if own[0][name] is None:
                    continue
                x = np.arange(len(own)) + 0.08 * (number - 1.5)
                look = {"color": colour, "marker": marker, "ms": 7, "ls": "" if group == "feature" else "-"}
                ax.plot(x, [row[name] for row in own], **look, label=NAMES[name], clip_on=False)
            ax.set_xticks(range(len(own)), labels=[row["label"].replace("_", ",\n") for row in own])
            ax.set(xlim=(-0.3, len(own) - 0.7), title=f"{title[0].upper()}{title[1:]}")
            share_axis(ax, f"share, after {last} edits" if ax is axes[0] else "")
        _legend_outside(axes[-1])
        return finished(figure)


# Capacity ------------------------------------------------------------------------------------------------------------


def capacity_check(checks: Sequence[Mapping[str, Any]], fitted: Sequence[Mapping[str, Any]]) -> Figure:
    """Reliability against T: predicted from keys (lines), measured (markers), and fitted to (hollow).

    checks  rows with label, write, T, reliability, which is None where no run was made, and reliability_predicted
    fitted  rows with label, T and reliability
    """
    labels = list(dict.fromkeys(row["label"] for row in checks))
    with theme():
        figure, ax = _single()
        for label, colour in zip(labels, sns.color_palette("colorblind", len(labels)), strict=True):
            own = [row for row in checks if row["label"] == label]
            ax.plot([row["T"] for row in own], [row["reliability_predicted"] for row in own], color=colour, label=label)
            look = {"color": colour, "ls": "", "marker": "o", "ms": 7, "clip_on": False}
            ax.plot([row["T"] for row in own], [row["reliability"] for row in own], **look)
            known = [row for row in fitted if row["label"] == label]
            ax.plot([row["T"] for row in known], [row["reliability"] for row in known], **look, mfc="none")
        edits_axis(ax, sorted({row["T"] for row in checks}), "edits T")
        share_axis(ax, NAMES["rel"])
        ax.set_title("Predicted from keys (lines), measured (dots); hollow: fitted to")
        _legend_outside(ax)
        return finished(figure)


def capacity_width(widths: Sequence[Mapping[str, Any]], paper: Sequence[Mapping[str, Any]]) -> Figure:
    """Reliability against the width of the layer, for so many edits: predicted, and what the paper measured.

    widths  rows with write, D, T and reliability_predicted
    paper   rows with D and rel, at the same number of edits
    """
    colours = {"sgd": HIGHLIGHT, "rls": EDITORS["memoir-rls"].colour}
    with theme():
        figure, ax = _single()
        for write, line in zip(dict.fromkeys(row["write"] for row in widths), LINES, strict=False):
            own = [row for row in widths if row["write"] == write]
            at, values = [row["D"] for row in own], [row["reliability_predicted"] for row in own]
            ax.plot(at, values, color=colours[write], ls=line, marker="o", label=f"{write}: predicted", clip_on=False)
        if paper:
            look = {"ms": 9, "mew": 2, "label": "paper, LLaMA-3-8B-Instruct"}
            ax.plot([row["D"] for row in paper], [row["rel"] for row in paper], "kx", **look)
        ax.set(xscale="log", xlabel="width D of the layer", title=f"{widths[0]['T']:,} edits on one page")
        ax.set_xticks(at, labels=[f"{width:,}" for width in at])
        ax.xaxis.set_minor_locator(NullLocator())
        share_axis(ax, NAMES["rel"])
        _legend_outside(ax)
        return finished(figure)


def _single(height: float = 4.4) -> tuple[Figure, Axes]:
    return plt.subplots(figsize=(8.5, height))


def _method_lines(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], methods: Mapping[str, str], **settings: Any
) -> Figure:
    """One line per label, in the colour and with the marker of its method, whose variants differ in their lines;
    settings are those of `Axes.set`."""
    drawn: Counter[str] = Counter()  # lines of each method so far
    with theme():
        figure, ax = _single()
        for label, (x, y) in curves.items():
            method = methods[label]
            look = {"ls": LINES[drawn[method] % len(LINES)], "markevery": 0.12 if len(x) > 20 else 1, "ms": 5}
            ax.plot(x, y, **method_style(method), **look, label=label, clip_on=False)
            drawn[method] += 1
        ax.set(**settings)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))  # edits and columns are whole
        _legend_outside(ax)
        return finished(figure)


def _legend_outside(ax: Axes, title: str | None = None) -> None:
    ax.legend(title=title, loc="upper left", bbox_to_anchor=(1.02, 1))
