# SPDX-License-Identifier: Apache-2.0
"""What an op writes, autograd notices: through the tensor itself, its views and their base."""

import pytest
import torch
import torch.nn.functional as F
from cases import STREAKS

from r2dllm_ext import DecodeConfig, DecodeState

STALE = "modified by an inplace operation"


def stability(r2, state):
    """One masked cell whose prediction is seen once: all four streak tensors are written."""
    masked = torch.ones(state.rows, state.block_length, dtype=torch.bool, device=state.device)
    return r2.update_stability_(
        state,
        torch.full_like(state.streak_id, 5),
        torch.full_like(state.streak_sum, 0.5),
        was_masked=masked,
        is_masked=masked,
        steps=2,
        min_confidence=0.9,
    )


@pytest.mark.parametrize("name", ["streak_sum", "streak_max"])
def test_what_a_product_saved_is_stale(r2, device, name):
    state = DecodeState(1, 1, device=device)
    factor = torch.ones(1, 1, device=device, requires_grad=True)
    product = factor * getattr(state, name)
    stability(r2, state)
    with pytest.raises(RuntimeError, match=STALE):
        product.sum().backward()


def test_what_an_embedding_looked_up_is_stale(r2, device):
    state = DecodeState(1, 1, device=device)
    state.streak_id.zero_()
    table = torch.ones(9, 2, device=device, requires_grad=True)
    rows = F.embedding(state.streak_id, table)
    stability(r2, state)
    with pytest.raises(RuntimeError, match=STALE):
        rows.sum().backward()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_views_and_their_base_count_the_same_writes(r2, device, mode):
    state = DecodeState(2, 3, device=device)
    bases = {name: getattr(state, name) for name in STREAKS}
    for name, base in bases.items():
        setattr(state, name, base[:1])
    siblings = {name: base[:, 1:] for name, base in bases.items()}
    before = {name: base._version for name, base in bases.items()}
    with mode():
        stability(r2, state)
    for name, base in bases.items():
        assert base._version == siblings[name]._version == before[name] + 1, name


def test_a_refused_call_counts_as_no_write(r2, device):
    state = DecodeState(1, 1, device=device)
    before = [getattr(state, name)._version for name in STREAKS]
    with pytest.raises(ValueError, match="steps takes"):
        torch.ops.r2dllm.update_stability_(
            *(getattr(state, name) for name in STREAKS),
            torch.zeros_like(state.streak_id),
            torch.zeros_like(state.streak_sum),
            *[torch.ones(1, 1, dtype=torch.bool, device=device)] * 2,
            0,
            0.5,
        )
    assert [getattr(state, name)._version for name in STREAKS] == before


def test_inference_tensors_have_no_count(r2, device):
    with torch.inference_mode():
        state = DecodeState(1, 1, device=device).take([0])
    stability(r2, state)
    assert state.streak_count.tolist() == [[1]] and state.streak_count.is_inference()


def step(r2, op, tokens, state):
    logits = torch.zeros(1, 2, 9, device=tokens.device)
    return getattr(r2, op)(logits, tokens, state, DecodeConfig(8))


def test_tokens_that_an_embedding_looked_up_are_stale(r2, device):
    """A lookup through a view: without the count, gradients go to the rows of other tokens."""
    sequence = torch.full((1, 4), 8, device=device)
    table = torch.ones(9, 2, device=device, requires_grad=True)
    rows = F.embedding(sequence, table)
    step(r2, "decode_step", sequence[:, 2:], DecodeState(1, 2, device=device))
    with pytest.raises(RuntimeError, match=STALE):
        rows.sum().backward()


@pytest.mark.parametrize("op, writes", [("decode_step", True), ("select", False)])
def test_a_step_counts_as_one_write_of_what_it_writes(r2, device, op, writes):
    tokens, state = torch.full((1, 2), 8, device=device), DecodeState(1, 2, device=device)
    written = [getattr(state, name) for name in (*STREAKS, "counters")]
    before = [tokens._version, *(tensor._version for tensor in written)]
    step(r2, op, tokens, state)
    after = [tokens._version, *(tensor._version for tensor in written)]
    assert [new - old for new, old in zip(after, before, strict=True)] == [writes, 1, 1, 1, 1, 1]
