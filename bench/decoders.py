# SPDX-License-Identifier: Apache-2.0
"""The decoders that are compared, and the parameter that the curve of each one varies."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from r2dllm_ext.config import DecodeConfig


class Decoder(NamedTuple):
    config: Callable[[int, float], DecodeConfig]  # of mask id and value
    parameter: str
    own: float  # the preset's value
    others: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(sorted((self.own, *self.others)))


def _r2(mask_id: int, value: float) -> DecodeConfig:
    """All thresholds move together: as in the preset, 0.8 and 0.9, a cell that stands for itself
    may be wrong half as often as one of a window or a streak."""
    return DecodeConfig.r2(
        mask_id,
        threshold=round((1 + value) / 2, 6),
        spatial_threshold=value,
        temporal_threshold=value,
    )


DECODERS = {
    "vanilla": Decoder(lambda m, x: DecodeConfig.vanilla(m, quota=int(x)), "quota", 1, ()),
    "fast_dllm": Decoder(
        lambda m, x: DecodeConfig.fast_dllm(m, threshold=x),
        "threshold", 0.9, (0.7, 0.8, 0.95, 0.98),
    ),
    "r2": Decoder(_r2, "spatial_threshold", 0.8, (0.6, 0.7, 0.85, 0.9, 0.95)),
    "budget": Decoder(
        lambda m, x: DecodeConfig.budget(m, error_budget=x),
        "error_budget", 0.005, (0.001, 0.02, 0.05, 0.1, 0.2),
    ),
    "entropy": Decoder(
        lambda m, x: DecodeConfig.entropy(m, entropy_budget=x),
        "entropy_budget", 0.05, (0.01, 0.1, 0.2, 0.5, 1.0),
    ),
}  # fmt: skip


def config_of(name: str, value: float, mask_id: int) -> DecodeConfig:
    return DECODERS[name].config(mask_id, value)
