# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, in one grammar: "where: argument takes A, got B".

`where` is the function or class that was called. TypeError: a value of another kind; ValueError:
one out of range. Each check returns the value in the plain type that it stands for. What lies in a
tensor is not read.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_INT64 = 2**63


def refuse(error: type[Exception], where: str, name: str, takes: str, got: object) -> NoReturn:
    """Raise what a check raises; `got` is shown as its repr."""
    raise error(f"{where}: {name} takes {takes}, got {got!r}")


# ---- numbers ---------------------------------------------------------------------------------


def integer(
    where: str,
    name: str,
    value: Any,
    low: int | None = None,
    high: int | None = None,
    *,
    optional: bool = False,
) -> Any:
    """An integer in [low, high], of 64 bits in any case.

    Whatever `operator.index` takes counts, numpy integers and 0-dim integer tensors among it; a
    bool does not.
    """
    if value is None and optional:
        return None
    number = _index(value)
    if number is None:
        refuse(TypeError, where, name, _integers(low, high, optional), value)
    if not -_INT64 <= number < _INT64:
        refuse(ValueError, where, name, _integers(low, high, optional, " of 64 bits"), value)
    if (low is not None and number < low) or (high is not None and number > high):
        refuse(ValueError, where, name, _integers(low, high, optional), value)
    return number


def integers(
    where: str, name: str, values: Iterable[Any], low: int, high: int | None = None
) -> None:
    """Integers each of which `integer` takes; quick where they are plain ones."""
    most = _INT64 - 1 if high is None else high
    for value in values:
        if type(value) is not int or not low <= value <= most:
            integer(where, name, value, low, high)


def _index(value: Any) -> int | torch.SymInt | None:
    # A size that is being traced stays what it is: its index would make it a constant.
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or getattr(value, "ndim", 0) != 0:
        return None
    if getattr(value, "dtype", None) == torch.bool:  # has __index__, unlike numpy's
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _integers(low: int | None, high: int | None, optional: bool, bits: str = "") -> str:
    takes = "an integer"
    if low is not None:
        takes += f" >= {low}" if high is None else f" in [{low}, {high}]"
    if high is None:
        takes += bits
    return f"{takes}{' or None' if optional else ''}"


def number(
    where: str,
    name: str,
    value: Any,
    low: float | None = None,
    high: float = math.inf,
    *,
    open_low: bool = False,
    optional: bool = False,
) -> Any:
    """A finite number in [low, high], or (low, high]; without `low` any number, NaN included."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(TypeError, where, name, _numbers(low, high, open_low, optional), value)
    try:
        real = float(value)
    except OverflowError:  # an integer beyond the greatest float
        real = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    if low is None:
        return real
    if not (low <= real <= high and math.isfinite(real)) or (open_low and real == low):
        refuse(ValueError, where, name, _numbers(low, high, open_low, optional), value)
    return real


def _numbers(low: float | None, high: float, open_low: bool, optional: bool) -> str:
    takes = "a number"
    if low is not None and math.isfinite(high):
        takes += f" in {'(' if open_low else '['}{low:g}, {high:g}]"
    elif low is not None:
        takes = f"a finite number {'>' if open_low else '>='} {low:g}"
    return f"{takes}{' or None' if optional else ''}"


# ---- other values ----------------------------------------------------------------------------


def flag(where: str, name: str, value: Any) -> bool:
    """A bool, and nothing that is merely true."""
    if not isinstance(value, bool):
        refuse(TypeError, where, name, "a bool", value)
    return value


def choice(where: str, name: str, value: Any, choices: Sequence[str | None]) -> Any:
    """One of some names; None may be one of them."""
    if value is not None and not isinstance(value, str):
        refuse(TypeError, where, name, f"one of {choices}", value)
    if value not in choices:
        refuse(ValueError, where, name, f"one of {choices}", value)
    return value


def device(where: str, name: str, value: Any) -> torch.device:
    """A device, or the name of one that torch may have."""
    try:
        return torch.device(value)
    except TypeError:
        refuse(TypeError, where, name, "a torch.device or the name of one", value)
    except RuntimeError:
        refuse(ValueError, where, name, "the name of a device, such as 'cpu' or 'cuda:0'", value)


def instance(where: str, name: str, value: Any, kind: type, *, optional: bool = False) -> None:
    """An object of a class; the message says of which class it is."""
    if isinstance(value, kind) or (optional and value is None):
        return
    takes = "a torch.Tensor" if kind is Tensor else f"a {kind.__name__}"
    takes += " or None" if optional else ""
    raise TypeError(f"{where}: {name} takes {takes}, got {type(value).__name__}")


def make_plain(owner: Any, check: Callable[..., Any], *names: str, **bounds: Any) -> None:
    """Fields of a frozen dataclass as `check` returns them: numpy's numbers become Python's."""
    for name in names:
        value = check(type(owner).__name__, name, getattr(owner, name), **bounds)
        object.__setattr__(owner, name, value)


# ---- tensors ---------------------------------------------------------------------------------


def is_tensor(where: str, *, optional: bool = False, **tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            instance(where, name, value, Tensor, optional=optional)


def tensor(
    where: str,
    name: str,
    value: Any,
    shape: str,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    *,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """A tensor of a shape such as "[B, T]" and of a dtype, or of one of some (None: any).

    `like`: name and value of a tensor on the same device whose first dimensions these are.
    """
    is_tensor(where, **{name: value})
    dims = shape.count(",") + 1
    if like is not None:
        sized(where, name, value, shape, like[1].shape[:dims], dtype)
        same_device(where, **dict([like]), **{name: value})
        return
    _check_dtype(where, name, value, dtype)
    if value.dim() != dims:
        raise ValueError(f"{where}: {name} takes shape {shape}, got {list(value.shape)}")


def sized(
    where: str,
    name: str,
    value: Tensor,
    shape: str,
    sizes: Sequence[int],
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
) -> None:
    """A tensor of these sizes, which `shape` names."""
    _check_dtype(where, name, value, dtype)
    if tuple(value.shape) != tuple(sizes):
        raise ValueError(
            f"{where}: {name} takes shape {shape} = {list(sizes)}, got {list(value.shape)}"
        )


def _check_dtype(
    where: str, name: str, value: Tensor, dtype: torch.dtype | Sequence[torch.dtype] | None
) -> None:
    if dtype is None:
        return
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if value.dtype not in dtypes:
        takes = " or ".join(map(str, dtypes))
        raise TypeError(f"{where}: {name} takes dtype {takes}, got {value.dtype}")


def logits_tensor(where: str, value: Tensor, *, or_rows: bool = False) -> None:
    """[B, L, V], or [N, V] as well; for fake kernels, as the ops check by themselves."""
    wide = () if value.device.type == "cuda" else (torch.float64,)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, *wide)
    _check_dtype(where, "logits", value, dtypes)
    if value.dim() != 3 and not (or_rows and value.dim() == 2):
        takes = "[N, V] or [B, L, V]" if or_rows else "[B, L, V]"
        raise ValueError(f"{where}: logits takes shape {takes}, got {list(value.shape)}")
    if value.shape[-1] < 1:
        raise ValueError(f"{where}: logits takes V >= 1, got shape {list(value.shape)}")
    if value.shape[-1] != 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{where}: logits takes a last dimension of stride 1, got strides {value.stride()}"
        )


def rule_tensors(
    where: str, confidence: Tensor, others: Sequence[tuple[str, Tensor, torch.dtype]]
) -> None:
    """[B, L] each, as the ops of single rules take them; for fake kernels, as `logits_tensor`."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    tensor(where, "confidence", confidence, "[B, L]", dtypes)
    for name, value, dtype in others:
        tensor(where, name, value, "[B, L]", dtype, like=("confidence", confidence))


def same_device(where: str, **tensors: Tensor | None) -> None:
    """All on the device of the first."""
    (first, like), *others = tensors.items()
    for name, other in others:
        if other is not None and like is not None and other.device != like.device:
            raise ValueError(
                f"{where}: {name} takes the device of {first} ({like.device}), got {other.device}"
            )


def no_tangent(where: str, **tensors: Tensor | None) -> None:
    """Forward mode takes the result of an op without a jvp for a constant: None, or zeros."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{where}: {name} takes no tangent of forward-mode differentiation, got one; "
                "gradients come from the backward (torch.autograd.grad, torch.func.vjp)"
            )
