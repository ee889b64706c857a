# SPDX-License-Identifier: Apache-2.0
"""Windowed confidence pooling: neighbours that are confident together."""

import math

import torch
from torch import Tensor


def float32(value: float) -> float:
    """`value` rounded to float32, the precision in which thresholds are compared."""
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def window_pool(
    confidence: Tensor,
    is_masked: Tensor,
    *,
    window: int,
    min_confidence: float,
    max_unmasked: int | None = None,
    mean_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Masked cells that lie in a window whose masked cells are confident on average.

    Windows do not see each other's verdicts. A window that holds a masked confidence which is not
    finite is skipped; so is one with more than `max_unmasked` committed cells.

    Args:
        confidence: [B, L] floating point.
        is_masked: [B, L] bool.
        window: cells of a window, >= 1. Longer than L marks nothing.
        min_confidence: the least mean (inclusive), rounded to float32.
        max_unmasked: None = no limit.
        mean_dtype: the mean is rounded to float32 and then to this dtype unless it is float64
            (the op has no such argument; `decode_step` needs it for confidence_dtype="logits").

    Returns:
        [B, L] bool, a subset of `is_masked`.
    """
    selected = torch.zeros_like(is_masked)
    least = float32(min_confidence)
    rows, length = is_masked.shape
    for b in range(rows):
        p, masked = confidence[b].tolist(), is_masked[b].tolist()
        for start in range(length - window + 1):
            cells = [i for i in range(start, start + window) if masked[i]]
            unmasked = window - len(cells)
            if not cells or (max_unmasked is not None and unmasked > max_unmasked):
                continue
            if not all(math.isfinite(p[i]) for i in cells):
                continue
            mean = sum(p[i] for i in cells) / len(cells)  # float64, in the order of the cells
            if mean_dtype != torch.float64:
                mean = torch.tensor(mean, dtype=torch.float32, device="cpu").to(mean_dtype).item()
            if mean >= least:
                selected[b, cells] = True
    return selected
