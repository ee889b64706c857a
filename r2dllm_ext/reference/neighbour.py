# SPDX-License-Identifier: Apache-2.0
"""Neighbours of sure cells (LocalLeap, arXiv 2510.07081)."""

from torch import Tensor


def neighbours(is_anchor: Tensor, is_near_enough: Tensor, radius: int) -> Tensor:
    """Cells that are sure enough beside another cell that is sure.

    Args:
        is_anchor: [B, L] bool, candidates whose confidence passes `threshold`.
        is_near_enough: [B, L] bool, masked cells whose confidence passes `neighbour_threshold`.
        radius: greatest distance to an anchor, >= 0; a cell is no anchor of itself.

    Returns:
        [B, L] bool, a subset of `is_near_enough`.
    """
    chosen = is_near_enough.clone()
    rows, length = is_anchor.shape
    for b in range(rows):
        anchors = is_anchor[b].nonzero().flatten().tolist()
        for i in range(length):
            if not any(0 < abs(i - j) <= radius for j in anchors):
                chosen[b, i] = False
    return chosen
