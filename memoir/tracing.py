"""Causal tracing: where a model recalls a fact (ROME: Meng, Bau, Andonian, Belinkov, NeurIPS 2022, section 2.1).

The subject's embeddings are drowned in noise, so that the model no longer gives its answer; then single states of the
clean run are put back, one place at a time. The places that bring the answer back are where the fact is recalled:

    indirect effect of state h_t^l = p(answer | noise, h_t^l put back) − p(answer | noise)
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from memoir.models import Batch, LanguageModel
from memoir.records import EditRequest
from memoir.sites import rewriting

KINDS = ("hidden", "mlp")
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True)
class Trace:
    """What restoring each state does to one answer.

    tokens     the prompt's T tokens as text
    roles      for each token its entry of ROLES; None before the subject, where noise cannot reach
    clean      probability of the model's own answer (its first token) on the clean prompt
    corrupted  the same with noise on the subject, mean over the noise samples
    effects    (T × blocks) probability with that state restored, minus `corrupted`
    """

    tokens: tuple[str, ...]
    roles: tuple[str | None, ...]
    clean: float
    corrupted: float
    effects: Tensor


@torch.no_grad()
def causal_trace(
    model: LanguageModel,
    prompt: str,
    subject: str,
    *,
    kind: str = "hidden",
    window: int = 1,
    noise: float = 3.0,
    samples: int = 10,
    rows: int = 128,
    seed: int = 0,
) -> Trace:
    """Trace the model's own answer to a prompt, under whatever editor is attached.

    kind     what is put back: "hidden", the stream behind a block, or "mlp", what its down-projection puts out
    window   how many neighbouring blocks' states are put back together, odd; the paper: 1 for hidden, 10 for mlp
    noise    standard deviation of the noise, in those of the subject's embeddings; the paper: 3
    samples  draws of the noise; the paper: 10
    rows     sequences run together
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}, expected one of {', '.join(KINDS)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window = {window}, expected an odd number of blocks")
    batch = model.encode([prompt])
    first, last = subject_tokens(model, prompt, subject)
    length, blocks = batch.input_ids.shape[1], len(model.blocks)
    modules = [model.blocks[layer] if kind == "hidden" else model.site(layer).module for layer in range(blocks)]
    embedding = model.network.get_input_embeddings()

    clean: dict[int, Tensor] = {}  # layer → (T × d); -1: the embeddings

    def keeping(layer: int, module: nn.Module):
        def keep(output: Tensor) -> Tensor:
            clean[layer] = output[0]
            return output

        return rewriting(module, keep)

    with contextlib.ExitStack() as stack:
        for layer, module in enumerate([embedding, *modules], -1):
            stack.enter_context(keeping(layer, module))
        probabilities = _last_probabilities(model, batch)[0]
    answer = int(probabilities.argmax())
    generator = torch.Generator().manual_seed(seed)
    subject_embeddings = clean[-1][first : last + 1]
    drawn = torch.randn(samples, *subject_embeddings.shape, generator=generator).to(subject_embeddings)
    drawn *= noise * subject_embeddings.std()

    def corrupt(output: Tensor) -> Tensor:
        output = output.clone()
        output[:, first : last + 1] += drawn.repeat(len(output) // samples, 1, 1)
        return output

    def probability(places: Sequence[int], layers: Sequence[int]) -> Tensor:
        """(n,) mean probability of the answer under noise, with the states of `layers` put back at each of n places."""
        which = torch.tensor(places, device=batch.input_ids.device).repeat_interleave(samples)

        def restoring(layer: int):
            def restore(output: Tensor) -> Tensor:
                output, at = output.clone(), which.to(output.device)
                output[torch.arange(len(at), device=at.device), at] = clean[layer][at]
                return output

            return rewriting(modules[layer], restore)

        with contextlib.ExitStack() as stack:
            stack.enter_context(rewriting(embedding, corrupt))
            for layer in layers:
                stack.enter_context(restoring(layer))
            found = _last_probabilities(model, _repeated(batch, len(which)))[:, answer]
        return found.view(len(places), samples).mean(1)

    corrupted = float(probability([0], [])[0])
    effects = torch.zeros(length, blocks)
    step = max(1, rows // samples)
    for layer in range(blocks):
        around = range(max(0, layer - window // 2), min(blocks, layer + window // 2 + 1))
        for start in range(first, length, step):
            places = range(start, min(start + step, length))
            effects[start : start + step, layer] = probability(places, around).cpu() - corrupted
    ids = batch.input_ids[0].tolist()
    return Trace(
        tokens=tuple(model.tokenizer.decode([i]) for i in ids),
        roles=tuple(_role(t, first, last, length) for t in range(length)),
        clean=float(probabilities[answer]),
        corrupted=corrupted,
        effects=effects,
    )


def trace_roles(
    model: LanguageModel, edits: Sequence[EditRequest], *, progress: bool = True, **options
) -> dict[str, list[float | None]]:
    """Average indirect effect by token role: role → one mean over all prompts' such tokens per block, None without any.

    edits    whose prompts and subjects are traced; options are those of `causal_trace`
    """
    found: dict[str, list[Tensor]] = {role: [] for role in ROLES}
    for edit in tqdm(edits, desc="causal tracing", unit="prompt", disable=not progress):
        trace = causal_trace(model, edit.prompt, edit.subject, **options)
        for role, effect in zip(trace.roles, trace.effects, strict=True):
            if role is not None:
                found[role].append(effect)
    empty = [None] * len(model.blocks)
    return {role: torch.stack(effects).mean(0).tolist() if effects else empty for role, effects in found.items()}


def subject_tokens(model: LanguageModel, prompt: str, subject: str) -> tuple[int, int]:
    """First and last token, counted from 0, of the subject's last occurrence in a prompt; ValueError without one."""
    subject = subject.strip()
    if not subject:
        raise ValueError(f"prompt {prompt[:80]!r} names no subject; give the edit one, or choose another token")
    start = prompt.rfind(subject)
    if start < 0:
        raise ValueError(f"subject {subject!r} does not occur in prompt {prompt[:80]!r}")
    return model.token_at(prompt, start), model.token_at(prompt, start + len(subject) - 1)


def _last_probabilities(model: LanguageModel, batch: Batch) -> Tensor:
    """(B × V) float32, for the token behind each prompt."""
    return model.forward(batch, positions=1)[:, -1].float().softmax(-1)


def _repeated(batch: Batch, count: int) -> Batch:
    return Batch(**{name: value.expand(count, -1) for name, value in vars(batch).items()})


def _role(token: int, first: int, last: int, length: int) -> str | None:
    if token < first:
        return None
    if token == length - 1:
        return "last token"
    if token == last:
        return "last subject token"
    if token == first:
        return "first subject token"
    if token < last:
        return "middle subject tokens"
    return "first subsequent token" if token == last + 1 else "further tokens"
