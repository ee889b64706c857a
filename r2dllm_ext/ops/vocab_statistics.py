# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._checks import flag, instance, integer, is_tensor, logits_tensor, no_tangent, refuse, tensor

_COLUMNS = 4


class VocabStatistics(NamedTuple):
    """What the logits of B rows and L cells say, in 32 bytes each; see `vocab_statistics`.

    Attributes:
        values: [B, L, 4] float64, contiguous: greatest logit m, sum of exp(u) with u = logit - m,
            id of the greatest (lowest on ties, -1 if there is none), sum of u * exp(u) (NaN without
            entropy).
        dtype: of the logits; `confidence_dtype="logits"` rounds to it.
        with_entropy: whether the last column is there, which base="entropy" and `report_entropy`
            need.
        exclude_id: the token id that was left out, which `decode_step` compares with its config's.
    """

    values: torch.Tensor
    dtype: torch.dtype
    with_entropy: bool = False
    exclude_id: int | None = None


def vocab_statistics(
    logits: torch.Tensor,
    *,
    first_id: int = 0,
    candidates: torch.Tensor | None = None,
    exclude_id: int | None = None,
    with_entropy: bool = False,
) -> VocabStatistics:
    """The pass over the part of the vocabulary that this rank holds.

    Engines with tensor parallelism shard the output head, so that a rank has the logits of ids
    `first_id` .. `first_id + V - 1`. Gather the statistics of all ranks (32 bytes a cell) and
    merge them with `merge_statistics`, or do both with `all_gather_statistics`, and hand the
    result to `decode_step` in place of logits.

    Args:
        logits: [B, L, V] float32, bfloat16 or float16 (float64 on the CPU), V >= 1; last dimension
            of stride 1, any other strides, any alignment.
        first_id: token id of column 0, >= 0.
        candidates: [B, L] bool, cells to read (those that may be edited too); default all. The
            others: (-inf, 0, -1, 0).
        exclude_id: the logit of this token id counts as -inf, on whichever rank it is; default
            none. `config.mask_id` where `config.mask_prediction` is "ban"; the step refuses others.
        with_entropy: also what entropy needs; on all ranks or on none.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    One read of the logits of the candidate cells. No host synchronisation.

    >>> vocab_statistics(torch.tensor([[[0.0, 2.0, 2.0]]]), first_id=100).values
    tensor([[[  2.0000,   2.1353, 101.0000,      nan]]], dtype=torch.float64)
    """
    op = "vocab_statistics"
    is_tensor(op, logits=logits)
    no_tangent(op, logits=logits)
    is_tensor(op, candidates=candidates, optional=True)
    first_id = integer(op, "first_id", first_id)
    exclude_id = integer(op, "exclude_id", exclude_id, optional=True)
    flag(op, "with_entropy", with_entropy)
    values = torch.ops.r2dllm.vocab_statistics(
        logits, candidates, first_id, exclude_id, with_entropy
    )
    return VocabStatistics(values, logits.dtype, with_entropy, exclude_id)


def merge_statistics(parts: VocabStatistics) -> VocabStatistics:
    """The statistics of the whole vocabulary from those of its parts.

    Args:
        parts: `values` [S, B, L, 4] float64, one layer per part, S >= 1, in the same order on all
            ranks (the sum is taken in that order; ties go to the lowest id in any).

    Returns:
        `values` [B, L, 4].

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    No host synchronisation.

    >>> logits = torch.tensor([[[0.0, 2.0, 2.0, 1.0]]])
    >>> parts = [vocab_statistics(logits[..., :3]), vocab_statistics(logits[..., 3:], first_id=3)]
    >>> stacked = VocabStatistics(torch.stack([part.values for part in parts]), torch.float32)
    >>> merge_statistics(stacked).values
    tensor([[[2.0000, 2.5032, 1.0000,    nan]]], dtype=torch.float64)
    """
    is_statistics("merge_statistics", "parts", parts)
    return parts._replace(values=torch.ops.r2dllm.merge_statistics(parts.values))


def all_gather_statistics(own: VocabStatistics, group=None) -> VocabStatistics:
    """The statistics of the whole vocabulary on every rank of a `torch.distributed` group.

    Args:
        own: this rank's, of `vocab_statistics`; B and L the same on all ranks.
        group: process group, default the world.

    One all-gather of 32 * B * L bytes a rank, then `merge_statistics`: all ranks get the same bits,
    and so take the same decode step.
    """
    is_statistics("all_gather_statistics", "own", own)
    ranks = torch.distributed.get_world_size(group)
    parts = own.values.new_empty((ranks * own.values.shape[0], *own.values.shape[1:]))
    torch.distributed.all_gather_into_tensor(parts, own.values, group=group)
    return merge_statistics(own._replace(values=parts.view(ranks, *own.values.shape)))


def is_statistics(op: str, name: str, statistics: Any) -> None:
    """VocabStatistics whose fields are what their names say."""
    instance(op, name, statistics, VocabStatistics)
    instance(op, f"{name}.values", statistics.values, torch.Tensor)
    instance(op, f"{name}.dtype", statistics.dtype, torch.dtype)
    flag(op, f"{name}.with_entropy", statistics.with_entropy)
    integer(op, f"{name}.exclude_id", statistics.exclude_id, optional=True)


def statistics_tensor(op: str, name: str, values: torch.Tensor, shape: str) -> None:
    """For fake kernels: `values` of VocabStatistics, or of several stacked."""
    tensor(op, name, values, shape, torch.float64)
    if values.shape[-1] != _COLUMNS:
        refuse(ValueError, op, name, f"shape {shape}", list(values.shape))


@torch.library.register_fake("r2dllm::vocab_statistics")
def _(logits, candidates=None, first_id=0, exclude_id=None, with_entropy=False):
    logits_tensor("vocab_statistics", logits)
    if candidates is not None:
        like = ("logits", logits)
        tensor("vocab_statistics", "candidates", candidates, "[B, L]", torch.bool, like=like)
    return logits.new_empty((*logits.shape[:2], _COLUMNS), dtype=torch.float64)


@torch.library.register_fake("r2dllm::merge_statistics")
def _(statistics):
    statistics_tensor("merge_statistics", "statistics", statistics, "[S, B, L, 4]")
    if statistics.shape[0] < 1:
        takes = "shape [S >= 1, B, L, 4]"
        refuse(ValueError, "merge_statistics", "statistics", takes, list(statistics.shape))
    return statistics.new_empty(statistics.shape[1:])
