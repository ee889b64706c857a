# SPDX-License-Identifier: Apache-2.0
"""dInfer: `R2Decoder`, the decoder of its runners (`BlockWiseDiffusionLLM` and its kin)."""

from __future__ import annotations

import torch

from .._checks import flag, instance, integer, refuse
from ..config import DecodeConfig
from ..ops import decode_step
from ..state import DecodeState
from ._near_ties import near_ties_step
from ._versions import require

require("dinfer")

from dinfer.decoding.parallel_strategy import ParallelDecoder  # noqa: E402


class R2Decoder(ParallelDecoder):
    """Decoder of dInfer's runners, by the rules of a `DecodeConfig`.

    dInfer's own `ThresholdParallelDecoder(0, threshold)` is
    `R2Decoder(engine_config("dinfer.ThresholdParallelDecoder", mask_id, threshold=threshold),
    near_ties=True)`; the rules of R2-dLLM are `R2Decoder(DecodeConfig.r2(mask_id))`.

    Args:
        config: what a step may commit; its `mask_id` is that of the model.
        eos_id: at which the runners end a sequence (dInfer: 126081, LLaDA's).
        near_ties: True is dInfer's base rule where no cell passes the threshold: all cells within
            1e-5 of the best commit together, not the best alone. Takes base="threshold" with a
            threshold, mask_prediction="skip" and temperature 0.

    Raises:
        TypeError, ValueError: name the argument, what it got and what it takes.

    The runners drop finished rows between two calls without saying which. They are known from the
    masks that the last call left, which is a host read in that call and in no other.

    ```
    decoder = R2Decoder(DecodeConfig.r2(126336), eos_id=126081)
    llm = BlockWiseDiffusionLLM(model, decoder, BlockIteratorFactory(), cache_factory=...)
    ```
    """

    def __init__(
        self, config: DecodeConfig, *, eos_id: int = 126081, near_ties: bool = False
    ) -> None:
        instance("R2Decoder", "config", config, DecodeConfig)
        if config.mask_id is None:
            refuse(ValueError, "R2Decoder", "config.mask_id", "the mask token of the model", None)
        eos_id = integer("R2Decoder", "eos_id", eos_id, 0)
        needed = {"base": "threshold", "mask_prediction": "skip", "temperature": 0.0}
        if flag("R2Decoder", "near_ties", near_ties):
            for name, value in needed.items():
                if getattr(config, name) != value:
                    takes = f"{value!r} with near_ties"
                    refuse(ValueError, "R2Decoder", f"config.{name}", takes, getattr(config, name))
            if config.threshold is None:
                refuse(ValueError, "R2Decoder", "config.threshold", "a number with near_ties", None)
        super().__init__(config.temperature, mask_id=config.mask_id)
        self.config = config
        self.eos_id = eos_id
        self.near_ties = near_ties
        self.threshold = config.threshold  # runners that smooth over iterations read it
        self._state: DecodeState | None = None
        self._slots = self._remaining = torch.empty(0, dtype=torch.int64, device="cpu")

    def block_init(self, block_x: torch.Tensor, block_id: int) -> None:
        """A block [B, L] int64 begins; with block 0 a new batch of sequences does."""
        rows, block_length = block_x.shape
        state = self._state
        if block_id == 0 or state is None or (state.rows, state.block_length) != block_x.shape:
            self._state = DecodeState(rows, block_length, device=block_x.device)
        else:
            state.reset()  # its counters go on, so that every block draws other random numbers
        self._slots = torch.arange(rows, device=block_x.device)
        self._remaining = (block_x == self.mask_id).sum(1)

    @torch.no_grad()
    def decode(
        self,
        logits: torch.Tensor,
        block_start: int,
        block_end: int,
        x: torch.Tensor,
        iter_threshold: float | None = None,
    ) -> None:
        """One step of the block.

        Args:
            logits: [B, L, V] float32, bfloat16 or float16, of the block alone.
            block_start, block_end: its place in `x`, L cells.
            x: [B, T] int64, a `TokenArray` or a tensor. Written in place.
            iter_threshold: of this step in place of the config's.

        Raises:
            ValueError: rows are missing that have masked cells, or `block_init` was not called.
        """
        block = x[:, block_start:block_end]
        self._drop_finished(block.shape[0])
        config = self.config
        if iter_threshold is not None and iter_threshold != config.threshold:
            config = config.replace(threshold=iter_threshold)
        step = near_ties_step if self.near_ties else decode_step
        self._remaining = step(logits, block, self._state, config, slots=self._slots).remaining

    def _drop_finished(self, rows: int) -> None:
        """Keep the slots of the rows that the runner still decodes."""
        if rows == len(self._slots):
            return
        kept = self._slots[self._remaining > 0]
        if rows != len(kept):
            takes = f"the {len(self._slots)} rows of the last call, or the {len(kept)} unfinished"
            refuse(ValueError, "R2Decoder.decode", "x", takes, f"{rows} rows")
        self._slots = kept
