# SPDX-License-Identifier: Apache-2.0
"""Word-level tokenizer of the ledger task: one id a word, one id a digit."""

from __future__ import annotations

from collections.abc import Iterable

PAD, END, MASK = "<pad>", "<end>", "<mask>"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
DIGITS = tuple("0123456789")
_WORDS = (
    "add take plus minus to from with at start begin we have and so now it is which gives makes "
    "becomes the final value end answer well then okay clearly indeed thus"
)
VOCABULARY = (PAD, END, MASK, ".", ",", ":", *DIGITS, *ORDINALS, *_WORDS.split())


class Tokenizer:
    """Fixed vocabulary of the bundled model; text is words parted by white space.

    Attributes:
        vocabulary: the words, a word's place being its id.
        pad_id, end_id, mask_id: ids of the special tokens.
        digit_ids: ids of "0" to "9".

    >>> tokenizer = Tokenizer()
    >>> tokenizer.decode(tokenizer.encode("first add 3 to 1 4 ."))
    'first add 3 to 1 4 .'
    """

    def __init__(self) -> None:
        self.vocabulary = VOCABULARY
        self._ids = {word: i for i, word in enumerate(VOCABULARY)}
        self.pad_id, self.end_id, self.mask_id = (self._ids[w] for w in (PAD, END, MASK))
        self.digit_ids = tuple(self._ids[d] for d in DIGITS)

    def __len__(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`; `ValueError` names a word outside the vocabulary."""
        ids = []
        for place, word in enumerate(text.split()):
            if word not in self._ids:
                hint = "; write numbers digit by digit, '1 7'" if word.isdigit() else ""
                raise ValueError(f"Tokenizer.encode: unknown word {word!r} at word {place}{hint}")
            ids.append(self._ids[word])
        return ids

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
