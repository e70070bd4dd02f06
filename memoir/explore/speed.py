"""The figures and texts of `speed.ipynb`, from what `bench.measure` and `shapes.measure_shapes` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from memoir.editors import EDITORS
from memoir.plots import finished, proper_name, theme

# The shape of LLaMA-3-8B on an H200, in a checkout.
MEASURED = Path(__file__).parents[2] / "reports" / "speed" / "llama-3-8b--h200.json"


def edits_figure(methods: Mapping[str, dict[str, Any]], plain: Mapping[str, dict[str, Any]]) -> Figure:
    """Seconds per edit by method, and MEMOIR at equal loss beside its plain form.

    methods  label → a row with seconds
    plain    form → a row with seconds and speedup, at equal loss; empty where it was not measured
    """
    with theme():
        height, parts = 1.6 + 0.45 * max(4, len(methods)), 1 + bool(plain)
        figure, axes = plt.subplots(1, parts, figsize=(6.5 * parts, height), squeeze=False)
        colours = [EDITORS[label.split("+")[0]].colour for label in methods]
        words = [f"{row['seconds']:.2g} s" for row in methods.values()]
        _bars(axes[0, 0], methods, colours, words, "By method")
        if plain:
            colours = [EDITORS["memoir"].colour if form == "memoir" else "0.6" for form in plain]
            words = [f"{row['speedup']:.1f} × MEMOIR" for row in plain.values()]
            _bars(axes[0, 1], plain, colours, words, "At equal loss")
        return finished(figure)


def _bars(
    ax: Axes, rows: Mapping[str, dict[str, Any]], colours: Sequence[str], words: Sequence[str], title: str
) -> None:
    """A bar of the seconds of each row, with a word at its end."""
    seconds = [row["seconds"] for row in rows.values()]
    ax.bar_label(ax.barh([proper_name(name) for name in rows], seconds, color=colours), words, padding=4)
    ax.set(title=title, xlabel="seconds per edit", xlim=(0, 1.5 * max(seconds)))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


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
    model, plain, last = record["summary"]["model"], record["plain"], record["search"][-1]
    factors = [f"{row['prefill']:.2f} and {row['decode']:.2f} at {row['edits']:,} edits" for row in record["overhead"]]
    if plain:
        ours, textbook = plain["memoir"], plain["plain"]
        claim = (
            f"On {model} MEMOIR makes an edit {textbook['speedup']:.1f} times as fast as its plain form at the same "
            f"loss, in {ours['seconds']:.2g} s ({ours['iterations']:.1f} iterations against "
            f"{textbook['iterations']:.1f}). A question costs more: prefill"
        )
    else:
        claim = f"On {model}, with a memory full of edits, prefill"
    return (
        f"{claim} and decoding take {'; '.join(factors)} times as long as unedited. A search among {last['masks']:,} "
        f"masks takes {last['seconds']:.2g} s. Ratios are of neighbouring measurements; the seconds are those of a "
        "machine that others may have used as well."
    )


# Shapes of published models ------------------------------------------------------------------------------------------


def shapes_figure(found: Mapping[str, Any]) -> Figure:
    """Seconds per edit by method at each shape (dots) and what no edit can undercut (ticks), on a logarithmic scale.

    found  what `shapes.measure_shapes` returns
    """
    with theme():
        rows = {name: _timed(shape) for name, shape in found["shapes"].items()}
        height = 1.6 + 0.45 * max(map(len, rows.values()))
        figure, axes = plt.subplots(1, len(rows), figsize=(8.5 * len(rows), height), squeeze=False)
        for ax, (name, methods) in zip(axes[0], rows.items(), strict=True):
            for y, (label, row) in enumerate(methods.items()):
                seconds, floor, colour = row["seconds"], row["floor_seconds"], EDITORS[label.split("+")[0]].colour
                ax.plot([floor, seconds], [y, y], color=colour, lw=1.5)
                ax.plot(floor, y, marker="|", ms=15, mew=2.5, color=colour)
                ax.plot(seconds, y, marker="o", ms=9, color=colour)
                ax.annotate(f"{seconds:.2g} s", (seconds, y), (9, 0), textcoords="offset points", va="center")
            ax.set_yticks(range(len(methods)), labels=[proper_name(label) for label in methods])
            ax.set(title=f"{name} (tick: floor)", xlabel="seconds per edit", xscale="log")
            ax.margins(x=0.22, y=0.06)
            ax.invert_yaxis()
        return finished(figure)


def shapes_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per shape and method, as text; None where there is no figure."""
    table = []
    for name, shape in found["shapes"].items():
        for label, row in shape["methods"].items():
            cells = {"shape": name, "method": proper_name(label), "seconds per edit": _short(row.get("seconds"))}
            cells |= {"floor": _short(row.get("floor_seconds")), "edits": row.get("edits")}
            cells |= {"steps": _short(row.get("iterations")), "first edit, s": _short(row.get("first_edit_seconds"))}
            cells["GB over the model"] = _short(row["bytes_over_model"] / 1e9) if "bytes_over_model" in row else None
            table.append(cells | {"note": row.get("reason")})
    return table


def shapes_meaning(found: Mapping[str, Any]) -> str:
    """What the numbers say of the first shape, and where they come from."""
    info, (name, shape) = found["info"], next(iter(found["shapes"].items()))
    rows = _timed(shape)
    if not rows:
        return f"No method was timed at {name}'s shape."
    slowest = max(rows, key=lambda label: rows[label]["seconds"])
    claim = f"{proper_name(slowest)} takes longest, {rows[slowest]['seconds']:.2g} s"
    if ours := rows.get("memoir"):
        times = ours["seconds"] / ours["floor_seconds"]
        claim = f"MEMOIR makes an edit in {ours['seconds']:.2g} s, {times:.0f} times its floor; {claim}"
    if questions := [f"{part} {value:.2f}" for row in rows.values() for part, value in row.items() if " at " in part]:
        claim += f". A question takes, × the unedited model's: {', '.join(questions)}"
    fewest = min(row["edits"] for row in rows.values())
    return (
        f"At {name}'s shape, with random weights, {claim}. Measured on one {info['machine']} at commit "
        f"{(info['commit'] or 'unknown')[:7]}; the medians are over {fewest} edits or more."
    )


def _timed(shape: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods that were timed, MEMOIR first."""
    rows = {label: row for label, row in shape["methods"].items() if "seconds" in row}
    return dict(sorted(rows.items(), key=lambda item: not item[0].startswith("memoir")))


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"
