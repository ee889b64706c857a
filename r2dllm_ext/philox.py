# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers as tensors: Philox4x32-10 (Salmon et al., SC'11).

The numbers of `csrc/rules/random.h`, and the same on every device: integer arithmetic alone, in
which no product leaves int64.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class Draw(IntEnum):
    """What a number is drawn for: the last word of the counter."""

    TOKEN = 0  # the token of a cell (temperature > 0), as in csrc/rules/random.h
    RUN = 1  # the cell of a run (token_cluster="random"), as there
    MASK = 2  # is this cell masked
    BLOCK = 3  # which block is active
    RATIO = 4  # how much of it is masked
    FRONT = 5  # from which cell on


Word = Tensor | int


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[int, int]
) -> tuple[Word, Word, Word, Word]:
    """Four random 32-bit words of a 128-bit counter and a 64-bit key.

    Args:
        counter: four words in [0, 2**32), int64 tensors that broadcast, or integers; with a tensor
            among them, the results are tensors.
        key: two words.
    """
    words: Any = counter  # tensors or integers, the arithmetic is the same
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _product(factor: int, word: Word) -> tuple[Word, Word]:
    """High and low word of a 32 x 32 bit product, by halves, so that nothing overflows."""
    low = factor * (word & 0xFFFF)
    middle = factor * (word >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(seed: int, row: Tensor, step: Word, position: Word, draw: Draw) -> Tensor:
    """float64 in [0, 1) with 53 random bits that depend on these five numbers alone.

    Args:
        seed: a 64-bit integer.
        row, step, position: int64 tensors that broadcast (integers too, but for `row`); their low
            32 bits count.
        draw: the purpose.

    >>> uniform(0, torch.arange(2), 0, 0, Draw.MASK)
    tensor([0.8640, 0.7289], dtype=torch.float64)
    """
    key = (seed & _WORD, (seed >> 32) & _WORD)
    counter = (row & _WORD, step & _WORD, position & _WORD, int(draw))
    x0, x1, _, _ = philox4x32(counter, key)
    bits = (x0 << 21) | (x1 >> 11)
    assert isinstance(bits, Tensor)  # as `row` is one
    return bits.double() * 2.0**-53
