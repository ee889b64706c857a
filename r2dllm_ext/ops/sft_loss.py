# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from .._checks import choice, flag, integer, is_tensor, no_tangent, number, same_device, sized
from .row_stats import STATE_SIZE, check_rows, check_temperature, stats_dtype

ENTROPY_GATES = ("correct", "all")  # the order of EntropyGate in csrc/rules/sft_loss.h


def sft_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    normalizer: float | torch.Tensor | None = None,
    entropy_weight: float = 0.0,
    entropy_temperature: float = 1.0,
    entropy_gate: str = "correct",
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """The fine-tuning loss of masked-diffusion models, from logits.

    loss = sum(weight * nll) / normalizer + entropy_weight * mean entropy over the gated rows, where
    nll = -log softmax(logits)[target]. The second term is the certainty loss of dParallel (there
    with gate "correct", temperature 0.5 and weight 1 or 2).

    Args:
        logits: [N, V] or [B, L, V] float32, bfloat16 or float16 (float64 on the CPU), V >= 1; last
            dimension of stride 1, any other strides, any alignment.
        targets: [N] or [B, L] int64, ids in [0, V) or `ignore_index`: such a row is not read, and
            has a gradient of exactly 0 whatever it holds.
        weight: of the shape of `targets`, float32, default 1; a constant.
        normalizer: a number > 0 or a 0-dim tensor on the device of the logits, a constant: with
            gradient accumulation or data parallelism the count over all parts of the batch, which
            makes the sum of their gradients exact. Default: the number of rows with a target.
        entropy_weight: finite; 0 skips the term and its cost.
        entropy_temperature: the entropy is that of softmax(logits / entropy_temperature); in
            [1e-6, 1e6].
        entropy_gate: "correct" takes the mean over rows whose argmax (lowest id on ties) is the
            target, "all" over all rows with a target. The gate is a constant of the gradient.
        ignore_index: marks rows without a target.
        inplace_backward: the backward overwrites the logits with their gradient, and so allocates
            nothing of size V. The logits have to be the output of an operation that does not need
            them again (a linear layer): autograd raises if one does, if they are modified between
            forward and backward, and on a second backward. Under torch.compile they have to be
            computed inside the graph.

    Returns:
        0-dim float32 (float64 for float64 logits). 0, with a gradient of 0, if no row has a target;
        NaN if a row with a target has no finite maximum.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes; so does a target
            outside [0, V) on the CPU. On CUDA it makes the loss NaN.
        RuntimeError: on a double backward, or one over logits that are no longer there.
        NotImplementedError: in forward-mode differentiation.

    Arithmetic is float32 whatever the dtype of the logits (float64 for float64); rows are added up
    in their order: the same bits with any number of threads. No host synchronisation on CUDA. The
    forward keeps eight floats per row, and the logits themselves.

    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss = sft_loss(logits, torch.tensor([1, -100])); loss.backward()
    >>> loss.detach(), logits.grad[0]
    (tensor(1.3863), tensor([ 0.2500, -0.7500,  0.2500,  0.2500]))
    """
    op = "sft_loss"
    is_tensor(op, logits=logits, targets=targets)
    is_tensor(op, weight=weight, optional=True)
    no_tangent(op, logits=logits)
    return torch.ops.r2dllm.sft_loss(
        logits,
        targets,
        weight,
        normalizer_tensor(op, normalizer, logits),
        number(op, "entropy_weight", entropy_weight),
        number(op, "entropy_temperature", entropy_temperature),
        gate_index(op, entropy_gate),
        integer(op, "ignore_index", ignore_index),
        flag(op, "inplace_backward", inplace_backward),
    )[0]


def normalizer_tensor(
    op: str, normalizer: float | torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    """A number as a 0-dim tensor, made on the device: no copy from the host."""
    if normalizer is None or isinstance(normalizer, torch.Tensor):
        return normalizer
    value = number(op, "normalizer", normalizer, 0, open_low=True)
    return torch.full((), value, dtype=torch.float64, device=like.device)


def check_constants(
    op: str, targets: torch.Tensor, weight: torch.Tensor | None, normalizer: torch.Tensor | None
) -> None:
    """What fake kernels refuse, as the ops do."""
    same_device(op, targets=targets, weight=weight, normalizer=normalizer)
    if weight is not None:
        sized(op, "weight", weight, "of targets", targets.shape, torch.float32)
    if normalizer is not None:
        sized(op, "normalizer", normalizer, "[]", ())
        if normalizer.is_complex() or normalizer.dtype == torch.bool:
            raise TypeError(f"{op}: normalizer takes a number, got dtype {normalizer.dtype}")


def gate_index(op: str, gate: str) -> int:
    return ENTROPY_GATES.index(choice(op, "entropy_gate", gate, ENTROPY_GATES))


@torch.library.register_fake("r2dllm::sft_loss")
def _(
    logits, targets, weight=None, normalizer=None, entropy_weight=0.0, entropy_temperature=1.0, *_
):
    check_rows("sft_loss", logits, targets)
    check_constants("sft_loss", targets, weight, normalizer)
    check_temperature("sft_loss", "entropy_temperature", entropy_temperature)
    rows, dtype = logits.shape[:-1], stats_dtype(logits)
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty((*rows, STATE_SIZE), dtype=torch.float64),
    )


@torch.library.register_fake("r2dllm::sft_reduce")
def _(
    nll,
    entropy,
    prediction,
    targets,
    weight=None,
    normalizer=None,
    entropy_weight=0.0,
    entropy_gate=0,
    ignore_index=-100,
    op="sft_reduce",
):
    same_device("sft_reduce", nll=nll, targets=targets)
    check_constants(op, targets, weight, normalizer)
    return nll.new_empty(()), nll.new_empty(nll.shape), nll.new_empty(nll.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, _, _, _, ctx.temperature, _, ctx.ignore_index, ctx.inplace = inputs
    _, *rows = output
    ctx.mark_non_differentiable(*rows)
    ctx.save_for_backward(logits, targets, *rows)


def _backward(ctx, d_loss, *_):
    try:
        logits, targets, d_nll, d_entropy, state = ctx.saved_tensors
    except RuntimeError as error:
        if not ctx.inplace:
            raise
        raise RuntimeError(
            "sft_loss: the backward needs the logits of the forward, but they were modified since, "
            "or overwritten by an earlier backward (inplace_backward=True)"
        ) from error
    rows = (targets, state, d_nll * d_loss, d_entropy * d_loss, ctx.temperature, ctx.ignore_index)
    if not ctx.inplace:
        gradient = torch.ops.r2dllm.row_stats_backward(logits, *rows)
    elif torch.is_grad_enabled():
        raise RuntimeError("sft_loss: inplace_backward=True does not take create_graph=True")
    else:
        torch.ops.r2dllm.row_stats_backward_(logits, *rows)
        gradient = logits.detach()
    return (gradient, *[None] * 8)


torch.library.register_autograd("r2dllm::sft_loss", _backward, setup_context=_setup_context)
