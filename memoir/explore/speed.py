"""The figures and the summary of `speed.ipynb`, from what `bench.measure` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from memoir.editors import EDITORS
from memoir.plots import finished, theme


def edits_figure(methods: Mapping[str, dict[str, Any]], plain: Mapping[str, dict[str, Any]]) -> Figure:
    """Seconds per edit by method, and MEMOIR at equal loss beside its plain form.

    methods  label → a row with seconds
    plain    form → a row with seconds and speedup, at equal loss
    """
    with theme():
        figure, (method_ax, plain_ax) = plt.subplots(1, 2, figsize=(13, 1.6 + 0.45 * max(4, len(methods))))
        colours = [EDITORS[label.split("+")[0]].colour for label in methods]
        seconds = [row["seconds"] for row in methods.values()]
        bars = method_ax.barh(list(methods), seconds, color=colours)
        method_ax.bar_label(bars, [f"{value:.2g} s" for value in seconds], padding=4)
        method_ax.set(title="By method", xlabel="seconds per edit", xlim=(0, 1.25 * max(seconds)))
        colours = [EDITORS["memoir"].colour if form == "memoir" else "0.6" for form in plain]
        seconds = [row["seconds"] for row in plain.values()]
        bars = plain_ax.barh(list(plain), seconds, color=colours)
        plain_ax.bar_label(bars, [f"{row['speedup']:.1f} × MEMOIR" for row in plain.values()], padding=4)
        plain_ax.set(title="At equal loss", xlabel="seconds per edit", xlim=(0, 1.5 * max(seconds)))
        for ax in (method_ax, plain_ax):
            ax.invert_yaxis()
            ax.grid(axis="y", visible=False)
        return finished(figure)


def questions_figure(overhead: Sequence[dict[str, Any]]) -> Figure:
    """What a question costs: the edited model over the unedited one."""
    with theme():
        figure, ax = plt.subplots(figsize=(8.5, 4.4))
        counts = [row["edits"] for row in overhead]
        for part, marker in {"prefill": "o", "decode": "s"}.items():
            ax.plot(counts, [row[part] for row in overhead], marker=marker, label=part)
        ax.axhline(1, color="0.5", lw=1)
        ax.set(title="Seconds of a question, edited over unedited model", ylabel="ratio", xlabel="edits in the memory")
        ax.set_xscale("log")
        ax.set_xticks(counts, labels=[f"{count:,}" for count in counts])
        ax.xaxis.set_minor_locator(plt.NullLocator())
        ax.legend()
        return finished(figure)


def meaning(record: Mapping[str, Any]) -> str:
    """What the numbers say, from all that `bench.measure` returns."""
    summary, plain, last = record["summary"], record["plain"], record["search"][-1]
    ours, textbook = plain["memoir"], plain["plain"]
    factors = [f"{row['prefill']:.2f} and {row['decode']:.2f} at {row['edits']:,} edits" for row in record["overhead"]]
    return (
        f"On {summary['model']} MEMOIR makes an edit in {ours['seconds']:.2g} s, "
        f"{summary['edit_speedup_vs_plain']:.1f} times as fast as its plain form at the same loss "
        f"({ours['iterations']:.1f} iterations against {textbook['iterations']:.1f}). The edited model's prefill and "
        f"decoding take {'; '.join(factors)} times as long as the unedited model's. A search among "
        f"{last['masks']:,} masks takes {last['seconds']:.2g} s."
    )
