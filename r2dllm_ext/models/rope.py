# SPDX-License-Identifier: Apache-2.0
"""Frequencies of the rotary embedding: what a config.json says of them, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST = 1e38  # of a number in a config.json: the tables are float32

# Keys of each rope_type beside itself and rope_theta; `...`: no default.
_KEYS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "yarn": {
        "factor": ...,
        "original_max_position_embeddings": None,  # None: max_position_embeddings
        "attention_factor": None,  # None: from factor and the two mscales
        "mscale": None,
        "mscale_all_dim": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    },
    "llama3": {
        "factor": ...,
        "original_max_position_embeddings": None,
        "low_freq_factor": ...,
        "high_freq_factor": ...,
    },
}
_FIELDS = {"original_max_position_embeddings": "original_length"}  # ours, where it differs


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of the training.

    The three types of transformers whose frequencies do not depend on the length of the sequence,
    to the bit. What a type does not use keeps its default.

    >>> RopeScaling("linear", 2.0).frequencies(theta=10000.0, head_dim=4)
    tensor([0.5000, 0.0050])
    """

    type: str  # "linear", "yarn" or "llama3"
    factor: float
    original_length: float = 1  # context of the training, in positions
    attention_factor: float = 1.0  # yarn: cosine and sine are multiplied by it
    # Turns over that context: frequencies above the high bound stay, those below the low one are
    # divided by `factor`, and between the two there is a ramp.
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the ramp begins and ends at whole dimensions
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0

    def frequencies(self, theta: float, head_dim: int) -> Tensor:
        """Radians a position [head_dim / 2], float32, on the CPU."""
        powers = _powers(theta, head_dim)
        plain = 1 / powers
        if self.type == "linear":
            return plain / self.factor
        if self.type == "yarn":
            kept = self._kept_by_yarn(theta, head_dim)
            return 1 / (self.factor * powers) * (1 - kept) + plain * kept
        turns = self.original_length / (2 * math.pi / plain)
        ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = ramp.clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain

    def _kept_by_yarn(self, theta: float, head_dim: int) -> Tensor:
        def dimension(turns: float) -> float:  # the one that turns so often over the context
            once = self.original_length / (2 * math.pi * turns)
            return head_dim * math.log(once) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # a step
        pair = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
        return 1 - ((pair - low) / (high - low)).clamp(0, 1)

    def to_fields(self) -> dict[str, Any]:
        """The `rope_scaling` of a config.json, from which `read_rope` reads this again."""
        keys = [key for key in _KEYS[self.type] if not key.startswith("mscale")]
        return {"rope_type": self.type} | {k: getattr(self, _FIELDS.get(k, k)) for k in keys}


def plain_frequencies(theta: float, head_dim: int) -> Tensor:
    """Radians a position of the rotary embedding as it was published; see `RopeScaling`."""
    return 1 / _powers(theta, head_dim)


def _powers(theta: float, head_dim: int) -> Tensor:
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def read_rope(
    fields: Mapping[str, Any], *, default_theta: float, max_length: int, where: str
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding in a config.json of either family.

    They stand in `rope_theta` and `rope_scaling`, or together in `rope_parameters` (transformers
    5); where both places speak, they have to agree. `where` begins the message of a `ValueError`.

    >>> nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    >>> read_rope(nested, default_theta=1e4, max_length=4096, where="config.json")
    (1000000.0, None)
    """
    thetas: dict[str, float] = {}
    if fields.get("rope_theta") is not None:
        thetas["rope_theta"] = _number(fields, "rope_theta", f"{where}: ")
    scalings: dict[str, RopeScaling | None] = {}
    for name in ("rope_scaling", "rope_parameters"):
        given = fields.get(name)
        if given is None or given is False or given == {}:
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{where}: {name} takes an object or null, got {given!r}")
        if given.get("rope_theta") is not None:
            thetas[f"{name}.rope_theta"] = _number(given, "rope_theta", f"{where}: {name}.")
        outside = fields.get("original_max_position_embeddings")
        context = {"original_max_position_embeddings": max_length if outside is None else outside}
        scalings[name] = _read_scaling(given, context, f"{where}: {name}")
    for what, values in (("rope_theta", thetas), ("rotary embedding", scalings)):
        if len(set(values.values())) > 1:
            said = ", ".join(f"{name} {value}" for name, value in values.items())
            raise ValueError(f"{where}: {' and '.join(values)} take one {what}, got {said}")
    theta = next(iter(thetas.values()), default_theta)
    scaling = next(iter(scalings.values()), None)
    if scaling is not None and scaling.type == "yarn" and theta <= 1:
        raise ValueError(f"{where}: rope_theta takes a number > 1 for yarn, got {theta}")
    return theta, scaling


def _read_scaling(given: dict[str, Any], context: dict[str, Any], where: str) -> RopeScaling | None:
    names = [given[key] for key in ("rope_type", "type") if key in given]
    kind, *others = [name for name in names if name is not None] or names or ["default"]
    if not isinstance(kind, str) or kind not in _KEYS or others not in ([], [kind]):
        raise ValueError(
            f"{where} takes a rope_type of {', '.join(map(repr, _KEYS))} (dynamic and longrope "
            f"change with the length of the sequence: not supported), got {given!r}"
        )
    keys = _KEYS[kind]
    neutral = {"rope_type": kind, "type": kind, "rope_theta": ..., "partial_rotary_factor": 1}
    if kind == "default":
        neutral["factor"] = 1
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if key in keys or neutral.get(key) in (..., value):
            continue
        raise ValueError(f"{where} of rope_type {kind!r} takes no {key}, got {given!r}")
    if kind == "default":
        return None

    values: dict[str, Any] = {}
    for key, default in keys.items():
        source = given if key in given else context
        if source.get(key) is None:
            if default is ...:
                raise ValueError(f"{where} of rope_type {kind!r} takes a {key}, got {given!r}")
            values[key] = default
        elif key == "truncate":
            if not isinstance(given[key], bool):
                raise ValueError(f"{where}.truncate takes true or false, got {given[key]!r}")
            values[key] = given[key]
        else:
            values[key] = _number(source, key, f"{where}.")
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if low in values and values[low] >= values[high]:
            raise ValueError(
                f"{where}.{high} takes a number above {low}, {values[low]}, got {values[high]}"
            )
    if values["factor"] < 1:
        raise ValueError(f"{where}.factor takes a number >= 1, got {values['factor']}")
    if kind == "yarn":
        scales = values.pop("mscale"), values.pop("mscale_all_dim")
        if values["attention_factor"] is None:
            values["attention_factor"] = _attention_factor(values["factor"], *scales)
    return RopeScaling(kind, **{_FIELDS.get(key, key): value for key, value in values.items()})


def _attention_factor(factor: float, scale: float | None, scale_all: float | None) -> float:
    """YaRN (arXiv 2309.00071), equation 22; with both scales the ratio that DeepSeek takes."""

    def stretch(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0

    return stretch(scale) / stretch(scale_all) if scale and scale_all else stretch(1)


def _number(fields: Mapping[str, Any], name: str, where: str) -> float:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST:
        raise ValueError(f"{where}{name} takes a number in (0, {LARGEST:g}], got {value!r}")
    return float(value)
