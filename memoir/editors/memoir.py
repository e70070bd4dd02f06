"""MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs (Wang, Qin, Dimitriadis,
Favero, Frossard, NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memoir.editors.base import EditError, Editor, Written
from memoir.editors.config import Count, EditorConfig, Layer, Natural, NonNegative, Positive, Rate, Share
from memoir.editors.convergence import Convergence
from memoir.editors.depth import layer_at
from memoir.editors.descent import Descent
from memoir.memory import ResidualMemory, pool_prompt, recursive_downdate, recursive_least_squares
from memoir.models import Batch, LanguageModel
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, Tail, input_of, places, watching

AT_HAND = 2  # pages whose P, (D × D) in float64, is kept: the one that is written, and one that edits are taken from
MANY = 64  # rows of an edit's factors from which their decomposition pays
TOGETHER = 32  # batches of edits that run through the model at once, of those ahead
DRIFT = 1e-7  # relative error of P at which "rls" computes it again; an edit taken out magnifies it by (‖k‖² / λ)²


@dataclass
class Factors:
    """One edit in the memory: its masked keys and what was written on them. Kept on the CPU, as only forgetting and
    saving ask for it, and thousands of them would fill a GPU.

    keys    (n × k) the masked keys' entries in the mask's columns
    values  (n × d): "sgd" G, the edit's part of W_m being Gᵀ keys; "rls" V, the values that the ridge solution fits
    """

    keys: Tensor
    values: Tensor


@dataclass
class RidgeSolution:
    """What "rls" goes on from: min ‖W K − V‖² + λ‖W‖² over all pairs that a page of the memory holds.

    In float64, beside the memory's own float32, as rounding grows when pairs are taken out again.

    weight   W (d × D)
    inverse  P (D × D), (λI + Σ k kᵀ)⁻¹
    pairs    how many
    """

    weight: Tensor
    inverse: Tensor
    pairs: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]], ridge: float, like: Tensor) -> RidgeSolution:
        """From keys (n × D) and values (n × d), some at a time; `like` is W's shape and place, (d × D)."""
        cross = torch.zeros_like(like, dtype=torch.float64)
        gram = ridge * torch.eye(cross.shape[1], dtype=cross.dtype, device=cross.device)
        count = 0
        for keys, values in pairs:
            gram.addmm_(keys.T.double(), keys.double())
            cross.addmm_(values.T.double(), keys.double())
            count += len(keys)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)) if count else gram / ridge**2
        return cls(cross @ inverse, inverse, count)

    def add(self, keys: Tensor, values: Tensor) -> None:
        K, V = keys.T.double(), values.T.double()
        recursive_least_squares(self.weight, self.inverse, K, V - self.weight @ K)
        self.pairs += len(keys)

    def remove(self, keys: Tensor, values: Tensor) -> None:
        recursive_downdate(self.weight, self.inverse, keys.T.double(), values.T.double())
        self.pairs -= len(keys)

    def clone(self) -> RidgeSolution:
        return RidgeSolution(self.weight.clone(), self.inverse.clone(), self.pairs)


@dataclass
class Turn:
    """Edits that are written together, n of them with B prompts.

    tail      these prompts, recorded at the site
    masks     (n × D) bool
    owner     (B,) int64, which of the edits each prompt belongs to
    descent   how they are learned ("sgd")
    then      the next turn's descent, and a tail of both turns, where they were recorded together
    """

    requests: list[EditRequest]
    tail: Tail
    masks: Tensor
    owner: Tensor
    descent: Descent | None = None
    then: tuple[Descent, Tail] | tuple[()] = ()


class MEMOIR(Editor):
    """FFN(a) = W0 a + W_m (M ⊙ a): edits live in masked columns of a residual memory, read by prompts that match."""

    name: ClassVar[str] = "memoir"
    colour: ClassVar[str] = "#d55e00"
    marker: ClassVar[str] = "o"
    can_forget: ClassVar[bool] = True
    routes: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        layer: Layer  # block of the edited down-projection; paper: 27 of LLaMA-3-8B
        k: Count  # columns in a mask, 1…D; paper: 4096 of 14336
        tau: Share = 0.4  # least overlap ratio that reads the memory; paper: 0.4 on ZsRE, 0.9 on SelfCheckGPT
        feature: Literal["mean", "mean_centred", "last"] = "mean_centred"  # prompt feature; paper: mean_centred
        write: Literal["sgd", "rls"] = "sgd"  # sgd: the paper's; rls: recursive least squares over all keys, beyond it
        iterations: Count = 50  # gradient steps per edit at most; paper: 30 to 70
        learning_rate: Rate = 1.0  # of SGD on W_m (sgd); paper: 1.0
        # constant: the paper's; relative: learning_rate × ‖h‖² / ‖M ⊙ a‖², not the paper's
        step_rule: Literal["constant", "relative"] = "constant"
        weight_decay: NonNegative = 1e-5  # of SGD on all of W_m; paper: 1e-5; each step fades old edits by rate × decay
        clip: NonNegative = 1.0  # gradient norm clip on W_m (sgd), 0: none; paper: 1.0
        stop_loss: NonNegative = 0.01  # nats per token at which an edit is done, 0: never; paper: early stopping
        prefixes: Natural = 10  # copies of the prompt behind random prefixes; paper: 10
        prefix_tokens: Count = 10  # tokens in a random prefix, as ROME's shorter ones
        ahead: Count = 1  # edits whose prompts run through the model together, before the first of them is written
        ridge: Positive = 0.01  # λ of the ridge solution (rls)
        # Keys per column at which W_m is full and a further page of it begun (rls with routing); 0: one page, as in the
        # paper. With as many keys as columns nothing can be held apart any more, and rephrases fail well before.
        fill: NonNegative = 0.5
        value_rate: Rate = 0.3  # of Adam on the values (rls), in units of the stream's root mean square
        value_steps: Count = 8  # steps of Adam on the values at most (rls)
        search: Literal["exact", "hnsw"] = "exact"  # of the nearest mask: exact; hnsw: approximate, for very many edits
        routing: bool = True  # ablation: read the memory on every prompt, by the prompt's own mask
        permute: bool = True  # ablation: leave the mask on the columns it was computed from
        random_mask: bool = False  # ablation: k random columns instead of TopHash
        # An earlier edit that answers this prompt otherwise: it goes, both stay, or this edit is refused.
        on_conflict: Literal["replace", "keep-both", "raise"] = "replace"

    config: Config

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        return dict(layer=layer_at(model, 27 / 32), k=max(1, model.site(0).in_features * 2 // 7))

    def build(self) -> dict[Site, Patch]:
        config, site = self.config, self.model.site(self.config.layer)
        generator = torch.Generator().manual_seed(config.seed)
        self.site = site
        self.memory = ResidualMemory(
            site,
            k=config.k,
            tau=config.tau,
            feature=config.feature,
            permutation=torch.randperm(site.in_features, generator=generator) if config.permute else None,
            device=site.device,
            routing=config.routing,
            random=config.random_mask,
            approximate=config.search == "hnsw",
        )
        self.ahead = config.ahead
        self._turns: list[Turn] = []
        self.factors: dict[str, Factors] = {}
        # By the bank's rows: how far weight decay has faded an "sgd" edit since it was written.
        self.scales = np.ones(0)
        self._solutions: dict[int, RidgeSolution] = {}
        self._prefixes: list[str] | None = None
        return {site: self.memory}

    # Writing ---------------------------------------------------------------------------------------------------------

    def look_ahead(self, requests: list[EditRequest]) -> None:
        """Record the prompts of several turns together: nothing that is written changes what leads up to the site."""
        self._turns = []
        size = self.config.batch_size
        turns = [requests[start : start + size] for start in range(0, len(requests), size)]
        if len(turns) < 2:
            return
        try:
            whole = self._encoded(requests)
        except ValueError:
            return  # what is wrong with one edit is told when its turn comes
        copies = len(whole) // len(requests)
        lengths = whole.attention_mask.sum(1).split([len(turn) * copies for turn in turns])
        widths = [int(length.max()) for length in lengths]
        order = sorted(range(len(turns)), key=widths.__getitem__)  # those of like length together
        found: dict[int, tuple[Tail, slice, Tensor]] = {}
        with self.memory.mute():
            self._measure_background()
            for start in range(0, len(order), TOGETHER):
                some = sorted(order[start : start + TOGETHER])
                rows = [size * copies * i + j for i in some for j in range(len(turns[i]) * copies)]
                tail = self.model.tail(self.site, whole[rows, -max(widths[i] for i in some) :], once=True)
                masks = self._masks(tail, copies)
                end = 0
                for i in some:
                    begin, end = end, end + len(turns[i]) * copies
                    found[i] = tail, slice(begin, end), masks[begin // copies : end // copies]
        behind = None
        for i, turn in enumerate(turns):
            tail, rows, masks = found[i]
            if i and tail is not found[i - 1][0]:
                behind = None
            self._turns.append(self._turn(turn, tail.of(rows), masks, behind))
            descent = self._turns[i].descent
            if behind is not None:
                self._turns[i - 1].then = descent, tail.of(slice(found[i - 1][1].start, rows.stop))
            behind = descent if self.memory.device.type == "cpu" else None

    def write(self, requests: list[EditRequest]) -> list[Written]:
        with self.memory.mute():
            self._measure_background()
            if self._turns and self._turns[0].requests == requests:
                turn = self._turns.pop(0)
            else:
                self._turns = []  # fewer edits were written than were to be written together
                tail = self.model.tail(self.site, self._encoded(requests))
                turn = self._turn(requests, tail, self._masks(tail, len(tail.batch) // len(requests)))
        if (count := self._compatible(requests, turn.masks)) < len(requests):
            requests = requests[:count]
            tail = turn.tail.of(slice(count * (len(turn.owner) // len(turn.requests))))
            turn = self._turn(requests, tail, turn.masks[:count])
        conflicts = self._conflicts(requests, turn.masks)
        replaced = self._replaced(requests, conflicts)
        gone = list(dict.fromkeys(edit_id for ids in replaced for edit_id in ids))  # in order: rounding depends on it
        before = self._snapshot(gone) if gone else None
        try:
            for edit_id in gone:
                self._erase(edit_id)
            if gone and turn.descent is not None:
                turn.descent.restart()
            learn = self._learn_sgd if self.config.write == "sgd" else self._learn_rls
            with self.memory.mute():
                losses, iterations = learn(turn)
        except BaseException:
            if before is not None:
                self._restore(before)
            raise
        self._enter([r.id for r in requests], turn.masks)
        return [
            Written(first, last, iterations, tuple(ids), tuple(against))
            for (first, last), ids, against in zip(losses, replaced, conflicts, strict=True)
        ]

    def _masks(self, tail: Tail, copies: int) -> Tensor:
        """(n × D) bool, the masks of a tail's edits, each of so many rows. A prompt's copies share its mask, which
        comes from the bare prompt: that is what a query will show."""
        bare = tail.of(slice(None, None, copies))
        return self.memory.fingerprint(bare.a, bare.batch.prompt_mask)

    def _turn(self, requests: list[EditRequest], tail: Tail, masks: Tensor, behind: Descent | None = None) -> Turn:
        """What is known of edits before they are written."""
        copies = len(tail.batch) // len(requests)
        owner = torch.arange(len(tail.batch), device=masks.device) // copies
        turn = Turn(requests, tail, masks, owner)
        if self.config.write == "sgd":
            check = self._checking(requests)
            turn.descent = Descent(self.config, self.memory, tail, masks, owner, check, behind)
        return turn

    def _enter(self, ids: Sequence[str], masks: Tensor, scale: float = 1.0) -> None:
        """Have queries find edits that were just written, masks (n × D) bool."""
        self.memory.bank.add(ids, masks)
        self.scales = np.append(self.scales, [scale] * len(ids))
        self.memory.page_of |= dict.fromkeys(ids, self.memory.last)

    def _encoded(self, requests: list[EditRequest]) -> Batch:
        """Each prompt with its target, and behind it the same behind `prefixes` random prefixes."""
        prompts = [
            prompt
            for request in requests
            for prompt in (request.prompt, *(f"{prefix}. {request.prompt}" for prefix in self._random_prefixes()))
        ]
        targets = [request.target for request in requests for _ in range(len(prompts) // len(requests))]
        return self.model.encode(prompts, targets, end=self.config.learn_stop)

    def _random_prefixes(self) -> list[str]:
        """Texts sampled from the unedited model once, as ROME samples its own; the same for every edit."""
        if self._prefixes is None:
            self._prefixes = self.sample_texts(self.config.prefixes, self.config.prefix_tokens)
        return self._prefixes

    def _measure_background(self) -> None:
        """The mean feature of the background prompts, once."""
        if self.config.feature != "mean_centred" or self.memory.background is not None:
            return
        if not self.background:
            raise EditError("feature 'mean_centred' needs background prompts: make_editor(..., background=[texts])")
        total = torch.zeros(self.site.in_features, device=self.memory.weight.device)
        with torch.no_grad():
            for start in range(0, len(self.background), 32):
                batch = self.model.encode(self.background[start : start + 32])
                with watching(self.site) as seen:
                    self.model.forward(batch, positions=1)
                total += pool_prompt(seen[0][0], batch.prompt_mask, "mean").sum(0).to(total)
        self.memory.background = total / len(self.background)

    def _learn_sgd(self, turn: Turn) -> tuple[list[tuple[float, float]], int]:
        """The paper's gradient descent. The last look at these edits takes the first one at the next ones along."""
        descent = turn.descent
        while True:
            self.check_cancelled()
            descent.look(*(turn.then if descent.may_end else ()))
            if descent.ended():
                break
            descent.step()
        losses, steps, shrink = descent.write()
        self.scales *= shrink
        for i, request in enumerate(turn.requests):
            mine, own = slice(None), slice(None)
            if len(turn.requests) > 1:
                mine, own = turn.owner[descent.row_of] == i, turn.masks[i][descent.columns]
            keys, G = trimmed(descent.keys[mine][:, own], descent.G[mine])
            self.factors[request.id] = Factors(keys.cpu(), G.cpu())
        return losses, steps

    def _learn_rls(self, turn: Turn) -> tuple[list[tuple[float, float]], int]:
        """Learn what the projection should put out where the target is predicted, then write it so that nothing moves.

        Z (n × d), the change of the output at the n predicting positions, takes a few steps of Adam; recursive least
        squares writes it as the ridge solution over every key ever written. Not in the paper.
        """
        config, memory, solution = self.config, self.memory, self._with_room()
        requests, tail, batch = turn.requests, turn.tail, turn.tail.batch
        used = places(batch.leading)
        keys, row_of = tail.inputs(used).to(memory.weight), used // batch.input_ids.shape[1]
        masks = turn.masks[turn.owner[row_of]]
        read = memory.read(keys, masks)
        at = places(batch.counted.flatten()[None, used])  # which of them predict what is learned
        predicted_by = turn.owner[row_of[at]]
        Z = torch.zeros_like(read[at], requires_grad=True)
        scale = tail.stream_norm(batch.counted_at)
        optimizer = torch.optim.Adam([Z], lr=config.value_rate * scale / Z.shape[1] ** 0.5)
        ended = Convergence(predicted_by, len(requests), config.stop_loss, self._checking(requests))
        for step in range(config.value_steps + 1):
            self.check_cancelled()
            logits = tail.logits(read.index_add(0, at, Z), batch.counted_at, used)
            losses = cross_entropy(logits.float(), batch.labels, reduction="none")
            if ended.reached(losses) or step == config.value_steps:
                break
            optimizer.zero_grad()
            (losses.mean() * len(requests)).backward()
            before = Z.detach().clone()
            optimizer.step()
            Z.data = ended.kept(Z.data, before)
        K, Z = keys[at] * masks[at], Z.detach()
        values = read[at] + Z
        solution.add(K, values)
        memory.weight.copy_(solution.weight)
        for i, request in enumerate(requests):
            mine, columns = predicted_by == i, turn.masks[i]
            self.factors[request.id] = Factors(K[mine][:, columns].cpu(), values[mine].cpu())
        return ended.outcome()

    def _checking(self, requests: list[EditRequest]) -> Callable[[int, float], float]:
        """Raises where a loss of one of these requests is no number."""
        return lambda i, loss: self.check_loss(loss, requests[i])

    # Forgetting ------------------------------------------------------------------------------------------------------

    def forget(self, edit_id: str) -> None:
        """Take exactly one edit out: W_m loses its term (sgd) or becomes the ridge solution over the others (rls)."""
        if edit_id not in self.edits:
            raise KeyError(f"no edit {edit_id!r} in this editor; it holds {len(self.edits)}")
        self._erase(edit_id)
        del self.edits[edit_id]

    def absorb(self, other: MEMOIR) -> None:
        """Take over another memory's edits, written on the same base with the same settings: its terms are added (sgd),
        or the ridge solution is over both memories' keys (rls). All of them, or none where that fails.

        An edit that both hold is taken from the other. What becomes of one that answers a prompt of the other's
        otherwise is for `on_conflict` to say, as if the other's edits were made now.
        """
        if other.model.fingerprint != self.model.fingerprint:
            raise EditError("memories of two base models cannot be merged")
        if other.model.chat != self.model.chat:
            raise EditError("a memory written with chat=True and one without cannot be merged")
        if other.config != self.config:
            differing = [k for k, v in vars(self.config).items() if getattr(other.config, k) != v]
            raise EditError(f"memories with different settings cannot be merged; they differ in {', '.join(differing)}")
        if not other.edits:
            return
        memory, centre, their_centre = self.memory, self.memory.background, other.memory.background
        # Another machine rounds the same mean otherwise, by far less than this.
        if self.edits and centre is not None and (their_centre.to(centre) - centre).norm() > 1e-3 * centre.norm():
            raise EditError(
                "memories centred on different background prompts cannot be merged: their masks are not comparable; "
                "make both editors with the same background"
            )
        requests, bank = list(other.edits.values()), other.memory.bank
        row_of = {edit_id: row for row, edit_id in enumerate(bank.ids)}
        gone: dict[str, None] = {}
        for some in (requests[start : start + 256] for start in range(0, len(requests), 256)):
            masks = bank.masks(np.array([row_of[request.id] for request in some]))
            gone |= dict.fromkeys(
                edit_id for ids in self._replaced(some, self._conflicts(some, masks)) for edit_id in ids
            )
        before, edits, pages = self._snapshot(gone), dict(self.edits), len(memory.pages)
        try:
            for edit_id in gone:
                self.forget(edit_id)
            for request in requests:
                scale = float(other.scales[row_of[request.id]])
                keys, values = other.pairs(request.id)
                if self.config.write == "sgd":
                    memory.weight.add_(scale * (values.T @ keys))
                else:
                    solution = self._with_room()
                    solution.add(keys, values)
                    memory.weight.copy_(solution.weight)
                row = np.array([row_of[request.id]])
                self._enter([request.id], bank.masks(row), scale)
                self.factors[request.id] = other.factors[request.id]
                self.edits[request.id] = request
        except BaseException:
            del memory.pages[pages:]
            self._restore(before)
            self.edits = edits
            raise
        if not edits:
            self.background, memory.background = other.background, their_centre

    def _erase(self, edit_id: str) -> None:
        memory, page = self.memory, self.memory.page_of[edit_id]
        keys, values = self.pairs(edit_id)
        if self.config.write == "sgd":
            scale = float(self.scales[memory.bank.ids.index(edit_id)])
            memory.weight.sub_(scale * (values.T @ keys))
        else:
            self.solution(page).remove(keys, values)
        del self.factors[edit_id], memory.page_of[edit_id]
        self.scales = np.delete(self.scales, memory.bank.remove(edit_id))
        if page not in memory.page_of.values():  # nothing is left on it, not even what was rounded off
            memory.pages[page].zero_()
            self._solutions.pop(page, None)
        elif self.config.write == "rls":
            if not self._drift(keys, page) <= DRIFT:  # nor where it is no number
                del self._solutions[page]
            memory.pages[page].copy_(self.solution(page).weight)

    def _drift(self, keys: Tensor, page: int) -> float:
        """‖(λI + Σ k kᵀ) P k − k‖ / ‖k‖ for keys (n × D) just taken out of a page, where the error of P is largest."""
        K = keys.T.double()
        X = (K.T @ self.solution(page).inverse).T  # P is symmetric, and tall thin products are slow
        found = self.config.ridge * X
        rows = [row for row, edit_id in enumerate(self.memory.bank.ids) if self.memory.page_of[edit_id] == page]
        masks = self.memory.bank.masks(np.array(rows, dtype=np.int64)).to(K.device)
        for row, mask in zip(rows, masks, strict=True):
            stored = self.factors[self.memory.bank.ids[row]].keys.to(K)
            found[mask] += stored.T @ (stored @ X[mask])
        return float((found - K).norm() / K.norm())

    def pairs(self, edit_id: str) -> tuple[Tensor, Tensor]:
        """An edit's keys in all columns (n × D) and values (n × d), float32, where the memory is."""
        factors, weight = self.factors[edit_id], self.memory.weight
        row = np.array([self.memory.bank.ids.index(edit_id)])
        keys = weight.new_zeros(len(factors.keys), self.site.in_features)
        keys[:, self.memory.bank.masks(row)[0].to(weight.device)] = factors.keys.to(weight.device)
        return keys, factors.values.to(weight.device)

    def _compatible(self, requests: list[EditRequest], masks: Tensor) -> int:
        """How many of these requests, from the first one on, can be written together: not two that contradict each
        other, nor two of the same id."""
        if len(requests) == 1:
            return 1
        overlaps = (masks.float() @ masks.float().T / self.config.k).tolist()  # exact: fewer than 2²⁴ columns
        for i, request in enumerate(requests):
            for other, overlap in zip(requests[:i], overlaps[i], strict=False):
                if request.id == other.id or self._contradicts(request, other, overlap):
                    return i
        return len(requests)

    def _contradicts(self, request: EditRequest, other: EditRequest, overlap: float) -> bool:
        """Whether a prompt would read another edit, and another answer with it."""
        return overlap >= self.config.tau and other.target != request.target and other.id != request.id

    def _conflicts(self, requests: Sequence[EditRequest], masks: Tensor) -> list[list[str]]:
        """For each request, masks (n × D) bool, the stored edits that it contradicts; EditError where none may be."""
        found: list[list[str]] = [[] for _ in requests]
        if not len(self.memory.bank):
            return found
        overlaps = self.memory.bank.overlaps(masks) / self.config.k
        for request, ids, ratios in zip(requests, found, overlaps, strict=True):
            for row in np.flatnonzero(ratios >= self.config.tau):
                other = self.edits[self.memory.bank.ids[row]]
                if not self._contradicts(request, other, ratios[row]):
                    continue
                if self.config.on_conflict == "raise":
                    raise EditError(
                        f"edit {request.id!r} conflicts with edit {other.id!r}: {request.prompt!r} overlaps "
                        f"{other.prompt!r} by {ratios[row]:.2f} ≥ τ = {self.config.tau}, but {request.target!r} is not "
                        f"{other.target!r}; forget that edit, or choose on_conflict"
                    )
                ids.append(other.id)
        return found

    def _replaced(self, requests: Sequence[EditRequest], conflicts: list[list[str]]) -> list[list[str]]:
        """For each request, the stored edits that make room for it: those it contradicts, and one of its own id."""
        return [
            [
                *(ids if self.config.on_conflict == "replace" else []),
                *([request.id] if request.id in self.edits else []),
            ]
            for request, ids in zip(requests, conflicts, strict=True)
        ]

    def _snapshot(self, erased: Iterable[str]) -> tuple:
        """What `_restore` needs to undo that these edits were taken out, and that others were written."""
        memory = self.memory
        pages = {memory.page_of[edit_id] for edit_id in erased} | {memory.last}
        weights = {page: memory.pages[page].clone() for page in pages}
        solutions = {page: solution.clone() for page, solution in self._solutions.items() if page in pages}
        bank = (list(memory.bank.ids), memory.bank.packed.copy())
        return weights, solutions, dict(memory.page_of), dict(self.factors), self.scales.copy(), bank

    def _restore(self, snapshot: tuple) -> None:
        weights, self._solutions, self.memory.page_of, self.factors, self.scales, bank = snapshot
        for page, weight in weights.items():
            self.memory.pages[page].copy_(weight)
        self.memory.bank.replace(*bank)

    def _with_room(self) -> RidgeSolution:
        """The solution of the page that is written, which is a new one where the last is full."""
        config, memory = self.config, self.memory
        solution = self.solution(memory.last)
        if config.routing and config.fill and solution.pairs >= config.fill * self.site.in_features:
            memory.turn_page()
            solution = self.solution(memory.last)
        return solution

    def solution(self, page: int) -> RidgeSolution:
        """The ridge solution over the pairs stored on a page; computed from them where it is not at hand."""
        if page not in self._solutions:
            if len(self._solutions) == AT_HAND:
                del self._solutions[next(p for p in self._solutions if p != self.memory.last)]
            stored = [edit_id for edit_id in self.factors if self.memory.page_of[edit_id] == page]
            pairs = (
                map(torch.cat, zip(*(self.pairs(edit_id) for edit_id in part), strict=True))
                for part in (stored[start : start + 256] for start in range(0, len(stored), 256))
            )
            self._solutions[page] = RidgeSolution.of(pairs, self.config.ridge, self.memory.weight)
        return self._solutions[page]

    # Asking, saving --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def explain(self, prompt: str) -> Explanation:
        batch = self.model.encode([prompt])
        with self.memory.mute(), watching(self.site) as seen:
            self.model.forward(batch, positions=1)
        (a, y), last = seen[0], int(batch.last_prompt[0])
        if not len(self.memory.bank):
            return Explanation(edit_id=None, score=None, threshold=self.config.tau, fired=False, contribution=0.0)
        route = self.memory.route(self.memory.fingerprint(a, batch.prompt_mask))
        after = self.memory.forward(a, y, route)
        moved = float((after - y)[0, last].float().norm() / y[0, last].float().norm().clamp(min=1e-12))
        return Explanation(
            edit_id=self.memory.bank.ids[route.rows[0]],
            score=float(route.overlaps[0]),
            threshold=self.config.tau,
            fired=bool(route.fired[0]),
            contribution=moved,
        )

    @torch.no_grad()
    def matches(self, prompts: Sequence[str]) -> list[str | None]:
        found: list[str | None] = [None] * len(prompts)
        for rows, batch in self.batches(prompts) if len(self.memory.bank) else ():
            a = input_of(self.site, lambda batch=batch: self.model.forward(batch))
            route = self.memory.route(self.memory.fingerprint(a, batch.prompt_mask))
            for i, row, fired in zip(rows, route.rows, route.fired, strict=True):
                found[i] = self.memory.bank.ids[row] if fired else None
        return found

    def settle(self) -> None:
        # The solution is not stored: whoever goes on from a file computes it from the factors, and so does this editor.
        # Nor is a last page that nothing is left on.
        self._solutions.clear()
        del self.memory.pages[1 + max(self.memory.page_of.values(), default=0) :]

    def state(self) -> dict[str, Tensor]:
        memory, factors = self.memory, [self.factors[edit_id] for edit_id in self.memory.bank.ids]
        weight = torch.cat(memory.pages, dim=1)
        columns = weight.any(0).nonzero()[:, 0]
        empty = weight.new_zeros(0)
        place = {edit_id: i for i, edit_id in enumerate(self.edits)}
        tensors = {
            "columns": columns,
            "weight": weight[:, columns],
            "masks": torch.from_numpy(memory.bank.packed.view(np.int64).copy()),
            "order": torch.tensor([place[i] for i in memory.bank.ids], dtype=torch.int64),
            "factor_rows": torch.tensor([len(f.keys) for f in factors], dtype=torch.int64),
            "factor_scales": torch.from_numpy(self.scales.copy()),
            "factor_keys": torch.cat([f.keys for f in factors]) if factors else empty,
            "factor_values": torch.cat([f.values for f in factors]) if factors else empty,
        }
        if len(memory.pages) > 1:
            tensors["pages"] = torch.tensor([memory.page_of[edit_id] for edit_id in memory.bank.ids])
        if memory.permutation is not None:
            tensors["permutation"] = memory.permutation
        if memory.background is not None:
            tensors["background"] = memory.background
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        memory, device = self.memory, self.memory.device
        edit_ids = list(self.edits)
        if memory.permutation is not None:
            memory.permutation.copy_(tensors["permutation"])  # in place: it is looked at from elsewhere too
            if memory.permutation.sort().values.tolist() != list(range(self.site.in_features)):
                raise ValueError(f"permutation is none of the {self.site.in_features} columns")
        if "background" in tensors:
            memory.background = tensors["background"].to(device)
        memory.bank.replace([edit_ids[i] for i in tensors["order"]], tensors["masks"].numpy().view(np.uint64))
        wrong = int((np.bitwise_count(memory.bank.packed).sum(1) != memory.k).sum())
        if wrong:
            raise ValueError(f"{wrong} masks have another number of columns than k = {memory.k}")
        pages = tensors["pages"].tolist() if "pages" in tensors else [0] * len(edit_ids)
        memory.page_of = dict(zip(memory.bank.ids, pages, strict=True))
        for _ in range(max(pages, default=0)):
            memory.turn_page()
        page, column = tensors["columns"] // self.site.in_features, tensors["columns"] % self.site.in_features
        for i, weight in enumerate(memory.pages):
            weight[:, column[page == i].to(device)] = tensors["weight"][:, page == i].to(device)
        rows = tensors["factor_rows"].tolist()
        keys, values = tensors["factor_keys"].split(rows), tensors["factor_values"].split(rows)
        for edit_id, k, v in zip(memory.bank.ids, keys, values, strict=True):
            self.factors[edit_id] = Factors(k, v)
        self.scales = tensors["factor_scales"].double().numpy().copy()
        if self.scales.shape != (len(edit_ids),):
            raise ValueError(f"{self.scales.shape} scales, expected those of {len(edit_ids)} edits")
        self._solutions.clear()


def trimmed(keys: Tensor, G: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The same Gᵀ A with fewer rows: keys A (n × k), G (n × d). Where there are many, of a prompt's copies, as few as
    its rank: relative singular values below the tolerance go."""
    written = G.any(1)
    if not bool(written.all()):
        if not bool(written.any()):
            return keys[:1], G[:1]
        keys, G = keys[written], G[written]
    if len(keys) <= MANY:
        return keys, G
    qa, ra = torch.linalg.qr(keys.T)
    qg, rg = torch.linalg.qr(G.T)
    u, s, vt = (part.to(G) for part in torch.linalg.svd((rg @ ra.T).cpu(), full_matrices=False))  # slow on a GPU
    keep = s > tolerance * s[0]
    return ((qa @ vt[keep].T) * s[keep]).T.contiguous(), (qg @ u[:, keep]).T.contiguous()
