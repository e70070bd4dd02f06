"""Whatever one does with a memory, in whatever order, it is what a dense model of it says (hypothesis).

The dense model keeps of each edit its term (d × D), `sgd`, or its page, keys and values, `rls`, and its mask as bits.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from families import small_model
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from memoir.editors import load_editor, make_editor
from memoir.records import EditRequest
from memoir.sites import watching

PROMPTS = ("The tower of Ostrava stands in", "Ida Verne plays the", "Zinc is written", "Rome lies on the")
TARGETS = ("Brno", "oboe")
TAU = 0.9
FILL = 0.15  # of the columns: two or three edits on a page
FORMS = {
    "sgd": dict(iterations=4, step_rule="constant", learning_rate=5.0, weight_decay=0.0),
    "rls": dict(value_steps=4, value_rate=0.5, ridge=1e-2, fill=FILL),
}
MODEL = small_model("llama")


@torch.no_grad()
def logits(prompts=PROMPTS) -> torch.Tensor:
    return torch.stack([MODEL.forward(MODEL.encode([prompt]))[0, -1] for prompt in prompts])


UNEDITED = logits()
MASKS: dict[str, torch.Tensor] = {}


class History(RuleBasedStateMachine):
    """Edits, forgets, replaces, saves, loads and detaches at random."""

    write: str

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())

    def teardown(self):
        self.editor.detach()
        shutil.rmtree(self.folder)

    @initialize()
    def begin(self):
        # No decay here: an edit's term then stands as it was written.
        self.editor = make_editor(
            "memoir",
            MODEL,
            feature="last",
            tau=TAU,
            k=16,
            prefixes=0,
            write=self.write,
            same_question=TAU,
            **FORMS[self.write],
        )
        self.terms: dict[str, object] = {}
        self.masks: dict[str, torch.Tensor] = {}
        self.requests: dict[str, EditRequest] = {}
        self.saved: tuple | None = None

    @property
    def weight(self) -> torch.Tensor:
        """(pages × d × D)"""
        return torch.stack(self.editor.memory.pages).double()

    def mask(self, prompt: str) -> torch.Tensor:
        """TopHash of a prompt, by sorting; the permutation is that of the seed."""
        if prompt in MASKS:
            return MASKS[prompt]
        with self.editor.detached(), watching(self.editor.site) as seen, torch.no_grad():
            MODEL.forward(MODEL.encode([prompt]))
        size = seen[0][0][0, -1].abs().tolist()
        order = sorted(range(len(size)), key=lambda j: -size[j])
        mask = torch.zeros(len(size), dtype=torch.bool)
        mask[self.editor.memory.permutation[order[:16]]] = True
        MASKS[prompt] = mask
        return mask

    @rule(prompt=st.sampled_from(PROMPTS), answer=st.sampled_from(TARGETS))
    def edit(self, prompt, answer):
        request, mask, before = EditRequest(prompt=prompt, target=answer), self.mask(prompt), self.weight
        expected = {
            other
            for other, stored in self.masks.items()
            if int((stored & mask).sum()) >= TAU * 16 and (self.requests[other].target != answer or other == request.id)
        }
        (report,) = self.editor.edit(request)
        assert set(report.replaced) == expected
        for other in expected:
            if self.write == "sgd":
                before = before - self.terms[other]
            del self.terms[other], self.masks[other], self.requests[other]
        factors = self.editor.factors[request.id]
        if self.write == "sgd":
            self.terms[request.id] = self.weight - before
        else:
            page = self.editor.memory.page_of[request.id]
            assert page in (len(before) - 1, len(before)), "the last page, or a further one"
            pairs = self.spread(mask, factors.keys), factors.values.double()
            held = sum(len(keys) for at, keys, _ in self.terms.values() if at == page)
            assert held < FILL * len(mask), "a full page is left alone"
            self.terms[request.id] = (page, *pairs)
        self.masks[request.id], self.requests[request.id] = mask, request

    @staticmethod
    def spread(mask, keys):
        wide = torch.zeros(len(keys), len(mask), dtype=torch.float64)
        wide[:, mask] = keys.double()
        return wide

    @precondition(lambda self: self.terms)
    @rule(data=st.data())
    def forget(self, data):
        edit_id = data.draw(st.sampled_from(sorted(self.terms)))
        self.editor.forget(edit_id)
        del self.terms[edit_id], self.masks[edit_id], self.requests[edit_id]

    @rule()
    def save(self):
        self.editor.save(self.folder / "memory")
        self.saved = (dict(self.terms), dict(self.masks), dict(self.requests), logits())

    @precondition(lambda self: self.saved)
    @rule()
    def load(self):
        self.editor.detach()
        self.editor = load_editor(self.folder / "memory", MODEL)
        self.terms, self.masks, self.requests, expected = (x if torch.is_tensor(x) else dict(x) for x in self.saved)
        assert torch.equal(logits(), expected)

    @rule()
    def detach_and_attach(self):
        before = logits()
        self.editor.detach()
        assert torch.equal(logits(), UNEDITED)
        self.editor.attach()
        assert torch.equal(logits(), before)

    @invariant()
    def it_holds_what_was_not_taken_out(self):
        if not hasattr(self, "editor"):
            return
        assert {i: e.target for i, e in self.editor.edits.items()} == {i: e.target for i, e in self.requests.items()}
        bank = self.editor.memory.bank
        assert set(bank.ids) == set(self.masks)
        for edit_id, mask in zip(bank.ids, bank.masks(np.arange(len(bank))), strict=True):
            assert torch.equal(mask, self.masks[edit_id])

    @invariant()
    def the_memory_is_the_dense_models(self):
        if not hasattr(self, "editor"):
            return
        if self.write == "sgd":
            dense = sum(self.terms.values(), torch.zeros_like(self.weight))
        else:
            dense = torch.stack([self.ridge_solution(page) for page in range(len(self.editor.memory.pages))])
        torch.testing.assert_close(self.weight, dense, rtol=1e-5, atol=1e-5 * max(1.0, float(dense.abs().max())))

    def ridge_solution(self, page):
        pairs = [pair for at, *pair in self.terms.values() if at == page]
        if not pairs:
            return torch.zeros_like(self.weight[page])
        K, V = map(torch.cat, zip(*pairs, strict=True))
        return torch.linalg.solve(K.T @ K + self.editor.ridge * torch.eye(K.shape[1], dtype=K.dtype), K.T @ V).T

    @invariant()
    def prompts_read_what_overlaps(self):
        if not hasattr(self, "editor"):
            return
        for prompt in PROMPTS:
            mask, explained = self.mask(prompt), self.editor.explain(prompt)
            overlaps = {edit_id: int((stored & mask).sum()) / 16 for edit_id, stored in self.masks.items()}
            best = max(overlaps.values(), default=None)
            assert explained.score == best and explained.fired == (best is not None and best >= TAU)
            assert best is None or overlaps[explained.edit_id] == best


def check(write: str):
    run_state_machine_as_test(
        type("History", (History,), {"write": write}),
        settings=settings(
            max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_any_history_of_an_sgd_memory():
    check("sgd")


def test_any_history_of_an_rls_memory():
    check("rls")
