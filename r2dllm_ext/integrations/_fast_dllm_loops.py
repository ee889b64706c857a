# SPDX-License-Identifier: Apache-2.0
"""The decoding loops of Fast-dLLM and R2-dLLM, under their signatures, as calls of `generate`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._checks import refuse
from ..config import DecodeConfig
from ..generation import generate
from .rules import engine_config

# Loop -> cache of `generate`.
LOOPS = {
    "generate": "none",
    "generate_with_prefix_cache": "prefix",
    "generate_with_dual_cache": "dual",
}
_WINDOW = ("confidence_cluster_size", "confidence_cluster_unmasked", "token_cluster")
_RELEASE = ("spatial_threshold", *_WINDOW, "temporal_steps", "temporal_threshold", "temporal_eval")
_RECORD = ("record_decode", "decode_events_dir")
ARGUMENTS = (
    *("model", "prompt", "steps", "gen_length", "block_length", "temperature", "remasking"),
    *("mask_id", "threshold", "factor", *_RELEASE, *_RECORD),
)
# Fields of DecodeConfig that the loops' own arguments set under another name.
FIELDS = {"base": "steps", "steps_per_block": "steps", "quota": "steps", "seed": "temperature"}


def loop_of(theirs: Callable, cache: str, rules: Mapping[str, Any]) -> Callable:
    """`generate` under the signature and the name of one of their loops."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def loop(*args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        result = generate(
            given["model"],
            given["prompt"],
            gen_length=given["gen_length"],
            block_length=given["block_length"],
            config=_loop_config(theirs.__name__, given, rules),
            cache=cache,
        )
        return result.sequences, result.nfe

    return loop


def _loop_config(where: str, given: Mapping[str, Any], rules: Mapping[str, Any]) -> DecodeConfig:
    """What a call of a loop asks for. Options that stay with their default are off, as there."""
    check_remasking(where, given["remasking"])
    if given.get("record_decode"):
        refuse(ValueError, where, "record_decode", "False while it is patched", True)
    options: dict[str, Any] = {"temperature": given["temperature"]}
    if options["temperature"] > 0:
        options["seed"] = seed()
    if given.get("factor") is not None:
        rule, options["factor"] = "get_transfer_index_dynamic", given["factor"]
    elif given["threshold"] is not None:
        rule, options["threshold"] = "get_transfer_index.threshold", probability(given["threshold"])
    else:
        blocks = given["gen_length"] // given["block_length"]
        if not blocks:
            takes = f"a multiple of block_length ({given['block_length']})"
            refuse(ValueError, where, "gen_length", takes, given["gen_length"])
        if given["steps"] % blocks:
            refuse(ValueError, where, "steps", f"a multiple of {blocks} blocks", given["steps"])
        rule = "get_transfer_index.quota"
        options |= {"base": "schedule", "steps_per_block": given["steps"] // blocks}
    return engine_config(
        f"fast_dllm.{rule}", given["mask_id"], **options, **rules, **_release(given)
    )


def _release(given: Mapping[str, Any]) -> dict[str, Any]:
    """R2's rules as its release takes them: each needs its threshold, runs need a window too."""
    options: dict[str, Any] = {}
    if given.get("spatial_threshold") is not None and (given["confidence_cluster_size"] or 0) > 0:
        options |= {name: given[name] for name in ("spatial_threshold", *_WINDOW)}
        if options["token_cluster"] in ("", "none"):
            options["token_cluster"] = None
    if given.get("temporal_threshold") is not None and given["temporal_steps"]:
        options |= {name: given[name] for name in _RELEASE if name.startswith("temporal")}
    return options


def probability(threshold: float) -> float | None:
    """No confidence is above 1 or below 0."""
    return None if threshold > 1 else max(threshold, 0.0)


def seed() -> int:
    return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))


def check_remasking(where: str, remasking: str) -> None:
    if remasking != "low_confidence":
        refuse(NotImplementedError, where, "remasking", "'low_confidence'", remasking)


def check_arguments(module: ModuleType, name: str, known: Collection[str]) -> None:
    for argument in inspect.signature(getattr(module, name)).parameters:
        if argument not in known:
            refuse(TypeError, "patch", f"module.{name}", "arguments that are known", argument)
