# SPDX-License-Identifier: Apache-2.0
"""Rows with options and a place in the state of their own, as calls on one row each."""

import dataclasses
import math
import sys
from collections.abc import Iterator

from torch import Tensor

from ..state import DecodeState

# What a tensor says where a config says None.
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def each_row(count: int, state, config, rows, slots: Tensor | None) -> Iterator[tuple]:
    """For each of `count` rows, the state (a view of one row) and the config of it alone.

    Both are None for a row to be left alone: a value that DecodeConfig would refuse, or a slot that
    the state does not have.
    """
    for b in range(count):
        slot = b if slots is None else int(slots[b])
        own = config_of_row(config, rows, b)
        if own is None or not 0 <= slot < state.rows:
            yield None, None
        else:
            yield view_of_row(state, slot), own


def config_of_row(config, rows, b: int):
    """`config` with the values that RowParams `rows` has for row b; None if one is out of range."""
    if rows is None:
        return config
    changes = {}
    for field in dataclasses.fields(rows):
        tensor = getattr(rows, field.name)
        if tensor is None:
            continue
        value = tensor[b].item()
        if value == _OFF.get(field.name, math.nan):
            value = None
        elif field.name in ("quota", "top_k"):
            value = min(value, 2**31 - 1)  # more than any block or vocabulary has
        elif field.name == "top_p" and value == 0:
            value = sys.float_info.min  # no mass at all: the likeliest token is kept
        changes[field.name] = value
    try:
        return config.replace(**changes)
    except ValueError:
        return None


def view_of_row(state, slot: int) -> DecodeState:
    """A state of one row in the memory of `state`."""
    return state._map(lambda tensor: tensor[slot : slot + 1])
