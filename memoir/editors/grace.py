"""GRACE: "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors" (Hartvigsen, Sankaranarayanan,
Palangi, Kim, Ghassemi, NeurIPS 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from memoir.editors.base import Editor, Written, target_losses
from memoir.editors.config import Count, EditorConfig, Layer, NonNegative, Positive, Rate
from memoir.editors.depth import layer_before_last
from memoir.memory import pool_prompt
from memoir.models import LanguageModel
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, Span, Tail

# Two keys closer than this share of their norm are the same: one prompt's float32 key varies that much between batches.
ROUNDING = 1e-5


@dataclass
class Codebook:
    """C = {(k, v, ε, y)}: keys with their values, radii and labels (GRACE, section 3.1 and Algorithm 1).

    keys    (n × D) float32, the projection's input at the last prompt token
    values  (n × d) float32, what replaces the projection's output
    radii   (n,) float32, ε: how far from its key an entry answers, in the keys' own units
    labels  the targets' tokens
    ids     the edits that the entries belong to
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: list[tuple[int, ...]]
    ids: list[str]

    @classmethod
    def empty(cls, site: Site) -> Codebook:
        keys, values = (torch.zeros(0, width, device=site.device) for width in (site.in_features, site.out_features))
        return cls(keys, values, torch.zeros(0, device=site.device), [], [])

    def __len__(self) -> int:
        return len(self.ids)

    def copy(self) -> Codebook:
        """A copy to `add` to, which leaves this codebook as it is."""
        return Codebook(self.keys, self.values.clone(), self.radii.clone(), list(self.labels), list(self.ids))

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each query (B × D) its nearest entry (B,) int64, the Euclidean distance to it (B,), and whether that is
        within the entry's radius (B,) bool. The codebook must not be empty."""
        # A matrix product would be faster, but cancellation would lose small distances.
        nearest = torch.cdist(queries, self.keys, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
        distances, rows = nearest.values, nearest.indices
        return rows, distances, distances <= self.radii[rows] + ROUNDING * queries.norm(dim=1)

    def answers(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """For each query (B × D) its nearest entry's value (B × d), and whether it is within the radius (B,) bool."""
        if not len(self):
            return self.values.new_zeros(len(queries), self.values.shape[1]), queries.new_zeros(len(queries)).bool()
        rows, _, fired = self.nearest(queries)
        return self.values[rows], fired

    def add(self, key: Tensor, value: Tensor, label: tuple[int, ...], edit_id: str, radius: float) -> tuple[int, str]:
        """Algorithm 1 for one edit: key (D,), value (d,) in case the entry is new, its label and ε_init.

        - Far from all entries (d > ε_i + ε_init), or the first of all: a new entry with radius ε_init.
        - Near an entry with the same label: that entry expands, ε_i = max(ε_i, d).
        - Near an entry with another label: a new entry, and both get radius d / 2.
        - At the same key as an entry with another label: the new edit takes over that entry. This is not in the
          algorithm, whose radius d / 2 = 0 would make both entries unreachable.
        Returns the entry's row, and the id of the edit that it belonged to before, or "".
        """
        if len(self):
            rows, distances, _ = self.nearest(key[None])
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

    The codebook is read once, at the last prompt token, and the result holds for the whole sequence.
    """

    def __init__(self, site: Site, replace: str):
        self.codebook, self.replace = Codebook.empty(site), replace

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if not span.decoding and len(self.codebook):
            queries = pool_prompt(a, span.prompt.to(a.device), "last").to(self.codebook.keys)
            span.memo[self] = tuple(x.to(y.device) for x in self.codebook.answers(queries))
        if self not in span.memo or (span.decoding and self.replace != "onward"):
            return y
        values, fired = span.memo[self]
        where = fired[:, None]
        if not span.decoding:
            where = where & replaced_places(span.prompt, self.replace).to(y.device)
        return torch.where(where[..., None], values[:, None].to(y.dtype), y)


def replaced_places(prompt: Tensor, replace: str) -> Tensor:
    """(B × T) bool: where the value replaces the output. prompt (B × T) bool, the prompt's tokens.

    "last": at the last prompt token; "prompt": at all of them; "onward": at the last one and all tokens after it.
    """
    if replace == "prompt":
        return prompt
    positions = torch.arange(prompt.shape[1], device=prompt.device)
    last = (prompt * positions).amax(dim=1, keepdim=True)
    return positions == last if replace == "last" else positions >= last


class GRACE(Editor):
    """A codebook in place of the projection's output: near a stored key the stored value, everywhere else the model."""

    name: ClassVar[str] = "grace"
    colour: ClassVar[str] = "#cc78bc"
    marker: ClassVar[str] = "D"
    routes: ClassVar[bool] = True
    measure: ClassVar[str] = "distance"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: Layer  # block of the edited down-projection; WISE, appendix A.3: 27 of LLaMA and Mistral, 21 of GPT-J
        radius: Positive = 1.0  # ε_init, in units of the projection's input; published: 1.0
        replace: Literal["last", "prompt", "onward"] = "last"  # see `replaced_places`; published for such models: last
        value_init: Literal["cold", "warm"] = "cold"  # cold: uniform in 0…1; warm: the output so far; published: cold
        iterations: Count = 100  # gradient steps per edit at most; published: 100
        learning_rate: Rate = 1.0  # of Adam on the value; published: 1.0
        # constant: as published; relative: learning_rate × ‖h‖ / √d, with h the stream after the block
        step_rule: Literal["constant", "relative"] = "constant"
        stop_loss: NonNegative = 0.01  # nats per token at which an edit is done, 0: never; published: 0

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        # The value replaces the last prompt token's output; later tokens see the change only through a later block.
        layer = layer_before_last(model, 27 / 31)
        return dict(layer=layer, value_init="warm", step_rule="relative", learning_rate=0.5)

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
                before = self._losses(tail, *codebook.answers(queries)).tolist()
            rows, replaced = [], []
            for i, request in enumerate(requests):
                value = self._first_value(tail, i, seed=len(codebook))
                row, owner = codebook.add(queries[i], value, labels[i], request.id, self.config.radius)
                rows.append(row)
                replaced.append((owner,) if owner not in ("", request.id) else ())
            # If two edits in a batch have the same key, the later one takes the entry; the earlier one is not learned.
            learned = torch.tensor([codebook.labels[row] == label for row, label in zip(rows, labels, strict=True)])
            after, steps = self._learn(requests, tail, codebook, torch.tensor(rows), learned)
        self.patch.codebook = codebook
        return [Written(first, last, steps, ids) for first, last, ids in zip(before, after, replaced, strict=True)]

    def _first_value(self, tail: Tail, i: int, seed: int) -> Tensor:
        """(d,) the value that a new entry starts from."""
        if self.config.value_init == "warm":
            return tail.y[i, tail.batch.last_prompt[i]].to(self.patch.codebook.values)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + seed)
        return torch.rand(self.site.out_features, generator=generator).to(self.patch.codebook.values)

    def _learn(
        self, requests: list[EditRequest], tail: Tail, codebook: Codebook, rows: Tensor, learned: Tensor
    ) -> tuple[list[float], int]:
        """Adam on the values of the entries in rows (B,), in place; returns each edit's last loss, and the steps taken.

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
        for step in range(config.iterations + 1):
            self.check_cancelled()
            losses = self._losses(tail, values[own], torch.ones_like(counts))
            last = self.check_losses(losses.tolist(), requests)
            if step == config.iterations or max(itertools.compress(last, learned)) < config.stop_loss:
                break
            optimizer.zero_grad()
            (losses * counts.to(losses)).sum().backward()
            optimizer.step()
        codebook.values[touched] = values.detach()
        return last, step

    def _losses(self, tail: Tail, values: Tensor, fired: Tensor) -> Tensor:
        """(B,) mean loss of each target, with values (B × d) in place of the output where fired (B,) bool."""
        where = fired[:, None].to(tail.y.device) & replaced_places(tail.batch.prompt_mask, self.config.replace)
        change = torch.where(where[..., None], values[:, None].to(tail.y.device) - tail.y.float(), 0.0)
        return target_losses(tail, change)

    def lookup(self, prompts: Sequence[str]) -> list[Explanation]:
        """The nearest entry's edit, its distance as `score`, its radius as `threshold`."""
        codebook, found = self.patch.codebook, [Explanation()] * len(prompts)
        for numbers, a, prompt in self.model.site_inputs(self.site, prompts) if len(codebook) else ():
            nearest = codebook.nearest(pool_prompt(a, prompt, "last").to(codebook.keys))
            for i, row, score, fired in zip(numbers, *(x.tolist() for x in nearest), strict=True):
                edit_id, radius = codebook.ids[row], float(codebook.radii[row])
                found[i] = Explanation(edit_id=edit_id, score=score, threshold=radius, fired=fired)
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
