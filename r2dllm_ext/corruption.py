# SPDX-License-Identifier: Apache-2.0
"""`corrupt`: clean sequences to masked views, targets and weights for fine-tuning."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import choice, flag, integer, number, refuse, tensor
from .philox import Draw, uniform

MODES = ("block", "iid", "trajectory", "frontier")
WEIGHTINGS = ("elbo", "mean", "flat")
IGNORE_INDEX = -100
_LEAST_RATIO = 1e-3  # LLaDA's eps: no cell weighs more than 1000


class Corruption(NamedTuple):
    """Result of `corrupt`: one view, or two that complement each other (C)."""

    views: Tensor  # [C, B, T] int64, what the model is given
    targets: Tensor  # [C, B, T] int64, the token to learn, IGNORE_INDEX = -100 elsewhere
    weights: Tensor  # [C, B, T] float32, of the target's negative log-likelihood; 0 elsewhere


def corrupt(
    tokens: Tensor,
    answer_mask: Tensor,
    *,
    mask_id: int,
    block_length: int,
    mode: str,
    ratio: float | tuple[float, float] | Tensor,
    seed: int,
    complementary: bool,
    commit_step: Tensor | None = None,
    serial: Tensor | None = None,
    weighting: str = "elbo",
    row: Tensor | None = None,
    step: int = 0,
) -> Corruption:
    """Mask answers the way that decoding meets them.

    The answer of a row is cut into blocks of `block_length` cells, the last of which may be
    shorter. What is not answer is never masked.

    Args:
        tokens: [B, T] int64, clean sequences.
        answer_mask: [B, T] bool, the cells that may be masked. They need not be adjacent, so
            padding on either side changes nothing.
        mask_id: the token that hides a cell.
        block_length: L >= 1, as in decoding (release: 32).
        mode: "block": one block, drawn evenly, is active; its cells are masked with probability
            `ratio`, the blocks before it are clean, those behind it all masked. "iid": every cell
            of the answer is masked with that probability (LLaDA). "trajectory": as "block", but the
            active block is in the state in which a recorded decode left it: the cells of its
            latest commit steps are masked, no fewer than `ratio` of them. "frontier": as "block",
            but of the `serial` cells of the active block all are masked from a place on that each
            row draws, and of the others each with probability `ratio` squared: what a decoder
            meets after the easy cells, where what is left has an order.
        ratio: t, a number in [0, 1]; or (low, high), from which each row draws its own; or [B]
            float, one a row.
        seed: a 64-bit integer.
        complementary: also return the view in which exactly the other cells of the active block
            (of the answer, with "iid") are masked, so that each of them is learned once.
        commit_step: [B, T] int64, "trajectory" only: the step that committed a cell
            (`Trace.commit_step`); -1, never committed, counts as the last.
        serial: [B, T] bool, "frontier" only: cells that decoding decides late and in order.
        weighting: "elbo" weighs the masked cells of a view by 1 / t and those of its complement by
            1 / (1 - t), t never below 1e-3 (LLaDA): each view's sum of weighted losses is an
            unbiased estimate of that over all its cells. "mean" divides by the number of masked
            cells in the row of the view (dParallel), "flat" weighs all by 1. Where the cells are
            not drawn one by one ("trajectory", "frontier"), t is the share that is masked.
        row: [B] int64, identity of the random numbers beside `seed` and `step`; None = 0 .. B - 1.
        step: of training, say; another one gives other numbers.

    Returns:
        Corruption: views, targets, weights. A row without a masked cell in a view has no target
        and no weight there.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    A row depends on its own cells, `seed`, `row` and `step` alone, and is the same on every
    device. No host synchronisation on CUDA, where the values of tensors are not checked.

    >>> tokens = torch.tensor([[7, 7, 1, 2, 3, 4, 5]])
    >>> answer = torch.tensor([[0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    >>> views, targets, weights = corrupt(tokens, answer, mask_id=9, block_length=3, mode="block",
    ...     ratio=0.5, seed=1, complementary=True)
    >>> views[:, 0]
    tensor([[7, 7, 9, 9, 3, 9, 9],
            [7, 7, 1, 2, 9, 9, 9]])
    >>> targets[:, 0]
    tensor([[-100, -100,    1,    2, -100, -100, -100],
            [-100, -100, -100, -100,    3, -100, -100]])
    """
    _check(tokens, answer_mask, mode, weighting, commit_step, serial, row)
    mask_id = integer("corrupt", "mask_id", mask_id, 0)
    block_length = integer("corrupt", "block_length", block_length, 1)
    flag("corrupt", "complementary", complementary)
    seed, step = integer("corrupt", "seed", seed), integer("corrupt", "step", step)
    B = tokens.shape[0]
    if row is None:
        row = torch.arange(B, dtype=torch.int64, device=tokens.device)
    t = _ratio(ratio, seed, row, step)[:, None]  # [B, 1] float64
    rank = answer_mask.cumsum(1) - 1  # place within the answer, whatever stands around it
    block_length = min(block_length, max(1, tokens.shape[1]))  # no answer is longer
    active, behind = answer_mask, torch.zeros_like(answer_mask)
    if mode != "iid":
        block = rank.div(block_length, rounding_mode="floor")
        blocks = (answer_mask.sum(1) + block_length - 1).div(block_length, rounding_mode="floor")
        chosen = (uniform(seed, row, step, 0, Draw.BLOCK) * blocks).long()[:, None]
        active, behind = answer_mask & (block == chosen), answer_mask & (block > chosen)
    if commit_step is not None:  # mode "trajectory"
        masked = _latest(commit_step, active, t)
    else:
        noise = uniform(seed, row[:, None], step, rank, Draw.MASK)
        masked = active & (noise < (t if serial is None else t * t))
    if serial is not None:  # mode "frontier"
        own = answer_mask.sum(1).clamp(max=block_length)  # the row's own, however it is padded
        place = (uniform(seed, row, step, 0, Draw.FRONT) * own).long()[:, None]
        masked = torch.where(serial, active & (rank % block_length >= place), masked)
    if mode in ("trajectory", "frontier"):
        t = masked.sum(1, keepdim=True).double() / active.sum(1, keepdim=True).clamp(min=1)
    chosen_cells, shares = [masked], [t]
    if complementary:
        chosen_cells.append(active & ~masked)
        shares.append(1 - t)
    learned = torch.stack(chosen_cells)  # [C, B, T]
    return Corruption(
        views=tokens.masked_fill(learned | behind, mask_id),
        targets=torch.where(learned, tokens, IGNORE_INDEX),
        weights=learned * _weights(learned, torch.stack(shares), weighting),
    )


def _ratio(ratio, seed: int, row: Tensor, step: int) -> Tensor:
    """t of every row, [B] float64."""
    if isinstance(ratio, Tensor):
        if not ratio.is_floating_point():
            raise TypeError(f"corrupt: ratio takes a floating-point dtype, got {ratio.dtype}")
        tensor("corrupt", "ratio", ratio, "[B]", like=("tokens", row))
        if ratio.device.type == "cpu" and not ((ratio >= 0) & (ratio <= 1)).all():
            raise ValueError("corrupt: ratio takes numbers in [0, 1], got others among them")
        return ratio.double()
    bounds = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    takes = "a number in [0, 1], (low, high) or a tensor [B]"
    if len(bounds) != 2:
        refuse(TypeError, "corrupt", "ratio", takes, ratio)
    low, high = (number("corrupt", "ratio", bound, 0, 1) for bound in bounds)
    if low > high:
        refuse(ValueError, "corrupt", "ratio", takes, ratio)
    if low == high:
        return torch.full(row.shape, low, dtype=torch.float64, device=row.device)
    return low + (high - low) * uniform(seed, row, step, 0, Draw.RATIO)


def _latest(commit_step: Tensor, active: Tensor, t: Tensor) -> Tensor:
    """Active cells committed in the latest steps: whole steps, until a share t is reached."""
    never = torch.iinfo(torch.int64).max
    when = torch.where(commit_step < 0, never, commit_step).masked_fill(~active, -1)
    in_order = when.sort(1).values
    later = when.shape[1] - torch.searchsorted(in_order, when, right=True)  # cells after it
    wanted = (t * active.sum(1, keepdim=True)).ceil().long()
    return active & (later < wanted)


def _weights(learned: Tensor, share: Tensor, weighting: str) -> Tensor:
    """[C, B, 1] or [C, B, T] float32."""
    if weighting == "elbo":
        return (1 / share.clamp(min=_LEAST_RATIO)).float()
    if weighting == "mean":
        return 1 / learned.sum(-1, keepdim=True).clamp(min=1).float()
    return torch.ones_like(share, dtype=torch.float32)


def _check(tokens, answer_mask, mode, weighting, commit_step, serial, row) -> None:
    tensor("corrupt", "tokens", tokens, "[B, T]", torch.int64)
    like = ("tokens", tokens)
    tensor("corrupt", "answer_mask", answer_mask, "[B, T]", torch.bool, like=like)
    choice("corrupt", "mode", mode, MODES)
    choice("corrupt", "weighting", weighting, WEIGHTINGS)
    given = (("commit_step", "trajectory", commit_step, torch.int64),
             ("serial", "frontier", serial, torch.bool))  # fmt: skip
    for name, owner, value, dtype in given:
        if (value is not None) != (mode == owner):
            raise ValueError(
                f"corrupt: {name} belongs to mode {owner!r} and only there, got "
                f"{'none' if value is None else 'one'} with {mode!r}"
            )
        if value is not None:
            tensor("corrupt", name, value, "[B, T]", dtype, like=like)
    if row is not None:
        tensor("corrupt", "row", row, "[B]", torch.int64, like=like)
