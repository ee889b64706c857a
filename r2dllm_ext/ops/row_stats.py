# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import NamedTuple

import torch

from .._checks import integer, is_tensor, logits_tensor, no_tangent, number, same_device, sized

STATE_SIZE = 6  # floats that a row keeps for its backward (RowState in csrc/rules/row_stats.h)


class RowStats(NamedTuple):
    """What is known of each row after one read of its logits; see `row_stats`."""

    nll: torch.Tensor
    entropy: torch.Tensor
    confidence: torch.Tensor
    prediction: torch.Tensor


def row_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> RowStats:
    """Loss, entropy, confidence and prediction of rows that have a target: one read of the logits.

    The base of losses beyond `sft_loss`: whatever is computed from `nll` and `entropy`, one value
    per row, goes back to the logits through one hand-written pass.

    Args:
        logits: [N, V] or [B, L, V] float32, bfloat16 or float16 (float64 on the CPU), V >= 1; last
            dimension of stride 1, any other strides, any alignment.
        targets: [N] or [B, L] int64, ids in [0, V) or `ignore_index`: such a row is not read.
        temperature: of the entropy alone, in [1e-6, 1e6].
        ignore_index: marks rows without a target.

    Returns, of the shape of `targets`:
        nll: -log softmax(logits)[target] in nats, float32 (float64 for float64 logits).
        entropy: of softmax(logits / temperature) in nats, of the same dtype.
        confidence: float32, the greatest probability; no gradient.
        prediction: int64, the argmax, lowest id on ties.
        Rows without a target have 0, 0, 0 and -1, and a gradient of exactly 0. A row whose maximum
        is NaN or +inf, or all of whose logits are -inf, has NaN, NaN, NaN and -1.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes; so does a target
            outside [0, V) on the CPU. On CUDA it makes the row's nll NaN.
        RuntimeError: on a double backward.

    Arithmetic is float32 whatever the dtype of the logits (float64 for float64). A row has the same
    bits alone, in any batch and with any number of threads. No host synchronisation on CUDA. Six
    floats per row are kept for the backward, and the logits themselves.

    >>> stats = row_stats(torch.zeros(2, 4), torch.tensor([1, -100]))
    >>> stats.nll, stats.prediction
    (tensor([1.3863, 0.0000]), tensor([ 0, -1]))
    """
    op = "row_stats"
    is_tensor(op, logits=logits, targets=targets)
    no_tangent(op, logits=logits)
    temperature = number(op, "temperature", temperature)
    ignore_index = integer(op, "ignore_index", ignore_index)
    return RowStats(*torch.ops.r2dllm.row_stats(logits, targets, temperature, ignore_index)[:4])


def check_rows(op: str, logits: torch.Tensor, targets: torch.Tensor) -> None:
    """What fake kernels refuse, as the ops do."""
    logits_tensor(op, logits, or_rows=True)
    shape, rows = "of the rows of logits", logits.shape[:-1]
    sized(op, "targets", targets, shape, rows, torch.int64)
    same_device(op, logits=logits, targets=targets)


def check_temperature(op: str, name: str, temperature: float) -> None:
    number(op, name, temperature, 1e-6, 1e6)


def stats_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("r2dllm::row_stats")
def _(logits, targets, temperature=1.0, ignore_index=-100, with_entropy=True):
    check_rows("row_stats", logits, targets)
    check_temperature("row_stats", "temperature", temperature)
    rows = logits.shape[:-1]
    return (
        logits.new_empty(rows, dtype=stats_dtype(logits)),
        logits.new_empty(rows, dtype=stats_dtype(logits)),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty((*rows, STATE_SIZE), dtype=torch.float64),
    )


@torch.library.register_fake("r2dllm::row_stats_backward")
def _(logits, *_):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("r2dllm::row_stats_backward_")
def _(*_):
    return None


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.temperature, ctx.ignore_index, _ = inputs
    _, _, confidence, prediction, state = output
    ctx.mark_non_differentiable(confidence, prediction, state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, state)


def _backward(ctx, d_nll, d_entropy, *_):
    logits, targets, state = ctx.saved_tensors
    if d_nll is None and d_entropy is None:
        return (None,) * 5
    if d_nll is None:
        d_nll = torch.zeros_like(d_entropy)
    gradient = torch.ops.r2dllm.row_stats_backward(
        logits, targets, state, d_nll, d_entropy, ctx.temperature, ctx.ignore_index
    )
    return (gradient, *[None] * 4)


def _no_double_backward(ctx, *_):
    raise RuntimeError("r2dllm: the gradient of row_stats and sft_loss has no derivative")


torch.library.register_autograd("r2dllm::row_stats", _backward, setup_context=_setup_context)
torch.library.register_autograd("r2dllm::row_stats_backward", _no_double_backward)
