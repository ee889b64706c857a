# SPDX-License-Identifier: Apache-2.0
"""Where the answers of `r2_generate` end, and the streamer that is told of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..generation import StepEvent
from ..stop_ids import stop_ids


class Finished(Exception):
    """All rows have ended, in the middle of `generate`."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences = sequences


class Answers:
    """Where the answers of a batch end, block by block, and the streamer that is told.

    Args:
        input_ids: [B, P].
        options: the GenerationConfig.
        criteria: the StoppingCriteriaList, of which those of time are asked once a block.
    """

    def __init__(
        self, input_ids: Tensor, options: Any, criteria: Any, streamer: Any, block_length: int
    ) -> None:
        self._criteria = [c for c in criteria or () if type(c).__name__ != "MaxTimeCriteria"]
        self._timers = [c for c in criteria or () if type(c).__name__ == "MaxTimeCriteria"]
        self._streamer, self._length = streamer, block_length
        eos = options.eos_token_id
        self.eos = () if eos is None else stop_ids(eos, where="r2_generate")
        self._pad = options.pad_token_id
        if self._pad is None and self.eos:
            self._pad = self.eos[0]
        self._most = options.max_length
        self._done = input_ids.shape[1]  # positions that are known to be finished
        self._ends = torch.full(
            (len(input_ids),), self._most, dtype=torch.int64, device="cpu"
        )  # position after the last token

    def on_step(self, event: StepEvent) -> None:
        """Looks at a block when no cell of it is masked; raises `Finished` when all rows ended."""
        if event.start < self._done or event.step.remaining.any():
            return
        self._block(event.sequences, event.start + self._length)
        if (self._ends <= self._done).all():
            raise Finished(event.sequences)

    def end(self, sequences: Tensor) -> Tensor:
        """[B, longest]: the answers, each followed by padding."""
        while self._done < min(sequences.shape[1], int(self._ends.max())):
            self._block(sequences, self._done + self._length)  # blocks of rows that have all ended
        sequences = sequences[:, : int(self._ends.max())]
        return self._padded(sequences, 0)

    def _block(self, sequences: Tensor, end: int) -> None:
        begin, end = self._done, min(end, self._most)
        for length in range(begin + 1, end + 1):
            met = torch.zeros_like(self._ends, dtype=torch.bool)
            for criterion in self._criteria:
                met = met | torch.as_tensor(criterion(sequences[:, :length], None)).cpu()
            self._ends[met & (self._ends > length)] = length
        for criterion in self._timers:
            self._ends[criterion(sequences[:, :end], None).cpu() & (self._ends > end)] = end
        self._done = end
        if self._streamer is not None:
            last = min(end, int(self._ends.max()))
            if last > begin:
                self._streamer.put(self._padded(sequences[:, :last], begin).cpu())

    def _padded(self, sequences: Tensor, begin: int) -> Tensor:
        """Columns from `begin` on, without what follows the ends."""
        columns = torch.arange(begin, sequences.shape[1], device="cpu")
        after = (columns >= self._ends[:, None]).to(sequences.device)
        tokens = sequences[:, begin:]
        return tokens if self._pad is None else tokens.masked_fill(after, self._pad)
