"""How many edits a residual memory holds, from the geometry of its keys.

Edit j owns the span of its masked keys at the positions where its answer is predicted: P_j (D × D) projects on it, p_j
is its dimension. Edits written by themselves ("sgd") are one sweep of Kaczmarz's method, W += (V_j − W K_j) K_j⁺: an
edit is exact when it is written, and every later edit replaces the share of the earlier keys that lies in its own
span. Edits written by recursive least squares ("rls") stay exact until the keys fill the memory. Both errors follow
from the eigenvalues of B = E[P_j] (`Spectrum`), which the keys of some fifty edits estimate without a single write;
`dose_response` measures on the model which error an answer bears.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from memoir.editors.residual import ResidualEditor
from memoir.evaluation import Evaluation
from memoir.models import LanguageModel
from memoir.records import EditRequest
from memoir.sites import input_of
from memoir.text import group_means

# Geometry ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of B = E[P_j], reduced to one direction that all edits share and a flat rest.

    tokens  p = tr B, keys of an edit where its answer is predicted
    spike   β_1, how much of itself an edit has in the shared direction, 0…1
    bulk    number of the other dimensions, each with eigenvalue (p − β_1) / bulk
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

        The moments are means over pairs and triples of different edits, which makes them unbiased for any number of
        edits. ValueError for fewer than three edits.
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

        def excess(spike: float) -> float:
            return spike**3 + (second - spike**2) ** 2 / (tokens - spike) - third

        if excess(0.0) >= 0:  # so few edits show no shared direction
            return cls(tokens=tokens, spike=0.0, bulk=tokens**2 / second)
        spike = root(excess, 0.0, min(second**0.5, tokens) * (1 - 1e-9))
        return cls(tokens=tokens, spike=spike, bulk=(tokens - spike) ** 2 / (second - spike**2))


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """The zero of a rising function that is negative at `low`, by bisection down to rounding."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low


def sgd_error(spectrum: Spectrum, edits: Sequence[int], ages: int = 33) -> list[np.ndarray]:
    """E‖W_T k_i − v_i‖² / ‖v_i‖² for edits spread evenly over the sequence, oldest first, for each number T of edits.

    With ω_l the energy of W in direction l, in units of an answer's, and w = β / p a key's share in it,
        dω_l/dt = β_l (1 + q − 2 ω_l),   q = Σ w_l ω_l,
    because an edit replaces the part of W in its span by its answer minus the output of the rest of W for its keys.
    Edit i keeps a_l = exp(−β_l (T − i)) of itself, ā = Σ w_l a_l in all, so its error is
        (1 − ā)² + q(T) − 2 ā Σ w_l a_l ω_l(i) + ā² q(i).
    """
    beta, weight = spectrum.values, spectrum.counts * spectrum.values / spectrum.tokens
    system = np.zeros((3, 3))  # of (ω_1, ω_2, 1), so that the equation is homogeneous: ω(t) = exp(system t) (0, 0, 1)
    system[:2, :2] = np.outer(beta, weight) - 2 * np.diag(beta)
    system[:2, 2] = beta
    errors = []
    for total in edits:
        made = np.linspace(0, total, ages)[:-1] + total / (ages - 1) / 2  # when these edits were written
        times = np.append(made, total)[:, None, None]
        energy = torch.linalg.matrix_exp(torch.from_numpy(system * times)).numpy()[:, :2, 2]
        written, final = energy[:-1], energy[-1]
        kept = np.exp(-beta * (total - made)[:, None])
        whole = kept @ weight
        error = (1 - whole) ** 2 + final @ weight
        errors.append(error - 2 * whole * ((kept * written) @ weight) + whole**2 * (written @ weight))
    return errors


def rls_error(spectrum: Spectrum, edits: Sequence[int], ridge: float) -> list[np.ndarray]:
    """The same error in the ridge solution over all keys, equal for all edits: one value for each number T of edits.

    The residual of n = T p random answers is λ² tr(K + λ)⁻² / n, K the keys' Gram matrix. For random keys with
    covariance eigenvalues μ (w, for keys of length 1), tr(K + λ)⁻¹ = 1 / κ where n = λ/κ + Σ μ / (μ + κ).

    ridge  λ in units of a key's squared length
    """
    beta, counts = spectrum.values / spectrum.tokens, spectrum.counts
    errors = []
    for total in edits:
        n = total * spectrum.tokens

        def missing(logarithm: float, n: float = n) -> float:
            kappa = np.exp(logarithm)
            return n - ridge / kappa - (counts * beta / (beta + kappa)).sum()

        kappa = np.exp(root(missing, np.log(ridge / n) - 1, np.log(ridge + 1) + 1))
        slope = kappa / (ridge + (counts * beta * (kappa / (beta + kappa)) ** 2).sum())
        errors.append(np.array([(ridge / kappa) ** 2 * slope / n]))
    return errors


def predicted_error(write: str, spectrum: Spectrum, edits: Sequence[int], ridge: float) -> list[np.ndarray]:
    """By write rule; ridge in units of a key's squared length, which only "rls" uses."""
    return sgd_error(spectrum, edits) if write == "sgd" else rls_error(spectrum, edits, ridge)


# What the model bears, and what really happens -----------------------------------------------------------------------


@dataclass
class Trial:
    """A sequence of edits, with what each of them wrote on its own keys.

    at             numbers of edits at which all edits so far were evaluated
    interference   at each, mean over edits of ‖W_T K_i − V_i‖² / ‖V_i‖²
    reliability    at each
    keys, values   of each edit, (p_i × D) and (p_i × d): K_i and V_i = W_i K_i just after it was written
    reads          of each edit, (n_i × d): the output of W_i at all positions up to the last that predicts its answer
    """

    at: list[int]
    interference: list[float] = field(default_factory=list)
    reliability: list[float] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)


def trial(
    editor: ResidualEditor, edits: Sequence[EditRequest], checkpoints: Iterable[int], *, progress: bool = True
) -> Trial:
    """Make edits with a fresh editor, and measure at every checkpoint what they have done to each other."""
    edits = [replace(edit, probes=()) for edit in edits]
    result = Trial(sorted({*checkpoints, len(edits)}))
    if result.at[0] < 1 or result.at[-1] > len(edits):
        raise ValueError(f"checkpoints {result.at} do not fit {len(edits)} edits, expected 1 to {len(edits)}")
    evaluation = Evaluation(editor, generate=False, texts=())
    for made, edit in enumerate(tqdm(edits, desc="trial", unit="edit", disable=not progress), 1):
        editor.edit(edit, check=False)
        weight = editor.memory.weight
        keys, counted = edit_keys(editor, edit)
        read = keys @ weight.T
        result.keys.append(keys[counted])
        result.values.append(read[counted])
        result.reads.append(read)
        if made in result.at:
            errors = [
                float((key @ weight.T - value).square().sum() / value.square().sum())
                for key, value in zip(result.keys, result.values, strict=True)
            ]
            result.interference.append(float(np.mean(errors)))
            result.reliability.append(evaluation.checkpoint(edits[:made]).scores["rel"])
    return result


@torch.no_grad()
def edit_keys(editor: ResidualEditor, edit: EditRequest) -> tuple[Tensor, Tensor]:
    """An edit's masked keys (n × D) up to the last position that predicts its answer, and which of the positions
    predict (n,) bool. Nothing is written."""
    editor.prepare()  # a fresh editor has not centred its features yet
    batch = editor.encode_edits([edit])
    a = input_of(editor.site, lambda: editor.model.forward(batch))
    counted = batch.counted[0]
    end = int(counted.nonzero().max()) + 1
    mask = editor.memory.fingerprint(a, batch.prompt_mask)
    return (a[0, :end] * mask[0]).to(editor.memory.weight), counted[:end]


@dataclass(frozen=True)
class Response:
    """What share of answer tokens survives an error E = ‖o − v‖² / ‖v‖² of the memory's output o, of the kind that a
    write rule makes: errors (m,), rising from 0, and reliability (m,)."""

    write: str
    errors: np.ndarray
    reliability: np.ndarray

    def expected(self, errors: np.ndarray) -> float:
        """Mean reliability of edits with these errors."""
        return float(np.interp(errors, self.errors, self.reliability).mean())


@torch.no_grad()
def dose_response(
    editor: ResidualEditor, edits: Sequence[EditRequest], made: Trial, levels: int = 11, seed: int = 0
) -> Response:
    """Spoil the outputs of a trial's edits the way later edits do, and count the answer tokens that survive.

    An edit keeps a share a of itself, from 1 down to 0, and a random mixture of all edits' values comes on top. The
    mixture's power is 1 − a for the oldest of edits written by themselves, where directions count alike, so that
    E = (1 − a)(2 − a); and a (1 − a) in a least-squares solution, whose hat matrix is a projection, so that E = 1 − a.
    """
    write = editor.write_rule
    kept = np.linspace(1, 0, levels)
    power = 1 - kept if write == "sgd" else kept * (1 - kept)
    everything = torch.cat(made.values)
    typical = everything.square().sum(1).mean().sqrt()
    generator = torch.Generator().manual_seed(seed)
    hits = np.zeros((levels, len(edits)))
    for start in range(0, len(edits), 32):
        rows = range(start, min(start + 32, len(edits)))
        batch = editor.encode_edits([edits[i] for i in rows])
        values = torch.cat([made.values[i] for i in rows])
        mixing = torch.randn(len(values), len(everything), generator=generator).to(everything)
        noise = mixing @ everything / len(everything) ** 0.5 / typical * values.norm(dim=1, keepdim=True)
        with editor.memory.mute():
            tail = editor.model.tail(editor.site, batch)
            answer = tail.batch.target_mask[tail.batch.learn_mask]  # the answer's own tokens, without a learned end
            change = torch.zeros_like(tail.y, dtype=torch.float32)
            change[batch.leading] = torch.cat([made.reads[i] for i in rows]).to(change)
            for level in range(levels):
                change[batch.counted] = (kept[level] * values + power[level] ** 0.5 * noise).to(change)
                right = tail.logits(change, tail.batch.counted_at).argmax(-1) == tail.batch.labels
                hits[level, rows] = group_means(right[answer].float(), tail.batch.label_rows[answer], len(batch)).cpu()
    return Response(write, (1 - kept) ** 2 + power, hits.mean(1))


# Another size --------------------------------------------------------------------------------------------------------


def plan(
    measured: Sequence[tuple[int, int, Spectrum]],
    checks: Sequence[Mapping[str, Any]],
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

    Assumptions: keys have as many flat dimensions per column as measured; the shared direction grows with k/D, the
    share of a key that two random masks have in common; answers bear the same relative error. The band's lower edge
    takes the fewest dimensions, the strongest shared direction, the largest measured ÷ predicted interference and the
    most delicate answers; its upper edge takes the opposite of each.

    measured     D, k and the spectrum of the keys there
    checks       rows with write, interference and interference_predicted
    responses    what answers bear, one per run
    tokens       answer tokens of an edit
    ridge        λ in units of a key's squared length
    worst_share  dimensions per column at the lower edge, × the fewest measured
    """
    dimensions = [spectrum.bulk / width for width, _, spectrum in measured]
    coherence = [spectrum.spike / spectrum.tokens / (mask / width) for width, mask, spectrum in measured]

    def spectrum(per_column: float, shared: float) -> Spectrum:
        return Spectrum(tokens=tokens, spike=tokens * min(1.0, shared * k / D), bulk=min(1.0, per_column) * D)

    expected = spectrum(float(np.mean(dimensions)), float(np.mean(coherence)))
    worst = spectrum(worst_share * min(dimensions), max(coherence))
    best = spectrum(max(dimensions), min(coherence))
    plans: dict[str, dict[str, list[float]]] = {}
    for write in dict.fromkeys(row["write"] for row in checks):
        # Where the predicted interference is almost 0, its ratio to the measured one means nothing.
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
        curves = [response for response in responses if response.write == write]
        plans[write] = {"T": [int(total) for total in edits]}
        for name, (case, factor, over_runs) in cases.items():
            errors = [factor * error for error in predicted_error(write, case, edits, ridge)]
            plans[write][f"error_{name}"] = [float(error.mean()) for error in errors]
            plans[write][name] = [float(over_runs([curve.expected(error) for curve in curves])) for error in errors]
    return plans


def sizes(model: LanguageModel, layer: int, k: int) -> list[tuple[int, int, str]]:
    """D, k and write rule of runs that tell what each of them does: the block as wide as it is, and as narrow as it can
    be without losing a neuron that writes; masks of k columns, and of a quarter of them."""
    site = model.site(layer)
    full, least, few = site.in_features, int(site.weight.any(0).sum()), max(1, k // 4)
    return list(dict.fromkeys([(least, few, "sgd"), (full, few, "sgd"), (full, k, "sgd"), (least, few, "rls")]))


def narrowed(model: LanguageModel, layer: int, width: int) -> LanguageModel:
    """A copy of a model in which one block's MLP has only `width` inner neurons; it computes the same function. The
    model itself, if it is as wide.

    Neurons without output weights are dropped first. ValueError if others would have to be dropped, or if the MLP is
    not made of plain linear layers.
    """
    if model.site(layer).in_features == width:
        return model
    with model.editor.detached() if model.editor is not None else contextlib.nullcontext():
        network = copy.deepcopy(model.network)
    narrow = LanguageModel(network, model.tokenizer, model.name, chat=model.chat)
    site = narrow.site(layer)
    full = site.in_features
    writes = site.weight.any(0)
    if not int(writes.sum()) <= width <= full:
        raise ValueError(f"width {width} of block {layer}, expected {int(writes.sum())} to {full}: all that write")
    keep = torch.argsort((~writes).int(), stable=True)[:width].sort().values
    for part in site.mlp.modules():
        if not isinstance(part, nn.Linear):
            continue
        for axis, name in ((0, "out_features"), (1, "in_features")):
            if part.weight.shape[axis] == full:
                part.weight = nn.Parameter(part.weight.index_select(axis, keep).contiguous(), requires_grad=False)
                setattr(part, name, width)
                if axis == 0 and part.bias is not None:
                    part.bias = nn.Parameter(part.bias[keep].contiguous(), requires_grad=False)
    if narrow.site(layer).in_features != width:
        raise ValueError(f"the MLP of {model.family} is not made of plain linear layers of width {full}")
    return narrow


def meaning(
    checks: Sequence[Mapping[str, Any]], plans: Mapping[str, Mapping[str, Any]], size: str, level: float = 0.9
) -> str:
    """One claim on the checked predictions, and one on the plan for another size."""
    gap = max(abs(row["reliability"] - row["reliability_predicted"]) for row in checks)
    expected = [f"{_reach(curves, 'reliability', level)} edits with {write}" for write, curves in plans.items()]
    lowest = dict.fromkeys(_reach(curves, "low", level) for curves in plans.values())
    return (
        f"The keys alone predict the reliability of every run to within {max(gap, 0.001):.3f}. At {size} one page is "
        f"expected to keep reliability above {level:g} for {' and '.join(expected)}. This is an extrapolation: the "
        f"lower edge of its error band allows for {' and '.join(lowest)} only."
    )


def _reach(curves: Mapping[str, Any], name: str, level: float) -> str:
    """Up to how many edits a curve of the plan stays above a level."""
    good = [total for total, value in zip(curves["T"], curves[name], strict=True) if value >= level]
    if not good:
        return f"fewer than {curves['T'][0]:,}"
    return f"more than {good[-1]:,}" if good[-1] == curves["T"][-1] else f"about {good[-1]:,}"
