# SPDX-License-Identifier: Apache-2.0
"""What Python has to check, because no kernel sees it, or only after torch.compile has."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def same_device(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} takes the device of the first argument ({first.device}), got "
                f"{tensor.device}"
            )


def is_tensor(op: str, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} takes a torch.Tensor, got {type(tensor).__name__}")


def no_tangent(op: str, **tensors: torch.Tensor | None) -> None:
    """Forward mode takes the result of an op without a jvp for a constant: None, or zeros."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op}: {name} takes no tangent of forward-mode differentiation, got one; "
                "gradients come from the backward (torch.autograd.grad, torch.func.vjp)"
            )
