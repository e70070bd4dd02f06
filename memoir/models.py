"""Host models: where a family keeps its blocks, how text becomes a batch, and what a model answers."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from memoir.sites import PromptScope, Site, Tail, composes, device_of, input_of, places


@dataclass(frozen=True)
class Family:
    """Dotted paths of the parts that editing needs; `projection` is relative to a block."""

    blocks: str
    projection: str
    final_norm: str


_LLAMA = Family("model.layers", "mlp.down_proj", "model.norm")
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": _LLAMA,
    "gptj": Family("transformer.h", "mlp.fc_out", "transformer.ln_f"),
    "gpt2": Family("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
}


@dataclass(frozen=True)
class Batch:
    """Prompts, each followed by its target where there is one, padded on the left.

    input_ids, position_ids  (B × T) int64
    attention_mask           (B × T) bool, False on padding
    prompt_mask              (B × T) bool, the prompt's own tokens: what a fingerprint may be taken from
    target_mask              (B × T) bool, the target's tokens, without the end token
    learn_mask               (B × T) bool, what a loss is taken on: the target, and the end token where it is asked for
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    prompt_mask: Tensor
    target_mask: Tensor
    learn_mask: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(part.to(device) for part in self._parts))

    def __getitem__(self, rows: slice | Sequence[int] | tuple) -> Batch:
        """Some rows; with a second index, some of their positions."""
        return Batch(*(part[rows] for part in self._parts))

    @property
    def _parts(self) -> list[Tensor]:
        return [getattr(self, part.name) for part in fields(self)]

    @cached_property
    def counted(self) -> Tensor:
        """(B × T) bool: the positions whose logits predict what is learned."""
        return predicting(self.learn_mask)

    @cached_property
    def counted_at(self) -> Tensor:
        """(n,) int64: their places."""
        return places(self.counted)

    @cached_property
    def labels(self) -> Tensor:
        """(n,) int64: the tokens that are learned, row by row; out of the encoded rows, so that a tokenizer's <s> in
        front of a lone target cannot slip in."""
        return self.input_ids[self.learn_mask]

    @cached_property
    def label_rows(self) -> Tensor:
        """(n,) int64: the row of each of them."""
        return self.learn_mask.nonzero()[:, 0]

    def row_means(self, values: Tensor) -> Tensor:
        """(B,) mean of each row's values (n,), one of each token that is learned."""
        return group_means(values, self.label_rows, len(self))

    def losses(self, logits: Tensor) -> Tensor:
        """(B,) mean −log p of each row's learned tokens, in nats: logits (n × V) at the counted positions."""
        return self.row_means(cross_entropy(logits.float(), self.labels, reduction="none"))

    @property
    def last_prompt(self) -> Tensor:
        """(B,) int64, the position of each row's last prompt token."""
        positions = torch.arange(self.prompt_mask.shape[1], device=self.prompt_mask.device)
        return (self.prompt_mask * positions).amax(dim=1)

    @property
    def leading(self) -> Tensor:
        """(B × T) bool: all tokens but one at a row's end that is learned: nothing is predicted behind it, so what
        becomes of it can change no loss."""
        leading = self.attention_mask.clone()
        leading[:, -1] &= ~self.learn_mask[:, -1]
        return leading


def predicting(mask: Tensor) -> Tensor:
    """(B × T) bool: the positions whose logits predict the tokens in mask (B × T), one place to the left."""
    shifted = torch.zeros_like(mask)
    shifted[:, :-1] = mask[:, 1:]
    return shifted


def group_means(values: Tensor, group: Tensor, count: int) -> Tensor:
    """(count × …) mean of the values (m × …) in each group (m,) int64."""
    total = values.new_zeros(count, *values.shape[1:]).index_add(0, group, values)
    sizes = values.new_zeros(count).index_add(0, group, values.new_ones(len(group)))  # a GPU waits for `bincount`
    return total / sizes.view(-1, *[1] * (values.dim() - 1))


class LanguageModel:
    """A causal language model with its tokenizer, frozen, ready to be edited.

    network    the transformers model; its weights never change
    tokenizer  its tokenizer
    name       how reports call it
    chat       prompts are rendered as a user's turn with the tokenizer's chat template; of a chat with more turns only
               the words of the user's last one are the prompt that edits are matched with: the model reads what was
               said before, but it chooses no edit
    """

    def __init__(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "", *, chat: bool = False
    ):
        kind = network.config.model_type
        if kind not in FAMILIES:
            raise ValueError(f"model family {kind!r} is not supported; expected one of {', '.join(sorted(FAMILIES))}")
        if chat and not tokenizer.chat_template:
            raise ValueError(f"chat=True, but the tokenizer of {name or kind} has no chat template")
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.name, self.family, self.chat = name or network.config.name_or_path, kind, chat
        self.scope = PromptScope()
        if chat:
            self.scope.narrow = self._last_user_turn
        self.editor: Any = None
        self.rewrite: Callable[[Sequence[str]], list[str]] | None = None  # what an editor makes of prompts
        self._composes: dict[int, bool] = {}
        self._shared: weakref.WeakValueDictionary[Hashable, Tensor] = weakref.WeakValueDictionary()
        paths = FAMILIES[kind]
        self._projection = paths.projection
        self._blocks_path = paths.blocks
        self.blocks: nn.ModuleList = operator.attrgetter(paths.blocks)(network)
        self.final_norm: nn.Module = operator.attrgetter(paths.final_norm)(network)
        self.head: nn.Module = network.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where its input goes."""
        return device_of(self.network.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def context_length(self) -> int:
        """Tokens that fit."""
        return self.network.config.max_position_embeddings

    def site(self, layer: int) -> Site:
        """The down-projection of a block, 0-based; IndexError names the layer and how many there are."""
        if not 0 <= layer < len(self.blocks):
            raise IndexError(f"layer {layer} does not exist; {self.name} has blocks 0 to {len(self.blocks) - 1}")
        block = self.blocks[layer]
        module = operator.attrgetter(self._projection)(block)
        mlp = operator.attrgetter(self._projection.rpartition(".")[0])(block)
        return Site(layer, f"{self._blocks_path}.{layer}.{self._projection}", module, block, mlp)

    def tail(self, site: Site, batch: Batch) -> Tail:
        """A batch recorded at a site. Whether the family's blocks compose is found out once per layer."""
        if site.layer not in self._composes:
            self._composes[site.layer] = composes(self, site, self._probe_batch())
            if not self._composes[site.layer]:
                warnings.warn(
                    f"the blocks of {self.name} ({self.family}) do more than add the output of {site.name}; "
                    "edits run the full network in every iteration, which is slower",
                    stacklevel=2,
                )
        return Tail.record(self, site, batch, composes=self._composes[site.layer])

    def _probe_batch(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        size = min(self.network.config.vocab_size, len(self.tokenizer))
        rows = [torch.randint(size, (length,), generator=generator).tolist() for length in (7, 4)]
        return self._pad([(row, [True] * len(row), 0, 0) for row in rows])

    # Text to batch ---------------------------------------------------------------------------------------------------

    def encode(
        self, prompts: Sequence[str], targets: Sequence[str | None] | None = None, *, end: bool = False
    ) -> Batch:
        """Tokenize prompts, and targets behind them (a space between; None: no target). ValueError when a row exceeds
        the context.

        The prompt's tokens are the same with and without a target, so a fingerprint never depends on the answer.
        `end` adds the end-of-sequence token behind each target to what is learned.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts is one text, expected a sequence of them: {prompts!r}")
        if targets is not None and len(prompts) != len(targets):
            raise ValueError(f"{len(prompts)} prompts, but {len(targets)} targets")
        prompts = self.rewrite(prompts) if self.rewrite else prompts
        coded, rows = self._prompt_tokens(prompts), []
        answers = self._answer_tokens(prompts, [tokens for tokens, _ in coded], targets or [None] * len(prompts))
        for prompt, (tokens, own), answer in zip(prompts, coded, answers, strict=True):
            closing = [self.tokenizer.eos_token_id] if end and answer else []
            length = len(tokens) + len(answer) + len(closing)
            if length > self.context_length:
                raise ValueError(f"{length} tokens exceed the context of {self.context_length}: {prompt[:80]!r}…")
            rows.append((tokens + answer + closing, own, len(answer), len(closing)))
        return self._pad(rows)

    def prompt_tokens(self, prompt: str) -> tuple[list[int], list[bool]]:
        """The tokens of a prompt, and which of them are its own: with a chat template, the user's words only."""
        return self._prompt_tokens([prompt])[0]

    def _prompt_tokens(self, prompts: Sequence[str]) -> list[tuple[list[int], list[bool]]]:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("prompt is empty, expected text")
        if not self.chat:
            coded = self.tokenizer([prompt.rstrip() for prompt in prompts])["input_ids"]
            return [(tokens, [True] * len(tokens)) for tokens in coded]
        words = [prompt.strip() for prompt in prompts]
        texts, starts = zip(*map(self._rendered, words), strict=True)
        coded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        return [
            (tokens, [first < start + len(said) and last > start for first, last in places])
            for tokens, places, start, said in zip(
                coded["input_ids"], coded["offset_mapping"], starts, words, strict=True
            )
        ]

    def token_at(self, prompt: str, character: int) -> int:
        """Which of the prompt's tokens holds a character of it (not a space), both counted from 0."""
        text, place = prompt, character
        if self.chat:
            text, start = self._rendered(prompt.strip())
            place += start - (len(prompt) - len(prompt.lstrip()))
        coded = self.tokenizer(text, add_special_tokens=not self.chat, return_offsets_mapping=True)
        return max(i for i, (first, end) in enumerate(coded["offset_mapping"]) if first <= place < end)

    def _rendered(self, words: str) -> tuple[str, int]:
        """Words, without space around them, as a user's turn, ready for the answer, and where in it they begin."""
        text, marked = (
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            for content in (words, "\x01")
        )
        # The words may be the template's own, "assistant" say: their place is that of a sign which no template has.
        start = marked.index("\x01")
        if not text.startswith(words, start):
            found = text[start : start + len(words)]
            raise ValueError(
                f"the chat template of {self.name} changes a user's words: {found[:80]!r}, expected {words[:80]!r}"
            )
        return text, start

    def _last_user_turn(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Of chats rendered elsewhere (a pipeline, say): the tokens between the last user header and what follows it.

        tokens (B × T) int64, mask (B × T) bool; a row in which no such turn is found keeps its mask.
        """
        header, closing = self._turn_marks
        narrowed = mask.clone()
        for row, own in zip(tokens.tolist(), narrowed, strict=True):
            start = _last_place(row, header)
            end = _last_place(row, closing)
            if 0 <= start < end:
                own[: start + len(header)] = False
                own[end:] = False
        return narrowed

    @cached_property
    def _turn_marks(self) -> tuple[list[int], list[int]]:
        """The tokens that open a user's turn and those that close it, read off the chat template."""
        turns = [{"role": r, "content": c} for r, c in (("user", "\x01"), ("assistant", "\x02"), ("user", "\x03"))]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        between, closing = text[text.index("\x02") + 1 : text.index("\x03")], text[text.index("\x03") + 1 :]
        opening = text[: text.index("\x01")]
        # What a user's turn opens with in every place: the common end of what stands before the first and the last.
        common = next((between[i:] for i in range(len(between)) if opening.endswith(between[i:])), between)
        code = lambda part: self.tokenizer(part, add_special_tokens=False)["input_ids"]  # noqa: E731
        return code(common), code(closing)

    def _answer_tokens(
        self, prompts: Sequence[str], coded: list[list[int]], targets: Sequence[str | None]
    ) -> list[list[int]]:
        """The tokens of each target behind its prompt, of which the tokens are known; none where there is no target."""
        if empty := [
            p for p, target in zip(prompts, targets, strict=True) if target is not None and not target.strip()
        ]:
            raise ValueError(f"target of prompt {empty[0][:80]!r} is empty, expected text")
        found: list[list[int]] = [[] for _ in prompts]
        given = {i: target.strip() for i, target in enumerate(targets) if target is not None}
        if given and not self.chat:
            wholes = self.tokenizer([f"{prompts[i].rstrip()} {target}" for i, target in given.items()])["input_ids"]
            for i, whole in zip(list(given), wholes, strict=True):
                if whole[: len(coded[i])] == coded[i]:
                    found[i] = whole[len(coded[i]) :]
                    del given[i]
        if given:  # in a chat, or where a prompt's last token is another one when the target follows
            texts = [target if self.chat else f" {target}" for target in given.values()]
            alone = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            for i, tokens in zip(given, alone, strict=True):
                found[i] = tokens
        return found

    def _pad(self, rows: list[tuple[list[int], list[bool], int, int]]) -> Batch:
        """A batch of tokens, which of the first of them are the prompt's own, and how many of the last ones are the
        answer's and, behind these, to be learned too."""
        width, blank = max(len(tokens) for tokens, *_ in rows), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[blank] * (width - len(tokens)) + tokens for tokens, *_ in rows])
        prompt = torch.tensor(
            [[False] * (width - len(tokens)) + own + [False] * (len(tokens) - len(own)) for tokens, own, *_ in rows]
        )
        sizes = torch.tensor([(len(tokens), answer, closing) for tokens, _, answer, closing in rows])
        length, answer, closing = sizes.T[..., None]
        column = torch.arange(width)
        attention = column >= width - length
        learn = (column >= width - answer - closing) & (answer > 0)
        target = learn & (column < width - closing)
        positions = (attention.long().cumsum(1) - 1).clamp(min=0)
        return Batch(*(x.to(self.device) for x in (ids, positions, attention, prompt, target, learn)))

    # Running ---------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, *, positions: int = 0) -> Tensor:
        """Logits (B × T × V), or of the last `positions` places only, under whatever editor is attached."""
        with self.scope.prompt(batch.prompt_mask):
            return self.network(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=positions,
            ).logits

    @torch.no_grad()
    def generate(self, prompts: str | Sequence[str], *, max_new_tokens: int = 32, **options: Any) -> Any:
        """Continue prompts until the model stops; greedy unless `options` of transformers' `generate` say otherwise.

        Returns one text for one prompt and a list for a list; with `num_return_sequences`, a list of texts per prompt.
        """
        one = isinstance(prompts, str)
        batch = self.encode([prompts] if one else prompts)
        room = self.context_length - batch.input_ids.shape[1]
        if room < 1:
            raise ValueError(f"the prompt fills the context of {self.context_length} tokens; no room for an answer")
        with self.scope.prompt(batch.prompt_mask, generating=True):
            tokens = self.network.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                max_new_tokens=min(max_new_tokens, room),
                pad_token_id=self.tokenizer.pad_token_id,
                **{"do_sample": False, **options},
            )
        texts = self.tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        each = len(texts) // len(batch)
        if each > 1:
            texts = [texts[start : start + each] for start in range(0, len(texts), each)]
        return texts[0] if one else texts

    def site_inputs(
        self, site: Site, prompts: Sequence[str], size: int = 32
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Bare prompts at a site, in batches of similar length: (which of the prompts, the site's inputs a (B × T × D),
        the prompts' own tokens (B × T) bool)."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = self.encode([prompts[i] for i in rows])
            yield rows, input_of(site, lambda batch=batch: self.forward(batch)), batch.prompt_mask

    def shared(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What compute() finds of the unedited model: one tensor, not to be changed, for all editors that ask for this
        key, as long as one of them keeps it."""
        if (found := self._shared.get(key)) is None:
            found = self._shared[key] = compute()
        return found

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration and the weights: all up to 1 GB, beyond that 4096 spaced values of each."""
        network = self.network
        digest = hashlib.sha256()
        config = {k: v for k, v in network.config.to_dict().items() if k not in _VOLATILE}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        # Offloaded weights that are tied have lost each other: count them once all the same.
        parameters = {k: v for k, v in sorted(network.named_parameters()) if k not in network.all_tied_weights_keys}
        sampled = sum(p.numel() * p.element_size() for p in parameters.values()) > 1e9
        for name, value in parameters.items():
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            path, _, own = name.rpartition(".")
            module = network.get_submodule(path)
            with align_module_device(module):  # brings offloaded weights in
                value = getattr(module, own)
                flat = value.detach().flatten()
            if value.device.type == "meta":
                continue  # the outline of a model has none
            if sampled:
                flat = flat[:: max(1, flat.numel() // 4096)]
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.family}, {len(self.blocks)} blocks, {self.dtype}, {self.device})"


def _last_place(row: list[int], part: list[int]) -> int:
    """Where `part` begins in `row` for the last time, or -1."""
    if not part:
        return -1
    return next((i for i in range(len(row) - len(part), -1, -1) if row[i : i + len(part)] == part), -1)


# What a configuration says about a session rather than about the function that the model computes.
_VOLATILE = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}


def load_model(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    chat: bool = False,
    **options: Any,
) -> LanguageModel:
    """Load "almanac", a local folder or a hub id with `AutoModelForCausalLM.from_pretrained`.

    dtype       default: float32 on a CPU, bfloat16 on a GPU
    device_map  default: the GPU where there is one; "auto" spreads a large model (accelerate)
    chat        render prompts as a user's turn with the tokenizer's chat template
    options     further arguments of `from_pretrained`
    """
    path: str | os.PathLike = name
    if name == "almanac":
        from memoir.almanac import model_path

        path = model_path()
    elif os.fspath(name).startswith((".", "/", "~")):
        path = Path(name).expanduser()
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"no model in {path}: expected a transformers folder with a config.json")
    on_gpu = torch.cuda.is_available()
    if device_map is None and on_gpu:
        device_map = "cuda"
    if isinstance(dtype, str):
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype {dtype!r} is unknown; expected e.g. 'float32' or 'bfloat16'")
        dtype = getattr(torch, dtype)
    if dtype is None:
        dtype = torch.bfloat16 if on_gpu else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(path)
    network = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device_map, **options)
    return LanguageModel(network, tokenizer, name if name == "almanac" else Path(name).name, chat=chat)


def subject_tokens(model: LanguageModel, prompt: str, subject: str) -> tuple[int, int]:
    """First and last token (counted from 0) of the subject's last occurrence in a prompt; ValueError without one."""
    subject = subject.strip()
    if not subject:
        raise ValueError(f"prompt {prompt[:80]!r} names no subject; give the edit one, or choose another token")
    start = prompt.rfind(subject)
    if start < 0:
        raise ValueError(f"subject {subject!r} does not occur in prompt {prompt[:80]!r}")
    return model.token_at(prompt, start), model.token_at(prompt, start + len(subject) - 1)
