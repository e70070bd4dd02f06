"""Where a run's numbers come from: code, versions, machine, settings and protocol."""

from __future__ import annotations

import datetime
import platform
import resource
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from memoir.editors.base import Editor
from memoir.metrics import PROTOCOL
from memoir.records import RunInfo


def run_info(editor: Editor, dataset: str, edits: int, eval_batch_size: int, started: str | None = None) -> RunInfo:
    """Everything needed to compute a run's numbers again; `started` defaults to now."""
    return RunInfo(
        method=editor.name,
        model=editor.model.name,
        model_fingerprint=editor.model.fingerprint,
        dataset=dataset,
        edits=edits,
        seed=editor.config.seed,
        dtype=editor.model.dtype_name,
        device=str(editor.model.device),
        config=asdict(editor.config),
        protocol={**PROTOCOL, "eval_batch_size": eval_batch_size, "edit_batch_size": editor.config.batch_size},
        **software(),
        started=started or now(),
        weights=editor.model.weights,
    )


def software() -> dict[str, Any]:
    """The code and what it runs on: commit, dirty, versions."""
    commit, dirty = _commit()
    versions = {name: _version(name) for name in ("memoir", "torch", "transformers", "numpy")}
    return {"commit": commit, "dirty": dirty, "versions": {"python": platform.python_version()} | versions}


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def peak_bytes() -> int:
    """Most memory in use so far: on the GPU where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str | None:
    """The version of a package; None if its metadata are missing, as memoir's own are in a source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this code and whether the code was changed since; None outside a checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        return None, None
