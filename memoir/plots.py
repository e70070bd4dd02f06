"""Results → figures. Nothing is measured here: what a figure shows stands in a Result or in a table's rows.

One theme and one colour per method for all figures of the house; the colours are told apart by colour-blind eyes, and
every method has a marker of its own as well. Functions return the figure; `save` writes it as PNG and SVG.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memoir import metrics
from memoir.analysis import ColumnWrites, Retention
from memoir.capacity import Response
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
        _share_axis(axes[0, 0], "share")
        axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1.02, 1))
        if long_form:
            values = [checkpoint.scores["ppl"] for checkpoint in result.checkpoints]
            axes[0, 1].plot(at, values, "o-", color=COLOURS["MEMOIR"])
            axes[0, 1].set(ylabel=NAMES["ppl"], yscale="log")
        for ax in axes.flat:
            _edits_axis(ax, at, "edits made")
        figure.suptitle(_title(result))
        return _done(figure)


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
        _share_axis(ax, NAMES[score]) if score != "ppl" else ax.set(ylabel=NAMES[score], yscale="log")
        ax.set(xlabel=f"place of the edit in the sequence (each point: 1/{bins} of them)", xlim=(0, None))
        ax.legend(title="evaluated", loc="upper left", bbox_to_anchor=(1.02, 1))
        ax.set_title(_title(result))
        return _done(figure)


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
            _edits_axis(ax, sorted({row["T"] for row in lines}), "edits T")
            if score == "ppl":
                ax.set(yscale="log")
            else:
                _share_axis(ax, "")
            ax.set_title(title)
        axes[0].set_ylabel(NAMES[score])
        figure.legend(shown.values(), shown.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5)
        return _done(figure)


def _variants(rows: Sequence[dict[str, Any]], plain: Mapping[str, str]) -> list[str]:
    """The labels of rows with settings changed, each once."""
    return [label for label in dict.fromkeys(row["label"] for row in rows) if label not in plain.values()]


def _title(result: Result) -> str:
    return f"{result.info.method} on {result.info.model}, {result.info.dataset}"


def _share_axis(ax: Axes, label: str) -> None:
    ax.set(ylabel=label, ylim=(-0.02, 1.02), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])


def _edits_axis(ax: Axes, at: Sequence[int], label: str) -> None:
    """Numbers of edits, by powers of ten where they span more than one, each with its own tick."""
    if max(at) >= 10 * min(at):
        ax.set_xscale("log")
    ax.set_xticks(at, labels=[str(n) for n in at])
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.set_xlabel(label)


def _done(figure: Figure) -> Figure:
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


def columns_heat(writes: Mapping[str, ColumnWrites], bins: int = 128) -> Figure:
    """Edits × columns: where each edit's energy goes, one panel per variant. Columns stand in their own order."""
    with theme():
        figure, axes = plt.subplots(
            1, len(writes), figsize=(4 * len(writes) + 1.2, 4), sharey=True, squeeze=False, layout="constrained"
        )
        for ax, (label, found) in zip(axes[0], writes.items(), strict=True):
            count, width = found.energy.shape
            parts = np.array_split(np.arange(width), min(bins, width))
            share = np.stack([found.energy[:, part].sum(1) for part in parts], 1) * len(parts)
            share /= np.maximum(found.energy.sum(1, keepdims=True), 1e-30)
            image = ax.imshow(
                np.log10(np.maximum(share, 1e-3)),
                aspect="auto",
                extent=(0, width, count, 0),
                cmap="PuOr",
                vmin=-1.5,
                vmax=1.5,
                interpolation="nearest",
            )
            ax.set(title=label, xlabel="column of the projection", xticks=[width // 4, width // 2, 3 * width // 4])
            ax.grid(False)
        axes[0, 0].set_ylabel("edit")
        bar = figure.colorbar(image, ax=axes[0].tolist(), ticks=[-1, 0, 1], pad=0.02, extend="both")
        bar.ax.set_yticklabels(["1/10", "even", "10 ×"])
        bar.set_label("energy, × an even share")
        plt.close(figure)
        return figure


def columns_curves(writes: Mapping[str, ColumnWrites], methods: Mapping[str, str]) -> Figure:
    """How evenly edits use the columns, what they share, and how an early edit's columns drift (the paper's figure 1b).

    methods  label → method
    """
    style = styles(methods)
    with theme():
        figure, axes = plt.subplots(2, 3, figsize=(14, 8))
        lorenz_ax, count_ax, share_ax, moved_ax, read_ax, legend_ax = axes.flat
        for label, found in writes.items():
            columns, line = found.columns, style[label]
            order = np.arange(1, len(found.energy) + 1)
            lorenz_ax.plot(*found.lorenz, **line)
            count_ax.plot(np.sort(columns.sum(0))[::-1], **line)
            share_ax.plot(order[1:], found.shared[1:], **line)
            moved_ax.plot(order[1:], found.moved[1:], **line)
            read_ax.plot(order[1:], found.read[1:], **line)
        lorenz_ax.plot([0, 1], [0, 1], color="0.6", lw=1)
        lorenz_ax.set(title="Spread of energy (Lorenz curve)", xlabel="share of columns, least written first")
        _share_axis(lorenz_ax, "share of all energy written")
        count_ax.set(title="Edits per column", xlabel="columns, most used first", ylabel="edits that wrote into it")
        share_ax.set(title="Columns shared with any earlier edit", xlabel="edit")
        _share_axis(share_ax, "share of the edit's columns")
        moved_ax.set(title="Drift of the first edit's columns", xlabel="edits made", ylabel="relative change of them")
        read_ax.set(title="Drift of what the first edit reads", xlabel="edits made", ylabel="relative change of output")
        for ax in (moved_ax, read_ax):
            ax.set_ylim(0, None)
        legend_ax.axis("off")
        legend_ax.legend(*lorenz_ax.get_legend_handles_labels(), loc="center")
        return _done(figure)


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
        for ax, (kind, values) in zip(axes, ratio.items(), strict=False):
            name, colour = KINDS[kind]
            ax.hist(values, bins, color=colour, weights=np.full(len(values), 1 / len(values)))
            ax.set_ylabel(name, rotation=0, ha="right", va="center")
            ax.set_yticks([])
        for place, row in enumerate(paper):
            axes[-1].plot([row["low"], row["high"]], [place, place], color="0.35", lw=6, solid_capstyle="butt")
        labels = [f"{row['dataset']}, {row['prompts']}" for row in paper]
        axes[-1].set_yticks(range(len(paper)), labels=labels, fontsize="small")
        axes[-1].set(
            ylim=(len(paper) - 0.4, -0.6), xlim=(0, 1.01), xlabel="overlap ratio R_match with the nearest edit"
        )
        axes[-1].text(0.99, 0.06, "the paper's ranges; chance 0.286", transform=axes[-1].transAxes, ha="right")
        for ax in axes[:-1]:
            ax.axvline(chance, color="0.3", ls=":", lw=1.5)
            ax.axvline(tau, color=COLOURS["MEMOIR"], lw=1.5)
        names = [(chance, f"chance k/D = {chance:.2f}", "0.3"), (tau, f"τ = {tau:.2f}", COLOURS["MEMOIR"])]
        for place, text, colour in names:
            axes[0].annotate(
                text, (place, 1.04), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=colour
            )
        figure.suptitle("Share of prompts by their overlap with the nearest edit")
        _done(figure)
        figure.subplots_adjust(hspace=0.25)
        return figure


def overlap_choice(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
    choices: Sequence[dict[str, Any]],
    taus: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    tau: float,
) -> Figure:
    """ROC per kind of prompt that must not match; feature and k side by side; scores as a function of τ.

    curves   prompt kind → false and true positive rates, and AUROC
    choices  rows with feature, k and auroc, the worst over the kinds
    """
    with theme():
        figure, (roc_ax, choice_ax, tau_ax) = plt.subplots(1, 3, figsize=(15, 4.8))
        for (kind, (false, true, area)), line in zip(curves.items(), LINES, strict=False):
            name, colour = KINDS[kind]
            roc_ax.plot(false, true, color=colour, ls=line, lw=2.5, label=f"{name}: {area:.3f}", clip_on=False)
        _share_axis(roc_ax, "rephrased prompts read")
        roc_ax.set(title="Telling prompts apart (ROC)", xlabel="other prompts read", xlim=(-0.02, 1.02))
        roc_ax.legend(title="AUROC against", loc="lower right")
        for (feature, marker), colour in zip(
            {"last": "o", "mean": "s", "mean_centred": "^"}.items(), sns.color_palette("colorblind"), strict=False
        ):
            own = [row for row in choices if row["feature"] == feature]
            if own:
                choice_ax.plot(
                    [row["k"] for row in own],
                    [row["auroc"] for row in own],
                    marker=marker,
                    color=colour,
                    label=feature.replace("_", ", "),
                )
        _edits_axis(choice_ax, sorted({row["k"] for row in choices}), "columns k in a mask")
        choice_ax.set_xscale("log", base=2)
        choice_ax.set_xticks(sorted({row["k"] for row in choices}), labels=sorted({row["k"] for row in choices}))
        choice_ax.set(title="Feature and k", ylabel="AUROC, worst kind", ylim=(None, 1.01))
        choice_ax.legend(title="feature")
        dashes = (*LINES, (0, (1, 1)))  # curves that lie on each other still show
        for (name, values), colour, line in zip(scores.items(), sns.color_palette("colorblind"), dashes, strict=False):
            tau_ax.plot(taus, values, color=colour, ls=line, lw=2.5, label=NAMES[name])
        tau_ax.axvline(tau, color="0.3", lw=1.5)
        _share_axis(tau_ax, "share")
        tau_ax.set(title=f"What τ trades (chosen: {tau:.2f})", xlabel="threshold τ", xlim=(0, 1))
        tau_ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
        return _done(figure)


def retention_heat(found: Mapping[str, Retention]) -> Figure:
    """Edit × time: reliability of each edit at each checkpoint after it, one panel per method."""
    wide = min(4, len(found))
    rows = -(-len(found) // wide)
    with theme():
        figure, axes = plt.subplots(
            rows,
            wide,
            figsize=(3.4 * wide + 1.4, 2.9 * rows + 0.4),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for ax in axes.flat[len(found) :]:
            ax.axis("off")
        for number, (ax, (label, kept)) in enumerate(zip(axes.flat, found.items(), strict=False)):
            edges = np.arange(len(kept.at) + 1)
            image = ax.pcolormesh(np.arange(kept.rel.shape[1] + 1), edges, kept.rel, cmap="cividis", vmin=0, vmax=1)
            some = slice(None, None, -max(1, len(kept.at) // 5))  # from the last one down
            ax.set_yticks((edges[:-1] + 0.5)[some], labels=[str(n) for n in kept.at[some]])
            ax.xaxis.set_major_locator(plt.MaxNLocator(4, integer=True))
            ax.set_title(label)
            ax.grid(False)
            if number + wide >= len(found):
                ax.set_xlabel("edit")
                ax.tick_params(labelbottom=True)
        for ax in axes[:, 0]:
            ax.set_ylabel("edits made")
        figure.colorbar(image, ax=axes.ravel().tolist(), pad=0.02).set_label("reliability of the edit")
        plt.close(figure)
        return figure


def retention_curves(found: Mapping[str, Retention], methods: Mapping[str, str]) -> Figure:
    """Reliability, and drift of the answers' logit margins, against the number of edits made since; label → method."""
    style = styles(methods)
    with theme():
        figure, (rel_ax, drift_ax) = plt.subplots(1, 2, figsize=(12.5, 4.8))
        for label, kept in found.items():
            line = {**style[label], "markevery": 1, "ms": 5}
            rel_ax.plot(*kept.by_age(kept.rel), **line, clip_on=False)
            drift_ax.plot(*kept.by_age(kept.drift), **line)
        _share_axis(rel_ax, NAMES["rel"])
        rel_ax.set(title="Who forgets", xlabel="later edits")
        drift_ax.set(title="How far answers drift", xlabel="later edits", ylabel="change of the logit margin")
        if drift_ax.get_ylim()[0] < -20:  # a method that breaks down should not flatten the others
            drift_ax.set_yscale("symlog", linthresh=10, linscale=2)
            ticks = [-300, -100, -30, -10, -5, 0, 5, 10]
            low, high = drift_ax.get_ylim()
            drift_ax.set_yticks([tick for tick in ticks if low <= tick <= high], minor=False)
            drift_ax.yaxis.set_major_formatter("{x:.0f}")
            drift_ax.yaxis.set_minor_locator(plt.NullLocator())
        drift_ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
        return _done(figure)


def ablations(rows: Sequence[dict[str, Any]], paper: Sequence[dict[str, Any]]) -> Figure:
    """MEMOIR with one thing changed at a time.

    rows   group (part, k, feature, layer), label, T and scores
    paper  rows of `memoir.paper.read("ablation")`
    """
    last = max(row["T"] for row in rows)
    parts = [row for row in rows if row["group"] == "part" and row["T"] == last]
    names = [name for name in ("rel", "gen", "loc", "loc_same_subject") if parts[0][name] is not None]
    shown = dict(zip(names, ("#0173b2", "#de8f05", "#029e73", "#cc78bc"), strict=False))
    markers = dict(zip(shown, "os^D", strict=False))
    offsets = dict(zip(shown, np.linspace(-0.24, 0.24, len(shown)), strict=True))
    with theme():
        figure, axes = plt.subplots(2, 3, figsize=(15, 8.6))
        part_ax, count_ax, legend_ax, *other = axes.flat
        for place, row in enumerate(parts):
            theirs = next((p for p in paper if p["variant"] == row["label"]), None)
            for name, colour in shown.items():
                at, look = place + offsets[name], {"marker": markers[name], "color": colour, "ms": 8, "clip_on": False}
                part_ax.plot(row[name], at, **look, zorder=3)
                if theirs and name in theirs:
                    part_ax.plot(theirs[name], at, **look, mfc="white", zorder=2)
        part_ax.set_yticks(range(len(parts)), labels=[_wrapped(row["label"]) for row in parts])
        part_ax.set(title="Parts taken out (hollow: paper)", xlabel="share", xlim=(-0.02, 1.04))
        part_ax.invert_yaxis()
        for row, line in zip(parts, LINES, strict=True):
            own = [r for r in rows if r["group"] == "part" and r["label"] == row["label"]]
            count_ax.plot(
                [r["T"] for r in own],
                [r["avg"] for r in own],
                color=COLOURS["MEMOIR"],
                ls=line,
                marker=MARKERS["MEMOIR"],
                label=row["label"],
                clip_on=False,
            )
        _share_axis(count_ax, "average of rel., gen., loc.")
        _edits_axis(count_ax, sorted({row["T"] for row in parts} | {row["T"] for row in rows}), "edits T")
        count_ax.set_title("Number of edits")
        for ax, (group, label) in zip(
            other,
            {"k": "columns k in a mask", "feature": "prompt feature", "layer": "block edited"}.items(),
            strict=True,
        ):
            own = [row for row in rows if row["group"] == group and row["T"] == last]
            for name, colour in shown.items():
                ax.plot(
                    np.arange(len(own)) + offsets[name] / 2,
                    [row[name] for row in own],
                    color=colour,
                    marker=markers[name],
                    ms=7,
                    ls="" if group == "feature" else "-",
                    label=NAMES[name],
                    clip_on=False,
                )
            ax.set_xticks(range(len(own)), labels=[row["label"].replace("_", ",\n") for row in own])
            ax.set(xlim=(-0.3, len(own) - 0.7))
            _share_axis(ax, "share" if group == "k" else "")
            ax.set(xlabel=label, title=f"{label[0].upper()}{label[1:]}")
        legend_ax.axis("off")
        first = legend_ax.legend(*other[0].get_legend_handles_labels(), loc="upper left", title=f"after {last} edits")
        legend_ax.add_artist(first)
        legend_ax.legend(*count_ax.get_legend_handles_labels(), loc="lower left", title="parts", handlelength=3)
        return _done(figure)


def capacity_check(checks: Sequence[dict[str, Any]], responses: Mapping[str, Response]) -> Figure:
    """Predictions from keys (lines) against measured runs (markers).

    checks     rows with label, D, k, write, T, interference, interference_predicted, reliability, reliability_predicted
    responses  label → what share of the answers survives an error
    """
    labels = list(dict.fromkeys(row["label"] for row in checks))
    colours = dict(zip(labels, sns.color_palette("colorblind", len(labels)), strict=True))
    with theme():
        figure, (error_ax, dose_ax, rel_ax) = plt.subplots(1, 3, figsize=(15.5, 4.8))
        for label in labels:
            own = [row for row in checks if row["label"] == label]
            marker = "o" if own[0]["write"] == "sgd" else "s"
            at, colour = [row["T"] for row in own], colours[label]
            for ax, name in ((error_ax, "interference"), (rel_ax, "reliability")):
                floor = 1e-5 if name == "interference" else 0
                ax.plot(at, [max(row[f"{name}_predicted"], floor) for row in own], color=colour)
                ax.plot(at, [max(row[name], floor) for row in own], marker, color=colour, label=label, clip_on=False)
        for label, found in responses.items():
            dose_ax.plot(found.errors, found.reliability, color=colours[label], marker=".", clip_on=False)
        error_ax.set(yscale="log", ylabel="relative error of an edit's output, E", title="Interference")
        dose_ax.set(xlabel="relative error E", title="What answers bear")
        rel_ax.set(title="Reliability (line: predicted)")
        for ax in (error_ax, rel_ax):
            _edits_axis(ax, sorted({row["T"] for row in checks}), "edits T")
        _share_axis(dose_ax, "reliability")
        _share_axis(rel_ax, "reliability")
        rel_ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1), title="measured")
        return _done(figure)


def capacity_plan(plan: Mapping[str, dict[str, Any]], paper: Sequence[dict[str, Any]], title: str) -> Figure:
    """Reliability against T at another size: expected (line) with its error band, and what the paper measured.

    plan   write rule → T, reliability, low and high
    paper  rows with T and rel
    """
    with theme():
        figure, ax = plt.subplots(figsize=(8.5, 4.8))
        for (write, found), line in zip(plan.items(), LINES, strict=False):
            colour = COLOURS["MEMOIR"] if write == "sgd" else COLOURS["AlphaEdit"]
            ax.plot(found["T"], found["reliability"], color=colour, ls=line, label=f"{write}: expected")
            ax.fill_between(found["T"], found["low"], found["high"], color=colour, alpha=0.15, lw=0, label="error band")
        ax.plot([row["T"] for row in paper], [row["rel"] for row in paper], "kx", label="paper, LLaMA-3-8B")
        _share_axis(ax, NAMES["rel"])
        ax.set(xscale="log", xlabel="edits T", title=title)
        ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
        return _done(figure)


PARTS = {"prefix": "#0173b2", "tail": "#d55e00", "write": "#029e73", "bank": "#949494"}  # of an edit's time


def speed_edits(methods: Mapping[str, dict[str, Any]], plain: Mapping[str, dict[str, Any]], floor: float) -> Figure:
    """Seconds per edit: by method and part; and MEMOIR beside its plain form, with what arithmetic and bytes ask for.

    methods  label → seconds by part
    plain    label → median_seconds, of which those at equal iterations are left out
    floor    seconds of MEMOIR's edit
    """
    with theme():
        figure, (part_ax, floor_ax) = plt.subplots(1, 2, figsize=(13, 1.6 + 0.45 * max(4, len(methods))))
        labels = list(methods)
        start = np.zeros(len(labels))
        for part, colour in PARTS.items():
            width = np.array([max(0.0, methods[label]["parts"][part]) for label in labels])
            part_ax.barh(labels, width, left=start, color=colour, label=part)
            start += width
        part_ax.set(title="By method and part", xlabel="seconds per edit", xlim=(0, 1.05 * start.max()))
        part_ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
        shown = {label: row["median_seconds"] for label, row in plain.items() if "same" not in label}
        colours = [COLOURS["MEMOIR"] if label.startswith("memoir") else "0.6" for label in shown]
        bars = floor_ax.barh(list(shown), list(shown.values()), color=colours)
        floor_ax.bar_label(bars, [f"{seconds / floor:.1f} × floor" for seconds in shown.values()], padding=4)
        floor_ax.axvline(floor, color="black", lw=1.5, ls="--")
        room = 1.5 * max(shown.values())  # for the labels
        floor_ax.set(title="Distance to the floor (dashed)", xlabel="seconds per edit", xlim=(0, room))
        for ax in (part_ax, floor_ax):
            ax.invert_yaxis()
            ax.grid(axis="y", visible=False)
        return _done(figure)


def speed_questions(overhead: Sequence[dict[str, Any]], search: Sequence[dict[str, Any]]) -> Figure:
    """What edits cost whoever asks: the edited model over the unedited one, and the mask search over mere reading."""
    with theme():
        figure, (over_ax, search_ax) = plt.subplots(1, 2, figsize=(12.5, 4.4))
        at = [row["edits"] for row in overhead]
        for (part, marker), colour in zip({"prefill": "o", "decode": "s"}.items(), PARTS.values(), strict=False):
            over_ax.plot(at, [row[part] for row in overhead], marker=marker, color=colour, label=part)
        over_ax.axhline(1, color="0.5", lw=1)
        _edits_axis(over_ax, at, "edits in the memory")
        over_ax.set(title="Edited over unedited model", ylabel="ratio of seconds")
        over_ax.legend()
        masks = [row["masks"] for row in search]
        for (name, label), line in zip({"seconds": "search", "floor_seconds": "reading"}.items(), LINES, strict=False):
            colour = COLOURS["MEMOIR"] if name == "seconds" else "black"
            search_ax.plot(masks, [row[name] for row in search], marker="o", ls=line, color=colour, label=label)
        _edits_axis(search_ax, masks, "masks in the bank")
        search_ax.set(yscale="log", ylabel="seconds", title="One search, and reading the same bytes")
        search_ax.legend()
        return _done(figure)


def _wrapped(text: str, width: int = 16) -> str:
    return "\n".join(textwrap.wrap(text, width))
