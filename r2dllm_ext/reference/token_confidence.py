# SPDX-License-Identifier: Apache-2.0
"""What a row of logits says: its likeliest token, probabilities, entropy."""

import torch
from torch import Tensor


def without_column(logits: Tensor, exclude_id: int | None) -> Tensor:
    """[..., V] logits in float64, column `exclude_id` set to -inf."""
    z = logits.to(torch.float64, copy=True)
    if exclude_id is not None:
        z[..., exclude_id] = -torch.inf
    return z


def token_confidence(
    logits: Tensor, *, candidates: Tensor | None = None, exclude_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Prediction and confidence of every candidate cell.

    Args:
        logits: [B, L, V] floating point.
        candidates: [B, L] bool, the cells to look at; None = all.
        exclude_id: a column that counts as -inf; None = no such column.

    Returns:
        prediction [B, L] int64, lowest id on ties; confidence [B, L] float64 (the op: float32).
        -1 / 0 where a cell is no candidate; -1 / NaN where the row is invalid: its maximum is NaN
        or +inf, or all of it is -inf.
    """
    prediction = torch.full(logits.shape[:-1], -1, dtype=torch.int64, device=logits.device)
    confidence = torch.zeros_like(prediction, dtype=torch.float64)
    if candidates is None:
        candidates = torch.ones_like(prediction, dtype=torch.bool)
    if not candidates.any():
        return prediction, confidence
    rows = without_column(logits[candidates], exclude_id)  # [n, V]
    top, index = rows.max(-1)  # NaN is the greatest
    lowest = (rows == top[:, None]).to(torch.uint8).argmax(-1)
    probability = 1 / (rows - top[:, None]).exp().sum(-1)
    valid = top.isfinite()
    prediction[candidates] = torch.where(valid, lowest, -1)
    confidence[candidates] = torch.where(valid, probability, torch.nan)
    return prediction, confidence


def token_entropy(
    logits: Tensor, *, candidates: Tensor | None = None, exclude_id: int | None = None
) -> Tensor:
    """[B, L] float64, entropy of the softmax in nats.

    0 where a cell is no candidate, NaN where the row is invalid, as in `token_confidence`.
    """
    entropy = torch.zeros(logits.shape[:-1], dtype=torch.float64, device=logits.device)
    if candidates is None:
        candidates = torch.ones_like(entropy, dtype=torch.bool)
    if not candidates.any():
        return entropy
    rows = without_column(logits[candidates], exclude_id)  # [n, V]
    log_p = rows.log_softmax(-1)
    surprise = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    valid = rows.amax(-1).isfinite()
    entropy[candidates] = torch.where(valid, surprise.clamp_min(0), torch.nan)
    return entropy


def probability_of(
    logits: Tensor, ids: Tensor, *, candidates: Tensor, exclude_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Given tokens and their probabilities at the candidate cells.

    Args:
        logits: [B, L, V] floating point.
        ids: [B, L] int64.

    Returns:
        token [B, L] int64 and probability [B, L] float64, -1 / 0 where a cell is no candidate;
        -1 / NaN where the id is none of [0, V) or the row is invalid.
    """
    token = torch.full_like(ids, -1)
    probability = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    for b, i in candidates.nonzero().tolist():
        z, given = without_column(logits[b, i], exclude_id), int(ids[b, i])
        probability[b, i] = torch.nan
        if 0 <= given < len(z) and z.max().isfinite():
            token[b, i], probability[b, i] = given, z.softmax(-1)[given]
    return token, probability
