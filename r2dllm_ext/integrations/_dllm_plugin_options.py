# SPDX-License-Identifier: Apache-2.0
"""The options of dllm-plugin's remasking policy, as a `DecodeConfig`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from .._checks import integer, refuse
from ..config import DecodeConfig
from .rules import ENGINE_RULES, cached_engine_config

_RULE = "dllm_plugin.Llada2DefaultRemaskingPolicy"
_FIELDS = {"mask_token_id": "mask_id", **ENGINE_RULES[_RULE].options}
# The plugin's values (its config.py) where neither its worker nor the user names one.
_MASK_ID, _STEPS = 1, 32


def policy_config(
    config: DecodeConfig | None, options: Mapping[str, Any], length: int
) -> DecodeConfig:
    """What a step of the plugin's policy may commit.

    Args:
        config: None is the plugin's own rule.
        options: the plugin's `remasking_config`. "mask_token_id" (1), "commit_confidence_threshold"
            (0.01) and "num_transfer", the least number of tokens, go before what `config` has.
            Without a `config`, num_transfer is by default what a schedule of "denoise_steps" (32)
            has at "denoise_step_index" (0). "grammar_extra_transfer" (0) comes on top of it.
        length: L.

    Raises:
        TypeError, ValueError: an option that the plugin does not have, or a bad value.

    >>> policy_config(None, {"denoise_steps": 12, "denoise_step_index": 2}, 32).quota
    3
    """
    where = "remasking_config"
    given = {"denoise_steps": _STEPS, "denoise_step_index": 0, "grammar_extra_transfer": 0}
    given.update(options)
    steps = integer(where, "denoise_steps", given.pop("denoise_steps"), 1)
    index = integer(where, "denoise_step_index", given.pop("denoise_step_index"))
    more = integer(where, "grammar_extra_transfer", given.pop("grammar_extra_transfer"), 0)
    for name in given:
        if name not in _FIELDS:
            refuse(TypeError, where, "options", f"{', '.join(_FIELDS)}, ...", name)
    if config is None:
        config = cached_engine_config(_RULE, given.pop("mask_token_id", _MASK_ID))
        # L tokens over the steps; where L is no multiple, the first ones have one more.
        place = min(max(index, 0), steps - 1)
        given.setdefault("num_transfer", length // steps + (place < length % steps))
    changes = {_FIELDS[name]: value for name, value in given.items()}
    quota = integer(where, "num_transfer", changes.get("quota", config.quota), 0)
    return replaced(config, **{**changes, "quota": quota + more})


@functools.lru_cache(typed=True)
def replaced(config: DecodeConfig, **changes: Any) -> DecodeConfig:
    return config.replace(**changes)
