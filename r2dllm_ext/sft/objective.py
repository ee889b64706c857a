# SPDX-License-Identifier: Apache-2.0
"""From chosen answers to the loss of a training step: batches, and the module that is wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..corruption import IGNORE_INDEX, Corruption, corrupt
from ..models import Transformer
from ..ops import linear_sft_loss
from .prompts import left_padded


class Example(NamedTuple):
    """A prompt and the answer to learn, all G tokens of it."""

    prompt_ids: list[int]
    answer_ids: list[int]
    commit_step: list[int] | None = None  # the forward that decided each token


class Batch(NamedTuple):
    """What one forward of training takes: n sequences, N rows of logits that carry loss."""

    ids: Tensor  # [n, T] int64
    keys: Tensor | None  # [n, T] bool, False on padding; None if nothing is
    rows: Tensor  # [N] int64, places in [n * T]
    targets: Tensor  # [N] int64
    weights: Tensor  # [N] float32

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in self))


class Masking(NamedTuple):
    """How answers are masked: see `corrupt`."""

    mask_id: int
    block_length: int
    mode: str
    iid_share: float
    ratio: tuple[float, float]
    complementary: bool
    weighting: str
    seed: int


def make_batch(
    examples: Sequence[Example],
    places: Sequence[int],
    step: int,
    masking: Masking,
    *,
    logits_shift: int,
    pad_id: int,
) -> Batch:
    """Examples that stand at `places` of the whole batch of a step, corrupted, on the CPU.

    The masks of an example hang on step and place alone. Every place whose share of the batch
    passes another whole iid example is masked all over instead of in one block.
    """
    prompts, real = left_padded([example.prompt_ids for example in examples], pad_id)
    answers = torch.tensor([example.answer_ids for example in examples], dtype=torch.int64)
    tokens = torch.cat([prompts, answers], 1)
    answer_mask = torch.zeros_like(tokens, dtype=torch.bool)
    answer_mask[:, prompts.shape[1] :] = True
    place = torch.tensor(places, dtype=torch.int64)
    share = masking.iid_share
    iid = ((place + 1) * share).floor() > (place * share).floor()

    parts: dict[bool, Corruption] = {}
    for is_iid in (False, True):
        own = iid == is_iid
        mode = "iid" if is_iid else masking.mode
        parts[is_iid] = corrupt(
            tokens[own],
            answer_mask[own],
            mask_id=masking.mask_id,
            block_length=masking.block_length,
            mode=mode,
            ratio=masking.ratio,
            seed=masking.seed,
            complementary=masking.complementary,
            commit_step=_commit_steps(examples, own, tokens) if mode == "trajectory" else None,
            weighting=masking.weighting,
            row=place[own],
            step=step,
        )
    views, targets, weights = (
        torch.cat([parts[False][i], parts[True][i]], 1).flatten(0, 1) for i in range(3)
    )
    keys = torch.cat([real, torch.ones_like(answers, dtype=torch.bool)], 1)
    keys = torch.cat([keys[~iid], keys[iid]]).repeat(len(views) // max(1, len(keys)), 1)
    learned = (targets != IGNORE_INDEX).flatten().nonzero().flatten()
    return Batch(
        ids=views,
        keys=None if bool(real.all()) else keys,
        rows=(learned - logits_shift).clamp(min=0),
        targets=targets.flatten()[learned],
        weights=weights.flatten()[learned],
    )


def _commit_steps(examples: Sequence[Example], own: Tensor, tokens: Tensor) -> Tensor:
    steps = torch.full_like(tokens, -1)
    for row, example in enumerate(examples):
        if example.commit_step is None:
            raise ValueError("mode 'trajectory' takes examples that know their commit steps")
        steps[row, -len(example.commit_step) :] = torch.tensor(example.commit_step)
    return steps[own]


class Objective(nn.Module):
    """The loss as a module, so that DDP and FSDP see one forward, the head's included.

    Only rows that carry loss reach the head.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 1.0,
        entropy_gate: str = "correct",
    ) -> None:
        super().__init__()
        self.model = model
        self.options = {
            "entropy_weight": entropy_weight,
            "entropy_temperature": entropy_temperature,
            "entropy_gate": entropy_gate,
        }

    def forward(self, batch: Batch) -> Tensor:
        """Mean weighted loss of the batch's rows, a scalar."""
        hidden, _ = self.model.hidden_states(batch.ids, attention_mask=batch.keys)
        hidden = hidden.flatten(0, 1).index_select(0, batch.rows)
        return linear_sft_loss(
            hidden,
            self.model.lm_head_weight,
            batch.targets,
            batch.weights,
            max_rows=len(batch.targets),  # known here, so CUDA need not count
            **self.options,
        )
