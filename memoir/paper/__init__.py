"""What the MEMOIR paper reports, as data: Wang, Qin, Dimitriadis, Favero, Frossard, "MEMOIR: Lifelong Model Editing
with Minimal Overwrite and Informed Retention for LLMs", NeurIPS 2025.

table1.csv    Table 1: ZsRE, eight methods on two models; rel, gen, loc, avg in 0…1 after T edits
table2.csv    Table 2: SelfCheckGPT; perplexity of the corrected sentences and locality, empty where the paper has none
curves.csv    the curves to T = 3000, read off the figures of the public project page: to about 0.01
overlap.csv   ranges of the overlap ratio R_match, read off the same page's figures
ablation.csv  MEMOIR without its parts, ZsRE, T = 1000, LLaMA-3-8B: a second-hand summary, to be treated with care
seconds.csv   seconds per edit on an A100: a second-hand summary, to be treated with care
"""

from __future__ import annotations

import csv
from importlib.resources import files
from typing import Any

MODELS = ("LLaMA-3-8B", "Mistral-7B")


def read(name: str) -> list[dict[str, Any]]:
    """The rows of one of the files above, e.g. `read("table1")`; numbers as numbers, None where the paper has none."""
    with files(__name__).joinpath(f"{name}.csv").open(encoding="utf-8", newline="") as lines:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(lines)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
