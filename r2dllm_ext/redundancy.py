# SPDX-License-Identifier: Apache-2.0
"""`redundant_cells`, `redundancy_score`: what a decode recomputed but could have committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import instance, integer, refuse
from .config import DecodeConfig, Rule
from .ops.positional_ambiguity import positional_ambiguity
from .ops.window_pool import window_pool
from .stop_ids import StopId, is_stop, stop_ids
from .trace import Trace

_R2 = DecodeConfig.r2(0)  # what judges a rule that is off


class RedundancyScore(NamedTuple):
    """Result of `redundancy_score`. All [B] float64, per answer token."""

    total: Tensor  # cells recomputed needlessly, whatever the reason: the score
    stability: Tensor  # of these: already predicted the final token, and stayed with it
    window: Tensor  # in a window that is confident on average
    ambiguity: Tensor  # in a confident run of equal predictions, and not its best
    nfe_per_token: Tensor  # forwards
    rule_count: Tensor  # tokens that the rules of R2-dLLM committed: a share


class RedundantCells(NamedTuple):
    """Result of `redundant_cells`. All [S, B, L] bool: steps, rows, cells of the active block."""

    stability: Tensor
    window: Tensor
    ambiguity: Tensor


def redundancy_score(
    trace: Trace,
    config: DecodeConfig,
    *,
    stop_id: StopId = None,
    exclude_ids: Sequence[int] = (),
) -> RedundancyScore:
    """Score every row of a decode; low is lean.

    Counts the cells that `redundant_cells` finds, in total each once, and divides them by the
    answer's tokens: dividing by the cells that were computed would favour slow decodes.

    Compare decodes of one kind only: where the rules of R2-dLLM were on they have removed the
    redundancy. To select training data, score decodes by the base rule (`DecodeConfig.fast_dllm`).

    Args:
        trace, config, stop_id, exclude_ids: see `redundant_cells`.

    Returns:
        RedundancyScore of tensors [B] float64 on the CPU; zeros for an empty answer.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    >>> model, config = load_model("ledger"), DecodeConfig.fast_dllm(2)
    >>> out = generate(model, torch.tensor([[33, 14]]), gen_length=32, config=config, trace=True)
    >>> score = redundancy_score(out.trace, config, stop_id=model.eos_id)
    >>> bool(score.total <= score.stability + score.window + score.ambiguity)
    True
    """
    exclude_ids = _check("redundancy_score", trace, config, exclude_ids)
    stops = stop_ids(stop_id, where="redundancy_score")
    cells = _redundant_cells(trace, config, stops, exclude_ids)
    answer = trace.sequences[:, trace.prompt_length :]
    length = _answer_length(answer, stops)  # [B]
    inside = torch.arange(answer.shape[1], device="cpu") < length[:, None]
    rules = [Rule.WINDOW, Rule.AMBIGUITY, Rule.STABILITY]
    r2_rules = torch.tensor(rules, dtype=torch.uint8, device="cpu")
    by_rule = torch.isin(trace.commit_rule, r2_rules)
    tokens = length.clamp(min=1).double()

    def per_token(redundant: Tensor) -> Tensor:
        return redundant.sum((0, 2)) / tokens

    return RedundancyScore(
        total=per_token(cells.stability | cells.window | cells.ambiguity),
        stability=per_token(cells.stability),
        window=per_token(cells.window),
        ambiguity=per_token(cells.ambiguity),
        nfe_per_token=trace.row_nfe() / tokens,
        rule_count=(by_rule & inside).sum(1) / tokens,
    )


def redundant_cells(
    trace: Trace,
    config: DecodeConfig,
    *,
    stop_id: StopId = None,
    exclude_ids: Sequence[int] = (),
) -> RedundantCells:
    """Which cells of a decode were computed again in vain.

    A cell of the active block waits if it is still masked after a step: it will be computed again.
    A waiting cell is redundant
      by stability, if its prediction already is the token that will be committed and does not
      change until then;
      by a window, if some `confidence_cluster_size` cells of the block, at most
      `confidence_cluster_unmasked` of which do not wait, have waiting cells of mean confidence >=
      `spatial_threshold`;
      by ambiguity, if it belongs to a run of at least `token_cluster_size` (and 2) neighbouring
      waiting cells with one prediction whose best confidence exceeds `spatial_threshold`, and is
      not the best.

    Args:
        trace: of `generate(..., trace=True)`.
        config: whose windows, runs and thresholds judge. A rule that is off is judged by its
            default, so that a base decode's own config will do.
        stop_id: the answer ends with the first one, itself included: cells behind it do not count,
            and it makes no run; one id or several. Default: the answer is all G positions.
        exclude_ids: further predictions that make no run (a newline, say).

    Returns:
        RedundantCells of tensors [S, B, L] bool on the CPU, as those of `trace`.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    >>> model, config = load_model("ledger"), DecodeConfig.fast_dllm(2)
    >>> out = generate(model, torch.tensor([[33, 14]]), gen_length=32, config=config, trace=True)
    >>> redundant_cells(out.trace, config).window.shape == out.trace.rule.shape
    True
    """
    exclude_ids = _check("redundant_cells", trace, config, exclude_ids)
    stops = stop_ids(stop_id, where="redundant_cells")
    return _redundant_cells(trace, config, stops, exclude_ids)


def _redundant_cells(
    trace: Trace, config: DecodeConfig, stops: Sequence[int], exclude_ids: Sequence[int]
) -> RedundantCells:
    answer = trace.sequences[:, trace.prompt_length :]
    L = trace.block_length
    in_block = torch.arange(L, device="cpu")
    position = trace.block[:, None] * L + in_block  # [S, L], of a block's cells
    waits = trace.masked & (trace.rule == Rule.NONE)
    waits &= position[:, None] < _answer_length(answer, stops)[:, None]  # [S, B, L]
    return RedundantCells(
        stability=waits & _stalled(trace, answer, position),
        window=_window(trace, waits, config),
        ambiguity=_ambiguity(trace, waits, config, [*stops, *exclude_ids]),
    )


def _answer_length(answer: Tensor, stops: Sequence[int]) -> Tensor:
    """Tokens up to the first stop token, itself included; [B]."""
    before = (is_stop(answer, stops).cumsum(1) == 0).sum(1)
    return (before + 1).clamp(max=answer.shape[1])


def _stalled(trace: Trace, answer: Tensor, position: Tensor) -> Tensor:
    """[S, B, L]: from this step to its commit the cell predicts the token it will get."""
    step = torch.arange(trace.nfe, device="cpu")[:, None, None]
    commit = trace.commit_step[:, position].transpose(0, 1)  # [S, B, L]
    final = answer[:, position].transpose(0, 1)
    settled = (trace.prediction == final) | (step > commit)
    stalled = torch.zeros_like(trace.masked)
    for block in trace.block.unique():
        own = trace.block == block
        until_commit = settled[own].flip(0).cummin(0).values.flip(0)
        stalled[own] = until_commit
    return stalled & (step < commit)


def _window(trace: Trace, waits: Tensor, config: DecodeConfig) -> Tensor:
    window = config.confidence_cluster_size or _R2.confidence_cluster_size
    assert window is not None  # `DecodeConfig.r2` has windows
    pooled = window_pool(
        trace.confidence.flatten(0, 1),
        waits.flatten(0, 1),
        window=window,
        min_confidence=config.spatial_threshold,
        max_unmasked=config.confidence_cluster_unmasked,
    )
    return pooled.view_as(waits)


def _ambiguity(trace: Trace, waits: Tensor, config: DecodeConfig, exclude_ids: list[int]) -> Tensor:
    excluded = torch.tensor(exclude_ids, dtype=torch.int64, device="cpu")
    belongs = waits & (trace.prediction >= 0) & trace.confidence.isfinite()
    belongs = (belongs & ~torch.isin(trace.prediction, excluded)).flatten(0, 1)
    prediction = trace.prediction.flatten(0, 1)
    best = positional_ambiguity(
        prediction,
        trace.confidence.flatten(0, 1),
        belongs,
        min_confidence=config.spatial_threshold,
        min_run=max(2, config.token_cluster_size),
        mode="confidence",
    )
    # Number the runs of a row; all cells of a run that has a best one are in it.
    begins = torch.ones_like(belongs)
    same = (prediction[:, 1:] == prediction[:, :-1]) & (belongs[:, 1:] == belongs[:, :-1])
    begins[:, 1:] = ~same
    run = begins.cumsum(1) - 1
    has_best = torch.zeros_like(run).scatter_add(1, run, best.long()) > 0
    return (belongs & has_best.gather(1, run) & ~best).view_as(waits)


def _check(
    function: str, trace: Trace, config: DecodeConfig, exclude_ids: Sequence[int]
) -> list[int]:
    """`exclude_ids` as plain integers."""
    instance(function, "trace", trace, Trace)
    instance(function, "config", config, DecodeConfig)
    try:
        ids = list(exclude_ids)
    except TypeError:
        refuse(TypeError, function, "exclude_ids", "ids", exclude_ids)
    return [integer(function, "exclude_ids", i, 0) for i in ids]
