# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from .._checks import choice, instance, integer, is_tensor, no_tangent, number, rule_tensors
from ..config import TEMPORAL_EVALS
from ..state import DecodeState


def update_stability_(
    state: DecodeState,
    prediction: torch.Tensor,
    confidence: torch.Tensor,
    *,
    was_masked: torch.Tensor,
    is_masked: torch.Tensor,
    steps: int,
    min_confidence: float,
    mode: str = "last",
) -> torch.Tensor:
    """Advance the streaks of `state` in place and report the predictions that have become stable.

    A cell that is still masked continues its streak if its prediction is the tracked one and
    begins a new one otherwise. It is stable once the streak is `steps` long and its evidence
    reaches `min_confidence`; its streak then ends. A cell committed in this step, or one that
    is masked but has no prediction, loses its streak. One that was not masked is left alone.

    Args:
        state: streaks of B rows and L cells, written in place.
        prediction: [B, L] int64; negative = none.
        confidence: [B, L] float32, float16 or bfloat16; non-finite = no prediction.
        was_masked, is_masked: [B, L] bool, before the step and after its other rules.
        steps: >= 1 equal predictions in a row, this step's included.
        min_confidence: inclusive, a probability in [0, 1].
        mode: evidence: confidence of this step ("last"), mean ("ave") or maximum ("max") of the
            streak.

    Returns:
        [B, L] bool, cells whose prediction is stable: a subset of `is_masked`.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes; the state is then
            unchanged.

    Float32 arithmetic, same bits on every device. No host synchronisation. Source: temporal rule of
    R2-dLLM (`temporal_steps`); oracle: `reference.update_stability_`.

    >>> masked = torch.ones(1, 1, dtype=torch.bool)
    >>> state = DecodeState(1, 1)
    >>> for _ in range(2):
    ...     stable = update_stability_(state, torch.tensor([[5]]), torch.tensor([[.9]]),
    ...                                was_masked=masked, is_masked=masked, steps=2,
    ...                                min_confidence=.8)
    >>> stable
    tensor([[True]])
    """
    op = "update_stability_"
    instance(op, "state", state, DecodeState)
    is_tensor(op, prediction=prediction, confidence=confidence)
    no_tangent(op, confidence=confidence)
    is_tensor(op, was_masked=was_masked, is_masked=is_masked)
    return torch.ops.r2dllm.update_stability_(
        state.streak_count,
        state.streak_id,
        state.streak_sum,
        state.streak_max,
        prediction,
        confidence,
        was_masked,
        is_masked,
        integer(op, "steps", steps),
        number(op, "min_confidence", min_confidence),
        TEMPORAL_EVALS.index(choice(op, "mode", mode, TEMPORAL_EVALS)),
    )


@torch.library.register_fake("r2dllm::update_stability_")
def _(
    streak_count,
    streak_id,
    streak_sum,
    streak_max,
    prediction,
    confidence,
    was_masked,
    is_masked,
    steps,
    min_confidence,
    temporal_eval=0,
):
    given = [
        ("state.streak_count", streak_count, torch.int32),
        ("state.streak_id", streak_id, torch.int64),
        ("state.streak_sum", streak_sum, torch.float32),
        ("state.streak_max", streak_max, torch.float32),
        ("prediction", prediction, torch.int64),
        ("was_masked", was_masked, torch.bool),
        ("is_masked", is_masked, torch.bool),
    ]
    rule_tensors("update_stability_", confidence, given)
    return prediction.new_empty(prediction.shape, dtype=torch.bool)
