# SPDX-License-Identifier: Apache-2.0
"""`RowParams`: options of a step that differ between the rows of a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import is_tensor, refuse
from .config import DecodeConfig
from .state import Rows, row_index, taken

# Of options that a config leaves out by None.
_NOTHING: dict[str, float] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
# Of the values that have a range; the least is 0.
_GREATEST = {
    "threshold": 1.0,
    "quota": math.inf,
    "error_budget": math.inf,
    "entropy_budget": math.inf,
    "spatial_threshold": 1.0,
    "temporal_threshold": 1.0,
    "edit_threshold": 1.0,
    "temperature": math.inf,
    "top_k": math.inf,
    "top_p": 1.0,
    "min_p": 1.0,
}


@dataclass(frozen=True, eq=False)
class RowParams:
    """Options of each row of a batch, in place of those of `DecodeConfig`.

    Row b is decided, to the bit, as a call on that row alone with
    `config.replace(field=value of row b)` would decide it; what it draws depends on its row of the
    state too (`Counter.ROW_ID`, its steps), which `DecodeState.take` takes along.

    Args:
        threshold, error_budget, entropy_budget, spatial_threshold, temporal_threshold,
            edit_threshold, temperature, top_p, min_p: [B] float32 or float64.
        quota, top_k: [B] int32 or int64.
        seed: [B] int64.

    All are contiguous and on the device of the logits; None = the config's value for all rows.
    Where a config says None, a tensor says 0 (`top_k`, `min_p`) or 1 (`top_p`); nothing says it of
    a threshold, as a confidence may be 1.
    `spatial_threshold` serves windows and runs. `edit_threshold` takes a config whose own is not
    None: the rule has to be on.

    A row with a value out of range is left alone: it commits nothing, its state does not change,
    and the step reports the argmax of its cells. Out of range is what `DecodeConfig` refuses:
    thresholds outside [0, 1] or NaN, a budget or quota < 0 or NaN, a temperature < 0, NaN or
    infinite, `top_k` < 0, `top_p` or `min_p` outside [0, 1].

    The step reads the tensors on the device and never on the host. A captured graph reads them
    where they lie: write into them, and the next replay sees it. Under `torch.compile` new values
    are no reason to compile again, as another config would be.

    Raises:
        TypeError: a field is no tensor. Dtype, shape and device are checked by the step, which
            names the field "rows.threshold".

    >>> rows = RowParams(threshold=torch.tensor([0.9, 0.3]))
    >>> tokens, config = torch.full((2, 2), 3), DecodeConfig.fast_dllm(3)
    >>> decode_step(torch.zeros(2, 2, 4), tokens, None, config, rows=rows).rule
    tensor([[2, 0],
            [1, 1]], dtype=torch.uint8)
    """

    # In the order of the op.
    threshold: Tensor | None = None
    quota: Tensor | None = None
    error_budget: Tensor | None = None
    entropy_budget: Tensor | None = None
    spatial_threshold: Tensor | None = None
    temporal_threshold: Tensor | None = None
    edit_threshold: Tensor | None = None
    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    seed: Tensor | None = None

    def __post_init__(self) -> None:
        tensors = [getattr(self, field.name) for field in dataclasses.fields(self)]
        for field, tensor in zip(dataclasses.fields(self), tensors, strict=True):
            is_tensor("RowParams", optional=True, **{field.name: tensor})
        is_empty = all(tensor is None for tensor in tensors)
        object.__setattr__(self, "_op_args", [] if is_empty else tensors)

    @classmethod
    def of(
        cls,
        configs: Sequence[DecodeConfig],
        *,
        names: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> RowParams:
        """What `configs` say, each of its row, beside the first of them as the config of the step.

        Args:
            configs: one for each row, at least one.
            names: fields that have a tensor in any case, so that a captured graph can read the next
                batch's; those in which the configs differ have one anyhow.
            device: that of the logits.

        Numbers are float64, exactly what the configs say, counts and seeds int64.

        Raises:
            ValueError: no config; configs that differ in something else, or of which one alone has
                no threshold.

        >>> patient, hasty = DecodeConfig.r2(3, top_k=5), DecodeConfig.r2(3, threshold=0.5)
        >>> rows = RowParams.of([patient, hasty])
        >>> rows.threshold, rows.top_k, rows.quota
        (tensor([0.9000, 0.5000], dtype=torch.float64), tensor([5, 0]), None)
        """
        if not configs:
            refuse(ValueError, "RowParams.of", "configs", "at least one", [])
        values = {
            field.name: [getattr(config, field.name) for config in configs]
            for field in dataclasses.fields(DecodeConfig)
        }
        differ = [name for name, own in values.items() if any(x != own[0] for x in own)]
        tensors = {}
        for name in dict.fromkeys((*differ, *names)):
            own = [_NOTHING.get(name) if x is None else x for x in values.get(name, [None])]
            if name not in cls.__dataclass_fields__ or None in own:
                takes = f"one {name} for all rows"
                refuse(ValueError, "RowParams.of", "configs", takes, values.get(name))
            dtype = torch.int64 if name in ("quota", "top_k", "seed") else torch.float64
            tensors[name] = torch.tensor(own, dtype=dtype, device=device)
        return cls(**tensors)

    def check_values(self, where: str) -> None:
        """Raises ValueError naming field, row and value if one is out of range.

        Args:
            where: what the message begins with.

        The host reads the tensors; a step never does that.

        >>> RowParams(quota=torch.tensor([1, -2])).check_values("request")
        Traceback (most recent call last):
        ValueError: request: rows.quota takes a number in [0, inf], got -2 in row 1
        """
        for name, high in _GREATEST.items():
            values = getattr(self, name)
            if values is None:
                continue
            inside = (values >= 0) & (values <= high)
            if name == "temperature":
                inside &= values.isfinite()
            if not inside.all():
                row = int(inside.flatten().int().argmin())
                raise ValueError(
                    f"{where}: rows.{name} takes a number in [0, {high:g}], got "
                    f"{values.flatten()[row].item()} in row {row}"
                )

    def replace(self, **changes: Tensor | None) -> RowParams:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def take(self, rows: Rows) -> RowParams:
        """New parameters of some rows, which `DecodeState.reset` describes.

        >>> RowParams(quota=torch.tensor([1, 2, 3])).take([2, 0]).quota
        tensor([3, 1])
        """
        given = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }
        if not given:
            return self
        first = next(iter(given.values()))
        index = row_index("RowParams.take", rows, len(first), first.device)
        return RowParams(**{name: taken(tensor, index) for name, tensor in given.items()})
