# SPDX-License-Identifier: Apache-2.0
"""One table: an engine's options -> fields of `DecodeConfig`.

With it an engine's own algorithm is one call. Each row is held to the engine's rule, restated in
torch, by `python_tests/test_rules_of_engines.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .. import config
from .._checks import choice, refuse
from ..config import DecodeConfig


@dataclass(frozen=True)
class EngineRule:
    """A decoding rule of an engine.

    Attributes:
        fields: fields of `DecodeConfig` that make the rule, beside what the engine lets one choose.
        options: the engine's name of an option -> the field that it is. The value is the same.
        defaults: values that the engine has for its options.
        call: arguments of `decode_step` that the rule needs, in words.
        differs: where the engine does something else, in words; "" = nowhere that is known.
    """

    fields: Mapping[str, Any]
    options: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    call: str = "candidates=None: cells that hold the mask id"
    differs: str = ""


_OWN_MASKS = "candidates=dllm_mask == 0, proposed=token_ids"
_NEAR_TIES = "cells within 1e-5 of the best, where none passes, are committed together there"

# What stands in no row is the same for all: none of R2's rules (`engine_config`).
ENGINE_RULES: Mapping[str, EngineRule] = MappingProxyType(
    {
        # ---- SGLang 0.5.23, sglang/srt/dllm/algorithm ----
        "sglang.LowConfidence": EngineRule(
            fields={"compare": ">", "mask_prediction": "allow"},
            options={"threshold": "threshold"},
            defaults={"threshold": 0.95},
        ),
        "sglang.JointThreshold": EngineRule(
            fields={"compare": ">", "mask_prediction": "allow"},
            options={"threshold": "threshold", "edit_threshold": "edit_threshold"},
            defaults={"threshold": 0.5, "edit_threshold": 0.0},
            call="mask_id=None, as an edit may write the mask id; candidates=masked cells of the "
            "answer, editable=its decided ones; logits less the penalty",
        ),
        # ---- diffusers 0.42.1 ----
        "diffusers.BlockRefinementScheduler": EngineRule(
            fields={"compare": ">", "mask_prediction": "allow"},
            options={"threshold": "threshold", "editing_threshold": "edit_threshold"},
            defaults={"threshold": 0.95, "editing_threshold": None},
            call="rows=RowParams(quota=the schedule's tokens of the step); editable=decided cells "
            "that are no prompt, if editing_threshold is given",
            differs="a threshold above 1 (none passes) is None here, an editing_threshold <= 0 too",
        ),
        "diffusers.EntropyBoundScheduler": EngineRule(
            fields={"mask_prediction": "allow", "base": "entropy", "last_free": True},
            options={"entropy_bound": "entropy_budget"},
            defaults={"entropy_bound": 0.1},
            call="mask_id=None, candidates=the whole canvas (nothing is masked in it); logits as "
            "they are after division by the temperature",
        ),
        # ---- dInfer fce4e32, vLLM dllm-plugin 02fdd98 ----
        "dinfer.ThresholdParallelDecoder": EngineRule(
            fields={"mask_prediction": "skip"},
            options={"threshold": "threshold"},
            defaults={"threshold": 0.9},
            differs=_NEAR_TIES,
        ),
        "dllm_plugin.batched_remask": EngineRule(
            fields={"mask_prediction": "skip"},
            options={"threshold": "threshold"},
            differs=_NEAR_TIES,
        ),
        "dllm_plugin.Llada2DefaultRemaskingPolicy": EngineRule(
            fields={"compare": ">", "mask_prediction": "allow"},
            options={"commit_confidence_threshold": "threshold", "num_transfer": "quota"},
            defaults={"commit_confidence_threshold": 0.01, "num_transfer": 1},
        ),
        # ---- Fast-dLLM 24cc59e (v1) and its forks, R2's release ----
        "fast_dllm.get_transfer_index.threshold": EngineRule(
            fields={"mask_prediction": "allow"},
            options={"threshold": "threshold"},
        ),
        "fast_dllm.get_transfer_index.quota": EngineRule(
            fields={"mask_prediction": "allow", "threshold": None},
            call="rows=RowParams(quota=num_transfer_tokens)",
        ),
        "fast_dllm.get_transfer_index_dynamic": EngineRule(
            fields={"mask_prediction": "allow", "base": "factor"},
            options={"factor": "factor"},
            defaults={"factor": 1.0},
        ),
        # ---- LMDeploy 0.18.0; the masks are apart from the ids, the tokens already sampled ----
        "lmdeploy.low_confidence_dynamic": EngineRule(
            fields={"confidence_dtype": "logits"},
            options={"confidence_threshold": "threshold"},
            defaults={"confidence_threshold": 0.85},
            call=f"mask_id=None, {_OWN_MASKS}",
        ),
        "lmdeploy.low_confidence_static": EngineRule(
            fields={"confidence_dtype": "logits", "threshold": None},
            options={"tokens_per_step": "quota"},
            defaults={"tokens_per_step": 1},
            call=f"mask_id=None, {_OWN_MASKS}; tokens_per_step = block_length // denoising_steps, "
            "at least 1",
        ),
        "lmdeploy.sequential": EngineRule(
            fields={"confidence_dtype": "logits", "base": "first"},
            options={"tokens_per_step": "quota"},
            defaults={"tokens_per_step": 1},
            call=f"mask_id=None, {_OWN_MASKS}; tokens_per_step as in low_confidence_static",
            differs="the cells that follow the first masked one count, masked or not: the same "
            "while the masked cells are the end of the block, as they are in its own loop",
        ),
        # ---- EB-Sampler, arXiv 2505.24857 ----
        "eb_sampler": EngineRule(
            fields={"base": "entropy", "last_free": True},
            options={"gamma": "entropy_budget"},
            defaults={"gamma": 0.1},
        ),
    }
)


def engine_config(rule: str, mask_id: int | None, **options: Any) -> DecodeConfig:
    """The configuration that is an engine's own decoding rule.

    Args:
        rule: a key of `ENGINE_RULES`, such as "sglang.LowConfidence"; its `call` says what else
            `decode_step` has to be given, its `differs` what is not the same.
        mask_id: of the model, or None where the rule's `call` says so.
        options: by the engine's own names; what is left out has the engine's default. Any field of
            `DecodeConfig` is taken too, `temperature` or a rule of R2 say.

    Raises:
        ValueError, TypeError: an unknown rule or option, or a value that DecodeConfig refuses.

    >>> engine_config("sglang.LowConfidence", 156895, threshold=0.9).compare
    '>'
    >>> engine_config("fast_dllm.get_transfer_index.quota", 126336, temporal_steps=3).threshold
    """
    choice("engine_config", "rule", rule, tuple(ENGINE_RULES))
    row = ENGINE_RULES[rule]
    known = DecodeConfig.__dataclass_fields__
    fields: dict[str, Any] = dict(row.fields)
    given: dict[str, str] = {}
    for name, value in {**row.defaults, **options}.items():
        target = row.options.get(name, name)
        if target not in known:
            takes = f"{', '.join(row.options) or 'no option of its own'}, or fields of DecodeConfig"
            refuse(TypeError, "engine_config", f"{rule}: options", takes, name)
        if name in options and given.setdefault(target, name) != name:
            takes = f"{given[target]} or {name}, which is the same"
            refuse(TypeError, "engine_config", f"{rule}: options", takes, "both")
        fields[target] = value
    return DecodeConfig.fast_dllm(mask_id, **fields)


# For adapters, which are asked at each step. Kept by type: True equals 1.0, and is no number.
cached_engine_config = functools.lru_cache(typed=True)(engine_config)


# What a name stands for: called with the mask id and fields of DecodeConfig.
NamedRules = Mapping[str, Callable[..., DecodeConfig]]

PRESETS: NamedRules = MappingProxyType({"r2": DecodeConfig.r2, **config.PRESETS})


def named_config(
    where: str,
    rules: NamedRules,
    mask_id: int | None,
    options: Mapping[str, Any],
) -> DecodeConfig:
    """The configuration that a user's table of options, a yaml file say, stands for.

    Args:
        where: whose options they are, for errors.
        rules: what the option "rules" may be -> a preset, or `engine_config` of an engine's rule;
            the first is the default.
        mask_id: of the model; no option.
        options: "rules", and fields of `DecodeConfig` in place of those of the rules.

    Raises:
        ValueError, TypeError: an unknown option or a value that DecodeConfig refuses; names it.

    >>> named_config("here", PRESETS, 3, {"rules": "fast_dllm", "threshold": 0.8}).threshold
    0.8
    """
    fields = dict(options)
    name = choice(where, "rules", fields.pop("rules", next(iter(rules))), tuple(rules))
    known = [name for name in DecodeConfig.__dataclass_fields__ if name != "mask_id"]
    for option in fields:
        if option not in known:
            refuse(ValueError, where, "an option", f"one of rules, {', '.join(known)}", option)
    return rules[name](mask_id, **fields)
