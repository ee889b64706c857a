# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from .._checks import integer, is_tensor, number, rule_tensors


def window_pool(
    confidence: torch.Tensor,
    is_masked: torch.Tensor,
    *,
    window: int,
    min_confidence: float,
    max_unmasked: int | None = None,
) -> torch.Tensor:
    """Mark the masked cells that lie in a confident window.

    Each run of `window` neighbours is judged by the mean confidence of its masked cells; where
    it reaches `min_confidence`, all of these are marked. Windows overlap and do not see each
    other's verdicts, so the result does not depend on the order of the scan.

    Args:
        confidence: [B, L] float32, float16 or bfloat16, probabilities of the predictions. A window
            that holds a non-finite one at a masked cell is skipped.
        is_masked: [B, L] bool, True where no token is committed yet.
        window: W >= 1 neighbours; a window longer than L marks nothing.
        min_confidence: inclusive, a probability in [0, 1].
        max_unmasked: most committed cells that a window may hold; None = no limit.

    Returns:
        [B, L] bool, a subset of `is_masked`.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    Same bits on every device; the mean is taken in float64, left to right. No host synchronisation.
    Source: spatial rule of R2-dLLM (`confidence_cluster_size`); oracle: `reference.window_pool`.

    >>> window_pool(torch.tensor([[.9, .8, .1]]), torch.ones(1, 3, dtype=torch.bool),
    ...             window=2, min_confidence=.8)
    tensor([[ True,  True, False]])
    """
    op = "window_pool"
    is_tensor(op, confidence=confidence, is_masked=is_masked)
    return torch.ops.r2dllm.window_pool(
        confidence,
        is_masked,
        integer(op, "window", window),
        number(op, "min_confidence", min_confidence),
        integer(op, "max_unmasked", max_unmasked, optional=True),
    )


@torch.library.register_fake("r2dllm::window_pool")
def _(confidence, is_masked, window, min_confidence, max_unmasked=None):
    rule_tensors("window_pool", confidence, [("is_masked", is_masked, torch.bool)])
    return confidence.new_empty(confidence.shape, dtype=torch.bool)
