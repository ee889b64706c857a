# SPDX-License-Identifier: Apache-2.0
"""Shards of the vocabulary: four numbers of a row that merge into those of the whole."""

import torch
from torch import Tensor

from .token_confidence import without_column


def vocab_statistics(
    logits: Tensor,
    *,
    first_id: int = 0,
    candidates: Tensor | None = None,
    exclude_id: int | None = None,
    with_entropy: bool = False,
) -> Tensor:
    """[B, L, 4] float64: greatest logit m, sum of exp(u), id of the greatest, sum of u * exp(u).

    u = logit - m, in nats; the last column is NaN without `with_entropy`. (-inf, 0, -1, 0) where a
    row was not read or is -inf throughout; m, NaN, -1, NaN where m is NaN or +inf.

    Args:
        logits: [B, L, V] floating point, tokens `first_id` .. `first_id + V - 1`.
        candidates: [B, L] bool, the cells to look at; None = all.
        exclude_id: the logit of this token counts as -inf, if it is here.
    """
    column = None if exclude_id is None else exclude_id - first_id
    is_here = column is not None and 0 <= column < logits.shape[-1]
    z = without_column(logits, column if is_here else None)
    if candidates is not None:
        z[~candidates] = -torch.inf
    top = z.amax(-1)
    index = (z == top[..., None]).to(torch.uint8).argmax(-1)
    u = z - top[..., None]
    values = torch.stack([top, u.exp().sum(-1), (first_id + index).double(), moment(u)], -1)
    values[top == -torch.inf] = values.new_tensor([-torch.inf, 0, -1, 0])
    values[top.isnan() | (top == torch.inf), 1:] = values.new_tensor([torch.nan, -1, torch.nan])
    if not with_entropy:
        values[..., 3] = torch.nan
    return values


def merge_statistics(parts: Tensor) -> Tensor:
    """[S, B, L, 4] statistics of S parts -> [B, L, 4] of the whole."""
    top = parts[..., 0].amax(0)
    wins = parts[..., 0] == top
    index = parts[..., 2].masked_fill(~wins, torch.inf).amin(0)
    below = torch.where(parts[..., 0] == -torch.inf, -torch.inf, parts[..., 0] - top)
    shrunk = below.exp()
    mass = (shrunk * parts[..., 1]).sum(0)
    shift = below.masked_fill(below == -torch.inf, 0)
    carried = (shrunk * (parts[..., 3] + shift * parts[..., 1])).sum(0)
    merged = torch.stack([top, mass, index, carried], -1)
    merged[~top.isfinite() & (top != -torch.inf), 1:] = merged.new_tensor(
        [torch.nan, -1, torch.nan]
    )
    return merged


def moment(u: Tensor) -> Tensor:
    """Sum of u * exp(u) over the last dimension; 0 where u is -inf."""
    return (u.masked_fill(u == -torch.inf, 0) * u.exp()).sum(-1)
