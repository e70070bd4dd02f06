"""What all editors share: the editing loop, asking, saving and loading, attaching and detaching."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from memoir import metrics
from memoir.editors.config import EditorConfig
from memoir.editors.export import Exported, export
from memoir.editors.hub import push
from memoir.editors.storage import MemoryFileError, read_memory, refusing, write_memory
from memoir.models import LanguageModel
from memoir.records import EditReport, EditRequest, Explanation
from memoir.sites import Attachment, Patch, Site, Tail, watching
from memoir.text import Batch

SCRATCH = "scratch."  # in front of the names of tensors that only a run that goes on needs


class EditError(RuntimeError):
    """An edit could not be written; earlier edits are kept."""


class EditCancelled(EditError):
    """An edit was stopped on request; the memory is unchanged."""


@dataclass(frozen=True)
class Written:
    """One edit's report by `Editor.write`: losses in nats per target token, gradient steps, ids of the edits that it
    replaced, ids of the edits that it contradicts."""

    loss_before: float
    loss_after: float
    iterations: int
    replaced: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()


class Editor(ABC):
    """A method at work on one model. Making one attaches it; a model carries one editor at a time.

    A method defines `name`, `Config` and
      build()                the patches on the model's sites; fresh, they are the identity
      write(requests)        writes a batch of edits, all or nothing, and returns one `Written` for each; a method that
                             cannot write all of them together may write only the first ones
      state(), load_state()  its tensors by name, for saving and loading
    """

    name: ClassVar[str]  # in commands and file names
    label: ClassVar[str]  # in tables and figures; default: the class's own name, as the paper writes it
    colour: ClassVar[str] = "#000000"  # in figures
    marker: ClassVar[str] = "."  # in figures
    Config: ClassVar[type[EditorConfig]]
    changes_model: ClassVar[bool] = True  # False for rows of a table that no method stands behind
    can_forget: ClassVar[bool] = False
    routes: ClassVar[bool] = False  # whether each prompt reads one edit, or none
    rewrite: ClassVar[Callable[..., list[str]] | None] = None  # maps prompts to those the model is asked instead
    measure: ClassVar[str] = "overlap"  # what `Explanation.score` is, for reports and the panel
    presets_of: ClassVar[str | None] = None  # the method whose presets this one uses; None: its own
    ahead: int = 1  # edits of a list that `look_ahead` receives at once

    def __init__(self, model: LanguageModel, config: EditorConfig, background: Sequence[str] = ()):
        """background: texts irrelevant to all edits, on which MEMOIR and WISE measure the usual activations."""
        self.model, self.config, self.background = model, config, tuple(background)
        self.edits: dict[str, EditRequest] = {}
        self._attachment: Attachment | None = None
        self._cancelled: Callable[[], bool] = lambda: False
        self._stepped: Callable[[float], None] = lambda loss: None
        self.patches: dict[Site, Patch] = self.build()
        self.attach()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "label" not in vars(cls):
            cls.label = cls.__name__

    # What a method defines -------------------------------------------------------------------------------------------

    @classmethod
    def defaults(cls, model: LanguageModel) -> dict[str, Any]:
        """Settings for a model that has no row in `presets.py`, the layer above all."""
        return {}

    @abstractmethod
    def build(self) -> dict[Site, Patch]: ...

    @abstractmethod
    def write(self, requests: list[EditRequest]) -> list[Written]: ...

    def check(self, request: EditRequest) -> None:  # noqa: B027 - most methods take every request
        """Raise ValueError if this method cannot write an edit. Runs check all edits before they make the first one."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def load_state(self, tensors: dict[str, Tensor]) -> None: ...

    def prepare(self) -> None:  # noqa: B027 - most methods have nothing to prepare
        """Measure once what the method needs before its first edit. Every `edit` calls this, outside of its timing."""

    def look_ahead(self, requests: list[EditRequest]) -> None:  # noqa: B027 - most methods take each edit as it comes
        """Do what can be done for several edits together, before the first of them is written."""

    def forget(self, edit_id: str) -> None:
        """Take one edit out again, if the method can."""
        raise EditError(f"{self.name} cannot forget a single edit; memoir can")

    def lookup(self, prompts: Sequence[str]) -> list[Explanation]:
        """For each prompt the stored edit that it meets, if the method routes; without `contribution`."""
        return [Explanation(fired=bool(self.edits))] * len(prompts)

    def explain(self, prompt: str) -> Explanation:
        """Which edit a prompt meets, and what it does to the answer."""
        (found,) = self.lookup([prompt])
        return replace(found, contribution=self.contribution(prompt)) if found.fired else found

    def matches(self, prompts: Sequence[str]) -> list[str | None] | None:
        """For each prompt the id of the edit that it reads, or None. Methods that do not route return no list."""
        return [found.edit_id if found.fired else None for found in self.lookup(prompts)] if self.routes else None

    @property
    def tau(self) -> float | None:
        """The overlap from which on a prompt reads an edit; None for a method that does not route by overlap."""
        return None

    # Editing ---------------------------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """How many edits of a list `look_ahead` receives at once: whole batches."""
        size = self.config.batch_size
        return max(size, self.ahead // size * size)

    def edit(
        self,
        requests: EditRequest | Iterable[EditRequest],
        *,
        progress: bool = False,
        cancelled: Callable[[], bool] | None = None,
        stepped: Callable[[float], None] | None = None,
        check: bool = True,
    ) -> list[EditReport]:
        """Write edits one after the other (`batch_size` at a time), on top of the edits already made.

        progress   show a text bar
        cancelled  called between steps; once it returns true, EditCancelled is raised and the memory is as it was
                   before the interrupted edit
        stepped    called after each step with the highest loss of the edits that are written
        check      ask the model each edit's prompt once the edit is written, for the report's `learned`. Turn this off
                   for long lists of edits that are evaluated afterwards anyway
        """
        requests = [requests] if isinstance(requests, EditRequest) else list(requests)
        for request in requests:
            if not isinstance(request, EditRequest):
                raise TypeError(f"an edit is {type(request).__name__}, expected EditRequest")
        if self._attachment is None:
            raise EditError(f"this {self.name} editor is detached; call attach() first")
        self._cancelled = cancelled or self._cancelled
        self._stepped = stepped or self._stepped
        reports: list[EditReport] = []
        size = self.config.batch_size
        bar = tqdm(total=len(requests), desc=self.name, unit="edit", disable=not progress)
        try:
            self.prepare()
            for start in range(0, len(requests), self.window):
                waiting = requests[start : start + self.window]
                self.check_cancelled()
                began = time.perf_counter()
                self.look_ahead(waiting)
                shared = (time.perf_counter() - began) / len(waiting)
                while waiting:
                    self.check_cancelled()
                    began = time.perf_counter()
                    written = self.write(waiting[:size])
                    assert 0 < len(written) <= size, f"{self.name} wrote {len(written)} of {size} edits"
                    seconds = shared + (time.perf_counter() - began) / len(written)
                    made, waiting = waiting[: len(written)], waiting[len(written) :]
                    for request, outcome in zip(made, written, strict=True):
                        for edit_id in (request.id, *outcome.replaced):
                            self.edits.pop(edit_id, None)
                        self.edits[request.id] = request
                    learned = self.learned(made) if check else [None] * len(made)
                    for request, outcome, known in zip(made, written, learned, strict=True):
                        measured = dict(seconds=seconds, learned=known, together=len(made))
                        reports.append(EditReport(edit_id=request.id, **vars(outcome), **measured))
                    bar.update(len(made))
        finally:
            bar.close()
            self._cancelled, self._stepped = lambda: False, lambda loss: None
        return reports

    def check_cancelled(self) -> None:
        """Raise EditCancelled if the caller of `edit` wants to stop. Methods call this in their loops."""
        if self._cancelled():
            raise EditCancelled(f"{self.name}: cancelled; the memory is as before the interrupted edit")

    def check_losses(self, losses: list[float], requests: Sequence[EditRequest]) -> list[float]:
        """The losses themselves. EditError names the edit whose loss is not a finite number."""
        for loss, request in zip(losses, requests, strict=True):
            if not math.isfinite(loss):
                raise EditError(f"{self.name}: the loss of edit {request.id!r} ({request.prompt[:60]!r}) became {loss}")
        self._stepped(max(losses))
        return losses

    def encode_edits(self, requests: Sequence[EditRequest]) -> Batch:
        """Prompts with their targets, in the form in which this editor learns them."""
        return self.model.encode([r.prompt for r in requests], [r.target for r in requests], end=self.config.learn_stop)

    @torch.no_grad()
    def losses(self, requests: Sequence[EditRequest]) -> list[float]:
        """Mean negative log-likelihood of each request's target under the present model, in nats per token."""
        batch = self.encode_edits(requests)
        return batch.losses(self.model.forward(batch)[batch.counted]).tolist()

    def sample_texts(self, count: int, tokens: int) -> list[str]:
        """Texts of `tokens` tokens sampled from the unedited model, as ROME makes its random prefixes; seeded."""
        with self.detached():
            return self.model.sample(count, tokens, seed=self.config.seed)

    # Asking ----------------------------------------------------------------------------------------------------------

    def ask(self, prompt: str, *, max_new_tokens: int = 32) -> str:
        """The edited model's greedy answer, until the model stops by itself."""
        return self.model.generate(prompt, max_new_tokens=max_new_tokens)

    def free_answers(self, requests: Sequence[EditRequest]) -> list[str]:
        """The edited model's greedy answers to some edits' prompts, up to four tokens longer than the longest target:
        enough to see an answer go on behind its target."""
        targets = [f" {request.target}" for request in requests]
        longest = max(map(len, self.model.tokenizer(targets, add_special_tokens=False)["input_ids"]))
        return self.model.generate([request.prompt for request in requests], max_new_tokens=longest + 4)

    def learned(self, requests: Sequence[EditRequest]) -> list[bool]:
        """Whether the edited model says what each of some edits taught, asked the edit's own prompt."""
        answers = self.free_answers(requests)
        return [self.says(answer, request.target) for answer, request in zip(answers, requests, strict=True)]

    def says(self, answer: str, target: str) -> bool:
        """Whether a free answer is the target, or begins with it where this editor does not teach the model to stop."""
        stops = self.changes_model and self.config.learn_stop
        return bool((metrics.generated if stops else metrics.begins)(answer, target))

    @torch.no_grad()
    def contribution(self, prompt: str) -> float:
        """‖y' − y‖ / ‖y‖ at the last prompt token, summed over this editor's sites."""
        batch = self.model.encode([prompt])
        last = int(batch.last_prompt[0])

        def outputs() -> list[Tensor]:
            with contextlib.ExitStack() as stack:
                seen = [stack.enter_context(watching(site)) for site in self.patches]
                self.model.forward(batch, positions=1)
            return [calls[0][1][0, last].float() for calls in seen]

        after = outputs()
        with self.detached():
            before = outputs()
        pairs = zip(before, after, strict=True)
        return sum((float((y - y0).norm() / y0.norm().clamp(min=1e-12)) for y0, y in pairs), 0.0)

    # Saving ----------------------------------------------------------------------------------------------------------

    def settle(self) -> None:  # noqa: B027 - most methods hold nothing beyond `state`
        """Bring the editor into exactly the state that loading what it saves would give."""

    def scratch(self) -> dict[str, Tensor]:
        """State that `state()` determines up to rounding; saved so that a resumed run continues bit for bit."""
        return {}

    def load_scratch(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 - most methods hold nothing beyond `state`
        """Take back, after `load_state`, what `scratch` gave."""

    def save(self, folder: str | os.PathLike, *, run: dict[str, Any] | None = None) -> Path:
        """Write this editor's memory to a folder, atomically, and return the path. `memoir.load_editor(folder, model)`
        loads it. MemoryFileError if the folder holds anything but an older memory.

        run  what else a run that goes on from here needs, JSON. Then the editor's scratch is kept, too, instead of
             settling the editor: whether a run saves does not show in its results
        """
        tensors: dict[str, Tensor] = {}
        if run is None:
            self.settle()
        else:
            tensors = {SCRATCH + name: value for name, value in self.scratch().items()}
        header = {
            "method": self.name,
            "config": asdict(self.config),
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "dtype": self.model.dtype_name,
            "rounded": self.model.rounded,
            "chat": self.model.chat,
            "background": list(self.background),
            **({} if run is None else {"run": run}),
        }
        return write_memory(folder, header, list(self.edits.values()), self.state() | tensors)

    def export(self, folder: str | os.PathLike) -> Exported:
        """Write the edited model as a plain transformers checkpoint, and tell what rounding cost. Only for methods that
        add a ΔW to weights: ExportError says what to do with the others."""
        return export(self, folder)

    def resume(self, folder: str | os.PathLike, *, allow_dtype: bool = False) -> dict[str, Any]:
        """Load into this fresh editor what `save` wrote, and return the file's header.

        allow_dtype  also where it was written on the same weights in another dtype: answers then agree up to
                     rounding

        MemoryFileError if the file is damaged, or belongs to another base model, method or configuration.
        """
        if self.edits:
            raise EditError(f"this {self.name} editor holds {len(self.edits)} edits already; resume with a fresh one")
        header, edits, tensors = read_memory(folder)
        check_base(folder, header, self.model, allow_dtype)
        differing = ["the method"]
        if header["method"] == self.name:
            # A setting that is younger than the file has its default.
            with refusing(f"{folder} holds settings that no {self.name} editor has"):
                stored = vars(self.Config(**header["config"]))
            differing = [name for name, value in vars(self.config).items() if stored[name] != value]
            if tuple(header["background"]) != self.background:
                differing.append("background")
        if differing:
            raise MemoryFileError(
                f"{folder} holds a run of {header['method']} with other settings than this {self.name} editor's"
                f" (they differ in {', '.join(differing)})"
            )
        self.edits = {edit.id: edit for edit in edits}
        with refusing(f"{folder} is damaged: its tensors do not fit its {len(edits)} edits by {self.name}"):
            self.load_state({name: value for name, value in tensors.items() if not name.startswith(SCRATCH)})
            self.load_scratch({name[len(SCRATCH) :]: tensors[name] for name in tensors if name.startswith(SCRATCH)})
        return header

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload this editor's memory and a model card to the Hugging Face hub; return the repository's address."""
        return push(self, repo_id, private=private, token=token)

    # Attaching -------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Attach the patches to the model. An editor that was attached before is detached."""
        if self.model.editor is not None and self.model.editor is not self:
            self.model.editor.detach()
        if self._attachment is None:
            self._attachment = Attachment(self.model.network, self.model.scope, self.patches)
        self.model.editor = self
        self.model.rewrite = self.rewrite

    def detach(self) -> None:
        """Remove the patches. The model is bit for bit the original one."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None
        if self.model.editor is self:
            self.model.editor = self.model.rewrite = None

    @contextlib.contextmanager
    def detached(self) -> Iterator[LanguageModel]:
        """`with editor.detached() as model:` gives the unedited model; afterwards the editor is attached again."""
        was_attached = self._attachment is not None
        self.detach()
        try:
            yield self.model
        finally:
            if was_attached:
                self.attach()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.edits)} edits on {self.model.name}, {json.dumps(vars(self.config))})"


def target_losses(tail: Tail, change: Tensor) -> Tensor:
    """(B,) mean −log p of each row's learned tokens, in nats, once change (B × T × d) is added to the site's output."""
    return tail.batch.losses(tail.logits(change, tail.batch.counted_at))


def check_base(
    folder: str | os.PathLike, header: dict[str, Any], model: LanguageModel, allow_dtype: bool = False
) -> None:
    """MemoryFileError unless a memory file was written on this model."""
    own = model.dtype_name
    written, rounded = header["dtype"], header["rounded"]
    if header["fingerprint"] == model.fingerprint:
        if (written, rounded) != (own, model.rounded):
            raise MemoryFileError(f"{folder} is damaged: its dtype {written!r} does not belong to its fingerprint")
    else:
        # The same weights agree once the finer ones are rounded to the coarser dtype.
        coarser = {written, own} & set(model.rounded)
        same = len(coarser) == 1 and rounded.get(coarser.pop()) in model.rounded.values()
        if not same or written == own:
            theirs = f"{header['model']} ({header['fingerprint'][:12]}…, {written})"
            ours = f"{model.name} ({model.fingerprint[:12]}…, {own})"
            raise MemoryFileError(f"{folder} was written on {theirs}; this model is {ours}")
        if not allow_dtype:
            raise MemoryFileError(
                f"{folder} was written on {header['model']} in {written}; this is the same model in {own}: load it "
                f"with dtype={written!r}, or the memory with allow_dtype=True"
            )
    if (chat := header["chat"]) != model.chat:  # the chat template changes every prompt's fingerprint
        raise MemoryFileError(
            f"{folder} was written on {header['model']} with chat={chat}; this model was opened with chat={model.chat}"
        )
