# SPDX-License-Identifier: Apache-2.0
"""A state by slot, as an engine uses it: requests come and go between steps, and none notices."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from cases import assert_same, random_steps, state_tensors
from torch import Tensor

from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.row_params import RowParams
from r2dllm_ext.state import Counter as Column
from r2dllm_ext.state import DecodeState

LENGTH, VOCAB, MASK, SLOTS, STEPS = 8, 61, 60, 6, 500
CONFIG = DecodeConfig(
    MASK, temporal_steps=2, token_cluster="random", threshold=0.95, neighbour_radius=2, seed=11,
    confidence_cluster_size=2, edit_threshold=0.9, report_entropy=True,
)  # fmt: skip
# Options that a request may have of its own, and a dtype of their tensor.
OPTIONS = {
    "threshold": ((0.6, 0.9, 1.0), torch.float32),
    "quota": ((0, 1, 2), torch.int32),
    "spatial_threshold": ((0.7, 0.95), torch.float64),
    "temporal_threshold": ((0.3, 0.8), torch.float32),
    "edit_threshold": ((0.5, 0.9), torch.float32),
    "temperature": ((0.0, 0.0, 1.0), torch.float64),
    "top_k": ((0, 5), torch.int64),
    "top_p": ((0.8, 1.0), torch.float32),
    "min_p": ((0.0, 0.1), torch.float32),
    "seed": ((3, -7), torch.int64),
}


@dataclass
class Request:
    """A request, and the same decoded alone: its own state, tokens and config."""

    number: int
    slot: int
    blocks: int  # that it still has
    options: dict
    device: str
    tokens: Tensor = field(init=False)  # [1, L]
    alone: Tensor = field(init=False)
    state: DecodeState = field(init=False)  # of the row alone
    steps: int = 0

    def __post_init__(self) -> None:
        self.tokens = torch.full((1, LENGTH), MASK, device=self.device)
        self.alone = self.tokens.clone()
        self.state = self.fresh()

    def fresh(self) -> DecodeState:
        """A state of one row with the identity of the request."""
        state = DecodeState(1, LENGTH, device=self.device, step_map=True)
        state.counters[:, Column.ROW_ID] = self.number
        return state

    def config(self) -> DecodeConfig:
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        said = {name: None if value == off.get(name) else value for name, value in self.values()}
        return CONFIG.replace(**said)

    def values(self):
        """What the tensors hold: rounded to their dtype."""
        for name, value in self.options.items():
            yield name, torch.tensor(value, dtype=OPTIONS[name][1]).item()

    def logits(self) -> Tensor:
        """[1, L, V] of the next step, whoever shares the batch."""
        seed = 7919 * self.number + self.steps // 4  # predictions stand for some steps
        return random_steps(seed, (1, LENGTH, VOCAB), 4, MASK)[self.steps % 4].to(self.device)

    def next_block(self) -> None:
        self.blocks -= 1
        self.tokens.fill_(MASK)
        self.alone.fill_(MASK)
        self.state.reset()


def parameters(batch: list[Request], device: str) -> RowParams:
    tensors = {
        name: torch.tensor([request.options[name] for request in batch], dtype=dtype, device=device)
        for name, (_, dtype) in OPTIONS.items()
    }
    return RowParams(**tensors)


def test_requests_come_and_go(r2, device):
    """500 steps; at each, every row equals the same row alone: decision, tokens, state."""
    random = Random(5)
    state = DecodeState(SLOTS, LENGTH, device=device, step_map=True)
    running: list[Request] = []
    met: Counter = Counter()
    for step in range(STEPS):
        free = sorted(set(range(SLOTS)) - {request.slot for request in running})
        while free and (not running or random.random() < 0.4):
            slot = free.pop(random.randrange(len(free)))
            options = {name: random.choice(values) for name, (values, _) in OPTIONS.items()}
            request = Request(met["arrived"], slot, random.randint(1, 3), options, device)
            state.put([slot], request.fresh())
            running.insert(random.randrange(len(running) + 1), request)
            met["arrived"] += 1
        batch = [request for request in running if random.random() < 0.9] or running[:1]
        random.shuffle(batch)

        tokens = torch.cat([request.tokens for request in batch])
        before = tokens.clone()
        logits = torch.cat([request.logits() for request in batch])
        got = r2.decode_step(
            logits, tokens, state, CONFIG,
            candidates=before == MASK, editable=before != MASK, rows=parameters(batch, device),
            slots=torch.tensor([request.slot for request in batch], device=device),
        )  # fmt: skip
        for b, request in enumerate(batch):
            where = f"step {step} request {request.number}"
            cells = request.alone == MASK
            want = r2.decode_step(
                request.logits(), request.alone, request.state, request.config(),
                candidates=cells, editable=~cells,
            )  # fmt: skip
            row = slice(b, b + 1)
            assert_same([part[row] for part in got], list(want), where)
            assert_same([tokens[row]], [request.alone], f"{where} tokens")
            own = state.take([request.slot])
            assert_same(state_tensors(own), state_tensors(request.state), f"{where} state")
            met.update(Rule(code) for code in want.rule.flatten().tolist())
            request.tokens = tokens[row].clone()
            request.steps += 1
            if want.remaining.item() == 0:
                request.next_block()
                state.reset([request.slot])
                met["blocks"] += 1
        # First done, first out, whoever else is under way; some are given up.
        for request in list(running):
            if request.blocks == 0 or random.random() < 0.01:
                running.remove(request)
                met["done" if request.blocks == 0 else "given up"] += 1
    assert met["done"] > 50 and met["given up"] > 5 and met["blocks"] > 100, met
    assert all(met[rule] > 20 for rule in Rule if rule is not Rule.BASE), met


def test_stack_take_put_move_rows(device):
    """Rows keep what they hold, their identity too, however they are moved."""
    states = [DecodeState(rows, 3, device=device, step_map=True) for rows in (2, 1)]
    for first, state in zip((10, 12), states, strict=True):
        for tensor in state_tensors(state):
            names = first + torch.arange(state.rows, dtype=tensor.dtype, device=device)
            tensor.copy_(names[:, None].expand_as(tensor))
    whole = DecodeState.stack(states)
    assert whole.counters[:, Column.ROW_ID].tolist() == [10, 11, 12]
    whole.put([0, 2], whole.take([2, 0]))
    for tensor in state_tensors(whole):
        assert tensor[:, 0].tolist() == [12, 11, 10]
    with pytest.raises(ValueError, match="DecodeState.put"):
        whole.put([0], states[0])
