# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from .._checks import instance, integer, is_tensor, same_device
from ..config import DecodeConfig
from ..state import DecodeState, DecodeStep
from .vocab_statistics import VocabStatistics, is_statistics


def decode_step(
    logits: torch.Tensor | VocabStatistics,
    tokens: torch.Tensor,
    state: DecodeState,
    config: DecodeConfig,
    *,
    candidates: torch.Tensor | None = None,
    logits_shift: int = 0,
) -> DecodeStep:
    """Commit tokens of a block from one forward's logits: all rules of R2-dLLM in one call.

    Base rule, `window_pool`, `positional_ambiguity`, `update_stability_`, in this order; each sees
    what the ones before have committed.

    Args:
        logits: [B, L, V] float32, bfloat16 or float16 (float64 on the CPU), row i for cell i;
            last dimension of stride 1, any other strides, any alignment. Or `VocabStatistics` of
            logits that are spread over ranks; then `temperature` is 0 and `logits_shift` 0.
        tokens: [B, L] int64, the block; a strided view is fine. Written in place.
        state: of this block, [B, L], on the device of the logits; written in place. Call
            `state.reset()` when a new block begins.
        config: what may be committed.
        candidates: [B, L] bool, cells that may be committed; every other cell counts as committed.
            Default `tokens == config.mask_id`.
        logits_shift: 1 judges cell i by row max(i - 1, 0) (Dream's block step), without a copy.

    Returns:
        prediction: [B, L] int64, the argmax (at temperature > 0 the drawn token, but the argmax at
            cells committed by AMBIGUITY or STABILITY); -1 where there is none. Wherever `rule` is
            not NONE it is the token committed.
        confidence: [B, L] float32, its untempered probability; 0 where not a candidate, NaN where a
            candidate's logits have no finite maximum. Such a cell is never committed.
        rule: [B, L] uint8, why a cell was committed: values of `Rule`.
        remaining: [B] int32, candidates that are still masked.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes. Nothing is written
            then.

    No host synchronisation; nothing of size V is allocated. A row's result depends on that row
    alone. With B = 0 or L = 0 the results are empty.

    >>> logits = torch.zeros(1, 2, 4); logits[0, 0, 1] = 9
    >>> tokens = torch.tensor([[3, 3]])
    >>> step = decode_step(logits, tokens, DecodeState(1, 2), DecodeConfig(mask_id=3))
    >>> tokens, step.rule, step.remaining
    (tensor([[1, 3]]), tensor([[1, 0]], dtype=torch.uint8), tensor([1], dtype=torch.int32))
    """
    op = torch.ops.r2dllm.decode_step
    return _step(op, logits, tokens, state, config, candidates, logits_shift)


def select(
    logits: torch.Tensor | VocabStatistics,
    tokens: torch.Tensor,
    state: DecodeState,
    config: DecodeConfig,
    *,
    candidates: torch.Tensor | None = None,
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
    op = torch.ops.r2dllm.select
    return _step(op, logits, tokens, state, config, candidates, logits_shift)


def _step(op, logits, tokens, state, config, candidates, logits_shift) -> DecodeStep:
    # A call is meant to cost microseconds: types are checked where one is found to be wrong.
    try:
        options = config._op_args
        streaks = (state.streak_count, state.streak_id, state.streak_sum, state.streak_max)
        state_tensors = (*streaks, state.counters)
    except AttributeError:
        _reject(op.__name__, state, config)
        raise
    if candidates is not None and not isinstance(candidates, torch.Tensor):
        is_tensor(op.__name__, candidates=candidates, optional=True)
    if type(logits_shift) is not int or not 0 <= logits_shift <= 1:
        logits_shift = integer(op.__name__, "logits_shift", logits_shift, 0, 1)
    if isinstance(logits, VocabStatistics):
        is_statistics(op.__name__, "logits", logits)
        is_tensor(op.__name__, tokens=tokens)
        if logits_shift != 0:
            raise ValueError(
                f"{op.__name__}: logits_shift takes 0 with statistics, got {logits_shift}"
            )
        values, dtype = logits
        return DecodeStep(
            *op.statistics(values, tokens, *state_tensors, candidates, dtype, *options)
        )
    if not (isinstance(logits, torch.Tensor) and isinstance(tokens, torch.Tensor)):
        is_tensor(op.__name__, logits=logits, tokens=tokens)
    return DecodeStep(
        *op.default(logits, tokens, *state_tensors, candidates, logits_shift, *options)
    )


def _reject(op: str, state: object, config: object) -> None:
    instance(op, "config", config, DecodeConfig)
    instance(op, "state", state, DecodeState)


def _fake_of(op: str):
    def fake(
        logits,
        tokens,
        streak_count,
        streak_id,
        streak_sum,
        streak_max,
        counters,
        candidates,
        *options,
    ):
        same_device(op, logits=logits, tokens=tokens, state=streak_count, candidates=candidates)
        cells, rows = logits.shape[:2], logits.shape[:1]
        return (
            logits.new_empty(cells, dtype=torch.int64),
            logits.new_empty(cells, dtype=torch.float32),
            logits.new_empty(cells, dtype=torch.uint8),
            logits.new_empty(rows, dtype=torch.int32),
        )

    return fake


torch.library.register_fake("r2dllm::decode_step", _fake_of("decode_step"))
torch.library.register_fake("r2dllm::select", _fake_of("select"))
torch.library.register_fake("r2dllm::decode_step.statistics", _fake_of("decode_step"))
torch.library.register_fake("r2dllm::select.statistics", _fake_of("select"))
