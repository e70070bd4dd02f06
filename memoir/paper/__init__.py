"""The numbers that the MEMOIR paper reports, as data: Wang, Qin, Dimitriadis, Favero, Frossard, "MEMOIR: Lifelong
Model Editing with Minimal Overwrite and Informed Retention for LLMs", NeurIPS 2025.

table1.csv    Table 1: ZsRE, eight methods on two models; rel, gen, loc and avg from 0 to 1 after T edits
table2.csv    Table 2: SelfCheckGPT; perplexity of the corrected sentences, and locality; empty where the paper has none
curves.csv    the curves to T = 3000, read off the figures of the public project page, accurate to about 0.01
overlap.csv   ranges of the overlap ratio R_match, read off figures of the same page
ablation.csv  MEMOIR without its parts, ZsRE, T = 1000, LLaMA-3-8B: from a second-hand summary, to be treated with care
seconds.csv   seconds per edit on an A100: from a second-hand summary, to be treated with care
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import pandas as pd

MODELS = ("LLaMA-3-8B", "Mistral-7B")


def read(name: str) -> list[dict[str, Any]]:
    """The rows of one of the files above, e.g. `read("table1")`; None where the paper has no number."""
    with files(__name__).joinpath(f"{name}.csv").open(encoding="utf-8") as lines:
        frame = pd.read_csv(lines)
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
