# SPDX-License-Identifier: Apache-2.0
"""The step of dInfer and of dllm-plugin, near ties included."""

from __future__ import annotations

import torch

from ..config import DecodeConfig
from ..ops import decode_step, vocab_statistics
from ..row_params import RowParams
from ..state import DecodeState, DecodeStep

NEAR = 1e-5  # of both engines


def near_ties_step(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    state: DecodeState | None,
    config: DecodeConfig,
    *,
    slots: torch.Tensor | None = None,
) -> DecodeStep:
    """`decode_step` with a threshold of each row: at most `NEAR` below its best cell.

    Where no cell passes `config.threshold`, all that are within `NEAR` of the best commit together.
    `config` has mask_prediction="skip" and draws nothing. Still one read of the logits.
    """
    assert config.mask_id is not None and config.threshold is not None  # checked by the callers
    masked = tokens == config.mask_id
    statistics = vocab_statistics(logits, candidates=masked)
    # Of each cell: the sum of exp(logit - greatest), so 1 / p, and the argmax (-1: there is none).
    total, argmax = statistics.values[..., 1], statistics.values[..., 2]
    live = masked & (argmax >= 0) & (argmax != config.mask_id)
    best = torch.where(live, (1 / total).float(), 0).amax(1)
    threshold = (best - NEAR).clamp(0, config.threshold)
    rows = RowParams(threshold=threshold)
    return decode_step(statistics, tokens, state, config, rows=rows, slots=slots)
