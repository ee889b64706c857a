# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .._checks import instance, integer, is_tensor, same_device


class VocabStatistics(NamedTuple):
    """What the logits of B rows and L cells say, in 24 bytes each; see `vocab_statistics`.

    Attributes:
        values: [B, L, 3] float64, contiguous: greatest logit, sum of exp(logit - greatest), id of
            the greatest (lowest on ties, -1 if there is none).
        dtype: of the logits; `confidence_dtype="logits"` rounds to it.
    """

    values: torch.Tensor
    dtype: torch.dtype


def vocab_statistics(
    logits: torch.Tensor,
    *,
    first_id: int = 0,
    candidates: torch.Tensor | None = None,
    exclude_id: int | None = None,
) -> VocabStatistics:
    """The pass over the part of the vocabulary that this rank holds.

    Engines with tensor parallelism shard the output head, so that a rank has the logits of ids
    `first_id` .. `first_id + V - 1`. Gather the statistics of all ranks (24 bytes a cell) and
    merge them with `merge_statistics`, or do both with `all_gather_statistics`, and hand the
    result to `decode_step` in place of logits.

    Args:
        logits: [B, L, V] float32, bfloat16 or float16 (float64 on the CPU), V >= 1; last dimension
            of stride 1, any other strides, any alignment.
        first_id: token id of column 0, >= 0.
        candidates: [B, L] bool, cells to read; default all. The others: (-inf, 0, -1).
        exclude_id: the logit of this token id counts as -inf, on whichever rank it is; default
            none. Pass `config.mask_id` unless `config.allow_mask_id`.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    One read of the logits of the candidate cells. No host synchronisation.

    >>> vocab_statistics(torch.tensor([[[0.0, 2.0, 2.0]]]), first_id=100).values
    tensor([[[  2.0000,   2.1353, 101.0000]]], dtype=torch.float64)
    """
    op = "vocab_statistics"
    is_tensor(op, logits=logits)
    is_tensor(op, candidates=candidates, optional=True)
    first_id = integer(op, "first_id", first_id)
    exclude_id = integer(op, "exclude_id", exclude_id, optional=True)
    values = torch.ops.r2dllm.vocab_statistics(logits, candidates, first_id, exclude_id)
    return VocabStatistics(values, logits.dtype)


def merge_statistics(parts: VocabStatistics) -> VocabStatistics:
    """The statistics of the whole vocabulary from those of its parts.

    Args:
        parts: `values` [S, B, L, 3] float64, one layer per part, S >= 1, in the same order on all
            ranks (the sum is taken in that order; ties go to the lowest id in any).

    Returns:
        `values` [B, L, 3].

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    No host synchronisation.

    >>> logits = torch.tensor([[[0.0, 2.0, 2.0, 1.0]]])
    >>> parts = [vocab_statistics(logits[..., :3]), vocab_statistics(logits[..., 3:], first_id=3)]
    >>> stacked = VocabStatistics(torch.stack([part.values for part in parts]), torch.float32)
    >>> merge_statistics(stacked).values
    tensor([[[2.0000, 2.5032, 1.0000]]], dtype=torch.float64)
    """
    is_statistics("merge_statistics", "parts", parts)
    return VocabStatistics(torch.ops.r2dllm.merge_statistics(parts.values), parts.dtype)


def all_gather_statistics(own: VocabStatistics, group=None) -> VocabStatistics:
    """The statistics of the whole vocabulary on every rank of a `torch.distributed` group.

    Args:
        own: this rank's, of `vocab_statistics`; B and L the same on all ranks.
        group: process group, default the world.

    One all-gather of 24 * B * L bytes a rank, then `merge_statistics`: all ranks get the same bits,
    and so take the same decode step.
    """
    is_statistics("all_gather_statistics", "own", own)
    ranks = torch.distributed.get_world_size(group)
    parts = own.values.new_empty((ranks * own.values.shape[0], *own.values.shape[1:]))
    torch.distributed.all_gather_into_tensor(parts, own.values, group=group)
    return merge_statistics(VocabStatistics(parts.view(ranks, *own.values.shape), own.dtype))


def is_statistics(op: str, name: str, statistics: Any) -> None:
    """VocabStatistics whose fields are what their names say."""
    instance(op, name, statistics, VocabStatistics)
    instance(op, f"{name}.values", statistics.values, torch.Tensor)
    instance(op, f"{name}.dtype", statistics.dtype, torch.dtype)


@torch.library.register_fake("r2dllm::vocab_statistics")
def _(logits, candidates=None, first_id=0, exclude_id=None):
    same_device("vocab_statistics", logits=logits, candidates=candidates)
    return logits.new_empty((*logits.shape[:2], 3), dtype=torch.float64)


@torch.library.register_fake("r2dllm::merge_statistics")
def _(statistics):
    return statistics.new_empty(statistics.shape[1:])
