# SPDX-License-Identifier: Apache-2.0
"""What a decode step may commit: `DecodeConfig`, and the reason it gives: `Rule`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from ._checks import choice, flag, integer, number


class Rule(IntEnum):
    """Why a cell got its token in a step; the values of `DecodeStep.rule` (uint8)."""

    NONE = 0  # still masked after the step, or not a candidate
    THRESHOLD = 1  # base="threshold": the confidence passes the threshold
    FORCED = 2  # one of the best cells, which the quota forces
    WINDOW = 3  # windowed confidence pooling
    AMBIGUITY = 4  # positional ambiguity: the chosen cell of a run
    STABILITY = 5  # the prediction stopped changing
    BASE = 6  # every other commit of a base rule
    NEIGHBOUR = 7  # near a cell whose confidence passes the threshold
    EDIT = 8  # a decided cell takes another token


# The position in each tuple is the integer that the ops take.
BASE_RULES = ("threshold", "schedule", "factor", "first", "budget", "entropy")
COMPARES = (">=", ">")
TOKEN_CLUSTERS = (None, "confidence", "mid", "random")
TEMPORAL_EVALS = ("last", "ave", "max")
SAMPLED_CONFIDENCES = ("untempered", "tempered")
MASK_PREDICTIONS = ("ban", "allow", "skip")
CONFIDENCE_DTYPES = ("float32", "logits")

_REQUIRED: Any = object()


def _takes(check: Callable[..., Any], *limits: Any, none: Any = _REQUIRED, **options: Any) -> dict:
    """Metadata of an option: a check of `_checks` with its limits, and the op's value of it.

    `none`: the option may be None, and this is what the op takes for it.
    """
    if none is not _REQUIRED:
        options["optional"] = True

    def checked(where: str, name: str, value: Any) -> Any:
        return check(where, name, value, *limits, **options)

    return {"check": checked, "op": lambda value: none if value is None else value}


def _count(least: int, *, none: Any = _REQUIRED) -> dict:
    """Metadata of an option that counts things: at least so many, and an int32."""
    return _takes(integer, least, 2**31 - 1, none=none)


def _chosen(names: tuple[str | None, ...]) -> dict:
    """Metadata of an option that is one of `names`: the op takes its position."""
    return {**_takes(choice, names), "op": names.index}


@dataclass(frozen=True)
class DecodeConfig:
    """Options of one decode step; validated when built, immutable afterwards.

    The defaults are the evaluation settings of the R2-dLLM release (all three rules on a 0.9
    threshold). `0` or `None` switches a rule off: `confidence_cluster_size`, `neighbour_radius`,
    `token_cluster`, `temporal_steps`, `edit_threshold`. Options that differ between the rows of a
    batch are tensors, `RowParams`; a config for each request would be compiled anew by
    `torch.compile`.

    Args:
        mask_id: id of the mask token, 0 <= mask_id < V. None: no token is a mask; the step is told
            its `candidates`.
        base: who commits from confidence alone. "threshold": every cell whose confidence passes
            `threshold`. "schedule": a fixed number of best cells a step, `steps_per_block` steps a
            block. "factor": the longest prefix of the cells in falling confidence p_1, p_2, ...
            with p_j >= 1 - factor / (j + 1) (Fast-dLLM). "first": the `quota` first masked cells.
            "budget" (ours): cells in falling confidence as long as their summed 1 - p, the expected
            number of wrong commits, stays <= `error_budget`. "entropy" (EB-Sampler, arXiv
            2505.24857): cells in rising entropy as long as its sum stays <= `entropy_budget`.
        threshold: a probability (release: 0.9), the anchors of `neighbour_radius` too; None = no
            cell passes.
        compare: ">=" or ">", how a confidence passes `threshold`, `neighbour_threshold` and
            `edit_threshold` (release: ">=").
        quota: least number of cells that the base rule commits, the best in its own order (release:
            1); 0 allows a step that commits nothing.
        factor: > 0; used by base="factor" (release: 1.0).
        error_budget: >= 0, expected wrong commits a step; used by base="budget".
        entropy_budget: >= 0, nats a step; used by base="entropy".
        last_free: whether the last cell of a budget does not count: near-certain cells and the best
            uncertain one (EB-Sampler: True).
        steps_per_block: steps of base="schedule"; None = one token a step.
        confidence_cluster_size: W, cells of a window (release: 3); 0 / None = off.
        spatial_threshold: least mean confidence of a window (inclusive), and the confidence that
            the best cell of a run must exceed (strictly); a probability (release: 0.8).
        confidence_cluster_unmasked: most committed cells that a window may hold (release: 1); None
            = no limit.
        neighbour_radius: a cell at most so far from one whose confidence passes `threshold` in this
            step commits at `neighbour_threshold` (LocalLeap, arXiv 2510.07081: 4); 0 / None = off.
        neighbour_threshold: a probability (LocalLeap: 0.75).
        token_cluster: which cell of a run of equal predictions is committed: "confidence" the
            best, "mid" cell len // 2, "random" any; None = off (release: "confidence").
        token_cluster_size: shortest run that counts, >= 1 (release: 2).
        temporal_steps: steps that a prediction must have stood (release: 3); 0 / None = off.
        temporal_threshold: inclusive, a probability (release: 0.8).
        temporal_eval: what is held against it: confidence of this step ("last"), mean ("ave") or
            maximum ("max") over the streak.
        edit_threshold: a decided cell that the step may edit takes the argmax if that is another
            token and its probability passes this one (LLaDA2.1); None = off.
        temperature: 0 = argmax; > 0 draws tokens from softmax(logits / temperature).
        sampled_confidence: confidence of a drawn token: its probability without temperature
            ("untempered", the release) or in the distribution that it was drawn from ("tempered").
        top_k, top_p, min_p: restrict the draw to the k likeliest tokens, to the smallest set of
            mass >= top_p, to tokens of at least min_p times the greatest probability; ties at the
            border are kept. None changes the argmax of temperature 0.
        seed: of the counter-based random numbers, a 64-bit integer.
        mask_prediction: "ban" treats the logit of mask_id as -inf. "allow" is the release:
            "committing" the mask id leaves the cell masked. "skip": a cell whose argmax is the mask
            id is no candidate in this step (dInfer, dllm-plugin).
        confidence_dtype: "float32", or "logits": confidence, thresholds and window mean are rounded
            to the dtype of the logits, as the Dream release does in bfloat16.
        report_entropy: True gives `DecodeStep.entropy` with any base rule.

    Raises:
        TypeError, ValueError: name the field, what it got and what it takes.

    >>> DecodeConfig(126336).replace(threshold=0.95).threshold
    0.95
    """

    # A row per option: name, default, what it takes, and what the op is given (`_takes`).
    mask_id: int | None = field(metadata=_takes(integer, 0, none=-1))
    _: dataclasses.KW_ONLY
    base: str = field(default="threshold", metadata=_chosen(BASE_RULES))
    threshold: float | None = field(default=0.9, metadata=_takes(number, 0, 1, none=-1.0))
    compare: str = field(default=">=", metadata=_chosen(COMPARES))
    quota: int = field(default=1, metadata=_count(0))
    factor: float = field(default=1.0, metadata=_takes(number, 0, open_low=True))
    error_budget: float = field(default=0.005, metadata=_takes(number, 0))
    entropy_budget: float = field(default=0.05, metadata=_takes(number, 0))
    last_free: bool = field(default=True, metadata=_takes(flag))
    steps_per_block: int | None = field(default=None, metadata=_count(1, none=0))
    confidence_cluster_size: int | None = field(default=3, metadata=_count(0, none=0))
    spatial_threshold: float = field(default=0.8, metadata=_takes(number, 0, 1))
    confidence_cluster_unmasked: int | None = field(default=1, metadata=_count(0, none=-1))
    neighbour_radius: int | None = field(default=0, metadata=_count(0, none=0))
    neighbour_threshold: float = field(default=0.75, metadata=_takes(number, 0, 1))
    token_cluster: str | None = field(default="confidence", metadata=_chosen(TOKEN_CLUSTERS))
    token_cluster_size: int = field(default=2, metadata=_count(1))
    temporal_steps: int | None = field(default=3, metadata=_count(0, none=0))
    temporal_threshold: float = field(default=0.8, metadata=_takes(number, 0, 1))
    temporal_eval: str = field(default="last", metadata=_chosen(TEMPORAL_EVALS))
    edit_threshold: float | None = field(default=None, metadata=_takes(number, 0, 1, none=-1.0))
    temperature: float = field(default=0.0, metadata=_takes(number, 0))
    sampled_confidence: str = field(default="untempered", metadata=_chosen(SAMPLED_CONFIDENCES))
    top_k: int | None = field(default=None, metadata=_count(1, none=0))
    top_p: float | None = field(
        default=None, metadata=_takes(number, 0, 1, open_low=True, none=1.0)
    )
    min_p: float | None = field(
        default=None, metadata=_takes(number, 0, 1, open_low=True, none=0.0)
    )
    seed: int = field(default=0, metadata=_takes(integer))
    mask_prediction: str = field(default="ban", metadata=_chosen(MASK_PREDICTIONS))
    confidence_dtype: str = field(
        default="float32", metadata={**_chosen(CONFIDENCE_DTYPES), "op": "logits".__eq__}
    )
    report_entropy: bool = field(default=False, metadata=_takes(flag))

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            check = option.metadata["check"]
            value = check("DecodeConfig", option.name, getattr(self, option.name))
            object.__setattr__(self, option.name, value)
        # Once, not in every step: the call is meant to cost microseconds.
        arguments = self._all_op_args()
        object.__setattr__(self, "_all_args", arguments)  # what the short way takes
        while arguments[-1] == _OP_DEFAULTS[len(arguments) - 1]:
            arguments = arguments[:-1]
        object.__setattr__(self, "_op_args", arguments)
        object.__setattr__(self, "_has_entropy", self.report_entropy or self.base == "entropy")

    def replace(self, **changes: Any) -> DecodeConfig:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def vanilla(cls, mask_id: int | None, **changes: Any) -> DecodeConfig:
        """One token a step, the most confident first; no other rule."""
        return cls(mask_id, **{"base": "schedule", **_NO_RULES, **changes})

    @classmethod
    def fast_dllm(cls, mask_id: int | None, **changes: Any) -> DecodeConfig:
        """The confidence threshold alone (0.9), as in Fast-dLLM."""
        return cls(mask_id, **{**_NO_RULES, **changes})

    @classmethod
    def r2(cls, mask_id: int | None, **changes: Any) -> DecodeConfig:
        """Threshold 0.9 and the three rules of R2-dLLM: the defaults."""
        return cls(mask_id, **changes)

    @classmethod
    def budget(cls, mask_id: int | None, **changes: Any) -> DecodeConfig:
        """A bound on the expected number of wrong commits a step, the last cell free; no other
        rule."""
        return cls(mask_id, **{"base": "budget", **_NO_RULES, **changes})

    @classmethod
    def entropy(cls, mask_id: int | None, **changes: Any) -> DecodeConfig:
        """A bound on the entropy a step, the last cell free, as in EB-Sampler; no other rule."""
        return cls(mask_id, **{"base": "entropy", **_NO_RULES, **changes})

    def _all_op_args(self) -> tuple[Any, ...]:
        """The options as `torch.ops.r2dllm.decode_step` takes them, in its order.

        `_op_args` leaves out those at the end that have its defaults.
        """
        return tuple(option.metadata["op"](getattr(self, option.name)) for option in _OP_ORDER)


def op_options(arguments: Sequence[Any]) -> dict[str, Any]:
    """The options of a call of the op by name, as the op takes them; `arguments` may end early.

    >>> op_options((7,))["quota"]
    1
    """
    given = [*arguments, *_OP_DEFAULTS[len(arguments) :]]
    return {option.name: value for option, value in zip(_OP_ORDER, given, strict=True)}


# The order of the op's schema: first what published settings change, then the rows as they stand.
# An op's argument costs a call half a microsecond, unless it is left out at the end.
_FIRST = (
    "mask_id mask_prediction confidence_dtype temperature base threshold quota compare "
    "error_budget last_free steps_per_block entropy_budget factor report_entropy edit_threshold"
).split()
_OP_ORDER = sorted(
    dataclasses.fields(DecodeConfig),
    key=lambda option: _FIRST.index(option.name) if option.name in _FIRST else len(_FIRST),
)
# The id of the mask has no default, which is what ends the loop of __post_init__.
_OP_DEFAULTS = [
    None if option.default is dataclasses.MISSING else option.metadata["op"](option.default)
    for option in _OP_ORDER
]
_NO_RULES = {"confidence_cluster_size": 0, "token_cluster": None, "temporal_steps": 0}

PRESETS: dict[str, Callable[..., DecodeConfig]] = {
    name: getattr(DecodeConfig, name)
    for name in ("vanilla", "fast_dllm", "r2", "budget", "entropy")
}
