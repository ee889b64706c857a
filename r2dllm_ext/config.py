# SPDX-License-Identifier: Apache-2.0
"""What a decode step may commit: `DecodeConfig`, and the reason it gives: `Rule`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any, ClassVar


class Rule(IntEnum):
    """Why a cell was committed in a step; the values of `DecodeStep.rule` (uint8)."""

    NONE = 0  # still masked after the step, or not a candidate
    THRESHOLD = 1  # base="threshold": confidence >= threshold
    FORCED = 2  # the best cell, where the base rule by itself would commit none
    WINDOW = 3  # windowed confidence pooling
    AMBIGUITY = 4  # positional ambiguity: the chosen cell of a run
    STABILITY = 5  # the prediction stopped changing
    BASE = 6  # every other commit of a base rule


# The position in each tuple is the integer that the ops take.
BASE_RULES = ("threshold", "schedule", "factor", "first", "budget")
TOKEN_CLUSTERS = (None, "confidence", "mid", "random")
TEMPORAL_EVALS = ("last", "ave", "max")
CONFIDENCE_DTYPES = ("float32", "logits")


@dataclass(frozen=True)
class DecodeConfig:
    """Options of one decode step; validated when built, immutable afterwards.

    The defaults are the evaluation settings of the R2-dLLM release (all three rules on a 0.9
    threshold). `0` or `None` switches a rule off: `confidence_cluster_size`, `token_cluster`,
    `temporal_steps`.

    Args:
        mask_id: id of the mask token, 0 <= mask_id < V.
        base: who commits from confidence alone. "threshold": every cell with confidence >=
            `threshold`, and always the row's best cell. "schedule": a fixed number of best cells a
            step, `steps_per_block` steps a block. "factor": the longest prefix of the cells in
            falling confidence p_1, p_2, ... with p_j >= 1 - factor / (j + 1). "first": the first
            masked cell only (Dream's full pass). "budget": the best cells as long as their summed
            (1 - p), the expected number of wrong commits, stays <= `error_budget`.
        threshold: inclusive, a probability (release: 0.9).
        factor: > 0; used by base="factor" (release: 1.0).
        error_budget: >= 0, expected wrong commits a step; used by base="budget".
        steps_per_block: steps of base="schedule"; None = one token a step.
        confidence_cluster_size: W, cells of a window (release: 3); 0 / None = off.
        spatial_threshold: least mean confidence of a window (inclusive), and the confidence that
            the best cell of a run must exceed (strictly); a probability (release: 0.8).
        confidence_cluster_unmasked: most committed cells that a window may hold (release: 1); None
            = no limit.
        token_cluster: which cell of a run of equal predictions is committed: "confidence" the
            best, "mid" cell len // 2, "random" any; None = off (release: "confidence").
        token_cluster_size: shortest run that counts, >= 1 (release: 2).
        temporal_steps: steps that a prediction must have stood (release: 3); 0 / None = off.
        temporal_threshold: inclusive, a probability (release: 0.8).
        temporal_eval: what is held against it: confidence of this step ("last"), mean ("ave") or
            maximum ("max") over the streak.
        temperature: 0 = argmax; > 0 draws tokens from softmax(logits / temperature).
        top_k, top_p: restrict the draw to the k likeliest tokens, then to the smallest set of mass
            >= top_p; ties at the border are kept. Neither changes the argmax of temperature 0.
        seed: of the counter-based random numbers, a 64-bit integer.
        allow_mask_id: False treats the logit of mask_id as -inf; True is the release's behaviour:
            "committing" the mask id leaves the cell masked.
        confidence_dtype: "float32", or "logits": confidence, threshold and window mean are rounded
            to the dtype of the logits, as the Dream release does in bfloat16.

    Raises:
        TypeError, ValueError: name the field, what it got and what it takes.

    >>> DecodeConfig(126336).replace(threshold=0.95).threshold
    0.95
    """

    mask_id: int
    base: str = dataclasses.field(default="threshold", kw_only=True)
    threshold: float = dataclasses.field(default=0.9, kw_only=True)
    factor: float = dataclasses.field(default=1.0, kw_only=True)
    error_budget: float = dataclasses.field(default=0.1, kw_only=True)
    steps_per_block: int | None = dataclasses.field(default=None, kw_only=True)
    confidence_cluster_size: int | None = dataclasses.field(default=3, kw_only=True)
    spatial_threshold: float = dataclasses.field(default=0.8, kw_only=True)
    confidence_cluster_unmasked: int | None = dataclasses.field(default=1, kw_only=True)
    token_cluster: str | None = dataclasses.field(default="confidence", kw_only=True)
    token_cluster_size: int = dataclasses.field(default=2, kw_only=True)
    temporal_steps: int | None = dataclasses.field(default=3, kw_only=True)
    temporal_threshold: float = dataclasses.field(default=0.8, kw_only=True)
    temporal_eval: str = dataclasses.field(default="last", kw_only=True)
    temperature: float = dataclasses.field(default=0.0, kw_only=True)
    top_k: int | None = dataclasses.field(default=None, kw_only=True)
    top_p: float | None = dataclasses.field(default=None, kw_only=True)
    seed: int = dataclasses.field(default=0, kw_only=True)
    allow_mask_id: bool = dataclasses.field(default=False, kw_only=True)
    confidence_dtype: str = dataclasses.field(default="float32", kw_only=True)

    _INT32_MAX: ClassVar[int] = 2**31 - 1

    def __post_init__(self) -> None:
        self._integer("mask_id", 0, 2**63 - 1)
        self._choice("base", BASE_RULES)
        self._number("threshold", 0.0, 1.0)
        self._number("factor", 0.0, math.inf, open_low=True)
        self._number("error_budget", 0.0, math.inf)
        self._integer("steps_per_block", 1, self._INT32_MAX, optional=True)
        self._integer("confidence_cluster_size", 0, self._INT32_MAX, optional=True)
        self._number("spatial_threshold", 0.0, 1.0)
        self._integer("confidence_cluster_unmasked", 0, self._INT32_MAX, optional=True)
        self._choice("token_cluster", TOKEN_CLUSTERS)
        self._integer("token_cluster_size", 1, self._INT32_MAX)
        self._integer("temporal_steps", 0, self._INT32_MAX, optional=True)
        self._number("temporal_threshold", 0.0, 1.0)
        self._choice("temporal_eval", TEMPORAL_EVALS)
        self._number("temperature", 0.0, math.inf)
        self._integer("top_k", 1, self._INT32_MAX, optional=True)
        self._number("top_p", 0.0, 1.0, optional=True, open_low=True)
        self._integer("seed", -(2**63), 2**63 - 1)
        if not isinstance(self.allow_mask_id, bool):
            self._fail(TypeError, "allow_mask_id", "a bool")
        self._choice("confidence_dtype", CONFIDENCE_DTYPES)
        # Once, not in every step: the call is meant to cost microseconds.
        arguments = self._all_op_args()
        while len(arguments) > 1 and arguments[-1] == _OP_DEFAULTS[len(arguments) - 1]:
            arguments = arguments[:-1]
        object.__setattr__(self, "_op_args", arguments)

    def replace(self, **changes: Any) -> DecodeConfig:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def vanilla(cls, mask_id: int, **changes: Any) -> DecodeConfig:
        """One token a step, the most confident first; no other rule."""
        return cls(mask_id, **{"base": "schedule", **_NO_RULES, **changes})

    @classmethod
    def fast_dllm(cls, mask_id: int, **changes: Any) -> DecodeConfig:
        """The confidence threshold alone (0.9), as in Fast-dLLM."""
        return cls(mask_id, **{**_NO_RULES, **changes})

    @classmethod
    def r2(cls, mask_id: int, **changes: Any) -> DecodeConfig:
        """Threshold 0.9 and the three rules of R2-dLLM: the defaults."""
        return cls(mask_id, **changes)

    @classmethod
    def budget(cls, mask_id: int, **changes: Any) -> DecodeConfig:
        """A bound of 0.1 on the expected number of wrong commits a step; no other rule."""
        return cls(mask_id, **{"base": "budget", **_NO_RULES, **changes})

    def _all_op_args(self) -> tuple[Any, ...]:
        """The options as `torch.ops.r2dllm.decode_step` takes them, in its order.

        `_op_args` leaves out those at the end that have its defaults.
        """
        return (
            self.mask_id,
            self.allow_mask_id,
            self.confidence_dtype == "logits",
            float(self.temperature),
            BASE_RULES.index(self.base),
            float(self.threshold),
            float(self.factor),
            float(self.error_budget),
            self.steps_per_block or 0,
            self.confidence_cluster_size or 0,
            float(self.spatial_threshold),
            -1 if self.confidence_cluster_unmasked is None else self.confidence_cluster_unmasked,
            TOKEN_CLUSTERS.index(self.token_cluster),
            self.token_cluster_size,
            self.temporal_steps or 0,
            float(self.temporal_threshold),
            TEMPORAL_EVALS.index(self.temporal_eval),
            self.top_k or 0,
            1.0 if self.top_p is None else float(self.top_p),
            self.seed,
        )

    def _fail(self, error: type[Exception], field: str, allowed: str) -> None:
        raise error(f"DecodeConfig.{field}: got {getattr(self, field)!r}, takes {allowed}")

    def _integer(self, field: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, field)
        allowed = f"an integer in [{low}, {high}]" + (" or None" if optional else "")
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            self._fail(TypeError, field, allowed)
        if not low <= value <= high:
            self._fail(ValueError, field, allowed)

    def _number(
        self, field: str, low: float, high: float, *, optional: bool = False, open_low: bool = False
    ) -> None:
        value = getattr(self, field)
        bracket = "(" if open_low else "["
        end = f"{high}]" if math.isfinite(high) else "inf)"
        allowed = f"a number in {bracket}{low}, {end}" + (" or None" if optional else "")
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._fail(TypeError, field, allowed)
        inside = low <= value <= high and math.isfinite(value) and not (open_low and value == low)
        if not inside:
            self._fail(ValueError, field, allowed)

    def _choice(self, field: str, choices: tuple[str | None, ...]) -> None:
        value = getattr(self, field)
        if value is not None and not isinstance(value, str):
            self._fail(TypeError, field, f"one of {choices}")
        if value not in choices:
            self._fail(ValueError, field, f"one of {choices}")


_OP_DEFAULTS = DecodeConfig._all_op_args(
    SimpleNamespace(**{field.name: field.default for field in dataclasses.fields(DecodeConfig)})
)
_NO_RULES = {"confidence_cluster_size": 0, "token_cluster": None, "temporal_steps": 0}
