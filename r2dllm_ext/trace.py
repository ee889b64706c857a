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
        self._shape = (rows, block_length)
        self._prompt_length = prompt_length
        self._steps: list[dict[str, torch.Tensor]] = []
        answer = (rows, gen_length)
        self._commit_step = torch.full(answer, -1, dtype=torch.int64, device="cpu")
        self._commit_rule = torch.zeros(answer, dtype=torch.uint8, device="cpu")

    def record(
        self, block: int, full_pass: bool, rows: list[int], masked: torch.Tensor, step: DecodeStep
    ) -> None:
        """`rows` are the rows of the batch that `masked` and `step` are about."""
        entry = {
            "block": torch.tensor(block, dtype=torch.int64, device="cpu"),
            "full_pass": torch.tensor(full_pass, dtype=torch.bool, device="cpu"),
            "prediction": torch.full(self._shape, -1, dtype=torch.int64, device="cpu"),
            "confidence": torch.zeros(self._shape, dtype=torch.float32, device="cpu"),
            "masked": torch.zeros(self._shape, dtype=torch.bool, device="cpu"),
            "rule": torch.zeros(self._shape, dtype=torch.uint8, device="cpu"),
        }
        entry["prediction"][rows] = step.prediction.cpu()
        entry["confidence"][rows] = step.confidence.cpu()
        entry["masked"][rows] = masked.cpu()
        entry["rule"][rows] = step.rule.cpu()

        length = self._shape[1]
        committed = entry["rule"] != Rule.NONE
        cells = slice(block * length, (block + 1) * length)
        self._commit_step[:, cells][committed] = len(self._steps)
        self._commit_rule[:, cells][committed] = entry["rule"][committed]
        self._steps.append(entry)

    def finish(self, sequences: torch.Tensor) -> Trace:
        empty = {
            "block": torch.empty(0, dtype=torch.int64, device="cpu"),
            "full_pass": torch.empty(0, dtype=torch.bool, device="cpu"),
            "prediction": torch.empty(0, *self._shape, dtype=torch.int64, device="cpu"),
            "confidence": torch.empty(0, *self._shape, dtype=torch.float32, device="cpu"),
            "masked": torch.empty(0, *self._shape, dtype=torch.bool, device="cpu"),
            "rule": torch.empty(0, *self._shape, dtype=torch.uint8, device="cpu"),
        }
        stacked = {
            name: torch.stack([step[name] for step in self._steps]) if self._steps else nothing
            for name, nothing in empty.items()
        }
        return Trace(
            prompt_length=self._prompt_length,
            block_length=self._shape[1],
            commit_step=self._commit_step,
            commit_rule=self._commit_rule,
            sequences=sequences.cpu(),
            **stacked,
        )
