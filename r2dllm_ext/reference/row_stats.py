# SPDX-License-Identifier: Apache-2.0
"""Loss, entropy, confidence and argmax of rows that have a target."""

import torch
from torch import Tensor


def row_stats(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`nll`, `entropy`, `confidence` [...] float64 and `prediction` [...] int64 of each row.

    Args:
        logits: [..., V] floating point; differentiable.
        targets: [...] int64; rows of `ignore_index` have 0, 0, 0, -1 and no gradient.
        temperature: of the entropy.
    """
    has_target = targets != ignore_index
    nll = torch.zeros(targets.shape, dtype=torch.float64, device=logits.device)
    entropy, confidence = torch.zeros_like(nll), torch.zeros_like(nll)
    prediction = torch.full_like(targets, -1)
    rows = logits[has_target].double()  # [n, V]
    log_p = rows.log_softmax(-1)
    log_q = (rows / temperature).log_softmax(-1)
    top = rows.max(-1, keepdim=True).values.detach()  # NaN is the greatest
    nll[has_target] = -log_p.gather(-1, targets[has_target, None]).squeeze(-1)
    entropy[has_target] = -(log_q.exp() * log_q.masked_fill(log_q == -torch.inf, 0)).sum(-1)
    confidence[has_target] = log_p.detach().exp().amax(-1)
    lowest = (rows == top).to(torch.uint8).argmax(-1)
    prediction[has_target] = torch.where(top.squeeze(-1).isfinite(), lowest, -1)
    return nll, entropy, confidence, prediction
