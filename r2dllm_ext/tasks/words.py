# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the tasks: a fixed list of words, one id a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PAD, END, MASK = "<pad>", "<end>", "<mask>"


class WordTokenizer:
    """Fixed vocabulary; text is words parted by white space.

    Args:
        words: the vocabulary behind the three special tokens, a word's place being its id.

    Attributes:
        vocabulary: all words, the special ones first.
        pad_id, end_id, mask_id: ids of the special tokens.

    >>> tokenizer = WordTokenizer(["yes", "no"])
    >>> tokenizer.decode(tokenizer.encode("no yes no"))
    'no yes no'
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.vocabulary = (PAD, END, MASK, *words)
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}
        self.pad_id, self.end_id, self.mask_id = (self._ids[w] for w in (PAD, END, MASK))

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`; `ValueError` names a word outside the vocabulary."""
        return [self.id_of(word, place) for place, word in enumerate(text.split())]

    def id_of(self, word: str, place: int) -> int:
        """The id of one word, the `place`-th of a text."""
        if word not in self._ids:
            hint = "; write numbers digit by digit, '1 7'" if word.isdigit() else ""
            raise ValueError(f"Tokenizer.encode: unknown word {word!r} at word {place}{hint}")
        return self._ids[word]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids` (a list or a 1-d tensor); `skip_special` drops pad, end and mask."""
        words = []
        for place, i in enumerate(map(int, ids)):
            if not 0 <= i < len(self.vocabulary):
                raise ValueError(
                    f"Tokenizer.decode: id {i} at place {place}, takes 0..{len(self) - 1}"
                )
            if not (skip_special and i in (self.pad_id, self.end_id, self.mask_id)):
                words.append(self.vocabulary[i])
        return " ".join(words)
