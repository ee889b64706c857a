# SPDX-License-Identifier: Apache-2.0
"""What `generate` knows on the host of a decode: cells left, rows that are stuck or finished."""

from __future__ import annotations

from torch import Tensor

from .config import DecodeConfig
from .ops import DecodeStep


class NoProgressError(RuntimeError):
    """The model can't finish a row.

    Attributes:
        step: forwards made, the failing one included.
        row: row of the batch.
        sequences: [B, P + gen_length] int64, the tokens decided so far.
    """

    def __init__(self, reason: str, step: int, row: int, sequences: Tensor) -> None:
        super().__init__(
            f"generate: no progress at step {step}, row {row}: {reason}. The tokens decided so far "
            "are in the exception's `sequences`."
        )
        self.step, self.row, self.sequences = step, row, sequences


class BlockProgress:
    """Cells left of each row in one block, as the host has read them.

    Args:
        config: of the decode.
        rows: the rows of the batch that are decoded.
        block_length: L, all of which is masked when the block begins.
    """

    # A model that predicts the mask id (allow_mask_id) may commit nothing for a while.
    _PATIENCE = 256

    def __init__(self, config: DecodeConfig, rows: list[int], block_length: int) -> None:
        self._rows = rows
        self.left = [block_length] * len(rows)
        self._stalled = [0] * len(rows)
        self._limit = self._PATIENCE + (config.steps_per_block or 0)

    @property
    def remaining(self) -> int:
        """Cells left, of all rows."""
        return sum(self.left)

    def keep_rows(self, keep: list[int]) -> None:
        """Forgets all other rows; indices into those that are decoded."""
        self._rows = [self._rows[i] for i in keep]
        self.left = [self.left[i] for i in keep]
        self._stalled = [self._stalled[i] for i in keep]

    def update(self, step: DecodeStep, nfe: int, sequences: Tensor) -> int:
        """Takes note of a step; returns how many tokens it committed.

        Reads `step.remaining`, the one host synchronisation of a step. Raises NoProgressError for a
        row that is stuck; `nfe` and `sequences` are for its message.
        """
        before, self.left = self.left, step.remaining.tolist()
        for i, (old, new) in enumerate(zip(before, self.left, strict=True)):
            self._stalled[i] = self._stalled[i] + 1 if new == old > 0 else 0
            if not self._stalled[i]:
                continue
            if not (step.prediction[i] >= 0).any():
                reason = "the logits of every masked position are non-finite"
            elif self._stalled[i] > self._limit:
                reason = f"nothing was committed in {self._stalled[i]} steps"
            else:
                continue
            raise NoProgressError(reason, nfe, self._rows[i], sequences.clone())
        return sum(before) - sum(self.left)


def finished_rows(tokens: Tensor, stop_id: int, mask_id: int) -> Tensor:
    """[B] bool, rows of `tokens` [B, L] with a stop token before which everything is decided."""
    undecided_before = (tokens == mask_id).cumsum(1) > 0
    return ((tokens == stop_id) & ~undecided_before).any(1)
