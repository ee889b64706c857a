# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.autograd import forward_ad

from .._checks import (
    instance,
    integer,
    is_tensor,
    logits_tensor,
    no_tangent,
    refuse,
    same_device,
    sized,
    tensor,
)
from .._library import _C
from ..config import BASE_RULES, DecodeConfig, op_options
from ..row_params import RowParams
from ..state import Counter, DecodeState, DecodeStep
from .vocab_statistics import VocabStatistics, is_statistics, statistics_tensor


def decode_step(
    logits: torch.Tensor | VocabStatistics,
    tokens: torch.Tensor,
    state: DecodeState | None,
    config: DecodeConfig,
    *,
    candidates: torch.Tensor | None = None,
    editable: torch.Tensor | None = None,
    proposed: torch.Tensor | None = None,
    rows: RowParams | None = None,
    slots: torch.Tensor | None = None,
    logits_shift: int = 0,
) -> DecodeStep:
    """Commit tokens of a block from one forward's logits: all rules in one call.

    Base rule with its quota, windows, neighbours, ambiguity, stability, edits, in this order; each
    sees what the ones before have committed. The fields of `DecodeConfig` say what each does.

    Args:
        logits: [B, L, V] float32, bfloat16 or float16 (float64 on the CPU), row i for cell i;
            last dimension of stride 1, any other strides, any alignment. Or `VocabStatistics` of
            logits that are spread over ranks; then nothing is drawn or proposed (`temperature` 0)
            and `logits_shift` is 0.
        tokens: [B, L] int64 or int32, the block; a strided view is fine. Written in place.
        state: of this block, [B, L] (with `slots` [any, L]), on the device of the logits; written
            in place. Call `state.reset()` when a new block begins. None where no rule needs one:
            without base="schedule", `temporal_steps`, token_cluster="random", `temperature` and
            `slots`.
        config: what may be committed.
        candidates: [B, L] bool, cells that may be committed; every other cell counts as committed.
            Default `tokens == config.mask_id`; has to be given if that is None.
        editable: [B, L] bool, decided cells that may take another token (`config.edit_threshold`,
            which then can't be None); at candidates it says nothing. No other rule sees them.
            Default: none.
        proposed: [B, L] int64, at candidates the token that base rule, windows and neighbours judge
            in place of the argmax, by its untempered probability; nothing is drawn. An id outside
            [0, V) is never committed by them. Ambiguity and stability look at the argmax.
        rows: options of each row in place of the config's.
        slots: [B] int64, the row of the state that each row uses, each at most once. A slot that
            the state does not have leaves the row alone, as a bad value in `RowParams` does.
            Default: row b.
        logits_shift: 1 judges cell i by row max(i - 1, 0) (Dream's block step), without a copy.

    Returns:
        prediction: [B, L] int64, at candidates and editable cells the argmax (at temperature > 0
            the drawn token, with `proposed` that, but the argmax at cells given a token by
            AMBIGUITY, STABILITY or EDIT); -1 where there is none, and at cells that are neither,
            which are not read. Wherever `rule` is not NONE it is the cell's new token.
        confidence: [B, L] float32, its untempered probability (`config.sampled_confidence`); 0
            where not read, NaN where the logits have no finite maximum or the proposed id is
            outside [0, V). Such a cell is never committed.
        rule: [B, L] uint8, why a cell got its token: values of `Rule`.
        remaining: [B] int32, candidates that are still masked.
        entropy: [B, L] float32, of the untempered distribution, in nats; 0 where not read, NaN
            where there is no prediction. None unless base="entropy" or `config.report_entropy`.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes. Nothing is written
            then. What lies in a tensor is not read to check it.
        NotImplementedError: in forward-mode differentiation.

    No host synchronisation; nothing of size V is allocated. Tensors are read where they lie: a
    captured graph sees what is written into them between replays. A row's result depends on that
    row alone. With B = 0 or L = 0 the results are empty.

    >>> logits = torch.zeros(1, 2, 4); logits[0, 0, 1] = 9
    >>> tokens = torch.tensor([[3, 3]])
    >>> step = decode_step(logits, tokens, DecodeState(1, 2), DecodeConfig(mask_id=3))
    >>> tokens, step.rule, step.remaining
    (tensor([[1, 3]]), tensor([[1, 0]], dtype=torch.uint8), tensor([1], dtype=torch.int32))
    """
    op = _DECODE_STEP
    given = (candidates, editable, proposed, slots)
    return _step(op, logits, tokens, state, config, given, rows, logits_shift)


def select(
    logits: torch.Tensor | VocabStatistics,
    tokens: torch.Tensor,
    state: DecodeState | None,
    config: DecodeConfig,
    *,
    candidates: torch.Tensor | None = None,
    editable: torch.Tensor | None = None,
    proposed: torch.Tensor | None = None,
    rows: RowParams | None = None,
    slots: torch.Tensor | None = None,
    logits_shift: int = 0,
) -> DecodeStep:
    """The decision of `decode_step` without writing `tokens`; the state advances.

    For loops that commit by themselves: take `prediction` wherever `rule` is not `Rule.NONE`.
    Arguments, results and errors are those of `decode_step`.

    >>> tokens = torch.tensor([[3, 3]])
    >>> step = select(torch.zeros(1, 2, 4), tokens, DecodeState(1, 2), DecodeConfig(mask_id=3))
    >>> tokens, step.rule
    (tensor([[3, 3]]), tensor([[2, 0]], dtype=torch.uint8))
    """
    op = _SELECT
    given = (candidates, editable, proposed, slots)
    return _step(op, logits, tokens, state, config, given, rows, logits_shift)


_DECODE_STEP, _SELECT = torch.ops.r2dllm.decode_step, torch.ops.r2dllm.select
_short_step = _C.step  # None for what torch.ops has to look at (csrc/ops/torch_python.cpp)
_NO_STATE = (None,) * len(DecodeState.__slots__)


def _step(op, logits, tokens, state, config, given, rows, logits_shift) -> DecodeStep:
    """`given`: candidates, editable, proposed, slots."""
    # A call is meant to cost microseconds: types are checked where one is found to be wrong.
    try:
        options, has_entropy = config._all_args, config._has_entropy
        held = _NO_STATE
        if state is not None:
            streaks = (state.streak_count, state.streak_id, state.streak_sum, state.streak_max)
            held = (*streaks, state.counters, state.step_map)
        own = [] if rows is None else rows._op_args
    except AttributeError:
        _reject(op.__name__, state, config, rows)
        raise
    step = None
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            _check_tangent(op.__name__, logits)
        writes = op is _DECODE_STEP
        step = _short_step(writes, logits, tokens, held, given, own, logits_shift, options)
    if step is None:
        step = _checked_step(op, logits, tokens, held, given, own, logits_shift, config)
    prediction, confidence, rule, remaining, entropy = step
    return DecodeStep(prediction, confidence, rule, remaining, entropy if has_entropy else None)


def _check_tangent(op: str, logits) -> None:
    values = logits.values if isinstance(logits, VocabStatistics) else logits
    if isinstance(values, torch.Tensor):
        no_tangent(op, logits=values)


def _checked_step(op, logits, tokens, held, given, own, logits_shift, config):
    name, options = op.__name__, config._op_args
    names = ("candidates", "editable", "proposed", "slots")
    is_tensor(name, optional=True, **dict(zip(names, given, strict=True)))
    logits_shift = integer(name, "logits_shift", logits_shift, 0, 1)
    is_tensor(name, tokens=tokens)
    if isinstance(logits, VocabStatistics):
        _check_statistics(name, logits, logits_shift, config)
        return op.statistics(logits.values, tokens, *held, *given, own, logits.dtype, *options)
    is_tensor(name, logits=logits)
    return op.default(logits, tokens, *held, *given, own, logits_shift, *options)


def _reject(op: str, state: object, config: object, rows: object) -> None:
    instance(op, "config", config, DecodeConfig)
    instance(op, "state", state, DecodeState, optional=True)
    instance(op, "rows", rows, RowParams, optional=True)


def _check_statistics(op: str, given: VocabStatistics, logits_shift: int, config: Any) -> None:
    is_statistics(op, "logits", given)
    if logits_shift != 0:
        refuse(ValueError, op, "logits_shift", "0 with statistics", logits_shift)
    banned = config.mask_id if config.mask_prediction == "ban" else None
    if given.exclude_id != banned:
        takes = f"statistics with exclude_id={banned}, as config has it"
        refuse(ValueError, op, "logits", takes, f"exclude_id={given.exclude_id}")
    if config._has_entropy and not given.with_entropy:
        takes = 'statistics with_entropy=True where config has base="entropy" or report_entropy'
        refuse(ValueError, op, "logits", takes, f"with_entropy={given.with_entropy}")


# ---- fake kernels ------------------------------------------------------------------------------

# Tensors of a state and of RowParams in the order of the op, and the dtypes that they take.
_STATE = {
    "streak_count": torch.int32,
    "streak_id": torch.int64,
    "streak_sum": torch.float32,
    "streak_max": torch.float32,
    "counters": torch.int64,
    "step_map": torch.int16,
}
_INTEGERS, _NUMBERS = (torch.int32, torch.int64), (torch.float32, torch.float64)
_ROWS = {
    field.name: {"quota": _INTEGERS, "top_k": _INTEGERS, "seed": torch.int64}.get(
        field.name, _NUMBERS
    )
    for field in dataclasses.fields(RowParams)
}


def _fake_of(op: str, evidence: str):
    """Refuses the shapes, dtypes and devices that the op refuses."""

    def fake(values, tokens, *others):
        state, (candidates, editable, proposed, slots, rows) = others[:6], others[6:11]
        options = op_options(others[12:])
        if evidence == "logits":
            logits_tensor(op, values)
            if options["mask_id"] >= values.shape[2]:
                takes = f"a token id in [0, V = {values.shape[2]})"
                refuse(ValueError, op, "config.mask_id", takes, options["mask_id"])
        else:
            statistics_tensor(op, "statistics", values, "[B, L, 4]")
        like = (evidence, values)
        tensor(op, "tokens", tokens, "[B, L]", (torch.int64, torch.int32), like=like)
        own = dict(zip(_ROWS, rows, strict=True)) if rows else {}
        given = (
            ("candidates", candidates, "[B, L]", torch.bool),
            ("editable", editable, "[B, L]", torch.bool),
            ("proposed", proposed, "[B, L]", torch.int64),
            ("slots", slots, "[B]", torch.int64),
            *((f"rows.{name}", row, "[B]", _ROWS[name]) for name, row in own.items()),
        )
        for name, value, shape, dtype in given:
            if value is not None:
                tensor(op, name, value, shape, dtype, like=like)
        _check_state(op, state, values, evidence, has_slots=slots is not None)
        cells = values.shape[:2]
        has_entropy = options["report_entropy"] or options["base"] == BASE_RULES.index("entropy")
        return (
            values.new_empty(cells, dtype=torch.int64),
            values.new_empty(cells, dtype=torch.float32),
            values.new_empty(cells, dtype=torch.uint8),
            values.new_empty(cells[:1], dtype=torch.int32),
            values.new_empty(cells if has_entropy else (0,), dtype=torch.float32),
        )

    return fake


def _check_state(op: str, state, values: torch.Tensor, evidence: str, *, has_slots: bool) -> None:
    for (name, dtype), value in zip(_STATE.items(), state, strict=True):
        if value is None:
            continue
        rows = value.shape[0] if has_slots else values.shape[0]
        columns = len(Counter) if name == "counters" else values.shape[1]
        shape = f"[rows, {len(Counter) if name == 'counters' else 'L'}]"
        sized(op, f"state.{name}", value, shape, (rows, columns), dtype)
        same_device(op, **{evidence: values, f"state.{name}": value})


for _op in ("decode_step", "select"):
    torch.library.register_fake(f"r2dllm::{_op}", _fake_of(_op, "logits"))
    torch.library.register_fake(f"r2dllm::{_op}.statistics", _fake_of(_op, "statistics"))
