"""What ROME, MEMIT, AlphaEdit and RLSEdit share: a projection seen as a memory of keys and values, v = W k (Meng et
al., ROME, NeurIPS 2022, section 3.1).

An edit asks for one new pair: the key k* is the projection's input at one token of the prompt, and the value v* is the
output that makes the model answer as wanted. A method then weighs that pair against C = E[k kᵀ], the keys of ordinary
text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.base import EditError, Editor
from memoir.editors.config import Count, EditorConfig, Natural, NonNegative, Positive, Rate
from memoir.editors.prompts import augmented
from memoir.moments import (
    SAMPLED,
    WIKIPEDIA,
    available,
    cache_header,
    cached,
    sampled_texts,
    second_moments,
    texts_of,
)
from memoir.records import EditRequest
from memoir.sites import DeltaWeight, Patch, Site, Tail, places, watching
from memoir.text import Batch, group_means, subject_tokens

AUTO, BACKGROUND = "auto", "background"


@dataclass(frozen=True, kw_only=True)
class KeyValueConfig(EditorConfig):
    """Settings of the key, the value and the second moments."""

    # The token whose value is edited. subject_last: the papers' choice; prompt_last: the last of the prompt; target,
    # beyond the papers: every token that predicts a target token, each with its own pair, for models that recall there.
    where: Literal["subject_last", "prompt_last", "target"] = "subject_last"
    value_steps: Count = 25  # gradient steps on v* at most; EasyEdit: 25
    value_rate: Rate = 0.5  # of Adam on δ = v* − v; the papers: 0.5
    value_decay: NonNegative = 0.5  # weight of ‖δ‖ / ‖h‖² in the loss; the papers: 0.5 on GPT-J
    kl_factor: NonNegative = 0.0625  # weight of the KL divergence on "{subject} is a"; the papers: 0.0625
    clamp: Positive = 4.0  # ‖δ‖ is kept below this × ‖h‖; ROME: 4, MEMIT: 0.75
    stop_loss: NonNegative = 0.05  # whole loss in nats at which v* is good enough, 0: never; the papers: 0.05
    prefixes: Natural = 5  # copies of the prompt behind random prefixes, averaged over; ROME: 20, MEMIT: 5
    prefix_tokens: Count = 10  # tokens in a random prefix; MEMIT: 10
    # Text for C. wikipedia: 20231101.en; the papers: Wikipedia. sampled: texts sampled from the model. auto: wikipedia
    # where the hub can be reached, else sampled; the editor's own config then says which. background: the editor's
    # background texts. Any other name: see `moments.texts_of`.
    moments: str = AUTO
    moment_samples: Count = 100_000  # texts that C is measured on, at most; the papers: 100 000


@dataclass(frozen=True)
class Rows:
    """The R rows on which n edits are learned, and the s pairs (k*, v*) that they ask for: one each, or one per token.

    Rows hold each prompt with its target, bare and behind each prefix. The last rows are essence prompts,
    "{subject} is a", one for each edit that names its subject.

    batch      the rows as tokens
    essence    number of the first essence prompt
    row_owner  (R,) int64, the edit that a row belongs to
    row, place, pair  (m,) int64: the token of pair[i] stands in row row[i] at position place[i]; essence prompts last
    pair_owner  (s,) int64, the edit that a pair belongs to
    bare       (s,) int64, which of the m entries is the pair's token in the bare prompt
    """

    batch: Batch
    essence: int
    row_owner: Tensor
    row: Tensor
    place: Tensor
    pair: Tensor
    pair_owner: Tensor
    bare: Tensor

    @property
    def at_bare(self) -> tuple[Tensor, Tensor]:
        """Index of the pairs' tokens in the bare prompts, into (R × T × …)."""
        return self.row[self.bare], self.place[self.bare]

    def mean(self, values: Tensor) -> Tensor:
        """(s × …) float32, the mean of values (R × T × …) at each pair's token, over a prompt and its copies."""
        prompts = self.row < self.essence
        at_tokens = values[self.row[prompts], self.place[prompts]].float()
        return group_means(at_tokens, self.pair[prompts].to(at_tokens.device), len(self.bare))


def edit_key(a: Tensor, rows: Rows) -> Tensor:
    """k* = mean over the prompt behind its prefixes of the projection's input at the edited token (ROME, equation 3).

    a (R × T × D) inputs of the projection; returns (s × D) float32.
    """
    return rows.mean(a)


def value_losses(
    config: KeyValueConfig, tail: Tail, rows: Rows, scale: Tensor
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The losses of n edits as a function of δ = v* − v (s × d), added at the edited token of every row (ROME, equation
    4): each edit's loss on its target, in nats per token, and its whole loss, both (n,)."""
    batch, essence, device = tail.batch, rows.essence, tail.y.device
    asked = batch.counted.clone()
    asked[essence:, -1] = True  # an essence prompt is asked for its next token
    asked, pair = places(asked), rows.pair.to(device)
    changed = (rows.row * batch.input_ids.shape[1] + rows.place).to(device)  # in the rows laid end to end
    row_owner, pair_owner = rows.row_owner.to(device), rows.pair_owner.to(device)
    edits = int(pair_owner[-1]) + 1
    unedited: Tensor | None = None  # log p of the essence prompts' next tokens, at δ = 0, where the first call is made

    def losses(delta: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal unedited
        logits = tail.logits(delta[pair], asked, changed).float().to(device)
        labels = batch.labels
        likelihood = cross_entropy(logits[: len(labels)], labels, reduction="none")
        on_target = group_means(group_means(likelihood, batch.label_rows, essence), row_owner[:essence], edits)
        norm = (delta.square().sum(1) + 1e-12).sqrt()
        whole = on_target.index_add(0, pair_owner, config.value_decay * norm / scale**2)
        if essence < len(batch):
            log_p = logits[len(labels) :].log_softmax(-1)
            unedited = log_p.detach() if unedited is None else unedited
            divergence = (log_p.exp() * (log_p - unedited)).sum(1)
            whole = whole.index_add(0, row_owner[essence:], config.kl_factor * divergence)
        return on_target, whole

    return losses


def edit_value(
    editor: KeyValueEditor, requests: list[EditRequest], tail: Tail, rows: Rows, scale: Tensor
) -> tuple[Tensor, list[float], list[float], int]:
    """δ = v* − v, with v* = argmin −mean log p(o* | x_j + p) + KL(p(· | p', v*) ‖ p(· | p')) (ROME, equation 4).

    Adam learns δ; ‖δ‖ is penalised and kept below clamp × scale.

    scale    (s,) the norm that ‖δ‖ is compared with. ROME: the norm of v; MEMIT: of the stream after the block
    returns  δ (s × d) float32; the edits' first and last losses on their targets, in nats per token; steps taken
    """
    config, device, first = editor.config, tail.y.device, None
    scale, owner = scale.to(device), rows.pair_owner.to(device)
    losses, longest = value_losses(config, tail, rows, scale), config.clamp * scale
    delta = torch.zeros(len(owner), tail.y.shape[-1], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=config.value_rate)
    done = torch.zeros(len(requests), dtype=torch.bool, device=device)
    for steps in range(config.value_steps + 1):
        editor.check_cancelled()
        on_target, whole = losses(delta)
        done |= whole.detach() < config.stop_loss
        # One transfer for all numbers: each one makes the CPU wait for the GPU.
        *values, all_done = torch.cat([on_target.detach(), done.all()[None].to(on_target)]).tolist()
        last = editor.check_losses(values, requests)
        first = first or last
        if steps == config.value_steps or all_done:
            break
        optimizer.zero_grad()
        whole.sum().backward()
        before = delta.detach().clone()
        optimizer.step()
        with torch.no_grad():
            delta *= (longest / delta.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)[:, None]
            # A finished edit keeps its value until its whole batch is done.
            delta.copy_(torch.where(done[owner][:, None], before, delta))
    return delta.detach(), first, last, steps


class KeyValueEditor(Editor):
    """Writes (k*, v*) pairs into ΔW of one or several sites, ascending; the value is learned at the last.

    A method defines `write`, and `factor_of` where it needs another factor of a site's C than its whitener.
    """

    config: KeyValueConfig

    def build(self) -> dict[Site, Patch]:
        self.sites = [self.model.site(layer) for layer in getattr(self.config, "layers", None) or [self.config.layer]]
        if self.config.moments == AUTO:
            name, samples = available(self.model, self.sites, self.config.moment_samples)
            self.config = replace(self.config, moments=name, moment_samples=samples)
        if self.config.moments == "wikipedia":
            self.config = replace(self.config, moments=WIKIPEDIA)
        self.deltas = {site: DeltaWeight(site, site.device) for site in self.sites}
        self.factors: dict[Site, Any] = {}  # what `write` needs of each site's C
        self._prefixes: list[str] | None = None
        return dict(self.deltas)

    def check(self, request: EditRequest) -> None:
        if self.config.where == "subject_last":
            subject_tokens(self.model, request.prompt, request.subject)

    def prepare(self) -> None:
        if self._prefixes is None:
            self._prefixes = self.sample_texts(self.config.prefixes, self.config.prefix_tokens)
        for site in self.sites:
            if site not in self.factors:
                self.factors[site] = self.factor_of(site)

    def factor_of(self, site: Site) -> Any:
        """S with SᵀS = C⁻¹, see `whitener`."""
        return self.factor("whitening", site, whitener)

    def moment(self, site: Site) -> Tensor:
        """C = E[k kᵀ] (D × D) float32 of a site on the unedited model, cached unless it is of the background texts."""
        name, samples = self.config.moments, self.config.moment_samples
        if name == BACKGROUND:
            if not self.background:
                raise EditError(f"moments = {name!r} needs background texts: make_editor(..., background=[texts])")
            texts, name, samples = self.background, None, min(samples, len(self.background))
        elif name == SAMPLED:
            texts = sampled_texts(self.model, samples, check=self.check_cancelled)
        else:
            texts = texts_of(name, samples)
        return second_moments(self.model, site, texts, samples=samples, name=name, check=self.check_cancelled)

    def factor(self, kind: str, site: Site, factorise: Callable[[Tensor], Tensor], **options: float) -> Tensor:
        """factorise(C) of a site, (D × D) on its device; callers share the result and must not change it.

        A factor takes D³ steps, so the editors of one model share it and a file caches it (not for background texts).

        kind, options  tell one factor of C from another
        """
        device, samples = site.device, self.config.moment_samples
        named = {name: repr(float(value)) for name, value in options.items()}

        def compute() -> Tensor:
            return factorise(self.moment(site).to(device)).cpu()

        if self.config.moments == BACKGROUND:
            header = {"site": site.name, "texts": self.background, "samples": samples} | named
            make = compute
        else:
            header = cache_header(self.model, site, self.config.moments, samples) | named
            make = partial(cached, kind, header, compute)
        return self.model.shared((kind, *header.items()), lambda: make().to(device))

    # For `write` -----------------------------------------------------------------------------------------------------

    def rows(self, requests: list[EditRequest]) -> Rows:
        """The rows of a batch of edits; ValueError where a prompt lacks the subject whose token is edited."""
        prompts, targets, row_owner = augmented(requests, self._prefixes or ())
        essence, copies = len(prompts), len(prompts) // len(requests)
        named = [i for i, request in enumerate(requests) if request.subject.strip() and self.config.kl_factor]
        prompts += [f"{requests[i].subject.strip()} is a" for i in named]
        row_owner += named
        batch = self.model.encode(prompts, targets + [None] * len(named), end=self.config.learn_stop)
        tokens = self._edited_tokens(batch, prompts, [requests[i] for i in row_owner], essence)
        pair_owner = [i for i in range(len(requests)) for _ in tokens[i * copies]]
        entries = [
            (row, place, pair_owner.index(row_owner[row]) + j)
            for row, positions in enumerate(tokens)
            for j, place in enumerate(positions)
        ]
        bare = [m for m, (row, _, _) in enumerate(entries) if row < essence and row % copies == 0]
        row, place, pair = torch.tensor(entries).T
        return Rows(
            batch, essence, torch.tensor(row_owner), row, place, pair, torch.tensor(pair_owner), torch.tensor(bare)
        )

    def _edited_tokens(
        self, batch: Batch, prompts: list[str], requests: list[EditRequest], essence: int
    ) -> list[list[int]]:
        """The positions of the edited tokens in each row: one, or with "target" one for each token of the target."""
        width = batch.input_ids.shape[1]
        answer = batch.counted.cpu()
        answer[essence:, -1] = True
        if self.config.where == "target":
            return [row.nonzero()[:, 0].tolist() for row in answer]
        if self.config.where == "prompt_last":
            return [[int(row.nonzero()[0])] for row in answer]
        lengths = batch.attention_mask.sum(1).tolist()
        tokens = [subject_tokens(self.model, p, r.subject)[1] for p, r in zip(prompts, requests, strict=True)]
        return [[width - length + token] for length, token in zip(lengths, tokens, strict=True)]

    def observe(self, rows: Rows) -> tuple[Tail, dict[Site, Tensor]]:
        """The tail of the last site with all edits so far in force, and the keys k* (s × D) of every site."""
        with contextlib.ExitStack() as stack:
            seen = {site: stack.enter_context(watching(site)) for site in self.sites}
            tail = self.model.tail(self.sites[-1], rows.batch)
        return tail, {site: edit_key(calls[-1][0], rows) for site, calls in seen.items()}

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """An exception inside leaves every ΔW as it was before."""
        before = {site: patch.delta for site, patch in self.deltas.items()}
        try:
            yield
        except BaseException:
            for site, patch in self.deltas.items():
                patch.set(before[site])
            raise

    def add(self, site: Site, update: Tensor) -> None:
        """ΔW += update (d × D); EditError where it is not finite."""
        patch = self.deltas[site]
        if not bool(torch.isfinite(update).all()):
            raise EditError(f"{self.name}: the update of {site.name} is not finite; C may be singular: {self.config}")
        patch.set(patch.delta + update.to(patch.delta))

    # Saving ----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        return {f"delta.{site.layer}": patch.delta for site, patch in self.deltas.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for site, patch in self.deltas.items():
            patch.set(tensors[f"delta.{site.layer}"])


def whitener(moment: Tensor) -> Tensor:
    """S (D × D) float32 with SᵀS = C⁻¹: the inverse Cholesky factor of C, taken once for all edits.

    In float32, C from finitely many texts may be singular or even have negative eigenvalues. Two additions to its
    diagonal make it regular: a ten-thousandth of each entry, which is above the rounding, and a millionth of the mean
    entry, for neurons that never fire.
    """
    C = moment.to(torch.float64, copy=True)
    diagonal = C.diagonal()
    diagonal.add_(1e-4 * diagonal + 1e-6 * diagonal.mean())
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(C), identity, upper=False).float().contiguous()
