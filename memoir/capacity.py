"""How many edits a residual memory holds, from the geometry of its keys.

Edit j owns the span of its masked keys, those at the places where its answer is predicted: P_j (D × D) projects on it,
p_j is its dimension. Written by themselves ("sgd"), edits are one sweep of Kaczmarz's method,
W += (V_j − W K_j) K_j⁺: an edit is exact when it is written, and every later one takes its own span's share of the
earlier keys away and puts something else there. Written by recursive least squares ("rls") they stay exact until the
keys fill the memory. Both follow from the eigenvalues of B = E[P_j] alone (`Spectrum`), which a few hundred edits'
keys estimate without a single edit being made; what error an answer bears is measured on the model (`dose_response`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from memoir.editors.memoir import MEMOIR
from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.run import Evaluation
from memoir.sites import input_of

# Geometry ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of B = E[P_j], reduced to one direction that all edits share and a flat rest.

    tokens  p = tr B, keys of an edit that count
    spike   β_1, how much of itself an edit has in the shared direction, 0…1
    bulk    number of the other dimensions, each with (p − β_1) / bulk
    """

    tokens: float
    spike: float
    bulk: float

    @property
    def values(self) -> np.ndarray:
        """(2,) the eigenvalues."""
        return np.array([self.spike, (self.tokens - self.spike) / self.bulk])

    @property
    def counts(self) -> np.ndarray:
        """(2,) how often each occurs."""
        return np.array([1.0, self.bulk])

    @property
    def leak(self) -> float:
        """ℓ, the share of a key that lies in the span of another edit: tr B² / p."""
        return float((self.counts * self.values**2).sum() / self.tokens)

    @classmethod
    def of(cls, keys: Sequence[Tensor]) -> Spectrum:
        """From the masked keys of edits, each (p_i × D): the one spectrum of this form with their tr B, tr B², tr B³.

        The moments are means over pairs and triples of different edits, so that they are unbiased however few there
        are. ValueError for fewer than three edits.
        """
        n = len(keys)
        if n < 3:
            raise ValueError(f"keys of {n} edits, expected at least 3 to compare")
        spans = [torch.linalg.qr(key.double().T).Q for key in keys]
        sizes = torch.tensor([span.shape[1] for span in spans])
        owner = torch.repeat_interleave(torch.arange(n), sizes)
        stacked = torch.cat(spans, 1)
        gram = (stacked.T @ stacked).masked_fill(owner[:, None] == owner, 0.0)
        squared = gram @ gram
        tokens = float(sizes.double().mean())
        second = float(squared.trace()) / (n * (n - 1))
        third = float((squared * gram).sum()) / (n * (n - 1) * (n - 2))
        return cls._of_moments(tokens, second, third)

    @classmethod
    def _of_moments(cls, tokens: float, second: float, third: float) -> Spectrum:
        def excess(spike: float) -> float:
            return spike**3 + (second - spike**2) ** 2 / (tokens - spike) - third

        low, high = 0.0, min(second**0.5, tokens) * (1 - 1e-9)
        if excess(low) >= 0:  # no shared direction that these few edits would show
            return cls(tokens=tokens, spike=0.0, bulk=tokens**2 / second)
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) < 0 else (low, middle)
        return cls(tokens=tokens, spike=low, bulk=(tokens - low) ** 2 / (second - low**2))


def sgd_error(spectrum: Spectrum, edits: Sequence[int], ages: int = 33) -> list[np.ndarray]:
    """E‖W_T k_i − v_i‖² / ‖v_i‖² for edits spread evenly over the sequence, oldest first, for each number T of edits.

    With ω_l the energy of W in direction l, in units of an answer's, and w = β / p a key's share in it,
        dω_l/dt = β_l (1 + q − 2 ω_l),   q = Σ w_l ω_l,
    since an edit replaces what stood in its span by its answer minus what the rest of W said to its keys. Edit i keeps
    a_l = exp(−β_l (T − i)) of itself, ā = Σ w_l a_l in all, so its error is
        (1 − ā)² + q(T) − 2 ā Σ w_l a_l ω_l(i) + ā² q(i).
    """
    beta, weight = spectrum.values, spectrum.counts * spectrum.values / spectrum.tokens
    found = []
    for total in edits:
        made = np.linspace(0, total, ages)[:-1] + total / (ages - 1) / 2  # when the edits looked at were written
        clock = np.unique(np.concatenate([[0.0], np.geomspace(min(1.0, total / 2), total, 400), made]))
        energy = np.zeros((len(clock), 2))
        for step in range(1, len(clock)):
            energy[step] = _advance(energy[step - 1], clock[step] - clock[step - 1], beta, weight)
        written = energy[np.searchsorted(clock, made)]
        kept = np.exp(-beta * (total - made)[:, None])
        whole = kept @ weight
        error = (1 - whole) ** 2 + energy[-1] @ weight
        found.append(error - 2 * whole * ((kept * written) @ weight) + whole**2 * (written @ weight))
    return found


def _advance(energy: np.ndarray, time: float, beta: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """ω after some time: the equation is linear, so one matrix exponential is exact."""
    system = np.zeros((3, 3))
    system[:2, :2] = np.outer(beta, weight) - 2 * np.diag(beta)
    system[:2, 2] = beta
    return (torch.linalg.matrix_exp(torch.from_numpy(system * time)).numpy() @ np.append(energy, 1.0))[:2]


def rls_error(spectrum: Spectrum, edits: Sequence[int], ridge: float) -> list[np.ndarray]:
    """The same for the ridge solution over all keys, alike for all edits: one value for each number T of edits.

    The residual of n = T p random answers is λ² tr(K + λ)⁻² / n, K the keys' Gram matrix. For random keys with
    covariance eigenvalues μ (w, for keys of length 1), tr(K + λ)⁻¹ = 1 / κ where n = λ/κ + Σ μ / (μ + κ).

    ridge  λ in units of a key's squared length
    """
    beta, counts = spectrum.values / spectrum.tokens, spectrum.counts
    found = []
    for total in edits:
        n = total * spectrum.tokens
        low, high = np.log(ridge / n) - 1, np.log(ridge + 1) + 1
        for _ in range(200):
            middle = (low + high) / 2
            kappa = np.exp(middle)
            filled = ridge / kappa + (counts * beta / (beta + kappa)).sum()
            low, high = (middle, high) if filled > n else (low, middle)
        slope = kappa / (ridge + (counts * beta * (kappa / (beta + kappa)) ** 2).sum())
        found.append(np.array([(ridge / kappa) ** 2 * slope / n]))
    return found


def predicted_error(write: str, spectrum: Spectrum, edits: Sequence[int], ridge: float) -> list[np.ndarray]:
    """By write rule; ridge in units of a key's squared length, of use for "rls" only."""
    return sgd_error(spectrum, edits) if write == "sgd" else rls_error(spectrum, edits, ridge)


# What the model bears, and what really happens -----------------------------------------------------------------------


@dataclass
class Trial:
    """A sequence of edits, with what each of them left on its own keys.

    at             numbers of edits at which all made so far were looked at
    interference   at each, mean over edits of ‖W_T K_i − V_i‖² / ‖V_i‖²
    reliability    at each
    keys, values   of each edit, (p_i × D) and (p_i × d): K_i and V_i = W_i K_i just after it was written
    reads          of each edit, (n_i × d): what W_i adds at all places up to the last that predicts its answer
    """

    at: list[int]
    interference: list[float] = field(default_factory=list)
    reliability: list[float] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)


def trial(editor: MEMOIR, edits: Sequence[EditRequest], checkpoints: Iterable[int], *, progress: bool = True) -> Trial:
    """Make edits with a fresh editor and measure at every checkpoint what they have done to each other."""
    edits = [replace(edit, probes=()) for edit in edits]
    found = Trial(sorted({*checkpoints, len(edits)}))
    if found.at[0] < 1 or found.at[-1] > len(edits):
        raise ValueError(f"checkpoints {found.at} do not fit {len(edits)} edits, expected 1 to {len(edits)}")
    evaluation = Evaluation(editor, generate=False)
    for made, edit in enumerate(tqdm(edits, desc="trial", unit="edit", disable=not progress), 1):
        editor.edit(edit)
        keys, counted = edit_keys(editor, edit)
        read = keys @ editor.memory.weight.T
        found.keys.append(keys[counted])
        found.values.append(read[counted])
        found.reads.append(read)
        if made in found.at:
            weight = editor.memory.weight
            errors = [
                float((key @ weight.T - value).square().sum() / value.square().sum())
                for key, value in zip(found.keys, found.values, strict=True)
            ]
            found.interference.append(float(np.mean(errors)))
            found.reliability.append(evaluation.checkpoint(edits[:made]).scores["rel"])
    return found


@torch.no_grad()
def edit_keys(editor: MEMOIR, edit: EditRequest) -> tuple[Tensor, Tensor]:
    """An edit's masked keys (n × D) up to the last place that predicts its answer, and which of them predict (n,) bool.

    Nothing is written for it.
    """
    batch = editor.encode_edits([edit])
    a = input_of(editor.site, lambda: editor.model.forward(batch))
    counted = batch.counted[0]
    upto = int(counted.nonzero().max()) + 1
    mask = editor.memory.fingerprint(a, batch.prompt_mask)
    return (a[0, :upto] * mask[0]).to(editor.memory.weight), counted[:upto]


@dataclass(frozen=True)
class Response:
    """What share of answer tokens survives an error E = ‖o − v‖² / ‖v‖² of the kind that a write rule makes, in what
    the memory adds where they are predicted: errors (m,), rising from 0, and reliability (m,)."""

    write: str
    errors: np.ndarray
    reliability: np.ndarray

    def expected(self, errors: np.ndarray) -> float:
        """Mean reliability of edits with these errors."""
        return float(np.interp(errors, self.errors, self.reliability).mean())


@torch.no_grad()
def dose_response(
    editor: MEMOIR, edits: Sequence[EditRequest], found: Trial, levels: int = 11, seed: int = 0
) -> Response:
    """Spoil what a trial's edits added, the way that later edits do, and count the answer tokens that survive.

    An edit keeps a share a of itself, from 1 down to 0, and a random mixture of all edits' values comes on top. Its
    power is 1 − a for the oldest of edits written by themselves, where directions count alike, so E = (1 − a)(2 − a);
    and a (1 − a) in a least-squares solution, whose hat matrix is a projection, so E = 1 − a.
    """
    write = editor.config.write
    kept = np.linspace(1, 0, levels)
    power = 1 - kept if write == "sgd" else kept * (1 - kept)
    everything = torch.cat(found.values)
    typical = everything.square().sum(1).mean().sqrt()
    generator = torch.Generator().manual_seed(seed)
    hits = np.zeros((levels, len(edits)))
    for start in range(0, len(edits), 32):
        rows = range(start, min(start + 32, len(edits)))
        batch = editor.encode_edits([edits[i] for i in rows])
        counted, used = batch.counted, batch.leading
        values = torch.cat([found.values[i] for i in rows])
        mixing = torch.randn(len(values), len(everything), generator=generator).to(everything)
        noise = mixing @ everything / len(everything) ** 0.5 / typical * values.norm(dim=1, keepdim=True)
        with editor.memory.mute():
            tail = editor.model.tail(editor.site, batch)
            change = torch.zeros_like(tail.y, dtype=torch.float32)
            change[used] = torch.cat([found.reads[i] for i in rows]).to(change)
            for level in range(levels):
                change[counted] = (kept[level] * values + power[level] ** 0.5 * noise).to(change)
                right = tail.logits(change, tail.batch.counted_at).argmax(-1) == tail.batch.labels
                hits[level, rows] = tail.batch.row_means(right.float()).cpu().numpy()
    return Response(write, (1 - kept) ** 2 + power, hits.mean(1))


def plan(
    measured: Sequence[tuple[int, int, Spectrum]],
    checks: Sequence[dict[str, Any]],
    responses: Sequence[Response],
    *,
    D: int,
    k: int,
    tokens: float,
    ridge: float,
    edits: Sequence[int],
    worst_share: float,
) -> dict[str, dict[str, list[float]]]:
    """Reliability by write rule for numbers of edits at another size, with a band.

    Assumed: as many flat dimensions per column as measured; a shared direction that holds, of a key, what two random
    masks share, k/D, times what was measured for that; answers that bear the same relative error.

    measured     D, k and the spectrum of the keys there
    checks       rows with write, interference and interference_predicted
    responses    what answers bear, one per run
    tokens       answer tokens of an edit
    ridge        λ in units of a key's squared length
    worst_share  dimensions per column, × the least measured, at the band's lower edge

    The band reaches from that, the strongest shared direction, the largest measured ÷ predicted interference and the
    most delicate answers to the opposite of each.
    """
    dimensions = [spectrum.bulk / width for width, _, spectrum in measured]
    coherence = [spectrum.spike / spectrum.tokens / (mask / width) for width, mask, spectrum in measured]

    def spectrum(per_column: float, shared: float) -> Spectrum:
        return Spectrum(tokens=tokens, spike=tokens * min(1.0, shared * k / D), bulk=min(1.0, per_column) * D)

    expected = spectrum(float(np.mean(dimensions)), float(np.mean(coherence)))
    worst = spectrum(worst_share * min(dimensions), max(coherence))
    best = spectrum(max(dimensions), min(coherence))
    found = {}
    for write in dict.fromkeys(row["write"] for row in checks):
        # Where hardly anything is predicted, a ratio says nothing.
        ratios = [
            row["interference"] / row["interference_predicted"]
            for row in checks
            if row["write"] == write and row["interference_predicted"] > 1e-3
        ]
        cases = {
            "reliability": (expected, 1.0, np.mean),
            "low": (worst, max([1.0, *ratios]), np.min),
            "high": (best, min([1.0, *ratios]), np.max),
        }
        found[write] = {"T": [int(total) for total in edits]}
        curves = [response for response in responses if response.write == write]
        for name, (case, factor, over_runs) in cases.items():
            errors = predicted_error(write, case, edits, ridge)
            found[write][f"error_{name}"] = [float(factor * error.mean()) for error in errors]
            found[write][name] = [
                float(over_runs([curve.expected(factor * error) for curve in curves])) for error in errors
            ]
    return found


def narrowed(model: LanguageModel, layer: int, width: int) -> LanguageModel:
    """A copy of a model in which one block's MLP has only `width` inner neurons: those that write nothing go first.

    The model computes the same function. ValueError where that is not so, or where the MLP is not made of plain linear
    layers.
    """
    copied = LanguageModel(copy.deepcopy(model.network), model.tokenizer, model.name, chat=model.chat)
    site = copied.site(layer)
    full = site.in_features
    writes = site.weight.any(0)
    if not int(writes.sum()) <= width <= full:
        raise ValueError(f"width {width} of block {layer}, expected {int(writes.sum())} to {full}: all that write")
    keep = torch.argsort((~writes).int(), stable=True)[:width].sort().values
    for part in copied.network.get_submodule(site.name.rpartition(".")[0]).modules():
        if not isinstance(part, nn.Linear):
            continue
        for axis, name in ((0, "out_features"), (1, "in_features")):
            if part.weight.shape[axis] == full:
                part.weight = nn.Parameter(part.weight.index_select(axis, keep).contiguous(), requires_grad=False)
                setattr(part, name, width)
                if axis == 0 and part.bias is not None:
                    part.bias = nn.Parameter(part.bias[keep].contiguous(), requires_grad=False)
    if copied.site(layer).in_features != width:
        raise ValueError(f"the MLP of {model.family} is not made of plain linear layers of width {full}")
    return copied
