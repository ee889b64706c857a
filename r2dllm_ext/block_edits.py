# SPDX-License-Identifier: Apache-2.0
"""`BlockEdits`: which decided cells of the active block may take another token."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Rule
from .state import DecodeStep


class BlockEdits:
    """Edits of the rows that `generate(..., edit=True)` decodes, kept on the device.

    A row goes on while its last step edited something and may do so again; once it does not, and no
    cell is masked, it has settled and is edited no more. So it depends on no other row, and ends.

    Args:
        rows: that are decoded.
        block_length: L.
        max_edits: of a cell in a block.
        mask_id: the mask token.
        device: of the tokens.

    Attributes:
        goes_on: [rows] bool, after a step: what is decided may be edited still.
    """

    def __init__(
        self, rows: int, block_length: int, max_edits: int, mask_id: int, device: torch.device
    ) -> None:
        self.max_edits, self._mask_id = max_edits, mask_id
        self._left = torch.zeros((rows, block_length), dtype=torch.int32, device=device)
        self._settled = torch.zeros(rows, dtype=torch.bool, device=device)
        self.goes_on = torch.zeros(rows, dtype=torch.bool, device=device)

    def begin(self, tokens: Tensor) -> None:
        """A new block `tokens` [B, L]. A row without a masked cell was finished before."""
        self._left.fill_(self.max_edits)
        self._settled.copy_((tokens != self._mask_id).all(1))

    def editable(self, tokens: Tensor) -> Tensor:
        """[B, L] bool."""
        return (tokens != self._mask_id) & (self._left > 0) & ~self._settled[:, None]

    def update(self, step: DecodeStep) -> DecodeStep:
        """Takes note of a step; returns it with `remaining` 1 where a row has no masked cell, but
        goes on."""
        edited = step.rule == Rule.EDIT
        self._left.sub_(edited.int())
        self.goes_on.copy_(edited.any(1) & (self._left > 0).any(1))
        is_whole = step.remaining == 0
        self._settled.logical_or_(is_whole & ~self.goes_on)
        return step._replace(remaining=step.remaining + (is_whole & self.goes_on).int())

    def settle(self, rows: Tensor) -> None:
        """`rows` [B] bool are finished."""
        self._settled.logical_or_(rows)

    def keep_rows(self, rows: Tensor) -> None:
        """Forgets all other rows; indices into those that are decoded."""
        self._left, self._settled = self._left[rows], self._settled[rows]
        self.goes_on = self.goes_on[rows]
