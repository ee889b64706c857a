# SPDX-License-Identifier: Apache-2.0
"""What the fake kernels check: under torch.compile they are the first to see the arguments."""

from __future__ import annotations

import torch


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
