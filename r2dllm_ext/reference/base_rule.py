# SPDX-License-Identifier: Apache-2.0
"""Who is committed from confidence alone."""

import torch
from torch import Tensor


def base_rule(
    confidence: Tensor,
    is_masked: Tensor,
    config,
    *,
    threshold: float,
    step: Tensor,
    masked_at_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cells that `config.base` commits by itself, and the best cells where it commits none.

    Args:
        confidence: [B, L] float32.
        is_masked: [B, L] bool, the cells that may be committed.
        config: DecodeConfig.
        threshold: config.threshold in the precision that `confidence` is compared in.
        step: [B] int64, steps taken in the block before this one.
        masked_at_start: [B] int64, candidates when the block began.

    Returns:
        Two disjoint [B, L] bool, subsets of `is_masked`: the rule's own cells; in a row that has
        none of these, its best cell, which is forced. So each row that may commit a cell does.
    """
    own, forced = torch.zeros_like(is_masked), torch.zeros_like(is_masked)
    for b in range(is_masked.shape[0]):
        cells = is_masked[b].nonzero().flatten().tolist()
        if not cells:
            continue
        p = confidence[b].tolist()
        falling = sorted(cells, key=lambda cell: (-p[cell], cell))  # ties: lowest index first
        ranked = [p[cell] for cell in falling]
        if config.base == "first":
            own[b, cells[0]] = True
            continue
        if config.base == "threshold":
            count = sum(value >= threshold for value in ranked)
        elif config.base == "schedule":
            n = config.steps_per_block or is_masked.shape[1]
            count = quota(int(masked_at_start[b]), n, int(step[b]), len(cells))
        elif config.base == "factor":
            count = factor_count(ranked, config.factor)
        else:
            count = budget_count(ranked, config.error_budget)
        own[b, falling[:count]] = True
        if count == 0:
            forced[b, falling[0]] = True
    return own, forced


def quota(m: int, n: int, step: int, masked: int) -> int:
    """Cells of `masked` that step `step` of `n` takes when a block began with `m`: an equal share,
    the remainder in the first steps; all of them past the end."""
    return min(masked, m // n + (step < m % n)) if step < n else masked


def factor_count(falling: list[float], factor: float) -> int:
    """Length of the prefix with p_j >= 1 - factor / (j + 1), j from 1; p_1 always passes.

    A single failing cell at the very end is committed with the rest, as the release does.
    """
    j = 1
    while j < len(falling) and falling[j] >= 1 - factor / (j + 2):
        j += 1
    return j + 1 if j == len(falling) - 1 else j


def budget_count(falling: list[float], error_budget: float) -> int:
    """Cells while the summed (1 - p) of all of them stays in the budget."""
    spent, count = 0.0, 0
    for p in falling:
        spent += 1 - p
        if not spent <= error_budget:
            break
        count += 1
    return count
