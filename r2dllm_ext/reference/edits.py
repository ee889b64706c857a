# SPDX-License-Identifier: Apache-2.0
"""Token to token: decided cells that take another token (LLaDA2.1, arXiv 2602.08676)."""

from torch import Tensor

from .base_rule import passes


def edits(
    top: Tensor,
    confidence: Tensor,
    tokens: Tensor,
    is_editable: Tensor,
    *,
    threshold: float | None,
    compare: str,
    mask_id: int | None,
) -> Tensor:
    """Editable cells whose argmax is sure, is another token, and is not the mask.

    Args:
        top, tokens: [B, L] integers, argmax (-1 = none) and the token that stands there.
        confidence: [B, L] float32, probability of the argmax.
        is_editable: [B, L] bool.
        threshold, compare: what the confidence has to pass; None = no edit.

    Returns:
        [B, L] bool, a subset of `is_editable`.
    """
    is_other = (top >= 0) & (top != tokens)
    if mask_id is not None:
        is_other = is_other & (top != mask_id)
    return is_editable & is_other & passes(confidence, threshold, compare)
