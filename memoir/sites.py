"""Where edits act: a projection (`Site`), what an editor does to its output (`Patch`), the blocks after it (`Tail`).

All hook code of the package lives here. Patches hang on forward hooks, so the host's `state_dict` keys never change,
and removing the hooks restores the model bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module with a weight computes. Accelerate may keep the weight on the CPU or on disk between
    calls and move it for each call; then this is the device that it moves the weight to."""
    return torch.device(module._hf_hook.execution_device) if has_offloaded_params(module) else module.weight.device


@dataclass(frozen=True, eq=False)
class Site:
    """An MLP down-projection y = W0 a + b of one block."""

    layer: int  # block number, counted from 0
    name: str  # dotted path of the projection in the network
    module: nn.Module  # the projection, `nn.Linear` or GPT-2's `Conv1D`
    block: nn.Module  # the transformer block that holds the projection
    mlp: nn.Module  # the block's MLP, which ends in the projection

    @property
    def in_features(self) -> int:
        """D, the width of the inner layer."""
        return self.module.nx if isinstance(self.module, Conv1D) else self.module.in_features

    @property
    def out_features(self) -> int:
        """d, the width of the residual stream."""
        return self.module.nf if isinstance(self.module, Conv1D) else self.module.out_features

    @property
    def device(self) -> torch.device:
        """The device on which the projection computes. Editors keep their additions there."""
        return device_of(self.module)

    @property
    def weight(self) -> Tensor:
        """W0 (d × D), a view for either module layout. RuntimeError if accelerate keeps the weight elsewhere."""
        if has_offloaded_params(self.module):
            raise RuntimeError(f"the weight of {self.name} is offloaded between calls, expected it in memory")
        return self.module.weight.T if isinstance(self.module, Conv1D) else self.module.weight


@dataclass
class Span:
    """The prompt of one forward call, and the decisions that patches took on it."""

    prompt: Tensor | None  # (B × T) bool, the prompt's tokens; None for decoding steps: theirs lies in the KV cache
    memo: dict[Any, Any] = field(default_factory=dict)  # by patch, what it keeps from the prefill to the decoding steps

    @property
    def decoding(self) -> bool:
        return self.prompt is None

    def __deepcopy__(self, memo: dict[int, Any]) -> Span:
        return self  # a copied cache continues from the same prefill

    def __reduce__(self) -> tuple:
        return type(None), ()  # a pickled cache loses its span: decisions do not belong in the user's files


class Patch(Protocol):
    """y' = patch(a, y, span): a (B × T × D) the projection's input, y (B × T × d) its output."""

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor: ...


class DeltaWeight:
    """y + ΔW a. ΔW (d × D) stays apart from W0, in float32, so that small updates survive the host's rounding."""

    def __init__(self, site: Site, device: torch.device | str):
        self.delta = torch.zeros(site.out_features, site.in_features, dtype=torch.float32, device=device)
        self.empty = True

    def set(self, delta: Tensor) -> None:
        """Replace ΔW (d × D). An all-zero ΔW is skipped in the forward pass."""
        self.delta = delta.detach().to(self.delta)
        self.empty = not bool(self.delta.any())

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if self.empty:
            return y
        return (y.float() + a.float() @ self.delta.T).to(y.dtype)


class PromptScope:
    """Tells patches which tokens are the prompt, in every forward call of one network.

    - Teacher forcing declares the prompt: `with scope.prompt(mask): network(...)`.
    - Any other call without a cache, or with an empty one, is a prefill. Its prompt is every attended token.
    - A call whose cache holds tokens is a decoding step. It keeps the span of that cache's prefill, so every sequence
      keeps the decision taken on its prompt. The cache carries the span, so interleaved generations do not mix.

    `narrow(tokens, mask)`, if set, reduces a prefill's mask to the prompt's own tokens: in a chat, to the user's last
    turn. With `use_cache=False` only a declared prompt can be told from generated tokens.
    """

    def __init__(self) -> None:
        self.span: Span | None = None
        self.narrow: Callable[[Tensor, Tensor], Tensor] | None = None
        self._declared: tuple[Tensor, bool] | None = None

    @contextlib.contextmanager
    def prompt(self, mask: Tensor, *, generating: bool = False) -> Iterator[None]:
        """Declare the prompt's tokens, mask (B × T) bool, for the calls inside.

        generating  one row of the mask may stand for several sequences (beams, samples), and generated tokens may
                    follow the prompt
        """
        self._declared, before = (mask, generating), self._declared
        try:
            yield
        finally:
            self._declared = before

    @contextlib.contextmanager
    def using(self, span: Span | None) -> Iterator[None]:
        """Replay part of a forward call under its recorded span."""
        self.span, before = span, self.span
        try:
            yield
        finally:
            self.span = before

    def before_forward(self, network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            raise ValueError("an edited model needs input_ids or inputs_embeds to know its prompt")
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self.span = self._continued(cache, len(tokens))
        else:
            self.span = Span(self._prompt_mask(kwargs.get("attention_mask"), tokens))

    def after_forward(self, network: nn.Module, args: tuple, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None and not self.span.decoding:
            cache.memoir_span = self.span

    def _prompt_mask(self, attention_mask: Tensor | None, tokens: Tensor) -> Tensor:
        (rows, length), device = tokens.shape[:2], tokens.device
        if self._declared is not None:
            mask, generating = self._declared
            (prompts, width), expected = mask.shape, (rows, length)
            if generating and rows % prompts == 0 and width <= length:
                mask = nn.functional.pad(mask.repeat_interleave(rows // prompts, dim=0), (0, length - width))
            if mask.shape != expected:
                raise ValueError(f"prompt mask has shape {(prompts, width)}, expected that of the tokens, {expected}")
            return mask.to(device)
        if attention_mask is None or attention_mask.shape != (rows, length):
            attention_mask = torch.ones(rows, length)
        mask = attention_mask.to(device).bool()
        return mask if self.narrow is None or tokens.dim() != 2 else self.narrow(tokens, mask)

    def _continued(self, cache: Any, rows: int) -> Span:
        prefill = getattr(cache, "memoir_span", None)
        if prefill is None:
            raise RuntimeError("this KV cache was filled before the editor was attached; prefill under the editor")
        if (filled := len(prefill.prompt)) != rows:
            raise RuntimeError(f"decoding {rows} sequences on a cache that was filled with {filled}")
        return Span(None, prefill.memo)


class Attachment:
    """The hooks that attach patches to a network; `remove` removes all of them."""

    def __init__(self, network: nn.Module, scope: PromptScope, patches: dict[Site, Patch]):
        self._scope = scope
        self._hooks = [
            network.register_forward_pre_hook(scope.before_forward, with_kwargs=True),
            network.register_forward_hook(scope.after_forward),
            *(site.module.register_forward_hook(_patching(patch, scope)) for site, patch in patches.items()),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._scope.span = None  # a later call without these hooks must not see an old span


def _patching(patch: Patch, scope: PromptScope) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        # Without a span the module is called on its own, outside a forward call of the network.
        return None if scope.span is None else patch(args[0], output, scope.span)

    return hook


@contextlib.contextmanager
def watching(site: Site) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record (a, y) of every call of a site: input a (B × T × D), output y (B × T × d) with patches applied."""
    seen: list[tuple[Tensor, Tensor]] = []
    with site.module.register_forward_hook(lambda module, args, output: seen.append((args[0], output))):
        yield seen


class _Reached(Exception):
    """Ends a forward call early: nothing after this point is needed."""


def _stop(*call: Any) -> None:
    raise _Reached


def input_of(site: Site, call: Callable[[], Any]) -> Tensor:
    """The input a (B × T × D) that reaches a site during `call`, a forward call of the network. The call ends there."""

    def stop(module: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise _Reached

    seen: list[Tensor] = []
    with contextlib.suppress(_Reached), site.module.register_forward_pre_hook(stop):
        call()
    return seen[0]


def places(mask: Tensor) -> Tensor:
    """(n,) int64: the flat indices at which a mask (B × T) is True, rows laid end to end."""
    return mask.flatten().nonzero()[:, 0]


def taken(values: Tensor, at: Tensor) -> Tensor:
    """(n × …) the values (B × T × …) at flat indices (n,) int64."""
    return values.flatten(0, 1).index_select(0, at.to(values.device))


def _sum(values: Tensor, change: Tensor, changed: Tensor | None) -> Tensor:
    """values (B × T × d) + change: of the same shape, or (m × d) at the flat indices `changed` (m,) int64."""
    change = change.to(values.dtype)
    return values + change if changed is None else values.flatten(0, 1).index_add(0, changed, change).view_as(values)


def rewriting(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Replace a module's output (the first element, if it is a tuple) by change(output) in the calls inside a `with`
    statement."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)


def adding(site: Site, change: Tensor, changed: Tensor | None = None) -> RemovableHandle:
    """Add a change to a site's output in the calls inside a `with` statement: (B × T × d), or (m × d) at flat indices
    `changed` (m,)."""
    return rewriting(site.module, lambda output: _sum(output, change, changed))


@contextlib.contextmanager
def only_at(module: nn.Module, at: Tensor) -> Iterator[None]:
    """Run a token-wise module at some flat indices (n,) int64 only, in the calls inside; its output is 0 elsewhere."""
    shapes: list[torch.Size] = []

    def narrow(module: nn.Module, args: tuple) -> tuple:
        shapes.append(args[0].shape[:2])
        return taken(args[0], at)[None], *args[1:]

    def widen(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        shape, values = shapes.pop(), output[0]
        zeros = values.new_zeros(shape.numel(), values.shape[-1])
        return zeros.index_copy(0, at.to(values.device), values).view(*shape, -1)

    with module.register_forward_pre_hook(narrow), module.register_forward_hook(widen):
        yield


@dataclass(frozen=True, eq=False)
class Tail:
    """A batch recorded at a site, and the blocks after the site, which `logits` replays on a changed output.

    Edits iterate over these blocks alone: what comes before the site does not change while an edit is learned.
    In some families a block does more with its MLP's output than add it (Gemma 3 norms the output first). There the
    blocks cannot be replayed, and `logits` runs the full network with the change added at the site.
    """

    model: Any  # `models.LanguageModel`
    site: Site
    batch: Any  # `text.Batch`, on the site's device
    a: Tensor  # (B × T × D) input of the site
    y: Tensor  # (B × T × d) output of the site, patches included
    stream: Tensor  # (B × T × d) output of the site's block
    composes: bool  # whether the blocks after the site can be replayed
    calls: tuple[tuple[nn.Module, tuple, dict[str, Any]], ...]  # each later block with the arguments of its call
    span: Span | None  # of the recorded call

    @classmethod
    def record(cls, model: Any, site: Site, batch: Any, *, composes: bool = True) -> Tail:
        """Run a batch (`text.Batch`) through a model (`models.LanguageModel`) up to the site, and record it."""
        calls: list[tuple[nn.Module, tuple, dict[str, Any]]] = []
        streams: list[Tensor] = []

        def remember(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.append((block, args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        later = list(model.blocks[site.layer + 1 :]) if composes else []
        hooks = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in later]
        hooks.append(site.block.register_forward_hook(lambda m, args, output: streams.append(_first(output))))
        # The last hook ends the call, since the outputs of later blocks are not needed.
        hooks.append((later[-1].register_forward_pre_hook if later else site.block.register_forward_hook)(_stop))
        with contextlib.ExitStack() as stack, contextlib.suppress(_Reached), torch.no_grad(), watching(site) as seen:
            for hook in hooks:
                stack.enter_context(hook)
            model.forward(batch, positions=1)
        a, y = seen[-1]
        return cls(model, site, batch.to(y.device), a, y, streams[-1], composes, tuple(calls), model.scope.span)

    def of(self, rows: slice) -> Tail:
        """The recording of some rows of the batch."""
        count = len(self.batch)
        return replace(
            self,
            batch=self.batch[rows],
            a=self.a[rows],
            y=self.y[rows],
            stream=self.stream[rows],
            calls=tuple((block, *_of_rows((args, kwargs), rows, count)) for block, args, kwargs in self.calls),
            span=None if self.span is None else Span(self.span.prompt[rows]),
        )

    def inputs(self, at: Tensor) -> Tensor:
        """(n × D) the site's inputs at flat indices (n,) int64."""
        return taken(self.a, at)

    def stream_norm(self, at: Tensor) -> float:
        """Mean norm of the stream after the site's block, h, at flat indices (n,) int64."""
        return float(taken(self.stream, at).float().norm(dim=-1).mean())

    def logits(self, change: Tensor, at: Tensor, changed: Tensor | None = None) -> Tensor:
        """Logits (n × V) at flat indices `at` (n,) int64, with a change added to y.

        change   (B × T × d), or (m × d) if `changed` gives flat indices (m,) int64
        """
        if not self.composes:
            with adding(self.site, change, changed):
                return taken(self.model.forward(self.batch), at)
        hidden = _sum(self.stream, change, changed)
        with self.model.scope.using(self.span), self._last_mlp_only(at):
            for block, args, kwargs in self.calls:
                hidden = _first(block(hidden, *args, **kwargs))
        return self.model.head(self.model.final_norm(taken(hidden, at))).to(self.y.device)

    def _last_mlp_only(self, at: Tensor) -> contextlib.AbstractContextManager:
        """Run the last block's MLP at these flat indices only, unless somebody watches its projection."""
        number = len(self.model.blocks) - 1
        if not self.calls or number not in self.model.dense:
            return contextlib.nullcontext()
        if (last := self.model.site(number)).module._forward_hooks:
            return contextlib.nullcontext()
        return only_at(last.mlp, at)


def composes(model: Any, site: Site, batch: Any) -> bool:
    """Whether replaying the blocks after a site gives the full network's logits for a random change of the output, both
    for a whole batch and for its last row alone."""
    tail, full = Tail.record(model, site, batch), Tail.record(model, site, batch, composes=False)
    at = places(batch.leading)
    change = torch.randn(full.y.shape, generator=torch.Generator().manual_seed(0)).to(full.y)
    change *= full.y.float().norm() / change.float().norm()
    with torch.no_grad():
        expected = full.logits(change, at).float()
        replayed = tail.logits(change, at).float()
        alone = tail.of(slice(-1, None)).logits(change[-1:], places(batch.leading[-1:])).float()
    tolerance = 1e-4 if full.y.dtype == torch.float32 else 3e-2
    replayed = torch.cat([replayed, alone])
    expected = torch.cat([expected, expected[-len(alone) :]])
    return bool((replayed - expected).norm() <= tolerance * expected.norm())


def _of_rows(value: Any, rows: slice, count: int) -> Any:
    """Some rows of what was recorded for a batch of `count`: of every tensor that has one entry for each row."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == count else value
    if isinstance(value, dict):
        return {name: _of_rows(part, rows, count) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_of_rows(part, rows, count) for part in value)
    return value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
