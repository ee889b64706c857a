# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from .._checks import integer, is_tensor, logits_tensor, no_tangent, tensor


def token_confidence(
    logits: torch.Tensor,
    *,
    candidates: torch.Tensor | None = None,
    exclude_id: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction of every cell and its softmax probability: the pass over V.

    One read of the logits of the candidate cells; nothing of size V is written.

    Args:
        logits: [B, L, V] float32, bfloat16 or float16 (float64 on the CPU), V >= 1; last dimension
            of stride 1, any other strides, any alignment.
        candidates: [B, L] bool, cells to read; default all.
        exclude_id: this column counts as -inf; default none.

    Returns:
        prediction: [B, L] int64, the argmax, lowest id on ties; -1 where there is none: not a
            candidate, maximum NaN or +inf, or all logits -inf.
        confidence: [B, L] float32, its probability; 0 where not a candidate, NaN where a candidate
            has no prediction.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.
        NotImplementedError: in forward-mode differentiation.

    A row has the same bits alone, in any batch and with any number of threads. No host
    synchronisation.

    >>> token_confidence(torch.tensor([[[0.0, 0.0, -1e4]]]))
    (tensor([[0]]), tensor([[0.5000]]))
    """
    op = "token_confidence"
    is_tensor(op, logits=logits)
    no_tangent(op, logits=logits)
    is_tensor(op, candidates=candidates, optional=True)
    exclude_id = integer(op, "exclude_id", exclude_id, optional=True)
    return torch.ops.r2dllm.token_confidence(logits, candidates, exclude_id)


@torch.library.register_fake("r2dllm::token_confidence")
def _(logits, candidates=None, exclude_id=None):
    logits_tensor("token_confidence", logits)
    if candidates is not None:
        like = ("logits", logits)
        tensor("token_confidence", "candidates", candidates, "[B, L]", torch.bool, like=like)
    shape = logits.shape[:2]
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
    )
