# SPDX-License-Identifier: Apache-2.0
"""`BlockEdits`: which decided cells of the active block may take another token."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Rule
from .state import DecodeStep


class BlockEdits:
    """Edits of the rows that `generate(..., edit=True)` decodes, kept on the device.

    A row settles, and is edited no more, once no cell is masked and its last step edited nothing,
    or no cell may be edited again. So it depends on no other row, and comes to an end.

    Args:
        rows: that are decoded.
        block_length: L.
        max_edits: of a cell in a block.
        mask_id: the mask token.
        device: of the tokens.
    """

    def __init__(
        self, rows: int, block_length: int, max_edits: int, mask_id: int, device: torch.device
    ) -> None:
        self.max_edits, self._mask_id = max_edits, mask_id
        self._left = torch.zeros((rows, block_length), dtype=torch.int32, device=device)
        self._settled = torch.zeros(rows, dtype=torch.bool, device=device)
        self.edited = torch.zeros(rows, dtype=torch.bool, device=device)  # in the last step

    def begin(self, tokens: Tensor) -> None:
        """A new block `tokens` [B, L]. A row without a masked cell was finished before."""
        self._left.fill_(self.max_edits)
        self._settled.copy_((tokens != self._mask_id).all(1))
        self.edited.zero_()

    def editable(self, tokens: Tensor) -> Tensor:
        """[B, L] bool."""
        return (tokens != self._mask_id) & (self._left > 0) & ~self._settled[:, None]

    def update(self, step: DecodeStep) -> DecodeStep:
        """Takes note of a step. In the one returned, `remaining` is 1 where a row has no masked
        cell, but has not settled."""
        cells = step.rule == Rule.EDIT
        self._left.sub_(cells.int())
        self.edited.copy_(cells.any(1))
        goes_on = self.edited & (self._left > 0).any(1)
        self._settled.logical_or_((step.remaining == 0) & ~goes_on)
        owed = (step.remaining == 0) & ~self._settled
        return step._replace(remaining=step.remaining + owed.int())

    def settle(self, rows: Tensor) -> None:
        """`rows` [B] bool are finished."""
        self._settled.logical_or_(rows)

    def keep_rows(self, rows: Tensor) -> None:
        """Forgets all other rows; indices into those that are decoded."""
        self._left, self._settled = self._left[rows], self._settled[rows]
        self.edited = self.edited[rows]
