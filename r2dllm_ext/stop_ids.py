# SPDX-License-Identifier: Apache-2.0
"""Tokens that end an answer: none, one, or several of which the first to come ends it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._checks import integer, refuse

StopId = int | Sequence[int] | None
"""What a `stop_id` may be, wherever one is taken."""


def stop_ids(stop_id: StopId, *, where: str) -> tuple[int, ...]:
    """The ids of `stop_id`, in its order; `where` is who takes it.

    Raises TypeError for what is no id and no sequence of them, ValueError for an empty sequence
    (None says that nothing ends an answer) and for an id that no vocabulary has.

    >>> stop_ids([2, 7], where="generate")
    (2, 7)
    """
    if stop_id is None:
        return ()
    several = isinstance(stop_id, (list, tuple, range)) or getattr(stop_id, "ndim", 0) == 1
    values = list(stop_id) if several else [stop_id]  # type: ignore[arg-type]
    if not values:
        refuse(ValueError, where, "stop_id", "an id, several or None", stop_id)
    return tuple(integer(where, "stop_id", value, 0) for value in values)


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
