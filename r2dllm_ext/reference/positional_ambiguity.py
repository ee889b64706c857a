# SPDX-License-Identifier: Apache-2.0
"""Positional ambiguity: neighbours that compete for one token."""

import math
from itertools import groupby

import torch
from torch import Tensor

from ..philox import Draw
from .random import uniform
from .window_pool import float32


def runs(prediction: list[int], belongs: list[bool]) -> list[range]:
    """Maximal runs of adjacent cells that belong and share one prediction."""
    found, start = [], 0
    for (inside, _), group in groupby(zip(belongs, prediction, strict=True)):
        length = len(list(group))
        if inside:
            found.append(range(start, start + length))
        start += length
    return found


def positional_ambiguity(
    prediction: Tensor,
    confidence: Tensor,
    is_masked: Tensor,
    *,
    min_confidence: float,
    min_run: int = 2,
    mode: str = "confidence",
    seed: int | Tensor = 0,
    row: Tensor | None = None,
    step: int | Tensor = 0,
) -> Tensor:
    """One cell of every confident run of equal predictions.

    Args:
        prediction: [B, L] int64; a cell below 0 belongs to no run.
        confidence: [B, L] floating point; a cell that is not finite belongs to no run.
        is_masked: [B, L] bool.
        min_confidence: the run's best confidence must exceed it (strictly), rounded to float32.
        min_run: shortest run that counts.
        mode: "confidence" = the best cell, leftmost on ties; "mid" = cell len // 2 of the run;
            "random" = cell floor(u * len), u a uniform number of (seed, row, step, first cell).
        seed, row, step: identity of the random numbers; row [B] int64, None = 0 .. B - 1; seed
            and step an integer or [B] int64.

    Returns:
        [B, L] bool, a subset of `is_masked`.
    """
    chosen = torch.zeros_like(is_masked)
    least = float32(min_confidence)
    rows = is_masked.shape[0]
    row_ids = list(range(rows)) if row is None else row.tolist()
    steps, seeds = (x.tolist() if isinstance(x, Tensor) else [x] * rows for x in (step, seed))
    for b in range(rows):
        p, ids, masked = confidence[b].tolist(), prediction[b].tolist(), is_masked[b].tolist()
        belongs = [masked[i] and ids[i] >= 0 and math.isfinite(p[i]) for i in range(len(p))]
        for run in runs(ids, belongs):
            best = max(run, key=lambda i: p[i])  # the first of equals
            if len(run) < min_run or not p[best] > least:
                continue
            if mode == "confidence":
                chosen[b, best] = True
            elif mode == "mid":
                chosen[b, run[len(run) // 2]] = True
            else:
                u = uniform(seeds[b], row_ids[b], steps[b], run[0], Draw.RUN)
                chosen[b, run[int(u * len(run))]] = True
    return chosen
