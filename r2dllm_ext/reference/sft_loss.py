# SPDX-License-Identifier: Apache-2.0
"""The fine-tuning loss, from logits or from hidden states, differentiated by autograd."""

from torch import Tensor

from .row_stats import row_stats


def sft_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    normalizer: float | Tensor | None = None,
    entropy_weight: float = 0.0,
    entropy_temperature: float = 1.0,
    entropy_gate: str = "correct",
    ignore_index: int = -100,
) -> Tensor:
    """sum(weight * nll) / normalizer + entropy_weight * mean entropy over the gated rows; float64.

    Args:
        logits: [..., V] floating point; targets, weight: [...].
        normalizer: default the number of rows with a target.
        entropy_gate: "correct", rows whose argmax is the target, or "all" with a target.
    """
    nll, entropy, _, prediction = row_stats(
        logits, targets, temperature=entropy_temperature, ignore_index=ignore_index
    )
    has_target = targets != ignore_index
    if not has_target.any():
        return nll.sum()
    if weight is not None:
        nll = nll * weight.masked_fill(~has_target, 0)  # a row without a target may hold NaN
    loss = nll.sum() / (has_target.sum() if normalizer is None else normalizer)
    gated = has_target if entropy_gate == "all" else has_target & (prediction == targets)
    if entropy_weight != 0 and gated.any():
        loss = loss + entropy_weight * entropy[gated].mean()
    return loss


def linear_sft_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    **options,
) -> Tensor:
    """`sft_loss` of the logits hidden @ lm_head_weight^T + bias; float64.

    Args:
        hidden: [..., H]; lm_head_weight: [V, H]; bias: [V]; targets, weight: [...].
        options: of `sft_loss`.
    """
    logits = hidden.double() @ lm_head_weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    return sft_loss(logits, targets, weight, **options)
