"""What only shows at a thousand edits: forgetting takes back exactly what was asked, and nothing else."""

from __future__ import annotations

import random

import pytest
import torch

import memoir as mm
from memoir.text import predicting

pytestmark = pytest.mark.slow


@torch.no_grad()
def answers(model, edits) -> list[list[int]]:
    """The argmax at each target token, teacher-forced, edit by edit."""
    found = []
    for start in range(0, len(edits), 50):
        part = edits[start : start + 50]
        batch = model.encode([edit.prompt for edit in part], [edit.target for edit in part])
        predicted = model.forward(batch).argmax(-1)
        found += [row[mask].tolist() for row, mask in zip(predicted, predicting(batch.target_mask), strict=True)]
    return found


def share(found: list[list[int]], expected: list[list[int]]) -> float:
    pairs = [(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def test_forgetting_a_hundred_of_a_thousand_edits():
    """With rls. With sgd an edit is learned on top of what earlier ones leave at its key: without them it moves."""
    model = mm.load_model("almanac")
    edits = list(mm.load_edits("almanac-qa", n=1000, seed=0))
    gone = set(random.Random(0).sample(range(1000), 100))
    before = answers(model, edits)
    editor = mm.make_editor("memoir", model, dataset="almanac-qa", write="rls")
    editor.edit(edits)
    edited = answers(model, edits)
    # An edit that another one replaced as its conflict is gone already.
    for i in sorted(gone):
        if edits[i].id in editor.edits:
            editor.forget(edits[i].id)
    after = answers(model, edits)

    def pick(found, wanted):
        return [row for i, row in enumerate(found) if (i in gone) == wanted]

    assert share(pick(after, True), pick(before, True)) >= 0.99
    assert share(pick(after, False), pick(edited, False)) >= 0.999
