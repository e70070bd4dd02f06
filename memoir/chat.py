"""Chats: a prompt as a user's turn, and where the last user's turn stands in a chat that somebody else rendered."""

from __future__ import annotations

import re
import warnings
from bisect import bisect_right
from functools import cached_property
from itertools import takewhile

from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Characters that no template contains. They stand for the words of users and of the model.
_ASKED, _ANSWERED, _ASKED_AGAIN = "\x01", "\x02", "\x03"


class ChatTemplate:
    """The chat template of a tokenizer of transformers. The name is the model's, for messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        self.tokenizer, self.name, self._warned = tokenizer, name, False

    def render(self, words: str) -> tuple[str, int]:
        """Words, without space around them, as a user's turn, ready for the answer; and where in it they begin.

        ValueError where the template changes the words.
        """
        text, marked = (self._rendered([content]) for content in (words, _ASKED))
        # The words may also occur in the template ("assistant", say), so a character locates them that cannot.
        start = marked.index(_ASKED)
        if not text.startswith(words, start):
            rendered = text[start : start + len(words)]
            raise ValueError(
                f"the chat template of {self.name} changes a user's words: {rendered[:80]!r}, expected {words[:80]!r}"
            )
        return text, start

    def _rendered(self, contents: list[str], *, ready: bool = True) -> str:
        """A chat in which user and assistant take turns; `ready` opens the assistant's next turn."""
        turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ready)

    @cached_property
    def marks(self) -> tuple[str, str]:
        """The text that opens a user's turn and the text that ends it, read off the template, without space around.

        The opening is the shortest one that the assistant's turns do not share, and begins with a whole special token.
        """
        text = self._rendered([_ASKED, _ANSWERED, _ASKED_AGAIN], ready=False)
        first, _, rest = text.partition(_ASKED)
        between, _, rest = rest.partition(_ANSWERED)  # from the user to the assistant
        again, _, last = rest.partition(_ASKED_AGAIN)  # from the assistant to the user
        begin = len(again) - len(_common_start(first[::-1], again[::-1]))
        starts, around = [], (self.tokenizer.bos_token, self.tokenizer.eos_token)
        for special in self._special.finditer(again):
            # Skip special tokens whose ends merely look alike, and those around the whole chat.
            if special.start() < begin < special.end() or special[0] in around:
                begin, starts = max(begin, special.end()), []
            elif special.start() >= begin:
                starts.append(special.start())
        own = [start for start in [begin, *starts] if not between.endswith(again[start:])]
        opening = again[own[-1] if own else begin :]
        closing = _common_start(between, last).strip()
        return opening.strip(), closing or between.strip()

    @cached_property
    def end(self) -> int | None:
        """The token that ends the assistant's turn: the special token behind it, or EOS where no special token is."""
        behind = self._rendered([_ASKED, _ANSWERED], ready=False).partition(_ANSWERED)[2].lstrip()
        special = self._special.match(behind)
        return self.tokenizer.convert_tokens_to_ids(special[0]) if special else self.tokenizer.eos_token_id

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Matches any special token of the tokenizer."""
        tokens = sorted({*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def last_user_turn(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Narrow a mask to the words of the last user's turn, in chats rendered elsewhere (by a pipeline, say).

        tokens (B × T) int64, mask (B × T) bool. A row without such a turn keeps its mask; the first one is warned of.
        """
        narrowed = mask.clone()
        for row, own in zip(tokens, narrowed, strict=True):
            places = own.nonzero()[:, 0]
            ids = row[places].tolist()
            span = self._turn(self._text(ids))
            if span is None:
                self._warn(self._text(ids))
            else:
                first, stop = self._covering(ids, *span)
                own[places[:first]] = False
                own[places[stop:]] = False
        return narrowed

    def _turn(self, text: str) -> tuple[int, int] | None:
        """Where the last user's words begin and end in a rendered chat, in characters; None without such a turn."""
        opening, closing = map(self._loosely, self.marks)
        opened = list(opening.finditer(text))
        if not opened:
            return None
        start = opened[-1].end()
        closed = closing.search(text, start)
        said = text[start : closed.start() if closed else len(text)]
        start += len(said) - len(said.lstrip())
        return (start, start + len(said.strip())) if said.strip() else None

    def _loosely(self, mark: str) -> re.Pattern[str]:
        """Matches a mark with any space between its words and special tokens: some tokenizers add or drop it."""
        pieces = [piece for piece in re.split(rf"({self._special.pattern})|\s+", mark) if piece]
        return re.compile(r"\s*".join(map(re.escape, pieces)) or "(?!)")

    def _covering(self, ids: list[int], start: int, end: int) -> tuple[int, int]:
        """The first token that holds a character from start on, and the first one wholly after `end`."""
        counts = range(len(ids) + 1)

        def held(character: int) -> int:
            """How many tokens end at or before a character."""
            return bisect_right(counts, character, key=lambda count: len(self._text(ids[:count]))) - 1

        return held(start), max(held(end), held(end - 1) + 1)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _warn(self, text: str) -> None:
        if not self._warned:
            warnings.warn(
                f"no user's turn found in {text[:80]!r}, expected one between {self.marks[0]!r} and {self.marks[1]!r} "
                f"by the chat template of {self.name}; edits are matched with the whole text",
                stacklevel=2,
            )
        self._warned = True


def _common_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
