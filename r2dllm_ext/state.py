# SPDX-License-Identifier: Apache-2.0
"""`DecodeState`: what a block remembers between steps; `DecodeStep`: what a step decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._checks import device as checked_device
from ._checks import flag, instance, integer, refuse

# Some rows of a state: see `DecodeState.reset`.
Rows = Tensor | Sequence[int] | Sequence[bool] | slice | int


class DecodeStep(NamedTuple):
    """What a step decided; see `decode_step`."""

    prediction: Tensor  # [B, L] int64, -1 = none; the cell's new token wherever rule is not NONE
    confidence: Tensor  # [B, L] float32, 0 = not read, NaN = invalid
    rule: Tensor  # [B, L] uint8, values of Rule
    remaining: Tensor  # [B] int32, cells still masked
    entropy: Tensor | None  # [B, L] float32 in nats, 0 = not read, NaN = invalid; if asked for


class Counter(IntEnum):
    """The columns of `DecodeState.counters`, as in csrc/rules/decode_step.h."""

    # The row in the random numbers, its low 32 bits: 0 .. B - 1 unless the caller writes another.
    ROW_ID = 0
    STEP = 1  # steps with a candidate, ever; in the random numbers too
    BLOCK_STEP = 2  # steps taken in this block
    BLOCK_MASKED = 3  # cells that were candidates when the block began; -1 = not known yet
    # Added to config.seed: requests of a batch have their own, and a captured graph is tied to
    # none. 0 unless the caller writes another.
    ROW_SEED = 4


class DecodeState:
    """Streaks of predictions and step counters of some rows, kept on the device of the logits.

    A step uses row b of the state for row b of the logits, or row `slots[b]`: then a state may have
    as many rows as an engine serves requests, and requests come (`put`) and go as they like.

    Args:
        rows: >= 0.
        block_length: L >= 0.
        device: default "cpu".
        step_map: True keeps the step in which each cell got its token.

    Attributes:
        streak_count: [rows, L] int32, steps that the tracked prediction has stood.
        streak_id: [rows, L] int64, the tracked prediction; -1 = none.
        streak_sum, streak_max: [rows, L] float32, sum and maximum of its confidences.
        counters: [rows, 5] int64, one column for each `Counter`.
        step_map: [rows, L] int16, the step of the block, from 0 on, that last gave a cell a token;
            -1 = none did, 32767 = that one or later. None unless asked for.

    The tensors are written in place by `decode_step`, `select` and `update_stability_`. Nothing
    synchronises with the host, masks of bools aside. `copy.deepcopy` and pickle copy a state.

    >>> state = DecodeState(2, 32)
    >>> state.streak_id.shape
    torch.Size([2, 32])
    """

    __slots__ = ("streak_count", "streak_id", "streak_sum", "streak_max", "counters", "step_map")

    streak_count: Tensor
    streak_id: Tensor
    streak_sum: Tensor
    streak_max: Tensor
    counters: Tensor
    step_map: Tensor | None

    @torch.inference_mode(False)  # or a state made under it could not be reset outside
    def __init__(
        self,
        rows: int,
        block_length: int,
        *,
        device: torch.device | str = "cpu",
        step_map: bool = False,
    ) -> None:
        rows = integer("DecodeState", "rows", rows, 0)
        shape = (rows, integer("DecodeState", "block_length", block_length, 0))
        flag("DecodeState", "step_map", step_map)
        device = checked_device("DecodeState", "device", "cpu" if device is None else device)
        self.streak_count = torch.zeros(shape, dtype=torch.int32, device=device)
        self.streak_id = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.streak_sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.streak_max = torch.zeros(shape, dtype=torch.float32, device=device)
        self.counters = torch.zeros((rows, len(Counter)), dtype=torch.int64, device=device)
        self.counters[:, Counter.ROW_ID] = torch.arange(rows, dtype=torch.int64, device=device)
        self.counters[:, Counter.BLOCK_MASKED] = -1
        self.step_map = None
        if step_map:
            self.step_map = torch.full(shape, -1, dtype=torch.int16, device=device)

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

        Streaks, step map and the counters of the block are cleared; the row's identity, its seed
        and its count of steps stay, so that a new block draws fresh random numbers. Returns the
        state itself.

        Args:
            rows: an index or a sequence of indices (negative: from the end), a slice, or a mask of
                bools, one for each row; a sequence may be a tensor or an array. Default: all rows.

        Raises:
            TypeError, ValueError: `rows` is none of these, or an index that the state does not
                have; nothing is written then. The indices of a tensor are not read to check them.

        >>> DecodeState(3, 32).reset((0, 2)).counters[:, Counter.BLOCK_MASKED]
        tensor([-1, -1, -1])
        """
        every = slice(None) if rows is None else rows
        index = row_index("DecodeState.reset", every, self.rows, self.device)
        self.streak_count[index] = 0
        self.streak_id[index] = -1
        self.streak_sum[index] = 0
        self.streak_max[index] = 0
        self.counters[index, Counter.BLOCK_STEP] = 0
        self.counters[index, Counter.BLOCK_MASKED] = -1
        if self.step_map is not None:
            self.step_map[index] = -1
        return self

    def to(self, device: torch.device | str) -> DecodeState:
        """A state with its tensors on `device`; those already there are shared, not copied."""
        device = checked_device("DecodeState.to", "device", device)
        return self._map(lambda tensor: tensor.to(device))

    def take(self, rows: Rows) -> DecodeState:
        """A new state of some rows, which `reset` describes; identities travel with the rows.

        >>> DecodeState(3, 32).take((0, 2)).counters[:, Counter.ROW_ID]
        tensor([0, 2])
        """
        index = row_index("DecodeState.take", rows, self.rows, self.device)
        return self._map(lambda tensor: taken(tensor, index))

    def put(self, rows: Rows, other: DecodeState) -> DecodeState:
        """Write the rows of another state, their identities too, over some rows of this one.

        Args:
            rows: as many as `other` has, as in `reset`; each once.
            other: of the same block length, on the same device, with a step map if this has one.

        Returns the state itself.

        >>> state = DecodeState(3, 32).put([2], DecodeState(1, 32))
        >>> state.counters[:, Counter.ROW_ID]
        tensor([0, 1, 0])
        """
        where = "DecodeState.put"
        instance(where, "other", other, DecodeState)
        self._check_like(where, "other", other)
        index = row_index(where, rows, self.rows, self.device, distinct=True)
        count = self.counters[index].shape[0]
        if other.rows != count:
            refuse(ValueError, where, "other", f"a state of {count} rows", other)
        for name in DecodeState.__slots__:
            own, given = getattr(self, name), getattr(other, name)
            if own is not None:
                own[index] = given.clone() if given is own else given
        return self

    @staticmethod
    def stack(states: Sequence[DecodeState]) -> DecodeState:
        """A new state with the rows of several, in their order; identities travel with the rows.

        Args:
            states: one or more, as alike as those of `put`.

        >>> DecodeState.stack([DecodeState(2, 32), DecodeState(1, 32)]).rows
        3
        """
        where = "DecodeState.stack"
        states = list(states)
        if not states:
            refuse(ValueError, where, "states", "one or more", states)
        for number, state in enumerate(states):
            instance(where, f"states[{number}]", state, DecodeState)
            states[0]._check_like(where, f"states[{number}]", state)
        whole = states[0]._map(lambda tensor: tensor)
        for name in DecodeState.__slots__:
            if getattr(whole, name) is not None:
                setattr(whole, name, torch.cat([getattr(state, name) for state in states]))
        return whole

    def _check_like(self, where: str, name: str, other: DecodeState) -> None:
        """Rows of `other` can be rows of this one."""
        for attribute in ("block_length", "device"):
            own, got = getattr(self, attribute), getattr(other, attribute)
            if own != got:
                refuse(ValueError, where, name, f"a state of {attribute} {str(own)!r}", str(got))
        if (self.step_map is None) != (other.step_map is None):
            with_or_without = "without" if self.step_map is None else "with"
            refuse(ValueError, where, name, f"a state {with_or_without} a step map", other)

    def _map(self, function: Callable[[Tensor], Tensor]) -> DecodeState:
        other = DecodeState.__new__(DecodeState)
        for name in DecodeState.__slots__:
            tensor = getattr(self, name)
            setattr(other, name, None if tensor is None else function(tensor))
        return other

    def __repr__(self) -> str:
        return (
            f"DecodeState(rows={self.rows}, block_length={self.block_length}, "
            f"device={str(self.device)!r}, step_map={self.step_map is not None})"
        )


def taken(tensor: Tensor, index: Tensor | slice) -> Tensor:
    """Rows of a tensor as a copy, whatever the index is."""
    return tensor[index].clone() if isinstance(index, slice) else tensor[index]


def row_index(
    where: str, rows: Any, count: int, device: torch.device, *, distinct: bool = False
) -> Tensor | slice:
    """What `rows` (see `DecodeState.reset`) means as an index into `count` rows.

    `distinct`: each row may come once; seen where the indices are on the host.
    """
    takes = f"indices of {count} rows, a slice or a bool mask [{count}]"
    if isinstance(rows, slice):
        try:
            every = range(count)[rows]
        except (TypeError, ValueError):
            refuse(TypeError, where, "rows", takes, rows)
        if every.step > 0:
            return rows
        rows = every
    # A set has no order for rows to come in.
    if isinstance(rows, (str, bytes, bytearray, Set, Mapping)):
        refuse(TypeError, where, "rows", takes, rows)
    if not isinstance(rows, Tensor) and hasattr(rows, "__array__"):
        rows = np.asarray(rows).tolist()
    if isinstance(rows, Tensor):
        if rows.is_floating_point() or rows.is_complex():
            refuse(TypeError, where, "rows", takes, rows.dtype)
        is_mask = rows.dtype == torch.bool
        if rows.dim() > 1 or (is_mask and rows.shape != (count,)):
            refuse(ValueError, where, "rows", takes, list(rows.shape))
        return rows if is_mask else rows.reshape(-1).long()
    try:
        given = list(rows)
    except TypeError:
        given = [rows]
    if given and all(_is_bool(row) for row in given):
        if len(given) != count:
            refuse(ValueError, where, "rows", takes, rows)
        return torch.tensor([bool(row) for row in given], dtype=torch.bool, device=device)
    indices = [integer(where, "rows", row, -count, count - 1) for row in given]
    if distinct and len({row % count for row in indices}) < len(indices):
        refuse(ValueError, where, "rows", "each row once", rows)
    return torch.tensor(indices, dtype=torch.int64, device=device)


def _is_bool(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return True
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.dim() == 0
