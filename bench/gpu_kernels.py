# SPDX-License-Identifier: Apache-2.0
"""Kernels of others that a step on a GPU is compared with: Triton, FlashInfer."""

from __future__ import annotations

from collections.abc import Callable

from report import optional
from torch import Tensor

Confidence = Callable[[Tensor], tuple[Tensor, Tensor]]


def flashinfer_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    from flashinfer.sampling import softmax

    return softmax(logits.view(-1, logits.shape[-1])).view(logits.shape).max(-1)


def other_ways(device: str) -> tuple[dict[str, Confidence], dict[str, str]]:
    """Confidence and prediction by the GPU packages that are here; why the others are left out."""
    ways: dict[str, Confidence] = {}
    skipped: dict[str, str] = {}
    for name in ("triton", "flashinfer") if device == "cuda" else ():
        if reason := optional(name):
            skipped[name] = reason
        elif name == "triton":
            from triton_confidence import triton_confidence

            ways[name] = triton_confidence
        else:
            ways[name] = flashinfer_confidence
    return ways, skipped
