# SPDX-License-Identifier: Apache-2.0
"""How `generate` calls a model: the convention of the published loops, and their three caches."""

from __future__ import annotations

from typing import Any

import torch

from .config import DecodeConfig
from .row_params import RowParams

CACHES = ("none", "prefix", "dual")


class ModelDriver:
    """Forwards of one decode: what the model is given, and which rows of its logits to take.

    Args:
        model: see `generate`.
        cache: one of `CACHES`.
        logits_shift: 0 or 1 (Dream).
        key_mask: [B, P + G] with zeros on padding, or None.
        prompt_length: P.
    """

    def __init__(
        self,
        model: Any,
        cache: str,
        logits_shift: int,
        key_mask: torch.Tensor | None,
        prompt_length: int,
    ) -> None:
        self._model = model
        self.cache = cache
        self._shift = logits_shift
        self._key_mask = key_mask
        # Tokens of padding before each sequence, [B]; None unless one begins with its answer.
        self._padding: torch.Tensor | None = None
        if key_mask is not None and logits_shift:
            padding = (key_mask == 0).sum(1)
            if bool((padding == prompt_length).any()):
                self._padding = padding
        self._block_logits_only = getattr(model, "supports_logits_positions", False)
        self._past: list[tuple[torch.Tensor, ...]] | None = None
        self.owes_block_step = False
        # Set for graphs: the positions [L] of the block, int64 on the device. A forward then takes
        # nothing else from where the block is, so that one graph does for all blocks, unless
        # `graph_fits_one_block`.
        self.columns: torch.Tensor | None = None

    @property
    def graph_fits_one_block(self) -> bool:
        """What follows a block's prefix differs in length from block to block."""
        return self.cache == "prefix"

    def step_options(
        self, config: DecodeConfig, rows: RowParams | None, full_pass: bool
    ) -> tuple[DecodeConfig, RowParams | None]:
        """Dream's full pass commits by the base rule the first cell of the block, nothing else."""
        if not full_pass or self.cache == "none" or self._shift == 0:
            return config, rows
        config = config.replace(base="first", quota=1)
        return config, None if rows is None else rows.replace(quota=None)

    def forward(
        self, ids: torch.Tensor, start: int, end: int, rows: list[int], *, new_block: bool
    ) -> tuple[torch.Tensor, int, bool]:
        """One forward for the block [start, end) of `ids` [B, T], the rows `rows` of the batch.

        Returns its logits [B, L, V], the shift that is left to apply to their rows, and whether the
        forward read the whole sequence.
        """
        options: dict[str, Any] = {}
        if self._key_mask is not None:
            mask = self._key_mask
            options["attention_mask"] = mask if len(rows) == len(mask) else mask[rows]
        if new_block or self.cache == "none":
            return self._full_pass(ids, start, end, rows, options)
        self.owes_block_step = False
        options.update(use_cache=True, past_key_values=self._past)
        inputs = ids[:, start:]
        if self.cache == "dual":
            replace = torch.zeros_like(ids, dtype=torch.bool)
            if self.columns is None:
                inputs, replace[:, start:end] = ids[:, start:end], True
            else:
                inputs = ids.index_select(1, self.columns)
                replace.index_fill_(1, self.columns, True)
            options["replace_position"] = replace
            if self._shift:
                options["dual_cache"] = True
        # Within a block row 0 stays with cell 0, as in the release.
        return self._logits(inputs, (0, end - start), options)[0], self._shift, False

    def keep_rows(self, keep: list[int]) -> None:
        """Drops the cached keys and values of all other rows."""
        if self._past is not None and keep:
            self._past = [tuple(tensor[keep] for tensor in pair) for pair in self._past]

    def _full_pass(
        self, ids: torch.Tensor, start: int, end: int, rows: list[int], options: dict[str, Any]
    ) -> tuple[torch.Tensor, int, bool]:
        if self.cache != "none":
            options["use_cache"] = True
            self.owes_block_step = self._shift == 1
        # Position i is predicted by row i - shift; the first of a sequence by its own row.
        if self._padding is not None:
            shift = 0
            logits, output = self._behind_padding(ids, start, end, rows, options)
        elif self.columns is None:
            begin = max(start - self._shift, 0)
            shift = self._shift - (start - begin)
            logits, output = self._logits(ids, (begin, begin + end - start), options)
        else:
            shift = 0
            places = (self.columns - self._shift).clamp_(min=0)
            logits, output = self._logits(ids, places, options)
        if self.cache != "none":
            past = getattr(output, "past_key_values", None)
            if past is None:
                raise TypeError(
                    f"generate: model takes a callable that returns `past_key_values` with "
                    f"use_cache=True for cache={self.cache!r}, got {type(output).__name__} without"
                )
            self._keep(past, start)
        return logits, shift, True

    def _behind_padding(
        self, ids: torch.Tensor, start: int, end: int, rows: list[int], options: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Shifted rows [B, L, V] where what stands before a block may be padding alone.

        Padding is no part of a sequence; a prompt that is empty is answered as it would be alone.
        """
        assert self._padding is not None
        padding = self._padding if len(rows) == len(self._padding) else self._padding[rows]
        if self.columns is None:
            logits, output = self._logits(ids, (start - 1, end), options)
            begins = padding == start
        else:
            places = torch.cat([self.columns[:1] - 1, self.columns])
            logits, output = self._logits(ids, places, options)
            begins = padding == self.columns[0]
        first = logits[:, 1].where(begins[:, None], logits[:, 0])
        return torch.cat([first[:, None], logits[:, 1:-1]], 1), output

    def _keep(self, past: Any, start: int) -> None:
        if self.cache == "prefix":
            past = _cut(past, start)
        elif self.columns is not None and self._past is not None:
            # A graph reads them where they were when it was captured.
            for old, new in zip(self._past, past, strict=True):
                for kept, tensor in zip(old, new, strict=True):
                    kept.copy_(tensor)
            return
        self._past = past

    def _logits(
        self, inputs: torch.Tensor, rows: tuple[int, int] | torch.Tensor, options: dict[str, Any]
    ) -> tuple[torch.Tensor, Any]:
        """Rows [begin, end), or those listed, of the logits, and the model's output."""
        batch, length = inputs.shape
        if self._block_logits_only:
            output = self._model(inputs, logits_positions=rows, **options)
            expected = (batch, len(rows) if isinstance(rows, torch.Tensor) else rows[1] - rows[0])
        else:
            output = self._model(inputs, **options)
            expected = (batch, length)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, torch.Tensor):
            raise TypeError(
                "generate: model takes a callable that returns an object with a tensor `logits`, "
                f"got {type(output).__name__} (transformers: with return_dict=False a tuple)"
            )
        if logits.dim() != 3 or tuple(logits.shape[:2]) != expected:
            raise ValueError(
                f"generate: the model takes ids {list(inputs.shape)} and has to return logits "
                f"[{expected[0]}, {expected[1]}, V], got {list(logits.shape)}"
            )
        if not self._block_logits_only:
            if isinstance(rows, torch.Tensor):
                logits = logits.index_select(1, rows)
            else:
                logits = logits[:, rows[0] : rows[1]]
        return logits, output


def _cut(past: Any, length: int) -> list[tuple[torch.Tensor, ...]]:
    """Keys and values of the first `length` positions.

    Time is dim 2 of [B, heads, T, head_dim] (LLaDA) and dim 1 of [B, T, heads * head_dim] (Dream).
    """
    return [tuple(tensor.narrow(tensor.dim() - 2, 0, length) for tensor in pair) for pair in past]
