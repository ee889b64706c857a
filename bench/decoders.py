# SPDX-License-Identifier: Apache-2.0
"""The decoders that are compared, and the parameter that the curve of each one varies."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from r2dllm_ext.config import DecodeConfig


class Decoder(NamedTuple):
    preset: Callable[..., DecodeConfig]
    parameters: tuple[str, ...]  # what takes the value
    own: float  # the preset's value
    others: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(sorted((self.own, *self.others)))


DECODERS = {
    "vanilla": Decoder(DecodeConfig.vanilla, ("quota",), 1, ()),
    "fast_dllm": Decoder(DecodeConfig.fast_dllm, ("threshold",), 0.9, (0.7, 0.8, 0.95, 0.98)),
    "r2": Decoder(
        DecodeConfig.r2, ("spatial_threshold", "temporal_threshold"), 0.8, (0.6, 0.7, 0.9, 0.95)
    ),
    "budget": Decoder(
        DecodeConfig.budget, ("error_budget",), 0.005, (0.001, 0.02, 0.05, 0.1, 0.2)
    ),
    "entropy": Decoder(
        DecodeConfig.entropy, ("entropy_budget",), 0.05, (0.01, 0.1, 0.2, 0.5, 1.0)
    ),
}  # fmt: skip


def config_of(name: str, value: float, mask_id: int) -> DecodeConfig:
    decoder = DECODERS[name]
    if decoder.parameters == ("quota",):
        value = int(value)
    return decoder.preset(mask_id, **dict.fromkeys(decoder.parameters, value))
