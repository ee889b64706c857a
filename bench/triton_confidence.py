# SPDX-License-Identifier: Apache-2.0
"""Confidence and prediction, a Triton kernel that one would write: a program per row, one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _confidence(logits, prediction, confidence, row_stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start_of_row = logits + row.to(tl.int64) * row_stride
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -1e38, tl.float32)  # finite: the difference of two of them is no NaN
    column = tl.full([BLOCK], 0, tl.int32)
    mass = tl.full([BLOCK], 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        at = start + lane
        z = tl.load(start_of_row + at, mask=at < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, z)
        mass = mass * tl.exp(top - higher) + tl.exp(z - higher)
        column = tl.where(z > top, at, column)
        top = higher
    best = tl.max(top, 0)
    tl.store(confidence + row, 1.0 / tl.sum(mass * tl.exp(top - best), 0))
    tl.store(prediction + row, tl.min(tl.where(top == best, column, V), 0).to(tl.int64))


def triton_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and prediction of contiguous logits [..., V] with finite maxima."""
    V = logits.shape[-1]
    prediction = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    confidence = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    _confidence[(prediction.numel(),)](
        logits, prediction, confidence, V, V, BLOCK=4096, num_warps=8
    )
    return confidence, prediction
