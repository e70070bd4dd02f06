"""What the exploring notebooks' numbers mean, in two sentences each, filled from those numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memoir.plots import KINDS, NAMES
from memoir.tables import compare, listed


def columns(found: Mapping[str, Mapping[str, Any]], width: int) -> str:
    """From label → `ColumnWrites.summary()` and D."""
    spread = [
        f"{f['columns_per_edit']:.0f} columns per edit, Gini {f['gini_energy']:.2f} ({n})" for n, f in found.items()
    ]
    moved = [
        f"by {f['first_edit_columns_moved'][-1]:.2f} of their size, and what it reads from them by "
        f"{f['first_edit_reading_moved'][-1]:.2f} ({name})"
        for name, f in found.items()
    ]
    edits = len(next(iter(found.values()))["first_edit_columns_moved"])
    return (
        f"Of {width} columns an edit writes 99 % of its energy into {listed(spread)}. After {edits} edits the first "
        f"one's columns have changed {listed(moved)}: an edit lasts by what its own key reads, not by owning columns."
    )


def overlap(found: Mapping[str, Any], by_tau: Mapping[str, float]) -> str:
    """From the record that the notebook leaves, and the scores at the chosen τ."""
    ranges, chosen = found["range"], found["chosen"]
    others = {kind: ranges[kind]["median"] for kind in ranges if kind not in ("edited", "rephrase")}
    nearest = max(others, key=others.get)
    best = max(found["choices"], key=lambda row: row["auroc"])
    scores = [f"{NAMES[name]} {value:.3f}" for name, value in by_tau.items()]
    return (
        f"With feature {chosen['feature']} and k = {chosen['k']}, rephrased prompts overlap the nearest edit by "
        f"{ranges['rephrase']['median']:.2f} (median), which is their own in {found['top1']:.1%}, and the nearest of "
        f"the others ({KINDS[nearest][0]}) by {others[nearest]:.2f}, where chance is {found['chance']:.2f}; the best "
        f"of all features and k tried is {best['feature']} at k = {best['k']} (worst AUROC {best['auroc']:.3f}). "
        f"By the rule of {chosen['rule']}, τ = {chosen['tau']:.3f} (balanced accuracy "
        f"{chosen['balanced_accuracy']:.3f}), which on these prompts gives {listed(scores)}."
    )


def retention(found: Mapping[str, Mapping[str, Any]], edits: int) -> str:
    """From label → `Retention.summary()`."""
    order = sorted(found, key=lambda name: found[name]["first_edits_rel"], reverse=True)
    kept = [f"{found[name]['first_edits_rel']:.1%} ({name})" for name in order]
    moved = [f"{found[name]['first_edits_margin_drift']:+.1f} ({name})" for name in order]
    return (
        f"After {edits} edits the first tenth of them stands at {listed(kept)}. Since they were made, the lead of "
        f"their answers over the best other token has changed by {listed(moved)} logits on average."
    )


def ablations(rows: Sequence[Mapping[str, Any]], paper: Sequence[Mapping[str, Any]]) -> str:
    """From the rows of all variants and the paper's."""
    last = max(row["T"] for row in rows)
    ours = {row["label"]: row["avg"] for row in rows if row["group"] == "part" and row["T"] == last}
    costs = [f"{ours['full'] - average:+.3f} ({label})" for label, average in ours.items() if label != "full"]
    agreement = compare(ours, {row["variant"]: row["avg"] for row in paper})
    others = {
        f"{row['group']} {row['label']}": row["avg"] for row in rows if row["group"] != "part" and row["T"] == last
    }
    low, high = min(others, key=others.get), max(others, key=others.get)
    return (
        f"After {last} edits MEMOIR averages {ours['full']:.3f} and taking a part out costs {listed(costs)}; "
        f"{agreement} (T = 1000 there). Of all k, features and layers, {high} does best with {others[high]:.3f} and "
        f"{low} worst with {others[low]:.3f}."
    )


def capacity(
    checks: Sequence[Mapping[str, Any]], plan: Mapping[str, Mapping[str, Any]], size: str, level: float = 0.9
) -> str:
    """From the checked predictions and the plan at another size."""
    last = [row for row in checks if row["T"] == max(row["T"] for row in checks)]
    told = [f"{row['interference_predicted']:.2g} for {row['interference']:.2g} ({row['label']})" for row in last]
    gap = max(abs(row["reliability"] - row["reliability_predicted"]) for row in checks)
    reach = [f"{_reach(found, 'reliability', level)} with {write}" for write, found in plan.items()]
    worst = [f"{_reach(found, 'low', level)} with {write}" for write, found in plan.items()]
    return (
        f"Predicted from keys alone and measured after {last[0]['T']} edits, the relative interference is "
        f"{listed(told)}, and no reliability is off by more than {gap:.3f}. At {size} the same geometry keeps "
        f"reliability above {level:g} {listed(reach)}, and at the band's lower edge {listed(worst)}."
    )


def speed(found: Mapping[str, Any]) -> str:
    """From what `bench.measure` returns."""
    summary, plain, largest = found["summary"], found["plain"], found["search"][-1]
    alone, ahead, textbook = plain["memoir"], plain["memoir, ahead"], plain["plain"]
    asked = [f"{row['prefill']:.2f} and {row['decode']:.2f} at {row['edits']:,}" for row in found["overhead"]]
    told = (
        f"On {found['machine']['device']}, with one thread, MEMOIR makes an edit in "
        f"{1e3 * alone['median_seconds']:.1f} ms, and in {1e3 * ahead['median_seconds']:.1f} with the prompts of "
        f"several run ahead together, {ahead['median_seconds'] / found['floor']['seconds']:.1f} times what its "
        f"arithmetic and bytes ask for. That is "
        f"{summary['edit_speedup_vs_plain']:.1f} times as fast as its plain form at the same loss "
        f"({textbook['iterations']:.1f} iterations for {ahead['iterations']:.1f}, reliability "
        f"{textbook['reliability']:.3f} and {ahead['reliability']:.3f}), and "
        f"{summary['edit_speedup_same_iterations']:.1f} times at "
        f"{plain['plain, same iterations']['iterations']:.0f} iterations each. Asking an edited model takes, of the "
        f"unedited one's prefill and decoding time, {listed(asked)} edits, and {largest['masks']:,} masks are "
        f"searched in {largest['seconds']:.2g} s, at {largest['bandwidth_share']:.0%} of the speed of reading them."
    )
    if graph := found["approximate_search"]:
        told += (
            f" Along a graph the nearest of {graph['masks']:,} real masks is found in "
            f"{1e6 * graph['approximate_seconds']:.0f} µs instead of {1e6 * graph['exact_seconds']:.0f}, and "
            f"{graph['recall']:.2%} of {graph['questions']:,} rephrased prompts find one as near."
        )
    return told


def _reach(found: Mapping[str, Any], name: str, level: float) -> str:
    good = [total for total, value in zip(found["T"], found[name], strict=True) if value >= level]
    if not good:
        return f"for fewer than {found['T'][0]:,} edits"
    return f"beyond {good[-1]:,} edits" if good[-1] == found["T"][-1] else f"up to about {good[-1]:,} edits"
