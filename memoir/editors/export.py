"""An edited model as a plain transformers checkpoint: W0 + ΔW in place of W0, for methods whose change is ΔW."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from memoir.sites import DeltaWeight, Site


class ExportError(ValueError):
    """What an editor adds to its model does not fold into plain weights."""


@dataclass(frozen=True)
class Exported:
    """A checkpoint that was written.

    folder    where `from_pretrained` of transformers loads it, the tokenizer included
    dtype     of its weights, the model's own
    edits     how many it holds
    rounding  ‖W − (W0 + ΔW)‖ / ‖ΔW‖ over the edited weights W: 0 where all of the change was kept, about 1 where
              `dtype` is too coarse for it
    """

    folder: Path
    dtype: str
    edits: int
    rounding: float


def export(editor: Any, folder: str | os.PathLike) -> Exported:
    """Write a new folder, whole or not at all. ExportError where the editor's change cannot be folded in;
    FileExistsError where the folder holds anything."""
    for site, patch in _foldable(editor).items():
        _check_weight(site, patch)
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already, expected a new or empty folder")
    network, lost, change = editor.model.network, 0.0, 0.0
    weights = network.state_dict()
    for site, patch in editor.patches.items():
        exact = site.weight.double() + patch.delta.to(site.weight.device).double()
        folded = exact.to(site.weight.dtype)
        lost += float((folded.double() - exact).square().sum())
        change += float(patch.delta.double().square().sum())
        weights[f"{site.name}.weight"] = (folded.T if isinstance(site.module, Conv1D) else folded).contiguous()
    _write(editor.model, weights, folder)
    return Exported(folder, editor.model.dtype_name, len(editor.edits), (lost / change) ** 0.5 if change else 0.0)


def _foldable(editor: Any) -> dict[Site, DeltaWeight]:
    if editor.patches and all(isinstance(patch, DeltaWeight) for patch in editor.patches.values()):
        return editor.patches
    if editor.changes_model:
        why = f"{editor.label} decides for each prompt what it adds to the model, which no plain weights can do"
    else:
        why = f"{editor.label} changes no weights"
    raise ExportError(
        f"{why}; keep its memory instead: editor.save(folder), and later mm.load_editor(folder, model) on this model"
    )


def _check_weight(site: Site, patch: DeltaWeight) -> None:
    if has_offloaded_params(site.module):
        raise ExportError(f"the weight of {site.name} is offloaded; load the model whole, with device_map='cpu'")
    weight = site.weight
    if not weight.is_floating_point() or weight.shape != patch.delta.shape:
        raise ExportError(
            f"the weight of {site.name} is quantised ({weight.dtype}), and ΔW would be lost in it; load the model in "
            "bfloat16 or float32, and the memory with allow_dtype=True"
        )


def _write(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a process that was killed
    config = model.network.config
    model.network.config = copy.deepcopy(config)  # saving writes into it, and it is part of the model's fingerprint
    try:
        with torch.no_grad():
            model.network.save_pretrained(new, state_dict=weights)
        model.tokenizer.save_pretrained(new)
        if folder.exists():
            folder.rmdir()
        new.rename(folder)
    finally:
        model.network.config = config
        shutil.rmtree(new, ignore_errors=True)
