"""GRACE: "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors" (Hartvigsen, Sankaranarayanan,
Palangi, Kim, Ghassemi, NeurIPS 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memoir.editors.base import Editor, EditorConfig, Written, target_losses
from memoir.memory import pool_prompt
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, Span, Tail, input_of

REPLACEMENTS = ("last", "prompt", "onward")
VALUE_INITS = ("cold", "warm")

# Up to this share of its own norm, a key is the same key: float32 gives no more when a prompt comes in another batch.
ROUNDING = 1e-5


@dataclass
class Codebook:
    """C = {(k, v, ε, y)}: keys with their values, radii and labels (GRACE, section 3.1 and Algorithm 1).

    keys    (n × D) float32, the projection's input at the last prompt token
    values  (n × d) float32, what the projection puts out instead
    radii   (n,) float32, ε: how far from its key an entry answers, in the keys' own units
    labels  the targets' tokens; two labels are equal where all their tokens are
    ids     the edits that the entries stand for
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: list[tuple[int, ...]]
    ids: list[str]

    @classmethod
    def empty(cls, site: Site) -> Codebook:
        device = site.device
        widths = (site.in_features, site.out_features)
        keys, values = (torch.zeros(0, width, device=device) for width in widths)
        return cls(keys, values, torch.zeros(0, device=device), [], [])

    def __len__(self) -> int:
        return len(self.ids)

    def copy(self) -> Codebook:
        """One to go on with: `add` leaves this one as it is."""
        return Codebook(self.keys, self.values.clone(), self.radii.clone(), list(self.labels), list(self.ids))

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """For each query (B × D): its nearest entry (B,) int64 and the Euclidean distance to it (B,)."""
        # Without the detour over a matrix product, which loses small distances to cancellation.
        found = torch.cdist(queries, self.keys, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        return found.indices, found.values

    def answers(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """For each query (B × D): its nearest entry's value (B × d), and whether it is within its radius (B,) bool."""
        if not len(self):
            return self.values.new_zeros(len(queries), self.values.shape[1]), queries.new_zeros(len(queries)).bool()
        rows, distances = self.nearest(queries)
        return self.values[rows], distances <= self.radii[rows] + ROUNDING * queries.norm(dim=1)

    def add(self, key: Tensor, value: Tensor, label: tuple[int, ...], edit_id: str, radius: float) -> tuple[int, str]:
        """Algorithm 1 for one edit: key (D,), value (d,) in case the entry is new, its label and ε_init.

        - Far from all entries (d > ε_i + ε_init), or the first of all: a new entry with radius ε_init.
        - Near one with the same label: that one expands, ε_i = max(ε_i, d).
        - Near one with another label: a new entry, and both get radius d / 2.
        - At the very key of one with another label, where the algorithm would leave two entries that nothing reaches:
          the new edit takes the entry over.
        Returns the entry's row, and the id of the edit that it took over from, or "".
        """
        if len(self):
            rows, distances = self.nearest(key[None])
            row, distance = int(rows), float(distances)
            if distance <= float(self.radii[row]) + radius:
                if self.labels[row] == label:
                    self.radii[row] = max(distance, float(self.radii[row]))
                    return row, ""
                if distance <= ROUNDING * float(key.norm()):
                    replaced = self.ids[row]
                    self.values[row], self.radii[row], self.labels[row], self.ids[row] = value, radius, label, edit_id
                    return row, replaced
                self.radii[row] = radius = distance / 2
        self.keys, self.values = torch.cat([self.keys, key[None]]), torch.cat([self.values, value[None]])
        self.radii = torch.cat([self.radii, self.radii.new_tensor([radius])])
        self.labels.append(label)
        self.ids.append(edit_id)
        return len(self) - 1, ""


class CodebookPatch:
    """y' = v of the nearest entry where the prompt lies within its radius, else y (GRACE, equation 1).

    The decision is taken on the last prompt token and stands for the whole sequence.
    """

    def __init__(self, site: Site, replace: str):
        self.codebook, self.replace = Codebook.empty(site), replace

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if span.decoding:
            if self not in span.memo or self.replace != "onward":
                return y
            values, fired = span.memo[self]
            where = fired[:, None]
        else:
            if not len(self.codebook):
                return y
            queries = pool_prompt(a, span.prompt.to(a.device), "last").to(self.codebook.keys)
            values, fired = span.memo[self] = tuple(x.to(y.device) for x in self.codebook.answers(queries))
            where = fired[:, None] & replaced_places(span.prompt, self.replace).to(y.device)
        return torch.where(where[..., None], values[:, None].to(y.dtype), y)


def replaced_places(prompt: Tensor, replace: str) -> Tensor:
    """(B × T) bool: where the value stands in for the output. prompt (B × T) bool, the prompt's tokens.

    "last": at the last prompt token; "prompt": at all of them; "onward": at the last and whatever follows.
    """
    if replace == "prompt":
        return prompt
    places = torch.arange(prompt.shape[1], device=prompt.device)
    last = (prompt * places).amax(dim=1, keepdim=True)
    return places == last if replace == "last" else places >= last


class GRACE(Editor):
    """A codebook in place of the projection's output: near a stored key the stored value, everywhere else the model."""

    name: ClassVar[str] = "grace"
    routes: ClassVar[bool] = True
    measure: ClassVar[str] = "distance"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: int  # block of the edited down-projection; WISE, appendix A.3: 27 of LLaMA and Mistral, 21 of GPT-J
        radius: float = 1.0  # ε_init, in units of the projection's input, > 0; published: 1.0
        replace: str = "last"  # last, prompt or onward, see `replaced_places`; published for such models: last
        value_init: str = "cold"  # cold: uniform in 0…1; warm: the output so far; published: cold
        iterations: int = 100  # gradient steps per edit at most; published: 100
        learning_rate: float = 1.0  # of Adam on the value, > 0; published: 1.0
        step_rule: str = "constant"  # constant: as published; relative: learning_rate × ‖h‖ / √d, h the stream
        stop_loss: float = 0.01  # nats per token at which an edit is done; 0: never, as published

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.radius > 0, "radius", "more than 0")
            self.require(self.replace in REPLACEMENTS, "replace", f"one of {', '.join(REPLACEMENTS)}")
            self.require(self.value_init in VALUE_INITS, "value_init", f"one of {', '.join(VALUE_INITS)}")
            self.require(self.iterations >= 1, "iterations", "at least 1")
            self.require(self.learning_rate > 0, "learning_rate", "more than 0")
            self.require(self.step_rule in ("constant", "relative"), "step_rule", "constant or relative")
            self.require(self.stop_loss >= 0, "stop_loss", "0 (never) or more")

    config: Config

    def build(self) -> dict[Site, Patch]:
        self.site = self.model.site(self.config.layer)
        self.patch = CodebookPatch(self.site, self.config.replace)
        return {self.site: self.patch}

    def write(self, requests: list[EditRequest]) -> list[Written]:
        batch, codebook = self.encode_edits(requests), self.patch.codebook.copy()
        labels = [tuple(row[mask].tolist()) for row, mask in zip(batch.input_ids, batch.learn_mask, strict=True)]
        with self.detached() as model:
            tail = model.tail(self.site, batch)
            queries = pool_prompt(tail.a, batch.prompt_mask, "last").to(codebook.keys)
            with torch.no_grad():
                before = self._losses(tail, *self.patch.codebook.answers(queries))
            rows, replaced = [], []
            for i, request in enumerate(requests):
                value = self._first_value(tail, i, seed=len(codebook))
                row, taken_over = codebook.add(queries[i], value, labels[i], request.id, self.config.radius)
                rows.append(row)
                replaced.append((taken_over,) if taken_over not in ("", request.id) else ())
            # Of two edits in a batch at the very same key the later one has the entry; the other is not learned.
            learned = torch.tensor([codebook.labels[row] == label for row, label in zip(rows, labels, strict=True)])
            last, steps = self._learn(requests, tail, codebook, torch.tensor(rows), learned)
        self.patch.codebook = codebook
        return [
            Written(first, end, steps, ids) for first, end, ids in zip(before.tolist(), last, replaced, strict=True)
        ]

    def _first_value(self, tail: Tail, i: int, seed: int) -> Tensor:
        """(d,) what the value of a new entry starts from."""
        if self.config.value_init == "warm":
            return tail.y[i, tail.batch.last_prompt[i]].to(self.patch.codebook.values)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + seed)
        return torch.rand(self.site.out_features, generator=generator).to(self.patch.codebook.values)

    def _learn(
        self, requests: list[EditRequest], tail: Tail, codebook: Codebook, rows: Tensor, learned: Tensor
    ) -> tuple[list[float], int]:
        """Fit the values of the entries in rows (B,) to the targets with Adam, in place: last losses, and steps taken.

        learned  (B,) bool: whether an edit's loss counts
        """
        config = self.config
        touched, own = rows.unique(return_inverse=True)
        values = codebook.values[touched].requires_grad_()
        rate = config.learning_rate
        if config.step_rule == "relative":
            rate *= tail.stream_norm(tail.batch.counted_at) / self.site.out_features**0.5
        optimizer = torch.optim.Adam([values], lr=rate)
        own, counts = own.to(values.device), learned.to(values.device)
        steps, everywhere = 0, torch.ones_like(counts)
        while True:
            self.check_cancelled()
            losses = self._losses(tail, values[own], everywhere)
            last = losses.tolist()
            for request, loss in zip(requests, last, strict=True):
                self.check_loss(loss, request)
            if steps == config.iterations or max(itertools.compress(last, learned)) < config.stop_loss:
                codebook.values[touched] = values.detach()
                return last, steps
            optimizer.zero_grad()
            (losses * counts.to(losses)).sum().backward()
            optimizer.step()
            steps += 1

    def _losses(self, tail: Tail, values: Tensor, fired: Tensor) -> Tensor:
        """(B,) mean loss of each target, with values (B × d) in place of the output where fired (B,) bool."""
        batch = tail.batch
        where = fired[:, None].to(tail.y.device) & replaced_places(batch.prompt_mask, self.config.replace)
        change = torch.where(where[..., None], values[:, None].to(tail.y.device) - tail.y.float(), 0.0)
        return target_losses(tail, change)

    @torch.no_grad()
    def explain(self, prompt: str) -> Explanation:
        """The nearest entry's edit, its distance as `overlap`, its radius as `tau`: it fires where overlap ≤ tau."""
        codebook, batch = self.patch.codebook, self.model.encode([prompt])
        if not len(codebook):
            return Explanation(edit_id=None, score=None, threshold=None, fired=False, contribution=0.0)
        a = input_of(self.site, lambda: self.model.forward(batch, positions=1))
        query = pool_prompt(a, batch.prompt_mask, "last").to(codebook.keys)
        rows, distances = codebook.nearest(query)
        _, fired = codebook.answers(query)
        return Explanation(
            edit_id=codebook.ids[int(rows)],
            score=float(distances),
            threshold=float(codebook.radii[rows]),
            fired=bool(fired),
            contribution=self.contribution(prompt),
        )

    @torch.no_grad()
    def matches(self, prompts: Sequence[str]) -> list[str | None]:
        codebook, found = self.patch.codebook, [None] * len(prompts)
        for numbers, batch in self.batches(prompts) if len(codebook) else ():
            a = input_of(self.site, lambda batch=batch: self.model.forward(batch))
            query = pool_prompt(a, batch.prompt_mask, "last").to(codebook.keys)
            (rows, _), (_, fired) = codebook.nearest(query), codebook.answers(query)
            for i, row, fires in zip(numbers, rows.tolist(), fired.tolist(), strict=True):
                found[i] = codebook.ids[row] if fires else None
        return found

    def state(self) -> dict[str, Tensor]:
        codebook, order = self.patch.codebook, {edit_id: i for i, edit_id in enumerate(self.edits)}
        return {
            "keys": codebook.keys,
            "values": codebook.values,
            "radii": codebook.radii,
            "labels": torch.tensor([token for label in codebook.labels for token in label], dtype=torch.int64),
            "label_lengths": torch.tensor([len(label) for label in codebook.labels], dtype=torch.int64),
            "order": torch.tensor([order[edit_id] for edit_id in codebook.ids], dtype=torch.int64),
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        edit_ids, device = list(self.edits), self.patch.codebook.keys.device
        labels = tensors["labels"].split(tensors["label_lengths"].tolist())
        self.patch.codebook = Codebook(
            *(tensors[name].to(device) for name in ("keys", "values", "radii")),
            labels=[tuple(label.tolist()) for label in labels],
            ids=[edit_ids[i] for i in tensors["order"]],
        )
