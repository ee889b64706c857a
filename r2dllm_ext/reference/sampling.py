# SPDX-License-Identifier: Apache-2.0
"""Draw a token from tempered, truncated logits."""

import math

import torch
from torch import Tensor

from ..philox import Draw
from .random import uniform
from .token_confidence import without_column


def token_weights(
    row: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """Unnormalised weights [V] float64 that a token is drawn with; 0 outside the support.

    Args:
        row: [V] float64, its maximum finite.
        top_k: keep every logit >= the k-th largest, ties included.
        top_p: then keep the likeliest tokens until their share of the mass reaches `top_p`; the one
            that crosses it and its ties stay.
        min_p: then keep every token whose tempered probability is at least `min_p` times that of
            the likeliest.
    """
    weights = ((row - row.max()) / temperature).exp()
    if top_k is not None and top_k < row.numel():
        weights[row < row.topk(top_k).values[-1]] = 0
    if top_p is not None:
        falling, order = row.sort(descending=True)
        reached = weights[order].cumsum(0) >= top_p * weights.sum()
        if reached.any():
            weights[row < falling[reached.to(torch.uint8).argmax()]] = 0
    if min_p is not None:
        weights[row < row.max() + math.log(min_p) * temperature] = 0
    return weights


def draw_token(weights: Tensor, u: float) -> int:
    """Inverse of the cumulative distribution: the first token whose cumulative mass exceeds u."""
    mass = weights.cumsum(0)
    beyond = mass > u * mass[-1]
    return int(beyond.to(torch.uint8).argmax())


def draw_tokens(
    logits: Tensor, cells: Tensor, config, *, row: Tensor, step: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Drawn tokens of some cells and the probabilities that count as their confidence.

    Args:
        logits: [B, L, V] floating point.
        cells: [B, L] bool, the cells that draw; their rows of logits are valid.
        config: temperature > 0, top_k, top_p, min_p, sampled_confidence, seed, mask_id,
            mask_prediction.
        row, step, seed: [B] int64, identity of the random numbers; `seed` is added to config.seed.

    Returns:
        token [B, L] int64 and probability [B, L] float64 (before temperature and truncation, or
        after them with sampled_confidence="tempered"); -1 / NaN in all other cells.
    """
    token = torch.full(cells.shape, -1, dtype=torch.int64, device=cells.device)
    probability = torch.full(cells.shape, torch.nan, dtype=torch.float64, device=cells.device)
    for b, i in cells.nonzero().tolist():
        z = without_column(logits[b, i], banned_id(config))
        weights = token_weights(z, config.temperature, config.top_k, config.top_p, config.min_p)
        u = uniform(config.seed + int(seed[b]), int(row[b]), int(step[b]), i, Draw.TOKEN)
        token[b, i] = drawn = draw_token(weights, u)
        if config.sampled_confidence == "tempered":
            probability[b, i] = weights[drawn] / weights.sum()
        else:
            probability[b, i] = z.softmax(-1)[drawn]
    return token, probability


def banned_id(config) -> int | None:
    """The column of the logits that counts as -inf."""
    return config.mask_id if config.mask_prediction == "ban" else None
