"""Which value for which model: (method, model) → settings, each row with its source; what a data set wants otherwise,
(method, model, data set) → settings.

A model is recognised by its shape, so that a local folder of any name finds its row. A model without a row gets the
method's settings for an unknown model, with layers placed at the same relative depth.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from memoir.models import LanguageModel
from memoir.records import read_json


@dataclass(frozen=True)
class Shape:
    """What tells one published model from another: family, blocks, d, D and vocabulary."""

    family: str
    blocks: int
    d: int
    D: int
    vocabulary: int


SHAPES = {
    "almanac": Shape("llama", 4, 128, 4096, 3072),
    "llama-3-8b": Shape("llama", 32, 4096, 14336, 128256),
    "llama-2-7b": Shape("llama", 32, 4096, 11008, 32000),
    "mistral-7b": Shape("mistral", 32, 4096, 14336, 32000),
    "gpt-j-6b": Shape("gptj", 28, 4096, 16384, 50400),
}

_ALMANAC_VALUES = dict(where="target", kl_factor=0.0, value_decay=0.0, moments="almanac", moment_samples=2000)

PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    # Chosen on the 200 validation edits: a close stop, which SGD without copies of the prompt reaches in few steps.
    ("memoir", "almanac"): dict(
        layer=2, k=1024, tau=0.6, feature="last", learning_rate=3.0, stop_loss=0.003, prefixes=0
    ),
    # MEMOIR, section 4.1 and appendix: block 27, k = 4096, rate 1, τ = 0.4 on ZsRE.
    ("memoir", "llama-3-8b"): dict(layer=27, k=4096),
    ("memoir", "llama-2-7b"): dict(layer=27, k=4096),
    ("memoir", "mistral-7b"): dict(layer=27, k=4096),
    ("memoir", "gpt-j-6b"): dict(layer=21, k=4096),
    # In-context retrieval: where MEMOIR takes its masks, so that both retrieve alike.
    ("incontext", "almanac"): dict(layer=2, k=1024, tau=0.6),
    ("ft", "almanac"): dict(layer=2, learning_rate=1e-3),
    # EasyEdit, hparams/FT/*.yaml: block 21, 25 steps of Adam at 5e-4, no norm constraint.
    ("ft", "llama-3-8b"): dict(layer=21),
    ("ft", "llama-2-7b"): dict(layer=21),
    ("ft", "mistral-7b"): dict(layer=21),
    ("ft", "gpt-j-6b"): dict(layer=21),
    # Causal tracing finds the almanac's recall at the token that predicts, not at the subject: its blocks restore the
    # answer at the last token (0.9) and nowhere else. So each target token is edited where it is predicted; the KL term
    # on "{subject} is a", which speaks of the subject's token, is off, and λ is small as the model is.
    ("rome", "almanac"): dict(layer=2, prefixes=0, **_ALMANAC_VALUES),
    ("memit", "almanac"): dict(layers=(1, 2), prefixes=0, moment_weight=1.0, clamp=4.0, **_ALMANAC_VALUES),
    ("alphaedit", "almanac"): dict(layers=(1, 2), prefixes=0, ridge=1.0, clamp=4.0, **_ALMANAC_VALUES),
    # EasyEdit, hparams/ROME/*.yaml: block 5 and 25 steps; C is used, as the paper does. GPT-J: the authors' own.
    ("rome", "llama-3-8b"): dict(layer=5, value_decay=1e-3),
    ("rome", "llama-2-7b"): dict(layer=5, value_decay=1e-3),
    ("rome", "mistral-7b"): dict(layer=5, value_decay=1e-3),
    ("rome", "gpt-j-6b"): dict(layer=5, value_steps=20),
    # LLaMA-3: AlphaEdit's hparams/MEMIT; LLaMA-2, Mistral: EasyEdit's; GPT-J: the authors' own.
    ("memit", "llama-3-8b"): dict(layers=(4, 5, 6, 7, 8), value_rate=0.1),
    ("memit", "llama-2-7b"): dict(layers=(4, 5, 6, 7, 8), value_decay=1e-3, clamp=4.0),
    ("memit", "mistral-7b"): dict(layers=(4, 5, 6, 7, 8), value_decay=1e-3, clamp=4.0),
    ("memit", "gpt-j-6b"): dict(layers=(3, 4, 5, 6, 7, 8)),
    # The authors' hparams/AlphaEdit; for LLaMA-2 and Mistral nothing is published, so they take LLaMA-3's.
    ("alphaedit", "llama-3-8b"): dict(layers=(4, 5, 6, 7, 8), value_rate=0.1),
    ("alphaedit", "llama-2-7b"): dict(layers=(4, 5, 6, 7, 8), value_rate=0.1),
    ("alphaedit", "mistral-7b"): dict(layers=(4, 5, 6, 7, 8), value_rate=0.1),
    ("alphaedit", "gpt-j-6b"): dict(layers=(3, 4, 5, 6, 7, 8)),
    # On the almanac's validation edits another wording of a question lies some 11 from its key in block 3, any other
    # question 22 or more; at the published ε_init = 1 no other wording is reached. The value replaces the answer's
    # outputs too: targets have two tokens, and there is no block left to carry the first one's value to the second.
    ("grace", "almanac"): dict(
        layer=3,
        radius=17.0,
        replace="onward",
        value_init="warm",
        step_rule="relative",
        learning_rate=0.25,
        stop_loss=0.05,
    ),
    ("defer", "almanac"): dict(layer=2, learning_rate=3e-4),
    # Margins as multiples of the output's size, ‖W_v a‖ ≈ 6 here, in about the published proportions: at 5, 20 and 10
    # an edit would have to move the output by three times its own length.
    ("wise", "almanac"): dict(
        layer=2,
        prefixes=2,
        margin_unit="output",
        alpha=0.4,
        beta=1.5,
        gamma=0.8,
        step_rule="relative",
        learning_rate=0.1,
    ),
    # WISE, appendix A.3: block 27 of LLaMA and Mistral, 21 of GPT-J for all methods without a layer of their own; GRACE
    # with rate 1, ε_init 1 and the last token replaced; DEFER with Adam at 7e-5, the best of 7e-5, 7e-4, 1e-3.
    ("grace", "llama-3-8b"): dict(layer=27),
    ("grace", "llama-2-7b"): dict(layer=27),
    ("grace", "mistral-7b"): dict(layer=27),
    ("grace", "gpt-j-6b"): dict(layer=21),
    ("defer", "llama-3-8b"): dict(layer=27),
    ("defer", "llama-2-7b"): dict(layer=27),
    ("defer", "mistral-7b"): dict(layer=27),
    ("defer", "gpt-j-6b"): dict(layer=21),
    # WISE, table 10; EasyEdit, hparams/WISE/*.yaml: 70 steps, and for GPT-J margins 15, 40, 20.
    ("wise", "llama-3-8b"): dict(layer=27),
    ("wise", "llama-2-7b"): dict(layer=27),
    ("wise", "mistral-7b"): dict(layer=27),
    ("wise", "gpt-j-6b"): dict(layer=21, alpha=15.0, beta=40.0, gamma=20.0),
}

DATASET_PRESETS: dict[tuple[str, str, str], dict[str, Any]] = {
    # Chosen on the 200 validation edits: passages of one style are more alike than questions, and their sentences are
    # learned as well, in a third of the time, where no block lies behind the memory.
    ("memoir", "almanac", "almanac-bio"): dict(layer=3, tau=0.9, stop_loss=0.01),
    ("memoir", "almanac", "selfcheckgpt"): dict(layer=3, tau=0.9, stop_loss=0.01),
    # On passages the published gate of DEFER never opens: it starts shut, and no gradient passes it.
    ("defer", "almanac", "almanac-bio"): dict(layer=3, scope_loss=1.0),
    ("wise", "almanac", "almanac-bio"): dict(layer=3, prefixes=0),
    # MEMOIR, section 4.1: τ = 0.9 on SelfCheckGPT.
    ("memoir", "llama-3-8b", "selfcheckgpt"): dict(tau=0.9),
    ("memoir", "llama-2-7b", "selfcheckgpt"): dict(tau=0.9),
    ("memoir", "mistral-7b", "selfcheckgpt"): dict(tau=0.9),
    ("memoir", "gpt-j-6b", "selfcheckgpt"): dict(tau=0.9),
}


def known_model(model: LanguageModel) -> str | None:
    """The name in `SHAPES` that a model's shape answers to, or None."""
    site = model.site(0)
    rows = model.network.get_input_embeddings().weight.shape[0]
    shape = Shape(model.family, len(model.blocks), site.out_features, site.in_features, rows)
    return next((name for name, known in SHAPES.items() if known == shape), None)


def preset(editor: Any, model: LanguageModel, dataset: str | None = None) -> dict[str, Any]:
    """The settings of a method (an `Editor` class) for a model and a data set: the model's row, or the method's
    defaults for a model without one. Of another method's row only the settings that this method has."""
    method, known = editor.presets_of or editor.name, known_model(model) or ""
    row = PRESETS.get((method, known))
    settings = {**((editor.defaults(model) or unknown_model(method, model)) if row is None else row), **DATASET_PRESETS.get((method, known, dataset), {})}
    return {name: value for name, value in settings.items() if name in {f.name for f in fields(editor.Config)}}


def unknown_model(method: str, model: LanguageModel) -> dict[str, Any]:
    """Settings for a model without a row: the paper's layers and widths at the same relative depth and share."""
    blocks, width = len(model.blocks), model.site(0).in_features
    late = max(0, min(round(27 / 32 * (blocks - 1)), blocks - 2))
    early = tuple(range(blocks * 4 // 32, blocks * 8 // 32 + 1))
    return {
        "memoir": dict(layer=round(27 / 32 * (blocks - 1)), k=max(1, width * 2 // 7)),
        "incontext": dict(layer=round(27 / 32 * (blocks - 1)), k=max(1, width * 2 // 7)),
        "ft": dict(layer=round(21 / 32 * (blocks - 1))),
        "rome": dict(layer=round(5 / 32 * (blocks - 1))),
        "memit": dict(layers=early),
        "alphaedit": dict(layers=early),
        # GRACE replaces the last prompt token's output: later answer tokens see that only through a block behind it.
        "grace": dict(layer=late, value_init="warm", step_rule="relative", learning_rate=0.5),
        # Of itself a gate that starts shut may stay shut: no gradient passes it.
        "defer": dict(layer=late, learning_rate=1e-2, scope_loss=1.0),
        # Margins as multiples of the output's own size, in the published proportions.
        "wise": dict(
            layer=late, margin_unit="output", alpha=0.25, beta=1.0, gamma=0.5, step_rule="relative", learning_rate=0.1
        ),
    }.get(method, {})


def chosen_tau(request: str, model: LanguageModel, settings: Mapping[str, Any]) -> float:
    """τ as `overlap.ipynb` picked it on validation prompts for this model and these settings (layer, k and feature).

    request  "auto", or "auto:<data set>" where choices for several data sets fit
    The choices lie in the reports folder, `overlap/tau--<model>--<data set>.json`: in $MEMOIR_REPORTS, else ./reports.
    FileNotFoundError where there is none, ValueError where none fits, or several do.
    """
    kind, _, dataset = request.partition(":")
    if kind != "auto":
        raise ValueError(f"tau = {request!r}, expected a number, 'auto' or 'auto:<data set>'")
    folder = Path(os.environ.get("MEMOIR_REPORTS", "reports")) / "overlap"
    pattern = f"tau--{model.name}--{dataset or '*'}.json"
    remedy = "`python -m memoir report --only overlap` makes one (MEMOIR_REPORTS names another reports folder)"
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"tau = {request!r}, but there is no {folder / pattern}; {remedy}")
    expected = {name: settings.get(name) for name in ("layer", "k", "feature")}
    if model.device.type != "meta":  # an outline without weights cannot be told from another
        expected["model_fingerprint"] = model.fingerprint
    fitting, reasons = {}, []
    for path in paths:
        choice = read_json(path)
        other = [
            f"{name} {str(choice.get(name))[:12]}, not {str(value)[:12]}"
            for name, value in expected.items()
            if choice.get(name) != value
        ]
        if other:
            reasons.append(f"{path} is for {', '.join(other)}")
        else:
            fitting[choice["dataset"]] = float(choice["tau"])
    if not fitting:
        raise ValueError(f"tau = {request!r}, but {'; '.join(reasons)}; {remedy}")
    if len(fitting) > 1:
        names = " or ".join(f"'auto:{name}'" for name in fitting)
        raise ValueError(f"tau = 'auto' fits choices for {len(fitting)} data sets, expected {names}")
    return next(iter(fitting.values()))
