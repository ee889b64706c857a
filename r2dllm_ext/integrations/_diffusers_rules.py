# SPDX-License-Identifier: Apache-2.0
"""What a `DecodeConfig` adds to the rule of diffusers' scheduler, and the two of them as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._checks import refuse
from ..config import DecodeConfig
from .rules import cached_engine_config, engine_config

_RULE = "diffusers.BlockRefinementScheduler"
# Fields of DecodeConfig that the pipeline's call, or the scheduler, has an option for.
_CALLS = frozenset(
    "mask_id threshold compare quota edit_threshold temperature top_k top_p sampled_confidence "
    "seed steps_per_block".split()
)


def rules_of(config: DecodeConfig | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Fields beyond the options of a call; a call's own have to be at their default."""
    if config is None:
        return None
    defaults = {field.name: field.default for field in dataclasses.fields(DecodeConfig)}
    defaults["mask_id"] = None
    given = dataclasses.asdict(config) if isinstance(config, DecodeConfig) else dict(config)
    for name in _CALLS & given.keys():
        value = given.pop(name)
        if value != defaults[name]:
            takes = f"its default (say it in the pipeline's call: {name})"
            refuse(ValueError, "R2BlockRefinementScheduler", f"config.{name}", takes, value)
    engine_config(_RULE, None, **given)  # validated now, not in the first step
    return given


def config_of(
    mask_id: int,
    threshold: float,
    edit: float | None,
    rules: Mapping[str, Any] | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> DecodeConfig:
    """The rule of one step, by diffusers' names and with its ways to say "off"."""
    options = {
        "threshold": None if threshold > 1 else max(float(threshold), 0.0),
        "editing_threshold": None if edit is None or edit <= 0 else min(float(edit), 1.0),
        "temperature": float(temperature),
        "top_k": None if top_k is None or top_k <= 0 else top_k,
        "top_p": None if top_p is None or top_p >= 1 else top_p,
    }
    # Without rules beyond theirs nothing has to know the mask: predicting it is as any token.
    mask = None if rules is None else mask_id
    return cached_engine_config(
        _RULE, mask, sampled_confidence="tempered", **(rules or {}), **options
    )
