"""Where edits act: a projection (`Site`), what an editor makes of its output (`Patch`), the model behind it (`Tail`).

All hook code of the house lives here. Patches hang on forward hooks: the host's `state_dict` keys never change, and
removing the hooks gives the model back bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def device_of(module: nn.Module) -> torch.device:
    """Where a module with a weight computes: where the weight is or, where accelerate keeps that on the CPU or on disk
    between calls, where it brings it for a call."""
    return torch.device(module._hf_hook.execution_device) if has_offloaded_params(module) else module.weight.device


@dataclass(frozen=True, eq=False)
class Site:
    """An MLP down-projection y = W0 a + b of one block.

    layer   block number, 0-based
    name    dotted path of the projection in the network
    module  the projection, `nn.Linear` or GPT-2's `Conv1D`
    block   the transformer block that holds it
    mlp     the MLP in it that the projection ends
    """

    layer: int
    name: str
    module: nn.Module
    block: nn.Module
    mlp: nn.Module

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
        """Where the projection computes, and so what an editor adds to it."""
        return device_of(self.module)

    @property
    def weight(self) -> Tensor:
        """W0 (d × D), a view whatever the module's own layout; RuntimeError where accelerate keeps it elsewhere."""
        if has_offloaded_params(self.module):
            raise RuntimeError(f"the weight of {self.name} is offloaded between calls, expected it in memory")
        return self.module.weight.T if isinstance(self.module, Conv1D) else self.module.weight


@dataclass
class Span:
    """Which tokens of a forward call are the prompt, and what was decided about them.

    prompt  (B × T) bool; None while a KV cache grows past the prefill
    memo    what patches keep from the prefill to the decoding steps, by patch
    """

    prompt: Tensor | None
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def decoding(self) -> bool:
        return self.prompt is None

    def __deepcopy__(self, memo: dict[int, Any]) -> Span:
        return self  # a copied cache goes on from the same prefill

    def __reduce__(self) -> tuple:
        return type(None), ()  # and a saved one has none: what patches keep does not go into the user's files


class Patch(Protocol):
    """y' = patch(a, y, span): a (B × T × D) the projection's input, y (B × T × d) its output."""

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor: ...


class DeltaWeight:
    """y + ΔW a, with ΔW (d × D) kept apart in float32, so that small updates do not drown in the host's rounding."""

    def __init__(self, site: Site, device: torch.device | str):
        self.delta = torch.zeros(site.out_features, site.in_features, dtype=torch.float32, device=device)
        self.empty = True

    def set(self, delta: Tensor) -> None:
        """Take ΔW (d × D); all-zero means no edit yet, and costs nothing."""
        self.delta = delta.detach().to(self.delta)
        self.empty = not bool(self.delta.any())

    def __call__(self, a: Tensor, y: Tensor, span: Span) -> Tensor:
        if self.empty:
            return y
        return (y.float() + a.float() @ self.delta.T).to(y.dtype)


class PromptScope:
    """Tells patches which tokens are the prompt, in every forward call of one network.

    - Teacher forcing declares it: `with scope.prompt(mask): network(...)`.
    - Otherwise a call without a cache, or with an empty one, is a prefill: its prompt is what the attention mask
      admits.
    - A call whose cache already holds tokens is decoding: the span of that cache's prefill stays in force, so every
      sequence keeps the decision taken on its prompt. Interleaved generations do not mix: a cache carries its span, and
      so do its copies.

    `narrow(tokens, mask)`, where it is set, cuts the mask of a prefill down to the prompt's own tokens: of a chat, to
    the user's last turn. Without a cache (`use_cache=False`) only a declared prompt is told from the tokens generated.
    """

    def __init__(self) -> None:
        self.span: Span | None = None
        self.narrow: Callable[[Tensor, Tensor], Tensor] | None = None
        self._declared: tuple[Tensor, bool] | None = None

    @contextlib.contextmanager
    def prompt(self, mask: Tensor, *, generating: bool = False) -> Iterator[None]:
        """Declare the prompt's tokens, mask (B × T) bool, for the calls inside.

        generating  a row may stand for several sequences (beams, samples), and tokens may follow it (without a cache)
        """
        self._declared, before = (mask, generating), self._declared
        try:
            yield
        finally:
            self._declared = before

    @contextlib.contextmanager
    def using(self, span: Span | None) -> Iterator[None]:
        """Put a recorded span in force, to replay part of a forward call."""
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
            return
        self.span = Span(self._prompt_mask(kwargs.get("attention_mask"), tokens))

    def after_forward(self, network: nn.Module, args: tuple, output: Any) -> None:
        if self.span is None or self.span.decoding:
            return
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
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
        if attention_mask is not None and attention_mask.shape == (rows, length):
            mask = attention_mask.to(device).bool()
        else:
            mask = torch.ones(rows, length, dtype=torch.bool, device=device)
        return mask if self.narrow is None or tokens.dim() != 2 else self.narrow(tokens, mask)

    def _continued(self, cache: Any, rows: int) -> Span:
        prefill = getattr(cache, "memoir_span", None)
        if prefill is None:
            raise RuntimeError(
                "this KV cache was filled before the editor was attached; prefill again under the editor"
            )
        if prefill.prompt is not None and prefill.prompt.shape[0] != rows:
            found, expected = rows, prefill.prompt.shape[0]
            raise RuntimeError(f"decoding {found} sequences on a cache that was filled with {expected}")
        return Span(None, prefill.memo)


class Attachment:
    """The hooks that hang patches on a network; `remove` takes all of them away."""

    def __init__(self, network: nn.Module, scope: PromptScope, patches: dict[Site, Patch]):
        self._handles = [
            network.register_forward_pre_hook(scope.before_forward, with_kwargs=True),
            network.register_forward_hook(scope.after_forward),
        ]
        for site, patch in patches.items():
            self._handles.append(site.module.register_forward_hook(_patching(patch, scope)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _patching(patch: Patch, scope: PromptScope):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if scope.span is None:
            return None  # the projection was called on its own, outside a forward call of the network
        return patch(args[0], output, scope.span)

    return hook


@contextlib.contextmanager
def watching(site: Site) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record (a, y) of every call of a site, y as the patches left it: a (B × T × D), y (B × T × d)."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = site.module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    try:
        yield seen
    finally:
        handle.remove()


class _Reached(Exception):
    """A forward call has come to a site; what lies behind it is not wanted."""


def input_of(site: Site, call: Callable[[], Any]) -> Tensor:
    """The input a (B × T × D) that a forward call of the network shows a site, running nothing behind it."""

    def stop(module: nn.Module, args: tuple) -> None:
        seen.append(args[0])
        raise _Reached

    seen: list[Tensor] = []
    handle = site.module.register_forward_pre_hook(stop)
    try:
        call()
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError(f"the call did not come to {site.name}")


def places(mask: Tensor) -> Tensor:
    """(n,) int64: where a mask (B × T) is True, a token's place being its number in the rows laid end to end."""
    return mask.flatten().nonzero()[:, 0]


def taken(values: Tensor, at: Tensor) -> Tensor:
    """(n × …) the values (B × T × …) at the places (n,) int64."""
    return values.flatten(0, 1).index_select(0, at.to(values.device))


def _sum(values: Tensor, change: Tensor, changed: Tensor | None) -> Tensor:
    """values (B × T × d) + change, of the same shape or (m × d) at the places `changed` (m,) int64."""
    change = change.to(values.dtype)
    return values + change if changed is None else values.flatten(0, 1).index_add(0, changed, change).view_as(values)


@contextlib.contextmanager
def adding(site: Site, change: Tensor, changed: Tensor | None = None) -> Iterator[None]:
    """Add change to a site's output in the calls inside: (B × T × d), or (m × d) at the places `changed` (m,) int64."""
    handle = site.module.register_forward_hook(lambda module, args, output: _sum(output, change, changed))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def rewriting(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put change(output) in the place of what a module puts out (of a tuple, its first part) in the calls inside."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Tail:
    """What lies behind a site, replayed on a changed output of it without running what lies before.

    One forward call records the input of the site, the stream behind its block and the arguments with which each later
    block is called, and ends there; `logits` replays those blocks, the final norm and the head, at the places asked for
    only: the last block's MLP too, behind which no token sees another.
    Where a block does more with its MLP's output than add it (Gemma's later models norm it first), the replay would be
    wrong: `composes` finds out, and `whole=True` runs the full network with the change added at the site instead.

    a       (B × T × D) the site's input
    y       (B × T × d) its output, patches included
    stream  (B × T × d) the output of the site's block
    batch   the recorded `models.Batch`, on the device of these, wherever a model spread over several begins
    """

    def __init__(self, model: Any, site: Site, batch: Any, *, whole: bool = False, once: bool = False):
        """Record `batch` (a `models.Batch`) through `model` (a `models.LanguageModel`).

        once  for many rows at a time, and no patch in force: the MLPs see only `batch.distinct()`; at the places that
              this leaves out, what is recorded is another token's
        """
        self.model, self.site, self.whole = model, site, whole
        self._calls: list[tuple[nn.Module, tuple, dict[str, Any]]] = []
        self._last = model.site(len(model.blocks) - 1)
        later = [] if whole else list(model.blocks[site.layer + 1 :])
        shown: Tensor | None = None
        with contextlib.ExitStack() as stack:
            handles = [block.register_forward_pre_hook(self._remember, with_kwargs=True) for block in later]
            handles.append(site.block.register_forward_hook(self._remember_stream))
            # The last thing to be recorded ends the call: what the blocks behind it put out is not wanted here.
            last = later[-1].register_forward_pre_hook if later else site.block.register_forward_hook
            for handle in (*handles, last(_stop)):
                stack.callback(handle.remove)
            if once:
                at, shown = batch.distinct()
                for layer in range(site.layer + 1):
                    stack.enter_context(only_at(model.site(layer).mlp, at, shown))
            seen = stack.enter_context(watching(site))
            with torch.no_grad(), contextlib.suppress(_Reached):
                model.forward(batch, positions=1)
        self._a, self._y = seen[-1]
        self._shown = None if shown is None else shown.to(self._y.device)
        self.batch = batch.to(self._y.device)
        self._span = model.scope.span

    @cached_property
    def a(self) -> Tensor:
        return self._a if self._shown is None else self._a[0, self._shown]

    @cached_property
    def y(self) -> Tensor:
        return self._y if self._shown is None else self._y[0, self._shown]

    def inputs(self, at: Tensor) -> Tensor:
        """(n × D) a at the places (n,) int64."""
        if self._shown is None:
            return taken(self._a, at)
        return self._a[0].index_select(0, self._shown.flatten().index_select(0, at))

    @cached_property
    def batch(self) -> Any:
        whole, rows = self._of
        return whole.batch[rows]

    @cached_property
    def _calls(self) -> list[tuple[nn.Module, tuple, dict[str, Any]]]:
        whole, rows = self._of
        return [(block, *_of_rows((args, kwargs), rows, len(whole.batch))) for block, args, kwargs in whole._calls]

    def of(self, rows: slice) -> Tail:
        """The same of some rows of its batch."""
        part = object.__new__(Tail)
        # Not everybody who asks for a part needs all of it.
        part.__dict__ |= {k: v for k, v in vars(self).items() if k not in ("a", "y", "batch", "_calls")}
        part._of = self, rows
        part.stream = self.stream[rows]
        if self._shown is None:
            part._a, part._y = self._a[rows], self._y[rows]
        else:
            part._shown = self._shown[rows]
        part._span = None if self._span is None else Span(self._span.prompt[rows])
        return part

    def _remember(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls.append((block, args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

    def _remember_stream(self, block: nn.Module, args: tuple, output: Any) -> None:
        self.stream = _first(output)

    def stream_norm(self, at: Tensor) -> float:
        """Mean norm of the stream behind the site's block, h, at the chosen places, (n,) int64."""
        return float(taken(self.stream, at).float().norm(dim=-1).mean())

    def logits(self, change: Tensor, at: Tensor, changed: Tensor | None = None) -> Tensor:
        """Logits (n × V) at the places (n,) int64, once change is added to y: (B × T × d), or (m × d) at the places
        `changed` (m,) int64 only."""
        if self.whole:
            with adding(self.site, change, changed):
                return taken(self.model.forward(self.batch), at)
        hidden = _sum(self.stream, change, changed)
        with self.model.scope.using(self._span), self._last_mlp_only(at):
            for block, args, kwargs in self._calls:
                hidden = _first(block(hidden, *args, **kwargs))
        return self.model.head(self.model.final_norm(taken(hidden, at))).to(self._y.device)

    def _last_mlp_only(self, at: Tensor) -> contextlib.AbstractContextManager:
        """The last block's MLP at these places only, unless somebody looks at its projection there."""
        if not self._calls or self._last.module._forward_hooks:
            return contextlib.nullcontext()
        return only_at(self._last.mlp, at)


@contextlib.contextmanager
def only_at(module: nn.Module, at: Tensor, shown: Tensor | None = None) -> Iterator[None]:
    """Run a module that treats each token by itself at some places only in the calls inside.

    at     (n,) int64, these places
    shown  (B × T) int64, which of these every place shows the output of; None: elsewhere there are zeros
    """
    # In the place of its `forward`, which may be accelerate's own: hooks take longer to come and go than to run.
    before, forward = module.__dict__.get("forward"), module.forward

    def narrowed(hidden: Tensor, *args: Any) -> Tensor:
        found = forward(taken(hidden, at)[None], *args)[0]
        if shown is not None:
            return found[shown.to(found.device)]
        zeros = found.new_zeros(hidden.shape[:2].numel(), found.shape[-1])
        return zeros.index_copy(0, at.to(found.device), found).view(*hidden.shape[:2], -1)

    module.forward = narrowed
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def composes(model: Any, site: Site, batch: Any) -> bool:
    """Whether the tail of a site, and that of the last row alone, reproduce the full forward call on a batch, for a
    random change of its output."""
    tail, full = Tail(model, site, batch), Tail(model, site, batch, whole=True)
    at = places(batch.leading)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(full.y.shape, generator=generator).to(full.y)
    change *= full.y.float().norm() / change.float().norm()
    with torch.no_grad():
        expected = full.logits(change, at).float()
        found = tail.logits(change, at).float()
        alone = tail.of(slice(-1, None)).logits(change[-1:], places(batch.leading[-1:])).float()
    tolerance = 1e-4 if full.y.dtype == torch.float32 else 3e-2
    found = torch.cat([found, alone])
    expected = torch.cat([expected, expected[-len(alone) :]])
    return bool((found - expected).norm() <= tolerance * expected.norm())


def _of_rows(value: Any, rows: slice, count: int) -> Any:
    """Some rows of what was recorded for a batch of `count`: of every tensor in it with a place for each row."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and len(value) == count else value
    if isinstance(value, dict):
        return {name: _of_rows(part, rows, count) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_of_rows(part, rows, count) for part in value)
    return value


def _stop(*call: Any) -> None:
    raise _Reached


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
