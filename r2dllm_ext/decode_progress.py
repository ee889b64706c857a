# SPDX-License-Identifier: Apache-2.0
"""What `generate` knows on the host of a decode: cells left, rows that are stuck or finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, where

from .config import DecodeConfig
from .ops import DecodeStep
from .stop_ids import is_stop

if TYPE_CHECKING:
    from .generation import Generation


class StuckRow(NamedTuple):
    """A row that the model can't finish."""

    step: int  # forwards made when it was given up
    reason: str


class NoProgressError(RuntimeError):
    """The model can't finish some rows. Those that it can are finished.

    Attributes:
        rows: these rows of the batch, in the order in which they were given up.
        row, step: the first of them, and the forwards made when it was given up, the failing one
            included.
        generation: what `generate` would have returned. In `rows` masked cells are left.
        sequences: its sequences.
    """

    def __init__(self, stuck: dict[int, StuckRow], generation: Generation) -> None:
        self.rows, self.generation = tuple(stuck), generation
        self.row, self.sequences = self.rows[0], generation.sequences
        self.step, reason = stuck[self.row]
        others = f" (and {len(stuck) - 1} more)" if len(stuck) > 1 else ""
        super().__init__(
            f"generate: no progress at step {self.step}, row {self.row}{others}: {reason}. What "
            "was decoded is in the exception's `generation`."
        )
        self._stuck = stuck

    def __reduce__(self) -> tuple[Any, ...]:
        # The default hands the message to __init__; workers send their errors as pickles.
        return type(self), (self._stuck, self.generation)


class BlockProgress:
    """Cells left of each row in one block, as the host has read them.

    Args:
        config: of the decode.
        rows: the rows of the batch that are decoded.
        block_length: L, all of which is masked when the block begins.
        stuck: by row of the batch, those that were given up; `update` adds to them.
        max_edits: of a cell (`BlockEdits`), while it may be that nothing else is done.
    """

    # A model that predicts the mask id (mask_prediction="allow") may commit nothing for a while.
    _PATIENCE = 256

    def __init__(
        self,
        config: DecodeConfig,
        rows: list[int],
        block_length: int,
        stuck: dict[int, StuckRow],
        max_edits: int = 0,
    ) -> None:
        self._rows, self._stuck = rows, stuck
        self.left = [block_length] * len(rows)
        self._stalled = [0] * len(rows)
        self._limit = self._PATIENCE + (config.steps_per_block or 0) + max_edits * block_length

    @property
    def remaining(self) -> int:
        """Cells left, of all rows that are not stuck."""
        pairs = zip(self._rows, self.left, strict=True)
        return sum(left for row, left in pairs if row not in self._stuck)

    def keep_rows(self, keep: list[int]) -> None:
        """Forgets all other rows; indices into those that are decoded."""
        self._rows = [self._rows[i] for i in keep]
        self.left = [self.left[i] for i in keep]
        self._stalled = [self._stalled[i] for i in keep]

    def update(self, step: DecodeStep, nfe: int, masked: Tensor | None = None) -> int:
        """Takes note of a step and of rows that are stuck; returns how many tokens it committed.

        masked: [B, L] bool, before the step, if that is known: predictions of cells that may be
        edited are no sign that those will ever have one.

        Reads `step.remaining`, the one host synchronisation of a step.
        """
        before, self.left = self.left, step.remaining.tolist()
        for i, (old, new) in enumerate(zip(before, self.left, strict=True)):
            self._stalled[i] = self._stalled[i] + 1 if new == old > 0 else 0
            if not self._stalled[i] or self._rows[i] in self._stuck:
                continue
            predicted = step.prediction[i]
            if masked is not None and masked[i].any():
                predicted = predicted[masked[i]]
            if not (predicted >= 0).any():
                reason = "the logits of every masked position are non-finite"
            elif self._stalled[i] > self._limit:
                reason = f"nothing was committed in {self._stalled[i]} steps"
            else:
                continue
            self._stuck[self._rows[i]] = StuckRow(nfe, reason)
        return sum(before) - sum(self.left)


def ending(tokens: Tensor, stops: Sequence[int], mask_id: int) -> Tensor:
    """[B] int64: of rows of `tokens` [B, L] the first token of `stops` before which everything is
    decided; -1 = none, the row is not finished."""
    undecided_before = (tokens == mask_id).cumsum(1) > 0
    ends = is_stop(tokens, stops) & ~undecided_before
    first = ends.int().argmax(1, keepdim=True)
    return where(ends.any(1), tokens.gather(1, first)[:, 0], -1)
