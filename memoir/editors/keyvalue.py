"""What ROME, MEMIT and AlphaEdit share: a projection seen as a memory of keys and values, v = W k (Meng et al., ROME,
NeurIPS 2022, section 3.1).

An edit asks for one new pair: the key k* that the prompt shows the projection at one token, and the value v* that makes
the model answer as wanted. A method then weighs that pair against C = E[k kᵀ], the keys of ordinary text.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.base import EditError, Editor, EditorConfig, Written
from memoir.memory import gain
from memoir.models import Batch, group_means, predicting, subject_tokens
from memoir.moments import cache_header, cached, second_moments, texts_of
from memoir.records import EditRequest
from memoir.sites import DeltaWeight, Patch, Site, Tail, places, watching

WHERE = ("subject_last", "prompt_last", "target")
BACKGROUND = "background"


@dataclass(frozen=True, kw_only=True)
class KeyValueConfig(EditorConfig):
    """Knobs of the key, the value and the second moments."""

    # The token whose value is edited. subject_last: the papers'; prompt_last: the last of the prompt; target, beyond
    # the papers: every token that predicts one of the target's, with a pair of its own, where a model recalls there.
    where: str = "subject_last"
    value_steps: int = 25  # gradient steps on v* at most; EasyEdit: 25
    value_rate: float = 0.5  # of Adam on δ = v* − v, > 0; the papers: 0.5
    value_decay: float = 0.5  # weight of ‖δ‖ / ‖h‖² in the loss; the papers: 0.5 on GPT-J
    kl_factor: float = 0.0625  # weight of the KL divergence on "{subject} is a"; the papers: 0.0625
    clamp: float = 4.0  # ‖δ‖ is kept below this × ‖h‖, > 0; ROME: 4, MEMIT: 0.75
    stop_loss: float = 0.05  # whole loss in nats at which v* is good enough, 0: never; the papers: 0.05
    prefixes: int = 5  # copies of the prompt behind random prefixes, averaged over; ROME: 20, MEMIT: 5
    prefix_tokens: int = 10  # tokens in a random prefix; MEMIT: 10
    moments: str = "wikimedia/wikipedia:20231101.en"  # text for C: see `moments.texts_of`, or "background"
    moment_samples: int = 100_000  # texts that C is measured on, at most; the papers: 100 000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.where in WHERE, "where", f"one of {', '.join(WHERE)}")
        self.require(self.value_steps >= 1, "value_steps", "at least 1")
        self.require(self.value_rate > 0, "value_rate", "more than 0")
        self.require(self.value_decay >= 0, "value_decay", "0 or more")
        self.require(self.kl_factor >= 0, "kl_factor", "0 or more")
        self.require(self.clamp > 0, "clamp", "more than 0")
        self.require(self.stop_loss >= 0, "stop_loss", "0 (never) or more")
        self.require(self.prefixes >= 0, "prefixes", "0 or more")
        self.require(self.prefix_tokens >= 1, "prefix_tokens", "at least 1")
        self.require(self.moment_samples >= 1, "moment_samples", "at least 1")


@dataclass(frozen=True)
class Rows:
    """The R rows on which n edits are learned, and the s pairs (k*, v*) that they ask for: one each, or one per token.

    Rows hold each prompt with its target, bare and behind each prefix; at the end an essence prompt, "{subject} is a",
    for each edit that names its subject.

    batch      the rows as tokens
    essence    rows from here on are essence prompts
    row_owner  (R,) int64, which of the n edits a row belongs to
    row, place, pair  (m,) int64: at this place in this row stands the token of this pair; those of essence prompts last
    pair_owner  (s,) int64, which edit a pair belongs to
    bare       (s,) int64, where among the m stands each pair's token in the prompt without a prefix
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
    def at(self) -> Tensor:
        """(m,) int64, the same in the rows laid end to end."""
        return self.row * self.batch.input_ids.shape[1] + self.place

    @property
    def at_bare(self) -> tuple[Tensor, Tensor]:
        """Index of the pairs' tokens without a prefix into (R × T × …)."""
        return self.row[self.bare], self.place[self.bare]

    def mean(self, values: Tensor) -> Tensor:
        """(s × …) float32, mean over a prompt and its prefixed copies of values (R × T × …) at each pair's token."""
        wanted = self.row < self.essence
        found = values[self.row[wanted], self.place[wanted]].float()
        return group_means(found, self.pair[wanted].to(found.device), len(self.bare))


def edit_key(a: Tensor, rows: Rows) -> Tensor:
    """k* = mean over the prompt behind its prefixes of the projection's input at the edited token (ROME, equation 3).

    a (R × T × D) inputs of the projection; returns (s × D) float32.
    """
    return rows.mean(a)


def edit_value(
    editor: KeyValueEditor, requests: list[EditRequest], tail: Tail, rows: Rows, scale: Tensor
) -> tuple[Tensor, list[float], list[float], int]:
    """δ = v* − v, with v* = argmin −mean log p(o* | x_j + p) + KL(p(· | p', v*) ‖ p(· | p')) (ROME, equation 4).

    Found by Adam on δ, added at the edited token of every row; ‖δ‖ is penalised and kept below clamp × scale.

    scale    (s,) the norm that δ is held against: ROME's that of v, MEMIT's that of the stream behind the block
    returns  δ (s × d) float32; the edits' first and last losses on their targets, in nats per token; steps taken
    """
    config, batch, n, device = editor.config, tail.batch, len(requests), tail.y.device
    learned = batch.learn_mask.clone()
    learned[rows.essence :] = False
    counted = predicting(learned)
    counted[rows.essence :, -1] = True
    labels, row_of = batch.input_ids[learned].to(device), learned.nonzero()[:, 0].to(device)
    asked, changed, pair = places(counted), rows.at.to(device), rows.pair.to(device)
    owner, row_owner, scale = rows.pair_owner.to(device), rows.row_owner.to(device), scale.to(device)
    delta = torch.zeros(len(owner), tail.y.shape[-1], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=config.value_rate)
    usual, first, done, steps = None, None, torch.zeros(n, dtype=torch.bool, device=device), 0
    for _ in range(config.value_steps + 1):
        editor.check_cancelled()
        logits = tail.logits(delta[pair], asked, changed).float().to(device)
        likelihood = cross_entropy(logits[: len(labels)], labels, reduction="none")
        nll = group_means(group_means(likelihood, row_of, rows.essence), row_owner[: rows.essence], n)
        norm = (delta.square().sum(1) + 1e-12).sqrt()
        loss = nll.index_add(0, owner, config.value_decay * norm / scale**2)
        if rows.essence < len(batch):
            log_p = logits[len(labels) :].log_softmax(-1)
            usual = log_p.detach() if usual is None else usual
            divergence = (log_p.exp() * (log_p - usual)).sum(1)
            loss = loss.index_add(0, row_owner[rows.essence :], config.kl_factor * divergence)
        done |= loss.detach() < config.stop_loss
        *last, all_done = torch.cat([nll.detach(), done.all()[None].to(nll)]).tolist()  # a GPU waits once
        first = first or last
        for request, found in zip(requests, last, strict=True):
            editor.check_loss(found, request)
        if steps == config.value_steps or all_done:
            break
        optimizer.zero_grad()
        loss.sum().backward()
        before = delta.detach().clone()
        optimizer.step()
        with torch.no_grad():
            longest = config.clamp * scale
            delta *= (longest / delta.norm(dim=1).clamp(min=1e-12)).clamp(max=1.0)[:, None]
            # An edit that is good enough waits for the others of its batch.
            delta.copy_(torch.where(done[owner][:, None], before, delta))
        steps += 1
    return delta.detach(), first, last, steps


@dataclass(frozen=True)
class Keys:
    """Keys written so far, as a method transforms them, ready to be solved with: all that an edit needs of them is
    H_new (HᵀH + μI)⁻¹ = [0 I] (H Hᵀ + μI)⁻¹ H. While they are few, as the right side; the left is of a fixed size.

    H        (m × D) float64, one transformed key per row: all of them, or beside an inverse the newest
    factor   (m × m) float64, lower Cholesky factor of H Hᵀ + μI; None beside an inverse
    inverse  (D × D) float64, (HᵀH + μI)⁻¹ over all keys, once they are as many as half of D; None before
    """

    H: Tensor
    factor: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(cls, new: Tensor, mu: float, earlier: Keys | None = None) -> Keys:
        """The earlier keys and, behind them, the new ones (n × D)."""
        new = new.double()
        n, D = new.shape
        if earlier is not None and (earlier.inverse is not None or len(earlier.H) + n > D // 2):
            inverse = earlier.inverse
            if inverse is None:
                gram = earlier.H.T @ earlier.H
                gram.diagonal().add_(mu)
                inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            PK, G = gain(inverse, new.T)
            return cls(new, inverse=torch.addmm(inverse, PK, G, alpha=-1))
        corner = new @ new.T
        corner.diagonal().add_(mu)
        if earlier is None:
            return cls(new, torch.linalg.cholesky(corner))
        m = len(earlier.H)
        border = torch.linalg.solve_triangular(earlier.factor, earlier.H @ new.T, upper=False).T
        factor = corner.new_zeros(m + n, m + n)
        factor[:m, :m], factor[m:, :m] = earlier.factor, border
        factor[m:, m:] = torch.linalg.cholesky(corner - border @ border.T)
        return cls(torch.cat([earlier.H, new]), factor)

    def newest(self, n: int) -> Tensor:
        """(n × D): what residuals at the newest n keys are written with."""
        if self.inverse is not None:
            return (self.inverse @ self.H[-n:].T).T
        unit = self.H.new_zeros(len(self.H), n)
        unit[-n:].fill_diagonal_(1.0)
        half = torch.linalg.solve_triangular(self.factor, unit, upper=False)
        return torch.linalg.solve_triangular(self.factor.T, half, upper=True).T @ self.H


class KeyValueEditor(Editor):
    """Writes (k*, v*) pairs into ΔW of one or several sites. A method defines `layers` and `write`, and in `prepare`
    makes of the second moments of its sites, `moment`, what it needs."""

    config: KeyValueConfig
    can_forget: ClassVar[bool] = False

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Blocks whose projections are edited, ascending; the value is learned at the last."""

    def build(self) -> dict[Site, Patch]:
        self.sites = [self.model.site(layer) for layer in self.layers]
        self.deltas = {site: DeltaWeight(site, site.device) for site in self.sites}
        self._prefixes: list[str] | None = None
        return dict(self.deltas)

    def prepare(self) -> None:
        if self._prefixes is None:
            self._prefixes = self.sample_texts(self.config.prefixes, self.config.prefix_tokens)

    def moment(self, site: Site) -> Tensor:
        """C = E[k kᵀ] (D × D) float32 of a site on the unedited model, from the cache where it is there."""
        name, samples = self.config.moments, self.config.moment_samples
        if name == BACKGROUND:
            if not self.background:
                raise EditError(f"moments = {name!r} needs background texts: make_editor(..., background=[texts])")
            texts, name, samples = self.background, None, min(samples, len(self.background))
        else:
            texts = texts_of(name, samples)
        return second_moments(self.model, site, texts, samples=samples, name=name, check=self.check_cancelled)

    def factor(self, kind: str, site: Site, factorise: Callable[[Tensor], Tensor], **options: float) -> Tensor:
        """What `factorise` makes of a site's C, (D × D) on its device, not to be changed; from another editor or from
        the cache where it is there, as D³ steps take their time.

        kind, options  what tells one factor of C from another
        """
        device, samples = site.device, self.config.moment_samples
        given = {name: repr(float(value)) for name, value in options.items()}

        def compute() -> Tensor:
            return factorise(self.moment(site).to(device)).cpu()

        if self.config.moments == BACKGROUND:
            header = {"site": site.name, "texts": tuple(self.background or ()), "samples": samples, **given}
            found = compute
        else:
            header = cache_header(self.model, site, self.config.moments, samples) | given
            found = partial(cached, kind, header, compute)
        return self.model.shared((kind, *header.items()), lambda: found().to(device))

    # For `write` -----------------------------------------------------------------------------------------------------

    def rows(self, requests: list[EditRequest]) -> Rows:
        """The rows of a batch of edits; ValueError where a prompt lacks the subject that is looked for."""
        prompts, targets, row_owner, bare_rows = [], [], [], []
        for i, request in enumerate(requests):
            bare_rows.append(len(prompts))
            copies = [request.prompt, *(f"{prefix}. {request.prompt}" for prefix in self._prefixes or ())]
            prompts += copies
            targets += [request.target] * len(copies)
            row_owner += [i] * len(copies)
        essence = len(prompts)
        named = [i for i, request in enumerate(requests) if request.subject.strip() and self.config.kl_factor]
        prompts += [f"{requests[i].subject.strip()} is a" for i in named]
        row_owner += named
        batch = self.model.encode(prompts, targets + [None] * len(named), end=self.config.learn_stop)
        places = self._places(batch, prompts, [requests[i] for i in row_owner], essence)
        first_pair, pair_owner = [], []
        for i, row in enumerate(bare_rows):
            first_pair.append(len(pair_owner))
            pair_owner += [i] * len(places[row])
        flat = [
            (row, place, first_pair[row_owner[row]] + j)
            for row, found in enumerate(places)
            for j, place in enumerate(found)
        ]
        bare = [m for m, (row, _, _) in enumerate(flat) if row in set(bare_rows)]
        row, place, pair = torch.tensor(flat).T
        return Rows(
            batch, essence, torch.tensor(row_owner), row, place, pair, torch.tensor(pair_owner), torch.tensor(bare)
        )

    def _places(self, batch: Batch, prompts: list[str], requests: list[EditRequest], essence: int) -> list[list[int]]:
        """Where in each row the edited tokens stand: one, or with "target" as many as the target has tokens."""
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
        """The tail of the last site as the model now stands, and the keys k* (s × D) of every site."""
        with contextlib.ExitStack() as stack:
            seen = {site: stack.enter_context(watching(site)) for site in self.sites}
            tail = self.model.tail(self.sites[-1], rows.batch)
        return tail, {site: edit_key(calls[-1][0], rows) for site, calls in seen.items()}

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Whatever goes wrong inside, every ΔW is as before."""
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


class SpreadingEditor(KeyValueEditor):
    """Spreads every value over several layers, as MEMIT does and AlphaEdit after it (MEMIT, section 4.3, algorithm 1).

    The stream behind the last block is to become z = h + δ. From the first layer on, each writes its share of what is
    still missing, r^l = (z − h) / (L − l + 1), and h is measured again. Where a family's blocks do more than add their
    MLP's output, that share would not arrive, and the last layer alone is written.

    A method defines `update`.
    """

    def build(self) -> dict[Site, Patch]:
        patches = super().build()
        self.kept: dict[Site, Keys] = {}  # what `update` returned of the edits so far
        return patches

    @property
    def layers(self) -> tuple[int, ...]:
        return self.config.layers

    @abstractmethod
    def update(self, site: Site, residual: Tensor, keys: Tensor, earlier: Keys | None) -> tuple[Tensor, Keys | None]:
        """ΔW (d × D) for residuals (d × s) at keys (D × s), and the keys that later edits are to see, or None."""

    def write(self, requests: list[EditRequest]) -> list[Written]:
        rows = self.rows(requests)
        tail, keys = self.observe(rows)
        at = rows.at_bare
        stream = tail.stream[at].float()
        delta, first, last, steps = edit_value(self, requests, tail, rows, stream.norm(dim=1))
        sites = self.sites[-1:] if not tail.composes else self.sites
        kept: dict[Site, Keys | None] = {}
        with self.all_or_nothing():
            for i, site in enumerate(sites):
                if i:
                    self.check_cancelled()
                    tail, keys = self.observe(rows)
                missing = stream + delta - tail.stream[at].float()
                residual = (missing / (len(sites) - i)).T.to(site.device)
                try:
                    update, kept[site] = self.update(site, residual, keys[site].T, self.kept.get(site))
                except torch.linalg.LinAlgError as error:
                    raise EditError(f"{self.name}: the update of {site.name} cannot be solved: {error}") from None
                self.add(site, update)
        self.kept.update({site: keys for site, keys in kept.items() if keys is not None})
        return [Written(before, after, steps) for before, after in zip(first, last, strict=True)]

    def state(self) -> dict[str, Tensor]:
        tensors = super().state()
        for site, keys in self.kept.items():
            held = {f"kept.{site.layer}.{part}": tensor for part, tensor in vars(keys).items()}
            tensors |= {name: tensor for name, tensor in held.items() if tensor is not None}
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        for site in self.sites:
            names = {part.name: f"kept.{site.layer}.{part.name}" for part in fields(Keys)}
            if names["H"] in tensors:
                held = {part: tensors[name].to(site.device) for part, name in names.items() if name in tensors}
                self.kept[site] = Keys(**held)


def check_layers(config: EditorConfig) -> None:
    """Make `layers` a tuple, and raise ValueError unless it names blocks in ascending order."""
    object.__setattr__(config, "layers", tuple(config.layers))  # JSON and notebooks bring lists
    ascending = all(a < b for a, b in zip(config.layers, config.layers[1:], strict=False))
    config.require(len(config.layers) > 0 and ascending, "layers", "one or more blocks, ascending")


def whitener(moment: Tensor) -> Tensor:
    """S (D × D) float32 with SᵀS = C⁻¹: the inverse Cholesky factor of C, taken once for all edits.

    C from finitely many texts, in float32, may be singular and worse. A ten-thousandth more on its diagonal, which is
    above the rounding, and a millionth of the diagonal's mean, for neurons that never fire, make it regular.
    """
    C = moment.to(torch.float64, copy=True)
    diagonal = C.diagonal()
    diagonal.add_(1e-4 * diagonal + 1e-6 * diagonal.mean())
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(C), identity, upper=False).float().contiguous()
