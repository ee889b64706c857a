# SPDX-License-Identifier: Apache-2.0
"""Tokens that end an answer: none, one, or several of which the first to come ends it."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

StopId = int | Sequence[int] | None
"""What a `stop_id` may be, wherever one is taken."""


def stop_ids(stop_id: StopId, *, where: str) -> tuple[int, ...]:
    """The ids of `stop_id`, in its order; `where` is who takes it.

    An integer is what Python takes as an index (numpy's too, a tensor's element, no bool). Raises
    TypeError for anything else, an empty sequence included: None says that nothing ends an answer;
    ValueError for an id that no vocabulary has.

    >>> stop_ids([2, 7], where="generate")
    (2, 7)
    """
    takes = f"{where}: stop_id takes a token id, a sequence of them or None, got {stop_id!r}"
    if stop_id is None:
        return ()
    several = isinstance(stop_id, (list, tuple, range)) or getattr(stop_id, "ndim", 0) == 1
    values = list(stop_id) if several else [stop_id]  # type: ignore[arg-type]
    if not values or any(isinstance(v, bool) or getattr(v, "ndim", 0) for v in values):
        raise TypeError(takes)
    try:
        ids = tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise TypeError(takes) from error
    if not all(0 <= i < 2**63 for i in ids):
        raise ValueError(f"{where}: stop_id takes ids in [0, 2**63), got {stop_id!r}")
    return ids


def answer_length(ids: Sequence[int], stops: Sequence[int]) -> tuple[int, bool]:
    """Tokens of an answer before its stop token, and whether it has one.

    >>> answer_length([5, 3, 7, 2], (2, 7))
    (2, True)
    """
    for place, i in enumerate(ids):
        if i in stops:
            return place, True
    return len(ids), False


def is_stop(tokens: torch.Tensor, stops: Sequence[int]) -> torch.Tensor:
    """bool, of the shape of `tokens`; without a copy to the device, so that graphs can hold it."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for i in stops:
        found |= tokens == i
    return found
