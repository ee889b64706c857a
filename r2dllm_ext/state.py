# SPDX-License-Identifier: Apache-2.0
"""`DecodeState`: what a block remembers between steps; `DecodeStep`: what a step decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import integer, refuse

# Some rows of a state: see `DecodeState.reset`.
Rows = Tensor | Sequence[int] | Sequence[bool] | slice | int


class DecodeStep(NamedTuple):
    """What a step decided; see `decode_step`."""

    prediction: Tensor  # [B, L] int64, -1 = none; the committed token wherever rule is not NONE
    confidence: Tensor  # [B, L] float32, 0 = no candidate, NaN = invalid
    rule: Tensor  # [B, L] uint8, values of Rule
    remaining: Tensor  # [B] int32, cells still masked


class Counter(IntEnum):
    """The columns of `DecodeState.counters`, as in csrc/rules/decode_step.h."""

    ROW_ID = 0  # the row in the random numbers: 0 .. B - 1 unless the caller writes another
    STEP = 1  # steps taken ever
    BLOCK_STEP = 2  # steps taken in this block
    BLOCK_MASKED = 3  # cells that were candidates when the block began; -1 = not known yet
    # Added to config.seed: requests of a batch have their own, and a captured graph is tied to
    # none. 0 unless the caller writes another.
    ROW_SEED = 4


class DecodeState:
    """Streaks of predictions and step counters of B rows, kept on the device of the logits.

    Args:
        rows: B >= 0.
        block_length: L >= 0.
        device: default "cpu".

    Attributes:
        streak_count: [B, L] int32, steps that the tracked prediction has stood.
        streak_id: [B, L] int64, the tracked prediction; -1 = none.
        streak_sum, streak_max: [B, L] float32, sum and maximum of its confidences.
        counters: [B, 5] int64, one column for each `Counter`.

    The tensors are written in place by `decode_step`, `select` and `update_stability_`. Nothing
    synchronises with the host.

    >>> state = DecodeState(2, 32)
    >>> state.streak_id.shape
    torch.Size([2, 32])
    """

    __slots__ = ("streak_count", "streak_id", "streak_sum", "streak_max", "counters")

    streak_count: Tensor
    streak_id: Tensor
    streak_sum: Tensor
    streak_max: Tensor
    counters: Tensor

    def __init__(self, rows: int, block_length: int, *, device: torch.device | str = "cpu") -> None:
        rows = integer("DecodeState", "rows", rows, 0)
        shape = (rows, integer("DecodeState", "block_length", block_length, 0))
        self.streak_count = torch.zeros(shape, dtype=torch.int32, device=device)
        self.streak_id = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.streak_sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.streak_max = torch.zeros(shape, dtype=torch.float32, device=device)
        self.counters = torch.zeros((rows, len(Counter)), dtype=torch.int64, device=device)
        self.counters[:, Counter.ROW_ID] = torch.arange(rows, dtype=torch.int64, device=device)
        self.counters[:, Counter.BLOCK_MASKED] = -1

    @property
    def rows(self) -> int:
        return self.streak_count.shape[0]

    @property
    def block_length(self) -> int:
        return self.streak_count.shape[1]

    @property
    def device(self) -> torch.device:
        return self.streak_count.device

    def reset(self, rows: Rows | None = None) -> DecodeState:
        """Begin a new block in all rows, or in some of them.

        Streaks and the counters of the block are cleared; the row's identity, its seed and its
        count of steps stay, so that a new block draws fresh random numbers. Returns the state
        itself.

        Args:
            rows: an index or a sequence of indices (negative: from the end), a slice, or a mask [B]
                of bools; a sequence may be a tensor or an array. Default: all rows.

        Raises:
            TypeError, ValueError: `rows` is none of these, or an index outside of [-B, B); nothing
                is written then. The indices of a tensor are not read to check them.

        >>> DecodeState(3, 32).reset((0, 2)).counters[:, Counter.BLOCK_MASKED]
        tensor([-1, -1, -1])
        """
        index = slice(None) if rows is None else self._index("reset", rows)
        self.streak_count[index] = 0
        self.streak_id[index] = -1
        self.streak_sum[index] = 0
        self.streak_max[index] = 0
        self.counters[index, Counter.BLOCK_STEP] = 0
        self.counters[index, Counter.BLOCK_MASKED] = -1
        return self

    def to(self, device: torch.device | str) -> DecodeState:
        """A state with its tensors on `device`; those already there are shared, not copied."""
        return self._map(lambda tensor: tensor.to(device))

    def take(self, rows: Rows) -> DecodeState:
        """A new state of some rows, which `reset` describes; identities travel with the rows.

        >>> DecodeState(3, 32).take((0, 2)).counters[:, Counter.ROW_ID]
        tensor([0, 2])
        """
        index = self._index("take", rows)
        if isinstance(index, slice):  # of which indexing makes a view
            return self._map(lambda tensor: tensor[index].clone())
        return self._map(lambda tensor: tensor[index])

    def _index(self, method: str, rows: Any) -> Tensor | slice:
        """What `rows` means as an index into the first dimension."""
        where = f"DecodeState.{method}"
        takes = f"indices of {self.rows} rows, a slice or a bool mask [{self.rows}]"
        if isinstance(rows, slice):
            return rows
        if isinstance(rows, str):
            refuse(TypeError, where, "rows", takes, rows)
        if not isinstance(rows, Tensor) and hasattr(rows, "__array__"):
            rows = torch.as_tensor(rows, device="cpu")
        if isinstance(rows, Tensor):
            if rows.is_floating_point() or rows.is_complex():
                refuse(TypeError, where, "rows", takes, rows.dtype)
            is_mask = rows.dtype == torch.bool
            if rows.dim() > 1 or (is_mask and rows.shape != (self.rows,)):
                refuse(ValueError, where, "rows", takes, list(rows.shape))
            return rows if is_mask else rows.reshape(-1).long()
        try:
            given = list(rows)
        except TypeError:
            given = [rows]
        if given and all(isinstance(row, bool) for row in given):
            if len(given) != self.rows:
                refuse(ValueError, where, "rows", takes, rows)
            return torch.tensor(given, dtype=torch.bool, device=self.device)
        indices = [integer(where, "rows", row, -self.rows, self.rows - 1) for row in given]
        return torch.tensor(indices, dtype=torch.int64, device=self.device)

    def _map(self, function: Callable[[Tensor], Tensor]) -> DecodeState:
        other = DecodeState.__new__(DecodeState)
        for name in DecodeState.__slots__:
            setattr(other, name, function(getattr(self, name)))
        return other

    def __repr__(self) -> str:
        return (
            f"DecodeState(rows={self.rows}, block_length={self.block_length}, "
            f"device={str(self.device)!r})"
        )
