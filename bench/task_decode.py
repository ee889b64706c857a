# SPDX-License-Identifier: Apache-2.0
"""Decode many prompts of a task at once, for rollouts and curves on the CPU.

Rows do not wait for each other: each has its own block and leaves the batch when it is done, so
that a batch costs what its rows cost. Rules: the cells of a block are taken in the order of their
confidence p, and committed

    vanilla        the first
    threshold τ    all with p >= τ, at least the first
    budget ε       while the sum of 1 - p over those *before* is at most ε: the last one is free
    entropy γ      the same with the entropy (nats) instead of 1 - p
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r2dllm_ext.models import Transformer
from r2dllm_ext.tasks import Task

BLOCK_LENGTH = 32


class Rule(NamedTuple):
    name: str = "vanilla"
    value: float = 0.0


class Decoded(NamedTuple):
    """Of n rows: answers [n, A], forwards [n], and at which forward a cell was committed [n, A]."""

    tokens: Tensor
    nfe: Tensor
    step: Tensor
    calibration: Tensor  # [3, bins]: cells, sum of confidence, predictions that came to be
    exact: Tensor  # the same, with the true probability of the prediction, where a task knows it


BINS = 15
_EXACT_EVERY = 6  # forwards: the true distribution costs as much as a forward


def taken(confidence: Tensor, entropy: Tensor, masked: Tensor, rule: Rule) -> Tensor:
    """Cells [n, L], bool, that a rule commits; at least one where any is masked."""
    confidence = confidence.masked_fill(~masked, -1.0)
    order = confidence.argsort(dim=1, descending=True)
    p = confidence.gather(1, order)
    first = torch.zeros_like(masked)
    first[:, 0] = True
    if rule.name == "vanilla":
        chosen = first
    elif rule.name == "threshold":
        chosen = first | (p >= rule.value)
    elif rule.name in ("budget", "entropy"):
        cost = 1 - p if rule.name == "budget" else entropy.gather(1, order)
        chosen = cost.cumsum(1) - cost <= rule.value
    else:
        raise ValueError(f"taken: rule is {rule.name!r}, takes vanilla, threshold, budget, entropy")
    return torch.zeros_like(masked).scatter(1, order, chosen) & masked


@torch.no_grad()
def decode(
    model: Transformer,
    task: Task,
    prompts: list[str],
    rule: Rule,
    *,
    batch: int = 64,
    temperature: float = 0.0,
    below: float = 0.5,
    generator: torch.Generator | None = None,
    calibrate: bool = False,
) -> Decoded:
    """Answers by `rule`; with `temperature`, cells whose p is under `below` are drawn.

    A drawn token is judged by its own probability at temperature 1.
    """
    parts = []
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch]
        parts.append(_decode(model, task, some, rule, temperature, below, generator, calibrate))
    *cells, calibration, exact = zip(*parts, strict=True)
    tables = (torch.stack(table).sum(0) for table in (calibration, exact))
    return Decoded(*map(torch.cat, cells), *tables)


def _prompt_ids(task: Task, prompts: list[str]) -> Tensor:
    """Left-padded to the shortest whole number of blocks that holds them, then the masks."""
    encoded = [task.tokenizer.encode(prompt) for prompt in prompts]
    long = -(-max(map(len, encoded)) // BLOCK_LENGTH) * BLOCK_LENGTH
    tail = [task.tokenizer.mask_id] * task.answer_length
    return torch.tensor([[task.tokenizer.pad_id] * (long - len(e)) + e + tail for e in encoded])


def _decode(model, task, prompts, rule, temperature, below, generator, calibrate) -> Decoded:
    ids, exact, forwards = _prompt_ids(task, prompts), torch.zeros(3, BINS).double(), 0
    n, A, words = len(ids), task.answer_length, task.tokenizer
    P = ids.shape[1] - A
    keys, cell = ids != words.pad_id, torch.arange(BLOCK_LENGTH)
    nfe = torch.zeros(n, dtype=torch.int64)
    step = torch.full((n, A), -1, dtype=torch.int16)
    seen = []  # per forward: rows, cells, prediction, confidence of what was masked
    while len(open_ := (ids[:, P:] == words.mask_id).any(1).nonzero()[:, 0]):
        first = (ids[open_, P:] == words.mask_id).int().argmax(1) // BLOCK_LENGTH * BLOCK_LENGTH
        place = P + first[:, None] + cell
        logits = model(ids[open_], attention_mask=keys[open_], logits_positions=place).logits
        logits[..., words.mask_id] = -torch.inf
        p = logits.softmax(-1)
        confidence, prediction = p.max(-1)
        block = ids[open_[:, None], place]
        masked = block == words.mask_id
        if calibrate:
            row, column = masked.nonzero(as_tuple=True)
            where = torch.stack((open_[row], place[row, column], prediction[row, column]), dim=1)
            seen.append((where, confidence[row, column]))
            if forwards % _EXACT_EVERY == 0:
                answers = ids[open_, P:]
                known = task.posterior(
                    [prompts[i] for i in open_], answers, answers == words.mask_id, strict=False
                )
                if known is not None:
                    truth = known[row, place[row, column] - P, prediction[row, column]]
                    right = truth.isfinite()  # else the decode had gone wrong before
                    exact += _table(confidence[row, column][right], truth[right])
        forwards += 1
        if temperature:
            unsure = confidence < below
            other = (logits[unsure] / temperature).softmax(-1)
            drawn = torch.multinomial(other, 1, generator=generator) if len(other) else None
            if drawn is not None:
                prediction[unsure] = drawn[:, 0]
                confidence[unsure] = p[unsure].gather(1, drawn)[:, 0]
        entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
        commit = taken(confidence, entropy, masked, rule)
        ids[open_[:, None], place] = torch.where(commit, prediction, block)
        nfe[open_] += 1
        row, column = commit.nonzero(as_tuple=True)
        step[open_[row], place[row, column] - P] = nfe[open_[row]].to(torch.int16)
    return Decoded(ids[:, P:], nfe, step, _calibration(seen, ids), exact)


def _calibration(seen: list, ids: Tensor) -> Tensor:
    table = torch.zeros(3, BINS, dtype=torch.float64)
    for where, confidence in seen:
        table += _table(confidence, ids[where[:, 0], where[:, 1]] == where[:, 2])
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
