# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011) in plain Python."""

from ..philox import Draw

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, ...]:
    """Four random 32-bit words of a 128-bit counter and a 64-bit key; ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        even, odd = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (odd >> 32) ^ c1 ^ k0, odd & _MASK, (even >> 32) ^ c3 ^ k1, even & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, row: int, step: int, position: int, draw: Draw) -> float:
    """A float64 in [0, 1) with 53 random bits that depends on these five numbers alone."""
    key = (seed & _MASK, (seed >> 32) & _MASK)
    x0, x1, _, _ = philox4x32((row & _MASK, step & _MASK, position, draw), key)
    return ((x0 << 32 | x1) >> 11) * 2.0**-53
