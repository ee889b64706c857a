# SPDX-License-Identifier: Apache-2.0
"""What is measured: named shapes, and a block of logits on which every rule has work to do."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from r2dllm_ext.config import DecodeConfig
from r2dllm_ext.state import Counter, DecodeState

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shape(NamedTuple):
    """B rows, L positions of the block, V ids."""

    B: int
    L: int
    V: int

    @property
    def mask_id(self) -> int:
        return _MASK_IDS.get(self.V, self.V - 1)


_MASK_IDS = {126464: 126336, 152064: 151666}  # LLaDA, Dream
NAMED = {
    f"{model}-{B}": Shape(B, 32, V)
    for model, V in (("llada", 126464), ("dream", 152064))
    for B in (1, 4, 8, 32, 64, 256)
}
TINY = Shape(1, 4, 16)  # nothing to compute: what is left is the cost of a call
LEAST_VOCAB = 16


def parse_shape(text: str) -> Shape:
    """A name of `NAMED`, or B,L,V."""
    if text in NAMED:
        return NAMED[text]
    try:
        shape = Shape(*map(int, text.split(",")))
    except (TypeError, ValueError):
        names = ", ".join(NAMED)
        raise ValueError(f"--shape takes B,L,V or one of {names}, got {text!r}") from None
    if shape.B < 1 or shape.L < 1 or shape.V < LEAST_VOCAB:
        raise ValueError(f"--shape takes B, L >= 1 and V >= {LEAST_VOCAB}, got {text!r}")
    return shape


# Wanted probability of the cells, repeated over the block, and the rule that settles them: a
# THRESHOLD, three WINDOW, a gap, an AMBIGUITY (two cells, one prediction), a gap, a STABILITY (its
# streak is two steps old), undecided cells. Far enough from 0.8 and 0.9 for bfloat16 logits.
_PATTERN = (
    0.97,
    0.85,
    0.85,
    0.85,
    0.25,
    0.85,
    0.35,
    0.2,
    0.25,
    0.85,
    0.2,
    0.3,
    0.25,
    0.2,
    0.35,
    0.2,
)
_AMBIGUOUS, _STABLE = 5, 9
# In every second row no cell reaches the threshold, so that the best one is FORCED.
_BEST, _SECOND = 0.88, 0.86


@dataclasses.dataclass
class Block:
    """A block before a step, all masked; `renew` undoes a step."""

    logits: Tensor  # [B, L, V]
    tokens: Tensor  # [B, L] int64
    state: DecodeState
    mask_id: int
    _streaks: tuple[Tensor, Tensor]

    def config(self) -> DecodeConfig:
        return DecodeConfig.r2(self.mask_id)

    def renew(self) -> None:
        count, streak_id = self._streaks
        self.tokens.fill_(self.mask_id)
        self.state.reset()
        self.state.counters[:, Counter.STEP] = 0
        self.state.streak_count.copy_(count)
        self.state.streak_id.copy_(streak_id)
        self.state.streak_sum.copy_(count * 0.85)
        self.state.streak_max.copy_((count > 0) * 0.85)

    def sibling(self) -> Block:
        """The same logits with tokens and state of its own."""
        state = DecodeState(*self.tokens.shape, device=self.logits.device)
        other = dataclasses.replace(self, tokens=torch.empty_like(self.tokens), state=state)
        other.renew()
        return other

    def turns(self, cache: str) -> list[Block]:
        """Blocks that one timed call works on, one after the other.

        On the CPU one. On a GPU a step is shorter than what an event resolves, so that a call takes
        20 or more; with "cold" caches they take turns with logits of three times the cache.
        """
        if not self.logits.is_cuda:
            return [self.sibling()]
        copies = [self.logits]
        if cache == "cold":
            cached = torch.cuda.get_device_properties(self.logits.device).L2_cache_size
            copies += [self.logits.clone() for _ in range(3 * cached // self.logits.nbytes)]
        blocks = [self.sibling() for _ in range(max(20, len(copies)))]
        for i, block in enumerate(blocks):
            block.logits = copies[i % len(copies)]
        return blocks


@torch.no_grad()
def spike(logits: Tensor, target: Tensor, p: Tensor) -> None:
    """Give `target` [B, L] the probability `p` [B, L], in place."""
    for b in range(len(logits)):  # one row at a time: no copy of the logits
        rows, place = logits[b], target[b, :, None]
        others = rows.scatter_(-1, place, -torch.inf).float().logsumexp(-1, keepdim=True)
        rows.scatter_(-1, place, (others + p[b, :, None].logit()).to(logits.dtype))


@torch.no_grad()
def spiked_block(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Block:
    """Gaussian logits with one spike a row, placed so that every rule commits something."""
    B, L, V = shape
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(shape, dtype=dtype, device=device)
    logits.normal_(0.0, 1.0 if V >= 1024 else 0.1, generator=generator)

    cell = torch.arange(L, device=device) % len(_PATTERN)
    row = torch.arange(B, device=device)[:, None]
    target = (torch.arange(B * L, device=device).view(B, L) * 7919 + 1) % V
    target[target == shape.mask_id] = 0
    second = (cell == _AMBIGUOUS + 1).nonzero().flatten()
    target[:, second] = target[:, second - 1]
    p = torch.tensor(_PATTERN, device=device)[cell].expand(B, L).clone()
    p[1::2] = p[1::2].where(p[1::2] < 0.9, _SECOND)
    p[1::2, 0] = _BEST
    spike(logits, target, p)

    ripe = ((cell == _STABLE) & (row >= 0)).int()
    streaks = (ripe * 2, torch.where(ripe > 0, target, -1))
    block = Block(
        logits,
        torch.empty_like(target),
        DecodeState(B, L, device=device),
        shape.mask_id,
        streaks,
    )
    block.renew()
    return block
