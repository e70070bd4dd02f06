"""Text to tokens: prompts and their targets as one padded batch, and where a subject stands in a prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from memoir.chat import ChatTemplate
from memoir.sites import places


@dataclass(frozen=True)
class Batch:
    """Prompts, each followed by its target where there is one, padded on the left: (B × T) int64 or bool."""

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor  # False on padding
    prompt_mask: Tensor  # the prompt's own tokens: a fingerprint may be taken from these only
    target_mask: Tensor  # the target's tokens, without the end token
    learn_mask: Tensor  # the tokens that a loss is taken on: the target, and the end token where asked

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda part: part.to(device))

    def __getitem__(self, rows: slice | Sequence[int] | tuple) -> Batch:
        """Some rows; with a second index, some positions of these rows."""
        return self._each(lambda part: part[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(change(getattr(self, part.name)) for part in fields(self)))

    @cached_property
    def counted(self) -> Tensor:
        """(B × T) bool: the positions whose logits predict the learned tokens."""
        return predicting(self.learn_mask)

    @cached_property
    def counted_at(self) -> Tensor:
        """(n,) int64: the places of these positions, as `sites.places` numbers them."""
        return places(self.counted)

    @cached_property
    def labels(self) -> Tensor:
        """(n,) int64: the learned tokens, row by row."""
        return self.input_ids[self.learn_mask]

    @cached_property
    def label_rows(self) -> Tensor:
        """(n,) int64: the row of each learned token."""
        return self.learn_mask.nonzero()[:, 0]

    def losses(self, logits: Tensor) -> Tensor:
        """(B,) mean −log p of each row's learned tokens, in nats: logits (n × V) at the counted positions."""
        losses = cross_entropy(logits.float(), self.labels, reduction="none")
        return group_means(losses, self.label_rows, len(self))

    @property
    def last_prompt(self) -> Tensor:
        """(B,) int64, the position of each row's last prompt token."""
        positions = torch.arange(self.prompt_mask.shape[1], device=self.prompt_mask.device)
        return (self.prompt_mask * positions).amax(dim=1)

    @property
    def leading(self) -> Tensor:
        """(B × T) bool: all tokens except a learned one at the end of its row. Nothing is predicted after that one, so
        its hidden state affects no loss."""
        leading = self.attention_mask.clone()
        leading[:, -1] &= ~self.learn_mask[:, -1]
        return leading


def predicting(mask: Tensor) -> Tensor:
    """(B × T) bool: the positions whose logits predict the tokens in mask (B × T), one place to the left."""
    return pad(mask[:, 1:], (0, 1))


def group_means(values: Tensor, group: Tensor, count: int) -> Tensor:
    """(count × …) mean of the values (m × …) in each group (m,) int64."""
    total = values.new_zeros(count, *values.shape[1:]).index_add(0, group, values)
    sizes = values.new_zeros(count).index_add(0, group, values.new_ones(len(group)))  # a GPU waits for `bincount`
    return total / sizes.view(-1, *[1] * (values.dim() - 1))


def similar_lengths(texts: Sequence[str], size: int) -> Iterator[list[int]]:
    """The numbers of the texts in groups of `size` with similar length, so that a batch holds little padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class Row(NamedTuple):
    """One prompt with its target, as tokens."""

    tokens: list[int]  # the prompt, then the target, then the end token if it is learned
    own: list[bool]  # which of the prompt's tokens are its own. In a chat these are the user's words
    target: int = 0  # number of target tokens
    end: int = 0  # 1 where the end token follows the target


class Encoder:
    """Turns prompts and targets into tokens.

    length  tokens that fit into the model's context
    chat    the chat template that renders a prompt as a user's turn; None: prompts stay as they are
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, chat: ChatTemplate | None = None):
        self.tokenizer, self.length, self.chat = tokenizer, length, chat

    @property
    def end(self) -> int | None:
        """The token that ends an answer; edits learn it, and generation stops at it. In a chat the template says which
        token ends the assistant's turn, in plain text it is EOS. None where the tokenizer has none."""
        return self.tokenizer.eos_token_id if self.chat is None else self.chat.end

    @cached_property
    def _front(self) -> list[int]:
        """The tokens that the tokenizer puts in front of a text: <s>, usually. What some tokenizers put after a text
        (`add_eos_token`) is left out, because a model does not continue a text that has ended."""
        bare, framed = (self.tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
        return next((framed[:i] for i in range(len(framed)) if framed[i : i + len(bare)] == bare), [])

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of plain texts, with the tokenizer's start token and without an end token."""
        return [self._front + self._bare(text) for text in texts]

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def rows(
        self, prompts: Sequence[str], targets: Sequence[str | None] | None = None, *, end: bool = False
    ) -> list[Row]:
        """Each prompt with its target behind it; see `LanguageModel.encode`."""
        targets = [None] * len(prompts) if targets is None else targets
        if len(prompts) != len(targets):
            raise ValueError(f"{len(prompts)} prompts, but {len(targets)} targets")
        if end and self.end is None:
            raise ValueError("the tokenizer has no EOS token that could be learned; expected learn_stop=False")
        rows = []
        for prompt, (tokens, own, *_), target in zip(prompts, self.prompts(prompts), targets, strict=True):
            answer = [] if target is None else self._answer(prompt, tokens, target)
            closing = [self.end] if end and answer else []
            row = Row(tokens + answer + closing, own, len(answer), len(closing))
            if len(row.tokens) > self.length:
                raise ValueError(f"{len(row.tokens)} tokens exceed the context of {self.length}: {prompt[:80]!r}…")
            rows.append(row)
        return rows

    def prompts(self, prompts: Sequence[str]) -> list[Row]:
        """The tokens of each prompt, and which of them are its own."""
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("prompt is empty, expected text")
        if self.chat is None:
            return [Row(tokens, [True] * len(tokens)) for tokens in self.tokens([p.rstrip() for p in prompts])]
        rows = []
        for words in (prompt.strip() for prompt in prompts):
            text, start = self.chat.render(words)
            coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            own = [first < start + len(words) and last > start for first, last in coded["offset_mapping"]]
            rows.append(Row(coded["input_ids"], own))
        return rows

    def _answer(self, prompt: str, tokens: list[int], target: str) -> list[int]:
        """The tokens of a target behind the tokens of its prompt.

        The prompt keeps its tokens. Where its last token changes once the target follows, the target is encoded alone.
        """
        target = target.strip()
        if not target:
            raise ValueError(f"target of prompt {prompt[:80]!r} is empty, expected text")
        if self.chat is not None:
            return self._bare(target)
        (whole,) = self.tokens([f"{prompt.rstrip()} {target}"])
        return whole[len(tokens) :] if whole[: len(tokens)] == tokens else self._bare(f" {target}")

    def tokens_of(self, prompt: str, first: int, end: int) -> tuple[int, int]:
        """The first and the last of the prompt's tokens that hold its characters from first to end (exclusive), all
        counted from 0; these characters begin and end with no space."""
        text, shift, front = prompt, 0, len(self._front)
        if self.chat is not None:
            text, start = self.chat.render(prompt.strip())
            shift, front = start - (len(prompt) - len(prompt.lstrip())), 0
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        inside = [i for i, (begin, stop) in enumerate(offsets) if begin < end + shift and stop > first + shift]
        return front + inside[0], front + inside[-1]

    def pad(self, rows: Sequence[Row]) -> Batch:
        """The rows as one batch on the CPU, padded on the left."""

        def padded(parts: list[list], blank: Any = False) -> Tensor:
            rows = [torch.tensor(part, dtype=torch.tensor(blank).dtype) for part in parts]
            return pad_sequence(rows, batch_first=True, padding_value=blank, padding_side="left")

        attention = padded([[True] * len(row.tokens) for row in rows])
        return Batch(
            # Padding is masked, so any token serves where the tokenizer has none for it.
            input_ids=padded([row.tokens for row in rows], self.tokenizer.pad_token_id or 0),
            position_ids=(attention.long().cumsum(1) - 1).clamp(min=0),
            attention_mask=attention,
            prompt_mask=padded([row.own + [False] * (row.target + row.end) for row in rows]),
            target_mask=padded([[False] * len(row.own) + [True] * row.target + [False] * row.end for row in rows]),
            learn_mask=padded([[False] * len(row.own) + [True] * (row.target + row.end) for row in rows]),
        )


def subject_tokens(model: Any, prompt: str, subject: str) -> tuple[int, int]:
    """First and last token, counted from 0, of a subject's last occurrence in a prompt; ValueError without one. The
    model is a `models.LanguageModel`."""
    return model.encoder.tokens_of(prompt, *subject_span(prompt, subject))


def subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Where a subject's last occurrence in a prompt begins and ends, in characters; ValueError without one.

    Whole words come first: "Ann" is not looked for inside "Annand" as long as it also stands alone. Accented letters
    match whether they are one character or a letter with a combining mark (Unicode's NFC and NFD).
    """
    sought = _decomposed(subject.strip())[0]
    if not sought:
        raise ValueError(f"the edit of {prompt[:80]!r} has no subject; add one, or edit at another token")
    text, characters = _decomposed(prompt)
    places = [(i, i + len(sought)) for i in range(len(text)) if text.startswith(sought, i)]
    places = [(start, end) for start, end in places if not unicodedata.combining(text[end : end + 1] or " ")]
    if not places:
        raise ValueError(f"subject {subject.strip()!r} does not occur in prompt {prompt[:80]!r}")
    whole = [place for place in places if not any(_joined(text, border) for border in place)]
    start, end = (whole or places)[-1]
    return characters[start], characters[end - 1] + 1


def _decomposed(text: str) -> tuple[str, list[int]]:
    """A text in Unicode's decomposed form, and for each character of that form its place in the text."""
    parts = [unicodedata.normalize("NFD", character) for character in text]
    return "".join(parts), [i for i, part in enumerate(parts) for _ in part]


def _joined(text: str, border: int) -> bool:
    """Whether a word goes on across the border between two characters of a decomposed text."""
    around = text[border - 1 : border + 1] if border else ""
    return len(around) == 2 and all(c.isalnum() or c == "_" or unicodedata.combining(c) for c in around)
