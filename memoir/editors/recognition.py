"""How MEMOIR recognises an edit: the fingerprints of prompts, τ, and what the memory decides for a question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from memoir import calibration
from memoir.editors.base import EditError, Editor
from memoir.editors.config import Count, EditorConfig, Layer, Share
from memoir.memory import Features, ResidualMemory, Route, Subjects, TokenMasks, pool_prompt
from memoir.records import EditRequest, Explanation
from memoir.sites import Patch, Site, input_of, watching
from memoir.text import Batch, subject_tokens


@dataclass(frozen=True, kw_only=True)
class RecognitionConfig(EditorConfig):
    """Settings of which edit a prompt reads."""

    layer: Layer  # block of the edited down-projection; paper: 27 of LLaMA-3-8B
    k: Count  # columns in a mask, up to D; paper: 4096 of 14336
    # Least overlap ratio that reads the memory; paper: 0.4 on ZsRE, 0.9 on SelfCheckGPT. auto: see `calibration`
    tau: Share | Literal["auto"] = "auto"
    unrelated_share: Share = 0.01  # of unrelated questions that may read the memory, for tau="auto"
    feature: Literal["mean", "mean_centred", "last"] = "mean_centred"  # prompt feature; paper: mean_centred
    subject_layer: Layer | None = None  # beyond the paper: a block that tells subjects apart, see `memory.Subjects`
    subject_share: Share = 0.2  # the subject's weight in R_match; needs subject_layer
    permute: bool = True  # ablation: False leaves the mask on the columns that it was computed from
    random_mask: bool = False  # ablation: k random columns instead of TopHash
    routing: bool = True  # ablation: False reads the memory on every prompt, by the prompt's own mask


class RecognisingEditor(Editor):
    """The reading side of MEMOIR: fingerprints, τ and routing. Subclasses write."""

    routes: ClassVar[bool] = True
    config: RecognitionConfig

    def build(self) -> dict[Site, Patch]:
        config, self.site, subjects = self.config, self.model.site(self.config.layer), self._subjects()
        order = torch.randperm(self.site.in_features, generator=torch.Generator().manual_seed(config.seed))
        self.memory = ResidualMemory(
            self.site,
            k=config.k,
            tau=1.0 if config.tau == "auto" else config.tau,
            feature=config.feature,
            permutation=order if config.permute else None,
            device=self.site.device,
            routing=config.routing,
            random=config.random_mask,
            subjects=subjects,
        )
        self._usual: Features | None = None  # of the background texts
        self._unrelated: tuple[Tensor, TokenMasks | None] | None = None  # see `unrelated`
        self._calibrated_at: int | None = None  # number of edits when τ was set
        return {self.site: self.memory} | ({subjects.site: subjects} if subjects else {})

    def _subjects(self) -> Subjects | None:
        layer, share = self.config.subject_layer, self.config.subject_share
        if layer is None:
            return None
        if layer >= self.config.layer:
            raise ValueError(f"subject_layer = {layer}, expected a block before layer = {self.config.layer}")
        return Subjects(self.model.site(layer), max(1, round(self.config.k * share / max(1 - share, 1e-6))))

    # Fingerprints ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def features(self, prompts: Sequence[str], feature: str) -> Features:
        """A feature of each prompt, and where subjects count the masks of their tokens; without the memory."""
        features = torch.zeros(len(prompts), self.site.in_features, device=self.memory.device)
        parts: list[tuple[np.ndarray, Tensor]] = []
        with self.detached(), self._early_inputs() as early:
            for rows, a, prompt in self.model.site_inputs(self.site, prompts):
                features[rows] = pool_prompt(a, prompt, feature, self.memory.background).to(features)
                if early:
                    tokens = self.memory.tokens(early.pop()[0], prompt)
                    parts.append((np.array(rows)[tokens.owner], tokens.masks))
        if not parts:
            return Features(features)
        owner = np.concatenate([owner for owner, _ in parts])
        order = owner.argsort(kind="stable")
        return Features(features, TokenMasks(torch.cat([masks for _, masks in parts])[order], owner[order]))

    def _early_inputs(self) -> AbstractContextManager[list[tuple[Tensor, Tensor]]]:
        """Record (a, y) of the block that tells subjects apart; always empty without such a block."""
        return watching(self.memory.subjects.site) if self.memory.subjects else nullcontext([])

    def stored(self, requests: Sequence[EditRequest], a: Tensor, early: Tensor | None, batch: Batch) -> Tensor:
        """(n × D) bool, the masks of edits as the bank stores them. Where subjects count, each is followed by that of
        its subject's last token, or of the prompt's last token if no subject is named there.

        a (n × T × D) and early (n × T × D′) are the inputs on the bare prompts, with which the batch's n rows begin.
        """
        masks = self.memory.fingerprint(a, batch.prompt_mask)
        if early is None:
            return masks
        at, first = batch.last_prompt.tolist(), batch.attention_mask.int().argmax(1).tolist()
        for i, request in enumerate(requests):
            with suppress(ValueError):
                at[i] = first[i] + subject_tokens(self.model, request.prompt, request.subject)[1]
        only = torch.zeros_like(batch.prompt_mask)
        only[torch.arange(len(at)), at] = True
        return torch.cat([masks, self.memory.tokens(early, only).masks], dim=1)

    @torch.no_grad()
    def stored_prompts(self, requests: Sequence[EditRequest]) -> Tensor:
        """The same for edits that are not written."""
        parts = []
        for some in (requests[start : start + 32] for start in range(0, len(requests), 32)):
            batch = self.model.encode([request.prompt for request in some])
            with self.detached(), self._early_inputs() as early:
                a = input_of(self.site, lambda batch=batch: self.model.forward(batch, positions=1))
            parts.append(self.stored(some, a, early[-1][0] if early else None, batch))
        return torch.cat(parts)

    # τ ---------------------------------------------------------------------------------------------------------------

    def _measure_background(self) -> None:
        """Run the background texts through the model, once: their mean centres features, their masks calibrate τ.
        EditError without background texts."""
        memory, centred = self.memory, self.config.feature == "mean_centred"
        if not self.background:
            needs = "feature 'mean_centred'" if centred else "tau 'auto'"
            raise EditError(f"{needs} needs background prompts: make_editor(..., background=[texts])")
        self._usual = usual = self.background_features("mean" if centred else self.config.feature)
        if centred and memory.background is None:
            memory.background = usual.pooled.mean(0)
        self._unrelated = memory.hashed(usual.pooled - memory.background if centred else usual.pooled), usual.tokens

    def background_features(self, feature: str) -> Features:
        """A feature of each background text. The editors of one model share them: the texts pass the model once."""
        subjects = self.memory.subjects
        key = ("background", self.site.name, feature, subjects and subjects.name, *self.background)
        return self.model.shared(key, lambda: self.features(self.background, feature))

    @property
    def unrelated(self) -> tuple[Tensor, TokenMasks | None]:
        """The masks of the background texts, (n × D) bool, and of their tokens where subjects count."""
        if self._unrelated is None:
            self._measure_background()
        return self._unrelated

    def calibrate(self) -> float:
        """Set τ so that `unrelated_share` of the background texts read the memory, and return it; see `calibration`."""
        masks, tokens = self.unrelated
        if len(masks) < 2:
            raise EditError(f"tau 'auto' needs at least 2 background texts to compare, got {len(masks)}")
        overlaps = calibration.nearest_overlaps(masks, self.memory.bank, tokens)
        self.memory.tau = calibration.pick(overlaps, self.config.unrelated_share)
        self._calibrated_at = len(self.memory.bank)
        return self.memory.tau

    @property
    def calibrated(self) -> bool:
        """Whether τ was measured on this model and is no setting."""
        return self.config.tau == "auto" and self._calibrated_at is not None

    def calibrate_if_due(self) -> None:
        if self.config.tau == "auto" and calibration.due(len(self.memory.bank), self._calibrated_at):
            self.calibrate()

    # Asking ----------------------------------------------------------------------------------------------------------

    @property
    def tau(self) -> float | None:
        return self.memory.tau if self.config.routing else None

    def lookup(self, prompts: Sequence[str]) -> list[Explanation]:
        bank, tau = self.memory.bank, self.memory.tau
        found = [Explanation(threshold=tau)] * len(prompts)
        for numbers, route in self.decisions(prompts) if len(bank) else ():
            for i, row, overlap, fired in zip(numbers, route.rows, route.overlaps, route.fired, strict=True):
                found[i] = Explanation(edit_id=bank.ids[row], score=float(overlap), threshold=tau, fired=bool(fired))
        return found

    @torch.no_grad()
    def decisions(self, prompts: Sequence[str]) -> Iterator[tuple[list[int], Route]]:
        """What the memory decides for each prompt, in batches of similar length: (row numbers, decision)."""
        with self._early_inputs() as early:
            for rows, a, prompt in self.model.site_inputs(self.site, prompts):
                tokens = self.memory.tokens(early.pop()[0], prompt) if early else None
                yield rows, self.memory.route(self.memory.fingerprint(a, prompt), tokens)
