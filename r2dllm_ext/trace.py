# SPDX-License-Identifier: Apache-2.0
"""`Trace`: everything that a decode saw and did, step by step."""

from __future__ import annotations

import dataclasses

import torch

from .config import Rule
from .state import DecodeStep


@dataclasses.dataclass(frozen=True)
class Trace:
    """A whole decode of B rows in S steps (forwards), on the CPU. G = generated positions.

    Attributes:
        prompt_length, block_length: P and L.
        block: [S] int64, the block that was active in a step.
        full_pass: [S] bool, True where the forward read the whole sequence.
        prediction: [S, B, L] int64, `DecodeStep.prediction` of the active block.
        confidence: [S, B, L] float32.
        masked: [S, B, L] bool, cells masked before the step.
        rule: [S, B, L] uint8, values of `Rule`.
        commit_step: [B, G] int64, the last step that gave a position its token, by a commit or an
            edit; -1 = none did (filled with `stop_id` once its row was finished).
        commit_rule: [B, G] uint8, its rule.
        sequences: [B, P + G] int64, the result.
    """

    prompt_length: int
    block_length: int
    block: torch.Tensor
    full_pass: torch.Tensor
    prediction: torch.Tensor
    confidence: torch.Tensor
    masked: torch.Tensor
    rule: torch.Tensor
    commit_step: torch.Tensor
    commit_rule: torch.Tensor
    sequences: torch.Tensor

    @property
    def nfe(self) -> int:
        """S, the number of forwards."""
        return len(self.block)

    def is_active(self) -> torch.Tensor:
        """[S, B] bool: steps at which a row had cells to decide, masked or editable ones."""
        return (self.masked | (self.prediction >= 0)).any(-1)

    def row_nfe(self) -> torch.Tensor:
        """[B] int64: forwards at which a row had cells to decide, what a decode of it alone
        takes."""
        return self.is_active().sum(0)

    def rule_counts(self) -> dict[Rule, int]:
        """Positions by the rule that gave them their token, over all rows."""
        counts = torch.bincount(self.commit_rule.flatten().long(), minlength=len(Rule))
        return {rule: int(counts[rule]) for rule in Rule if rule is not Rule.NONE}


class TraceRecorder:
    """Collects the steps of `generate`."""

    def __init__(self, rows: int, prompt_length: int, gen_length: int, block_length: int):
        self._prompt_length, self._block_length = prompt_length, block_length
        self._blocks: list[int] = []
        self._full_passes: list[bool] = []
        dtypes = {
            "prediction": torch.int64,
            "confidence": torch.float32,
            "masked": torch.bool,
            "rule": torch.uint8,
        }
        shape, answer = (0, rows, block_length), (rows, gen_length)
        self._cells = {n: [torch.empty(shape, dtype=d, device="cpu")] for n, d in dtypes.items()}
        self._commit_step = torch.full(answer, -1, dtype=torch.int64, device="cpu")
        self._commit_rule = torch.zeros(answer, dtype=torch.uint8, device="cpu")

    def record(
        self, block: int, full_pass: bool, rows: list[int], masked: torch.Tensor, step: DecodeStep
    ) -> None:
        """`rows` are the rows of the batch that `masked` and `step` are about."""
        for name, parts in self._cells.items():
            shape = (1, *parts[0].shape[1:])
            part = parts[0].new_full(shape, -1 if name == "prediction" else 0)
            part[0, rows] = (masked if name == "masked" else getattr(step, name)).cpu()
            parts.append(part)
        rule = self._cells["rule"][-1][0]
        committed = rule != Rule.NONE
        cells = slice(block * self._block_length, (block + 1) * self._block_length)
        self._commit_step[:, cells][committed] = len(self._blocks)
        self._commit_rule[:, cells][committed] = rule[committed]
        self._blocks.append(block)
        self._full_passes.append(full_pass)

    def finish(self, sequences: torch.Tensor) -> Trace:
        return Trace(
            prompt_length=self._prompt_length,
            block_length=self._block_length,
            block=torch.tensor(self._blocks, dtype=torch.int64, device="cpu"),
            full_pass=torch.tensor(self._full_passes, dtype=torch.bool, device="cpu"),
            commit_step=self._commit_step,
            commit_rule=self._commit_rule,
            sequences=sequences.cpu(),
            **{name: torch.cat(parts) for name, parts in self._cells.items()},
        )
