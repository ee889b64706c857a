# SPDX-License-Identifier: Apache-2.0
"""Who is committed from confidence (or entropy) alone."""

import torch
from torch import Tensor


def passes(confidence: Tensor, threshold: float | None, compare: str) -> Tensor:
    """Where a confidence is enough; nowhere without a threshold, and never where it is NaN."""
    if threshold is None:
        return torch.zeros_like(confidence, dtype=torch.bool)
    return confidence > threshold if compare == ">" else confidence >= threshold


def base_rule(
    confidence: Tensor,
    entropy: Tensor,
    is_eligible: Tensor,
    config,
    *,
    threshold: float | None,
    step: Tensor,
    masked_at_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cells that `config.base` commits by itself, and those that `config.quota` adds.

    Every base rule ranks the cells of a row and commits a prefix; the quota extends a prefix that
    is shorter. By falling confidence, but "first" as they lie, and "entropy" by rising entropy;
    ties: lowest index first.

    Args:
        confidence, entropy: [B, L] float32; `entropy` matters to base="entropy" alone.
        is_eligible: [B, L] bool, the cells that may be committed; their confidence is not NaN.
        config: DecodeConfig.
        threshold: config.threshold in the precision that `confidence` is compared in, or None.
        step: [B] int64, steps taken in the block before this one.
        masked_at_start: [B] int64, candidates when the block began.

    Returns:
        Two disjoint [B, L] bool, subsets of `is_eligible`: the rule's own cells, the quota's.
    """
    own, forced = torch.zeros_like(is_eligible), torch.zeros_like(is_eligible)
    enough = passes(confidence, threshold, config.compare)
    for b in range(is_eligible.shape[0]):
        cells = is_eligible[b].nonzero().flatten().tolist()
        p, h = confidence[b].tolist(), entropy[b].tolist()
        if config.base == "entropy":
            ranked = sorted((cell for cell in cells if h[cell] == h[cell]), key=lambda i: (h[i], i))
        elif config.base == "first":
            ranked = cells
        else:
            ranked = sorted(cells, key=lambda i: (-p[i], i))
        falling = [p[cell] for cell in ranked]

        if config.base == "threshold":
            count = sum(enough[b, ranked].tolist())
        elif config.base == "schedule":
            n = config.steps_per_block or is_eligible.shape[1]
            count = schedule_count(int(masked_at_start[b]), n, int(step[b]), len(ranked))
        elif config.base == "factor":
            count = factor_count(falling, config.factor)
        elif config.base == "first":
            count = config.quota
        elif config.base == "budget":
            costs = [1 - value for value in falling]
            count = budget_count(costs, config.error_budget, config.last_free)
        else:
            costs = [h[cell] for cell in ranked]
            count = budget_count(costs, config.entropy_budget, config.last_free)
        own[b, ranked[:count]] = True
        forced[b, ranked[count : config.quota]] = True
    return own, forced


def schedule_count(m: int, n: int, step: int, masked: int) -> int:
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


def budget_count(costs: list[float], budget: float, last_free: bool) -> int:
    """Length of the longest prefix whose costs, without the last if that is free, sum up to no
    more than the budget. No cost is negative."""
    spent = 0.0
    for count, cost in enumerate(costs):
        if not (spent if last_free else spent + cost) <= budget:
            return count
        spent += cost
    return len(costs)
