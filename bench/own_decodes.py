# SPDX-License-Identifier: Apache-2.0
"""Rows that a model decodes while it learns from them.

At every training step they are half decoded, block by block, by the model itself: what is learned
is what decoding meets. From the forward that it is trained by, a row then commits the cell that the
model is surest of, and sometimes the next surest ones too. A token that no right answer has there
is not committed; one is drawn from the exact distribution in its place, so that every state has an
answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r2dllm_ext.tasks import Task

SHARE_OF_ONE = 0.7  # of the commits are of one cell; the others of 2 to MOST, as long as these are
MOST, SURE, LIKELY = 6, 0.9, 0.5  # sure, and likely in truth


class OwnDecodes:
    """The states of `rows` decodes; prompts are drawn from the training split."""

    def __init__(self, task: Task, rows: int, seed: int, block_length: int) -> None:
        self.task, self.seed, self.block_length = task, seed, block_length
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0  # prompts so far
        self.prompts = [""] * rows
        self.ids = torch.zeros(rows, task.prompt_length + task.answer_length, dtype=torch.int64)
        self.start = torch.zeros(rows, dtype=torch.int64)  # of the active block, in the answer
        blocks = task.answer_length // block_length
        for row in range(rows):
            # Not all in their first block at the start: what lies before is the sampled answer.
            self._begin(row, block_length * (row % blocks))

    def answers(self) -> Tensor:
        return self.ids[:, self.task.prompt_length :]

    def masks(self) -> tuple[Tensor, Tensor]:
        """Which cells [rows, A] are hidden, and which of them are in the active block."""
        hidden = self.answers() == self.task.tokenizer.mask_id
        cell, start = torch.arange(hidden.shape[1]), self.start[:, None]
        return hidden, hidden & (cell >= start) & (cell < start + self.block_length)

    def advance(self, confidence: Tensor, prediction: Tensor, exact: Tensor) -> int:
        """Commits cells of every row; returns how many commits were no right answer's.

        confidence, prediction [rows, A] of a forward over the states; exact [rows, A, V] of the
        hidden cells. A row in which that is NaN has no answer, and begins anew.
        """
        wrong, active = 0, self.masks()[1]
        bad = exact.isnan().any(-1).any(-1)
        for row in range(len(self.prompts)):
            if bad[row]:
                self._begin(row)
                continue
            cells = active[row].nonzero()[:, 0]
            cells = cells[confidence[row, cells].argsort(descending=True)][: self._count()]
            for rank, cell in enumerate(cells.tolist()):
                token, truth = int(prediction[row, cell]), exact[row, cell]
                if rank == 0 and truth[token] < 1e-6:
                    wrong += 1
                    token = int(torch.multinomial(truth, 1, generator=self.generator))
                elif rank > 0 and (confidence[row, cell] < SURE or truth[token] < LIKELY):
                    break
                self.answers()[row, cell] = token
            self._go_on(row)
        return wrong

    def state(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("drawn", "prompts", "ids", "start")}
        return {**kept, "generator": self.generator.get_state()}

    def load(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        for name in ("drawn", "prompts", "ids", "start"):
            setattr(self, name, state[name])

    def _count(self) -> int:
        one, several = torch.rand(2, generator=self.generator).tolist()
        return 1 if one < SHARE_OF_ONE else 2 + int(several * (MOST - 1))

    def _go_on(self, row: int) -> None:
        """To the next block, or the next prompt, where a block is decided."""
        tokenizer, end = self.task.tokenizer, int(self.start[row]) + self.block_length
        block = self.answers()[row, end - self.block_length : end]
        if (block == tokenizer.mask_id).any():
            return
        if end == self.task.answer_length or block[-1] == tokenizer.end_id:
            self._begin(row)
        else:
            self.start[row] = end

    def _begin(self, row: int, start: int = 0) -> None:
        sample = self.task.sample(self.seed, self.drawn)
        self.drawn += 1
        prompt, answer = self.task.encode(sample)
        tokenizer = self.task.tokenizer
        masks = [tokenizer.mask_id] * (self.task.answer_length - start)
        left = [tokenizer.pad_id] * (self.task.prompt_length - len(prompt))
        self.prompts[row] = sample.prompt
        self.ids[row] = torch.tensor(left + prompt + answer[:start] + masks)
        self.start[row] = start
