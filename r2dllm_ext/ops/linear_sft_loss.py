# SPDX-License-Identifier: Apache-2.0
"""linear_sft_loss: matrix products of torch and the row kernels of csrc, one chunk at a time.

Registered as an op of its own: to the compiler it is one node, whatever the number of chunks and of
rows that carry loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import (
    flag,
    integer,
    is_tensor,
    no_tangent,
    number,
    refuse,
    same_device,
    sized,
    tensor,
)
from .row_stats import check_temperature
from .sft_loss import check_constants, gate_index, normalizer_tensor

_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}  # of logits; enough rows for an efficient product


def linear_sft_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    rows: Tensor | None = None,
    max_rows: int | None = None,
    normalizer: float | Tensor | None = None,
    entropy_weight: float = 0.0,
    entropy_temperature: float = 1.0,
    entropy_gate: str = "correct",
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> Tensor:
    """`sft_loss` of the logits hidden @ lm_head_weight^T + bias, which never exist as a whole.

    Rows without a target are left out before the first product. Of the others, `chunk_rows` at a
    time have logits, in one buffer that their gradient overwrites. The gradients of hidden states
    and head are computed along with the loss, so that each row costs three products. With
    entropy_gate "correct" and entropy_weight != 0 they can't be: the backward then computes the
    logits once more, as every second backward does. Nor with float16, whose range is that of the
    gradients of a scaled loss: the factor has to be known before anything is rounded. And the
    head's gradient in 16 bits on the CPU computes them once more if there is more than one chunk:
    some columns at a time, instead of a float32 sum that would be twice as large as the head.

    Args:
        hidden: [N, H] or [B, L, H] float32, bfloat16 or float16 (float64 on the CPU).
        lm_head_weight: [V, H] of the same dtype. Frozen, it costs no gradient.
        targets, weight: [N] or [B, L], as in `sft_loss`.
        bias: [V] of the same dtype.
        chunk_rows: default as many as 64 MiB of logits hold, 512 MiB on CUDA.
        rows: [R] int64, distinct positions of `targets` (flattened); all others count as without a
            target. Default: where `targets` is not ignore_index, for which CUDA has to synchronise.
        max_rows: a bound on the number of rows with a target, in place of `rows`: that many rows
            are computed, without a synchronisation.
        normalizer, entropy_weight, entropy_temperature, entropy_gate, ignore_index: as in
            `sft_loss`.
        inplace_backward: no effect, for the sake of one signature: there are no logits to keep.

    Returns:
        0-dim float32 (float64 for float64).

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes. A target outside
            [0, V), or more rows with a target than max_rows: on the CPU; on CUDA they make the loss
            NaN.
        RuntimeError: on a double backward.
        NotImplementedError: in forward-mode differentiation.

    Under autocast the products run in its dtype. The head's gradient is added up in float32
    (float64 for float64) over all chunks and rounded once. A module sharded by FSDP has to be
    unsharded while this reads its weight: call it from that module's forward.

    >>> hidden, head = torch.ones(2, 3, requires_grad=True), torch.zeros(4, 3)
    >>> loss = linear_sft_loss(hidden, head, torch.tensor([1, -100])); loss.backward()
    >>> loss.detach(), hidden.grad.shape
    (tensor(1.3863), torch.Size([2, 3]))
    """
    op = "linear_sft_loss"
    is_tensor(op, hidden=hidden, lm_head_weight=lm_head_weight, targets=targets)
    is_tensor(op, weight=weight, bias=bias, rows=rows, optional=True)
    flag(op, "inplace_backward", inplace_backward)
    no_tangent(op, hidden=hidden, lm_head_weight=lm_head_weight, bias=bias)
    if hidden.dim() not in (2, 3) or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: hidden takes shape [N, H] or [B, L, H] and targets [N] or [B, L], got "
            f"{list(hidden.shape)} and {list(targets.shape)}"
        )
    if weight is not None:
        sized(op, "weight", weight, "of targets", targets.shape)
    grad = torch.is_grad_enabled()
    return torch.ops.r2dllm.linear_sft_loss(
        hidden.flatten(0, -2),
        lm_head_weight,
        targets.flatten(),
        None if weight is None else weight.flatten(),
        bias,
        normalizer_tensor(op, normalizer, hidden),
        rows,
        integer(op, "max_rows", max_rows, 0, optional=True),
        integer(op, "chunk_rows", chunk_rows, 1, optional=True),
        _product_dtype(hidden),
        number(op, "entropy_weight", entropy_weight),
        number(op, "entropy_temperature", entropy_temperature),
        gate_index(op, entropy_gate),
        integer(op, "ignore_index", ignore_index),
        [grad and t is not None and t.requires_grad for t in (hidden, lm_head_weight, bias)],
    )[0]


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return hidden.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- rows and chunks -------------------------------------------------------------------------


def _check(hidden, head, targets, bias, rows, max_rows, dtype, temperature) -> None:
    """All that does not lie in a tensor."""
    op, vocab = "linear_sft_loss", head.shape[0]
    wide = (torch.float64,) if hidden.is_cpu else ()
    tensor(op, "hidden", hidden, "[N, H]", (torch.float32, torch.bfloat16, torch.float16, *wide))
    same_device(op, hidden=hidden, lm_head_weight=head, bias=bias)
    alike = hidden.dtype if dtype == hidden.dtype else None  # autocast brings them together
    sized(op, "lm_head_weight", head, "[V, H]", (max(1, vocab), hidden.shape[1]), alike)
    if bias is not None:
        sized(op, "bias", bias, "[V]", (vocab,), alike)
    tensor(op, "targets", targets, "[N]", torch.int64)
    check_temperature(op, "entropy_temperature", temperature)
    if rows is not None:
        if max_rows is not None:
            refuse(ValueError, op, "max_rows", "None beside rows", max_rows)
        if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != hidden.device:
            got = f"{rows.dtype} {list(rows.shape)} on {rows.device}"
            raise ValueError(f"{op}: rows takes [R] torch.int64 on {hidden.device}, got {got}")


def _check_values(targets, vocab: int, rows, max_rows, ignore_index) -> None:
    """On the CPU, where they can be read."""
    op = "linear_sft_loss"
    if rows is not None and rows.numel():
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= len(targets):
            takes, got = f"positions in [0, {len(targets)})", f"{low} .. {high}"
            raise ValueError(f"{op}: rows takes {takes}, got {got}")
        if rows.unique().numel() != rows.numel():
            raise ValueError(f"{op}: rows takes distinct positions, got some twice")
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab))]
    if wrong.numel():
        takes = f"ids in [0, V = {vocab}) or ignore_index = {ignore_index}"
        raise ValueError(f"{op}: targets takes {takes}, got {int(wrong[0])}")
    count = int((targets != ignore_index).sum())
    if max_rows is not None and count > max_rows:
        takes = "at least the number of rows with a target"
        raise ValueError(f"{op}: max_rows takes {takes}, got {max_rows}")


def _computed_rows(
    targets: Tensor, rows: Tensor | None, max_rows: int | None, ignore_index: int
) -> Tensor:
    """[R] positions of the rows that are computed, ascending unless they are given."""
    if rows is not None:
        return rows
    if max_rows is None:
        return (targets != ignore_index).nonzero().squeeze(1)
    # Those with a target come first; what is then too many has none, and a loss of 0.
    return (targets == ignore_index).byte().argsort(stable=True)[:max_rows].sort().values


def _new_buffer(head: Tensor, rows: int, chunk_rows: int | None) -> Tensor:
    """[n, V] for the logits of a chunk; the chunks of `rows` rows are about equal."""
    vocab = head.shape[0]
    if chunk_rows is None:
        chunk_rows = max(1, _CHUNK_BYTES[head.device.type] // (vocab * head.dtype.itemsize))
    chunks = max(1, -(-rows // chunk_rows))
    return head.new_empty(-(-rows // chunks), vocab)


def _chunks(
    hidden: Tensor, head: Tensor, bias: Tensor | None, index: Tensor, buffer: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(positions, their hidden states, their logits in the buffer)"""
    if index.numel() == 0:
        return
    for positions in index.tensor_split(-(-index.numel() // len(buffer))):
        states = hidden.index_select(0, positions).to(head.dtype)
        yield positions, states, _product(states, head, bias, buffer[: len(positions)])


def _product(states: Tensor, head: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(states, head.t(), out=out)
    return torch.addmm(bias, states, head.t(), out=out)


class _Rows(NamedTuple):
    """What the gradient of some rows' logits takes, beside the logits."""

    targets: Tensor
    state: Tensor  # of row_stats
    d_nll: Tensor
    d_entropy: Tensor
    temperature: float
    ignore_index: int

    def differentiate_(self, logits: Tensor, first_id: int | None = None) -> None:
        """Overwrites logits with their gradient; these are all columns, or those from first_id."""
        torch.ops.r2dllm.row_stats_backward_(logits, *self, first_id)


class _Gradients:
    """d hidden, d head and d bias; those that are not needed have no elements."""

    def __init__(self, hidden: Tensor, head: Tensor, dtype: torch.dtype, needs: list[bool]):
        self.needs, wide = needs, _wide(dtype)
        vocab, width = head.shape
        # No product on the CPU reads two bytes and adds to four.
        self._in_parts = head.device.type != "cpu" or dtype == wide
        self.hidden = torch.zeros_like(hidden) if needs[0] else hidden.new_empty(0)
        shape = (vocab, width) if needs[1] else (0,)
        self.head = head.new_empty(shape, dtype=wide if self._in_parts else dtype)
        self.bias = head.new_zeros(vocab if needs[2] else 0, dtype=wide)
        self._written = False
        self._rows: list[_Rows] = []

    def add(self, positions, states, logits, head, rows: _Rows, is_only: bool) -> None:
        """A chunk; its logits are overwritten."""
        rows.differentiate_(logits)
        if self.needs[0]:
            d_states = torch.mm(logits, head).to(self.hidden.dtype)
            self.hidden.index_copy_(0, positions, d_states)
        if self.needs[2]:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        if not self.needs[1]:
            return
        if not self._in_parts and not is_only:
            self._rows.append(rows)
        elif logits.dtype == self.head.dtype:
            torch.addmm(self.head, logits.t(), states, beta=int(self._written), out=self.head)
        else:
            aten = torch.ops.aten.addmm.dtype_out
            wide, keep = self.head.dtype, int(self._written)
            aten(self.head, logits.t(), states, wide, beta=keep, out=self.head)
        self._written = True

    def finished(self, hidden, head, bias, index, buffer) -> tuple[Tensor, Tensor, Tensor]:
        """After the last chunk; what the buffer holds is lost."""
        if not self._written:
            self.head.zero_()
        if self._rows:
            self._head_by_columns(hidden, head, bias, index, buffer.flatten())
        return self.hidden, self.head, self.bias

    def _head_by_columns(self, hidden, head, bias, index, memory) -> None:
        """All rows at once, as many columns as the memory holds."""
        rows = self._rows[0]._replace(
            targets=torch.cat([chunk.targets for chunk in self._rows]),
            state=torch.cat([chunk.state for chunk in self._rows]),
            d_nll=torch.cat([chunk.d_nll for chunk in self._rows]),
            d_entropy=torch.cat([chunk.d_entropy for chunk in self._rows]),
        )
        states = hidden.index_select(0, index).to(head.dtype)
        vocab, n = len(head), len(index)
        if len(memory) < n:
            memory = head.new_empty(n)
        columns = len(memory) // n
        columns -= columns % 64 if columns > 64 else 0
        for first in range(0, vocab, columns):
            part = slice(first, min(first + columns, vocab))
            size = part.stop - first
            part_bias = None if bias is None else bias[part]
            logits = memory[: n * size].view(n, size)
            rows.differentiate_(_product(states, head[part], part_bias, logits), first)
            torch.mm(logits.t(), states, out=self.head[part])


# ---- the op ----------------------------------------------------------------------------------


def _with_the_loss(
    needs: list[bool],
    entropy_weight: float,
    entropy_gate: int,
    hidden_dtype: torch.dtype,
    dtype: torch.dtype,
) -> bool:
    """Are the gradients computed in the forward?

    Its derivatives are known before the logits, unless the mean is over the rows that turn out to
    be correct. The upstream factor is not; it may follow unless float16 is where something is kept:
    d logits of one row in a thousand of 65,536 ids are below its least number, and a loss scale
    that comes later cannot bring them back.
    """
    known = entropy_weight == 0 or entropy_gate == 1
    return any(needs) and known and torch.float16 not in (hidden_dtype, dtype)


@torch.library.custom_op("r2dllm::linear_sft_loss", mutates_args=())
def _linear_sft_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalizer: Tensor | None,
    rows: Tensor | None,
    max_rows: int | None,
    chunk_rows: int | None,
    dtype: torch.dtype,
    entropy_weight: float,
    entropy_temperature: float,
    entropy_gate: int,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(hidden, head, targets, bias, rows, max_rows, dtype, entropy_temperature)
    if hidden.is_cpu:
        _check_values(targets, len(head), rows, max_rows, ignore_index)
    head_read, bias_read = head.to(dtype), None if bias is None else bias.to(dtype)
    index = _computed_rows(targets, rows, max_rows, ignore_index)
    counted = torch.full_like(targets, ignore_index).index_copy_(0, index, targets[index])
    if max_rows is not None and not targets.is_cpu:
        count = (targets != ignore_index).sum()
        poisoned = torch.where(count > max_rows, torch.nan, 1.0)
        normalizer = (count if normalizer is None else normalizer) * poisoned
    constants = (weight, normalizer, entropy_weight, entropy_gate, ignore_index, "linear_sft_loss")

    def reduced(nll: Tensor, entropy: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.r2dllm.sft_reduce(nll, entropy, prediction, counted, *constants)

    nll = hidden.new_zeros(len(targets), dtype=_wide(dtype))
    entropy, prediction = torch.zeros_like(nll), torch.full_like(targets, -1)
    # The derivatives, if they do not depend on what the logits are; and a check of the arguments.
    _, d_nll, d_entropy = reduced(nll, entropy, counted)
    with_the_loss = _with_the_loss(needs, entropy_weight, entropy_gate, hidden.dtype, dtype)
    gradients = _Gradients(hidden, head, dtype, needs if with_the_loss else [False] * 3)
    buffer = _new_buffer(head_read, len(index), chunk_rows)
    for positions, states, logits in _chunks(hidden, head_read, bias_read, index, buffer):
        chosen = counted[positions]
        *stats, state = torch.ops.r2dllm.row_stats(
            logits, chosen, entropy_temperature, ignore_index, entropy_weight != 0
        )
        for whole, part in zip((nll, entropy, prediction), (*stats[:2], stats[3]), strict=True):
            whole.index_copy_(0, positions, part)
        if with_the_loss:
            own = (chosen, state, d_nll[positions], d_entropy[positions])
            rows_here = _Rows(*own, entropy_temperature, ignore_index)
            is_only = len(positions) == len(index)
            gradients.add(positions, states, logits, head_read, rows_here, is_only)
    computed = gradients.finished(hidden, head_read, bias_read, index, buffer)
    return (*reduced(nll, entropy, prediction), *computed)


@torch.library.custom_op("r2dllm::linear_sft_loss_backward", mutates_args=())
def _linear_sft_loss_backward(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    d_nll: Tensor,
    d_entropy: Tensor,
    rows: Tensor | None,
    max_rows: int | None,
    chunk_rows: int | None,
    dtype: torch.dtype,
    entropy_temperature: float,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients from the logits, computed once more."""
    head_read, bias_read = head.to(dtype), None if bias is None else bias.to(dtype)
    index = _computed_rows(targets, rows, max_rows, ignore_index)
    gradients = _Gradients(hidden, head, dtype, needs)
    buffer = _new_buffer(head_read, len(index), chunk_rows)
    for positions, states, logits in _chunks(hidden, head_read, bias_read, index, buffer):
        chosen = targets[positions]
        state = torch.ops.r2dllm.row_stats(logits, chosen, entropy_temperature, ignore_index)[-1]
        rows_here = _Rows(
            chosen, state, d_nll[positions], d_entropy[positions], entropy_temperature, ignore_index
        )
        gradients.add(positions, states, logits, head_read, rows_here, len(positions) == len(index))
    return gradients.finished(hidden, head_read, bias_read, index, buffer)


@_linear_sft_loss.register_fake
def _(
    hidden,
    head,
    targets,
    weight,
    bias,
    normalizer,
    rows,
    max_rows,
    chunk_rows,
    dtype,
    entropy_weight,
    entropy_temperature,
    entropy_gate,
    ignore_index,
    needs,
):
    same_device("linear_sft_loss", hidden=hidden, targets=targets)
    _check(hidden, head, targets, bias, rows, max_rows, dtype, entropy_temperature)
    check_constants("linear_sft_loss", targets, weight, normalizer)
    row = hidden.new_empty(targets.shape, dtype=_wide(dtype))
    with_the_loss = _with_the_loss(needs, entropy_weight, entropy_gate, hidden.dtype, dtype)
    computed = needs if with_the_loss else [False] * 3
    return row.new_empty(()), row, torch.empty_like(row), *_empty(hidden, head, dtype, computed)


@_linear_sft_loss_backward.register_fake
def _(hidden, head, *others):
    dtype, _temperature, _ignore_index, needs = others[-4:]
    return _empty(hidden, head, dtype, needs)


def _empty(hidden, head, dtype, needs) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _Gradients(hidden, head, dtype, needs)
    return gradients.hidden, gradients.head, gradients.bias


def _setup_context(ctx, inputs, output):
    hidden, head, targets, _, bias, _, rows, *ctx.options, ctx.needs = inputs
    _, d_nll, d_entropy, *gradients = output
    ctx.mark_non_differentiable(d_nll, d_entropy, *gradients)
    ctx.set_materialize_grads(False)  # else zeros as large as the head, for an output without one
    ctx.dtypes = hidden.dtype, head.dtype, None if bias is None else bias.dtype
    _, _, dtype, weight, _, gate, _ = ctx.options
    with_the_loss = _with_the_loss(ctx.needs, weight, gate, hidden.dtype, dtype)
    ctx.gradients = gradients if with_the_loss else None
    ctx.save_for_backward(hidden, head, targets, bias, d_nll, d_entropy, rows)


def _backward(ctx, d_loss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_sft_loss: takes no create_graph=True: no double backward")
    if d_loss is None:
        return (None,) * 15
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is not None:
        # They may be as large as the head, and are used up; a second backward computes them again.
        # While a graph is traced their memory is not ours to reuse.
        gradients = [g.mul_(d_loss) if type(g) is Tensor else g * d_loss for g in gradients]
    else:
        *tensors, d_nll, d_entropy, rows = ctx.saved_tensors
        max_rows, chunk_rows, dtype, _, temperature, _, ignore_index = ctx.options
        which = (rows, max_rows, chunk_rows, dtype, temperature, ignore_index)
        gradients = torch.ops.r2dllm.linear_sft_loss_backward(
            *tensors, d_nll * d_loss, d_entropy * d_loss, *which, ctx.needs
        )
    d_hidden, d_head, d_bias = (
        gradient.to(dtype) if needed else None
        for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
    )
    return d_hidden, d_head, None, None, d_bias, *(None,) * 10


_linear_sft_loss.register_autograd(_backward, setup_context=_setup_context)
