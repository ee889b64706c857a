# SPDX-License-Identifier: Apache-2.0
"""`DecodeState`: what a block remembers from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class DecodeState:
    """Streaks of predictions and step counters of B rows, kept on the device of the logits.

    Args:
        batch_size: B >= 0.
        block_length: L >= 0.
        device: default "cpu".

    Attributes:
        streak_count: [B, L] int32, steps that the tracked prediction has stood.
        streak_id: [B, L] int64, the tracked prediction; -1 = none.
        streak_sum, streak_max: [B, L] float32, sum and maximum of its confidences.
        counters: [B, 5] int64, one column each: identity of the row in the random numbers (0 ..
            B - 1 unless the caller writes another), steps taken ever, steps taken in this block,
            cells that were candidates when the block began (-1 = not known yet), seed of the row
            (0 unless the caller writes another; added to `config.seed`, so that requests of a batch
            have their own, and a captured graph is not tied to one).

    The tensors are written in place by `decode_step`, `select` and `update_stability_`. Nothing
    synchronises with the host.

    >>> state = DecodeState(2, 32)
    >>> state.streak_id.shape
    torch.Size([2, 32])
    """

    __slots__ = ("streak_count", "streak_id", "streak_sum", "streak_max", "counters")

    def __init__(
        self, batch_size: int, block_length: int, *, device: torch.device | str = "cpu"
    ) -> None:
        for name, value in (("batch_size", batch_size), ("block_length", block_length)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"DecodeState: {name} takes an integer >= 0, got {value!r}")
            if value < 0:
                raise ValueError(f"DecodeState: {name} takes an integer >= 0, got {value}")
        shape = (batch_size, block_length)
        self.streak_count = torch.zeros(shape, dtype=torch.int32, device=device)
        self.streak_id = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.streak_sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.streak_max = torch.zeros(shape, dtype=torch.float32, device=device)
        self.counters = torch.zeros((batch_size, 5), dtype=torch.int64, device=device)
        self.counters[:, 0] = torch.arange(batch_size, device=device)
        self.counters[:, 3] = -1

    @property
    def batch_size(self) -> int:
        return self.streak_count.shape[0]

    @property
    def block_length(self) -> int:
        return self.streak_count.shape[1]

    @property
    def device(self) -> torch.device:
        return self.streak_count.device

    def reset(self, rows: torch.Tensor | Sequence[int] | slice | None = None) -> DecodeState:
        """Begin a new block in all rows, or in `rows` (indices, a bool mask or a slice).

        Streaks and the counters of the block are cleared; the row's identity, its seed and its
        count of steps stay, so that a new block draws fresh random numbers. Returns the state
        itself.
        """
        index = slice(None) if rows is None else rows
        self.streak_count[index] = 0
        self.streak_id[index] = -1
        self.streak_sum[index] = 0
        self.streak_max[index] = 0
        self.counters[index, 2] = 0
        self.counters[index, 3] = -1
        return self

    def to(self, device: torch.device | str) -> DecodeState:
        """A state with its tensors on `device`; those already there are shared, not copied."""
        return self._map(lambda tensor: tensor.to(device))

    def take(self, rows: torch.Tensor) -> DecodeState:
        """A new state of some rows, [n] indices or [B] bool; identities travel with the rows."""
        return self._map(lambda tensor: tensor[rows])

    def _map(self, function) -> DecodeState:
        other = DecodeState.__new__(DecodeState)
        for name in DecodeState.__slots__:
            setattr(other, name, function(getattr(self, name)))
        return other

    def __repr__(self) -> str:
        return (
            f"DecodeState(batch_size={self.batch_size}, block_length={self.block_length}, "
            f"device={str(self.device)!r})"
        )
