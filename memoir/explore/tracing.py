"""Causal tracing: where a model recalls a fact (ROME: Meng, Bau, Andonian, Belinkov, NeurIPS 2022, section 2.1).

Noise on the subject's embeddings makes the model lose its answer. Then single states of the clean run are put back, one
position at a time. The states that bring the answer back are where the fact is recalled:

    indirect effect of state h_t^l = p(answer | noise, h_t^l put back) − p(answer | noise)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from memoir.models import LanguageModel
from memoir.sites import rewriting
from memoir.text import Batch, subject_tokens

KINDS = ("hidden", "mlp")


@dataclass(frozen=True)
class Trace:
    """What putting back each state does to one answer.

    tokens     the prompt's T tokens as text
    clean      probability of the model's own answer (its first token) on the clean prompt
    corrupted  the same with noise on the subject, mean over the noise samples
    effects    (T × blocks) probability with that state put back, minus `corrupted`; 0 before the subject, where noise
               cannot reach
    """

    tokens: tuple[str, ...]
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

    kind     which states are put back: "hidden", the stream behind a block, or "mlp", its down-projection's output
    window   how many neighbouring blocks' states are put back together, odd; the paper: 1 for hidden, 10 for mlp
    noise    standard deviation of the noise, × the standard deviation of the subject's embeddings; the paper: 3
    samples  draws of the noise; the paper: 10
    rows     sequences run together
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}, expected one of {', '.join(KINDS)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window = {window}, expected an odd number of blocks")
    batch, embedding = model.encode([prompt]), model.network.get_input_embeddings()
    first, last = subject_tokens(model, prompt, subject)
    length, blocks = batch.input_ids.shape[1], len(model.blocks)
    modules = [model.blocks[layer] if kind == "hidden" else model.site(layer).module for layer in range(blocks)]
    states: dict[nn.Module, Tensor] = {}  # of the clean run, (T × d) each

    def keep(module: nn.Module, output: Tensor) -> Tensor:
        states[module] = output[0]
        return output

    clean = _last_probabilities(model, batch, {module: partial(keep, module) for module in (embedding, *modules)})[0]
    answer, embedded = int(clean.argmax()), states[embedding][first : last + 1]
    drawn = torch.randn(samples, *embedded.shape, generator=torch.Generator().manual_seed(seed)).to(embedded)
    drawn = drawn * noise * embedded.std()

    def corrupt(output: Tensor) -> Tensor:
        output = output.clone()
        output[:, first : last + 1] += drawn.repeat(len(output) // samples, 1, 1)
        return output

    def put_back(module: nn.Module, positions: Tensor, output: Tensor) -> Tensor:
        output, positions = output.clone(), positions.to(output.device)
        output[torch.arange(len(positions), device=output.device), positions] = states[module][positions]
        return output

    def probability(positions: Sequence[int], layers: Iterable[int]) -> Tensor:
        """(n,) mean over the noise, with the clean states of `layers` at each of n positions."""
        restored = torch.tensor(positions).repeat_interleave(samples)
        hooks = {embedding: corrupt}
        hooks |= {modules[layer]: partial(put_back, modules[layer], restored) for layer in layers}
        found = _last_probabilities(model, batch[[0] * len(restored)], hooks)[:, answer]
        return found.view(len(positions), samples).mean(1).cpu()

    corrupted = float(probability([0], [])[0])
    effects = torch.zeros(length, blocks)
    step = max(1, rows // samples)
    for layer in range(blocks):
        around = range(max(0, layer - window // 2), min(blocks, layer + window // 2 + 1))
        for start in range(first, length, step):
            positions = range(start, min(start + step, length))
            effects[start : start + step, layer] = probability(positions, around) - corrupted
    tokens = tuple(model.tokenizer.decode([i]) for i in batch.input_ids[0].tolist())
    return Trace(tokens, float(clean[answer]), corrupted, effects)


def _last_probabilities(model: LanguageModel, batch: Batch, hooks: Mapping[nn.Module, Callable]) -> Tensor:
    """(B × V) float32, for the token behind each prompt, with modules' outputs rewritten."""
    with contextlib.ExitStack() as stack:
        for module, rewrite in hooks.items():
            stack.enter_context(rewriting(module, rewrite))
        return model.forward(batch, positions=1)[:, -1].float().softmax(-1)
