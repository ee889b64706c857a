# SPDX-License-Identifier: Apache-2.0
"""Checks of the settings of a run: "Name: field takes A, got B"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def integer(owner: str, name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}: {name} takes an integer >= {least}, got {value!r}")


def number(
    owner: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float = math.inf,
    infinite: bool = False,
) -> None:
    """A number > `above` or >= `least`, <= `most`, and finite unless `infinite`; never a NaN."""
    takes = "a number" if infinite or most < math.inf else "a finite number"
    takes += f" > {above}" if above is not None else f" >= {least}"
    takes += f" and <= {most}" if most < math.inf else ""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (value > above if above is not None else value >= (least or 0))
        or not value <= most
        or not (infinite or value < math.inf)
    ):
        raise ValueError(f"{owner}: {name} takes {takes}, got {value!r}")


def choice(owner: str, name: str, value: Any, choices: Sequence[str], *, why: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{owner}: {name} takes one of {tuple(choices)}, got {value!r}{why}")
