# SPDX-License-Identifier: Apache-2.0
"""vLLM's dllm-plugin 0c53db5, remasking: what a policy returns, how it is called, their own one."""

from __future__ import annotations

import math
from dataclasses import dataclass

DRAFT_SIZE = 32


@dataclass(frozen=True, slots=True)
class RemaskStepResult:
    committed_token_ids: tuple[int, ...]
    next_input_block: tuple[int, ...]


def remask_after_block_forward(*, input_draft, logits, policy, remasking_config=None):
    if len(input_draft) != DRAFT_SIZE or logits is None or len(logits) != DRAFT_SIZE:
        raise ValueError("a draft and logits of DRAFT_SIZE")
    result = policy.apply(input_draft=input_draft, logits=logits, remasking_config=remasking_config)
    if len(result.next_input_block) != DRAFT_SIZE:
        raise ValueError("next_input_block")
    if len(result.committed_token_ids) > DRAFT_SIZE:
        raise ValueError("committed_token_ids")
    return result


class Llada2DefaultRemaskingPolicy:
    """All above the threshold if these are enough, else the best; in Python's floats."""

    def apply(self, *, input_draft, logits=None, remasking_config=None):
        options = dict(remasking_config or {})
        mask_id = options.get("mask_token_id", 1)
        threshold = options.get("commit_confidence_threshold", 0.01)
        draft = list(input_draft)
        masked = [cell for cell, token in enumerate(draft) if token == mask_id]
        if "num_transfer" in options:
            count = options["num_transfer"]
        else:
            steps, step = options.get("denoise_steps", 32), options.get("denoise_step_index", 0)
            step = max(0, min(step, steps - 1))
            count = DRAFT_SIZE // steps + (1 if step < DRAFT_SIZE % steps else 0)
        best = {cell: self.best(logits[cell]) for cell in masked}
        chosen = [cell for cell in masked if best[cell][1] > threshold]
        if len(chosen) < count:
            chosen = sorted(masked, key=lambda cell: (-best[cell][1], cell))[:count]
        for cell in chosen:
            draft[cell] = best[cell][0]
        if mask_id in draft:
            return RemaskStepResult((), tuple(draft))
        return RemaskStepResult(tuple(draft), (mask_id,) * DRAFT_SIZE)

    @staticmethod
    def best(row):
        """The argmax and its probability."""
        row = [float(value) for value in row]
        greatest = max(row)
        return row.index(greatest), 1 / sum(math.exp(value - greatest) for value in row)
