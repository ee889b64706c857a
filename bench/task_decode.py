# SPDX-License-Identifier: Apache-2.0
"""Decode many prompts of a task at once, for curves on the CPU.

Rows do not wait for each other: each has its own block and a slot of the state, and leaves the
batch when it is done, so that a batch costs what its rows cost. Every row decides as `generate`
does of its prompt alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r2dllm_ext import DecodeConfig, DecodeState, decode_step
from r2dllm_ext.models import Transformer
from r2dllm_ext.tasks import Task

BINS = 15
_EXACT_EVERY = 6  # forwards: the true distribution costs as much as a forward


class Decoded(NamedTuple):
    """Of n prompts."""

    tokens: Tensor  # [n, A] int64, the answers
    nfe: Tensor  # [n] int64, forwards that a decode of this prompt alone takes
    rule: Tensor  # [n, A] uint8, by which a cell was committed
    calibration: Tensor  # [3, BINS]: cells, sum of confidence, predictions that came to be
    exact: Tensor  # the same, with the true probability of the prediction, where a task knows it


@torch.no_grad()
def decode(
    model: Transformer,
    task: Task,
    prompts: list[str],
    config: DecodeConfig,
    *,
    block_length: int | None = None,  # the task's own
    batch: int = 64,
    calibrate: bool = False,
) -> Decoded:
    block = block_length or task.block_length
    parts = [
        _decode(model, task, prompts[i : i + batch], config, block, calibrate)
        for i in range(0, len(prompts), batch)
    ]
    *cells, calibration, exact = zip(*parts, strict=True)
    tables = (torch.stack(table).sum(0) for table in (calibration, exact))
    return Decoded(*map(torch.cat, cells), *tables)


def prompt_ids(task: Task, prompts: list[str]) -> Tensor:
    """Left-padded to the shortest multiple of 32 that holds them, then the masks."""
    encoded = [task.tokenizer.encode(prompt) for prompt in prompts]
    long = -(-max(map(len, encoded)) // 32) * 32
    tail = [task.tokenizer.mask_id] * task.answer_length
    return torch.tensor([[task.tokenizer.pad_id] * (long - len(e)) + e + tail for e in encoded])


def _decode(model, task, prompts, config, block_length, calibrate) -> Decoded:
    ids, exact, forwards = prompt_ids(task, prompts), torch.zeros(3, BINS).double(), 0
    n, A, words = len(ids), task.answer_length, task.tokenizer
    P, L = ids.shape[1] - A, block_length
    keys, cell = ids != words.pad_id, torch.arange(L)
    nfe, rules = torch.zeros(n, dtype=torch.int64), torch.zeros(n, A, dtype=torch.uint8)
    state, block = DecodeState(n, L), torch.zeros(n, dtype=torch.int64)
    seen = []  # per forward: rows, cells, prediction, confidence of what was masked
    while len(open_ := (ids[:, P:] == words.mask_id).any(1).nonzero()[:, 0]):
        now = (ids[open_, P:] == words.mask_id).int().argmax(1) // L
        state.reset(open_[now != block[open_]])
        block[open_] = now
        place = P + now[:, None] * L + cell
        logits = model(ids[open_], attention_mask=keys[open_], logits_positions=place).logits
        tokens = ids[open_[:, None], place]
        masked = tokens == words.mask_id
        step = decode_step(logits, tokens, state, config, slots=open_)
        nfe[open_] += 1
        if not step.rule.any(1).all():
            raise ValueError("decode: a row commits nothing: its logits are not finite")
        if calibrate:
            row, column = masked.nonzero(as_tuple=True)
            prediction, confidence = step.prediction[row, column], step.confidence[row, column]
            seen.append((torch.stack((open_[row], place[row, column], prediction)), confidence))
            if forwards % _EXACT_EVERY == 0:
                answers = ids[open_, P:]
                known = task.posterior(
                    [prompts[i] for i in open_], answers, answers == words.mask_id, strict=False
                )
                if known is not None:
                    truth = known[row, place[row, column] - P, prediction]
                    right = truth.isfinite()  # else the decode had gone wrong before
                    exact += _table(confidence[right], truth[right])
        forwards += 1
        ids[open_[:, None], place] = tokens
        rules[open_[:, None], place - P] += step.rule
    return Decoded(ids[:, P:], nfe, rules, _calibration(seen, ids), exact)


def _calibration(seen: list, ids: Tensor) -> Tensor:
    table = torch.zeros(3, BINS, dtype=torch.float64)
    for (row, place, prediction), confidence in seen:
        table += _table(confidence, ids[row, place] == prediction)
    return table


def _table(confidence: Tensor, right: Tensor) -> Tensor:
    table = torch.zeros(3, BINS, dtype=torch.float64)
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    for place, values in enumerate((torch.ones_like(right), confidence, right)):
        table[place].index_add_(0, number, values.double())
    return table


def calibration_error(table: Tensor) -> float:
    """Expected calibration error: mean of |confidence - right| over bins, weighed by cells."""
    return float((table[1] - table[2]).abs().sum() / table[0].sum().clamp(min=1))
