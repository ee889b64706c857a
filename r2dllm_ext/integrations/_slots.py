# SPDX-License-Identifier: Apache-2.0
"""Slots: rows of one `DecodeState` for the blocks that an engine has under way.

Requests come, leave and change their place in the batch; what a block remembers stays in its slot
on the device, and a step is told the slots of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..state import Counter, DecodeState


def _indices(numbers: list[int] | list[list[int]]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


class Block:
    """What an engine keeps of a block from step to step, one for each request.

    Its slot is free again once the engine has let go of it, be the block finished or aborted.
    """

    __slots__ = ("slot", "still", "_free")

    def __init__(self, free: list[int]) -> None:
        self.slot = -1  # none before its first step
        self.still = 0  # steps on end that changed nothing
        self._free = free

    def __del__(self) -> None:
        if self.slot >= 0:
            self._free.append(self.slot)


class Fresh(NamedTuple):
    """The blocks of a batch that are at their first step; int64 on the device."""

    rows: Tensor  # their rows of the batch
    slots: Tensor  # the slots that they got


class BlockSlots:
    """Gives slots to blocks; there are more slots when there are more blocks at once.

    Args:
        block_length: L.
        count: slots to begin with.
        kept: what else is kept of a block: a value of each of its "cells", or one of the "block",
            and of which dtype; 0 at first. `slots[name]` is its tensor [slots, L] or [slots].
    """

    def __init__(
        self, block_length: int, count: int, kept: Mapping[str, tuple[str, torch.dtype]]
    ) -> None:
        self._block_length = block_length
        self._count = count
        self._kept = kept
        self._tensors: dict[str, Tensor] = {}
        self._free: list[int] = []
        self._begun = 0
        self._order: list[int] = []
        self._slots: Tensor | None = None  # `_order` on the device
        self.state: DecodeState | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def new_block(self) -> Block:
        return Block(self._free)

    def of(self, blocks: list[Block], device: torch.device) -> tuple[Tensor, Fresh | None]:
        """The slots of a batch, [B] int64 on the device, and its blocks that had none.

        What those remember is cleared. The host does not wait for its copies to the device.
        """
        fresh = None
        rows = [row for row, block in enumerate(blocks) if block.slot < 0]
        # A batch may be empty, at the very first too: that of an idle rank of data parallelism.
        if self.state is None or len(rows) > len(self._free):
            self._grow(len(rows), device)
        if rows:
            for row in rows:
                blocks[row].slot = self._free.pop()
            begun = _indices([rows, [blocks[row].slot for row in rows]])
            fresh = Fresh(*begun.to(device, non_blocking=True))
            assert self.state is not None  # grown
            self.state.reset(fresh.slots)
            # Which slot is free depends on when Python frees objects, and so may differ from one
            # rank to another; the number of a block doesn't.
            identity = self.state.counters[fresh.slots]
            identity[:, Counter.ROW_ID] = self._begun + torch.arange(len(rows), device=device)
            identity[:, Counter.STEP] = 0
            self.state.counters[fresh.slots] = identity
            self._begun += len(rows)
            for tensor in self._tensors.values():
                tensor[fresh.slots] = 0
        order = [block.slot for block in blocks]
        if self._slots is None or order != self._order:
            self._order = order
            self._slots = _indices(order).to(device, non_blocking=True)
        return self._slots, fresh

    def _grow(self, more: int, device: torch.device) -> None:
        old = 0 if self.state is None else self.state.rows
        rows = max(2 * old, old + more, self._count)
        state = DecodeState(rows, self._block_length, device=device)
        self.state = state if self.state is None else state.put(slice(old), self.state)
        for name, (of, dtype) in self._kept.items():
            shape = (rows, self._block_length) if of == "cells" else (rows,)
            tensor = torch.zeros(shape, dtype=dtype, device=device)
            if old:
                tensor[:old] = self._tensors[name]
            self._tensors[name] = tensor
        self._free.extend(range(rows - 1, old - 1, -1))
