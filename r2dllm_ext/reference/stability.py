# SPDX-License-Identifier: Apache-2.0
"""Temporal redundancy: predictions that stopped changing."""

import torch
from torch import Tensor


def update_stability_(
    state,
    prediction: Tensor,
    confidence: Tensor,
    *,
    was_masked: Tensor,
    is_masked: Tensor,
    steps: int,
    min_confidence: float,
    mode: str = "last",
) -> Tensor:
    """Advance the streaks of a step and return the cells that are final.

    A cell masked before and after the other rules extends its streak if its prediction is the
    tracked one, else starts anew. It is final once the streak counts at least `steps` and its
    value reaches `min_confidence`. All arithmetic in float32.

    Args:
        state: streak_count int32, streak_id int64, streak_sum and streak_max float32, all [B, L];
            written in place. Cleared: cells committed in this step, invalid cells (prediction
            below 0 or confidence not finite) and final cells. Untouched: not `was_masked`.
        prediction: [B, L] int64.
        confidence: [B, L] floating point, rounded to float32.
        was_masked, is_masked: [B, L] bool, before the step and now.
        steps: >= 1.
        min_confidence: inclusive, rounded to float32.
        mode: confidence of this step ("last"), mean ("ave") or maximum ("max") of the streak.

    Returns:
        [B, L] bool, the final cells; what they commit is their prediction.
    """
    p = confidence.float()
    observed = was_masked & is_masked & (prediction >= 0) & p.isfinite()
    same = observed & (state.streak_id == prediction)
    count = torch.where(same, state.streak_count + 1, 1)
    total = torch.where(same, state.streak_sum + p, p)
    highest = torch.where(same, torch.maximum(state.streak_max, p), p)
    value = {"last": p, "ave": total / count.float(), "max": highest}[mode]
    least = torch.tensor(min_confidence, dtype=torch.float32, device=p.device)
    final = observed & (count >= steps) & (value >= least)
    keep = observed & ~final
    for tensor, new, empty in (
        (state.streak_count, count, 0),
        (state.streak_id, prediction, -1),
        (state.streak_sum, total, 0),
        (state.streak_max, highest, 0),
    ):
        advanced = torch.where(keep, new, torch.full_like(new, empty))
        tensor.copy_(torch.where(was_masked, advanced.to(tensor.dtype), tensor))
    return final
