"""Names and values of facts: words of one token, and digits, split into trained and held out."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

_WORD = re.compile(r" [a-z]{4,9}")
_MOST = 4096
_FEWEST = 48
_HELD_OUT = 5  # one of this many words and values is held out
_DIGITS = 6
_SPACE = "\u2581"  # in the tokens of SentencePiece
_POOLS = {2: 32, 4: 12}


class Encoder:
    """Text in the middle of a sequence to token numbers, without special tokens.

    Some tokenizers, such as those of Llama 2, Mistral and MiniCPM, begin every text with a space.
    Such a text is encoded behind another character, whose tokens are left out.

    Args:
        tokenizer: A fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        # One text at a time, since the tokenizer's threads do not survive the fork of a worker.
        self._backend = tokenizer.backend_tokenizer
        self._known: dict[str, list[int]] = {}
        # The tokens that each of these characters has at the beginning of a text.
        anchors = {text: self._backend.encode(text, add_special_tokens=False) for text in "\n;"}
        adds_space = any(token[0] == _SPACE for one in anchors.values() for token in one.tokens[:1])
        self._anchors = {text: list(one.ids) for text, one in anchors.items() if adds_space}

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of a text.

        Raises:
            ValueError: The tokenizer joins the text with whatever is before it.
        """
        for before, known in (self._anchors or {"": []}).items():
            ids = list(self._backend.encode(before + text, add_special_tokens=False).ids)
            if ids[: len(known)] == known:
                return ids[len(known) :]
        raise ValueError(
            f"base: its tokenizer must divide texts behind a line break or a semicolon, it joins "
            f"{text!r} with both: choose another base"
        )

    def text_of(self, number: int) -> str:
        """Return the text of a token in the middle of a sequence."""
        anchor = next(iter(self._anchors.values()), [])
        before, both = (
            str(self._backend.decode(ids, skip_special_tokens=False))
            for ids in (anchor, [*anchor, number])
        )
        return both[len(before) :]

    def fixed(self, text: str) -> list[int]:
        """Return the tokens of a text, cached."""
        if text not in self._known:
            self._known[text] = self(text)
        return self._known[text]


class Vocabulary:
    """Words and values of the facts.

    Every word begins with a space and is one token. A hash holds out a fifth of words and values,
    so that no evaluation asks for a name or a value of training.

    Args:
        tokenizer: A fast tokenizer of transformers.
        beginning: Tokens at the beginning of every sequence.

    Raises:
        ValueError: The tokenizer has too few words of one token.
    """

    def __init__(self, tokenizer: Any, beginning: Sequence[int] = ()) -> None:
        self.beginning = list(beginning)
        encode = Encoder(tokenizer)
        words = []
        for number in range(len(tokenizer)):
            text = encode.text_of(number)
            if _WORD.fullmatch(text) and encode(text) == [number]:
                words.append(text)
        words = words[len(words) // 8 :][:_MOST]  # the most frequent words are no plausible names
        self.encode = encode
        self._backend = tokenizer.backend_tokenizer
        self._words = {
            part: [word for word in words if _is_held_out(word) == part] for part in (False, True)
        }
        fewest = min(len(part) for part in self._words.values())
        if fewest < _FEWEST:
            raise ValueError(
                f"base: its tokenizer must have {_FEWEST} words of one token to train on, and as "
                f"many held out, got {fewest}: choose another base"
            )

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens."""
        return str(self._backend.decode(tokens, skip_special_tokens=False))

    def names(self, random: Random, held_out: bool, count: int, size: int) -> list[str]:
        """Return different names of ``size`` words; names of several words overlap in words."""
        words = self._words[held_out]
        if size == 1:
            return random.sample(words, count)
        pool = min(_POOLS[size], len(words) // size)
        chosen = random.sample(words, size * pool)
        parts = [chosen[first : first + pool] for first in range(0, size * pool, pool)]
        names: dict[str, None] = {}
        while len(names) < count:
            names["".join(random.choice(part) for part in parts)] = None
        return list(names)

    def value(self, random: Random, held_out: bool, digits: int = _DIGITS) -> str:
        """Return random digits; those of evaluation and of training are disjoint."""
        while True:
            value = "".join(random.choice("0123456789") for _ in range(digits))
            if _is_held_out(value) == held_out:
                return value


def _is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % _HELD_OUT == 0
