# SPDX-License-Identifier: Apache-2.0
"""DecodeState: rows that are reset, taken, put and stacked; copies; the step map."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import OFF, assert_same, clone, random_steps, state_tensors

from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.state import Counter, DecodeState

MASK = 20


def numbered(rows: int, first: int = 0, **options) -> DecodeState:
    """Every cell holds the number of its row; a whole block behind it."""
    state = DecodeState(rows, 3, **options)
    for tensor in state_tensors(state):
        numbers = first + torch.arange(rows, dtype=tensor.dtype)
        tensor.copy_(numbers[:, None].expand_as(tensor))
    return state


def held(state: DecodeState) -> list[int]:
    """The number of each row; all tensors agree."""
    (numbers,) = {tuple(tensor[:, 0].tolist()) for tensor in state_tensors(state)}
    return list(numbers)


def test_a_fresh_state():
    state = DecodeState(2, 3, step_map=True)
    assert (state.rows, state.block_length, state.device) == (2, 3, torch.device("cpu"))
    assert state.step_map.dtype == torch.int16 and (state.step_map == -1).all()
    assert (state.streak_id == -1).all() and not state.streak_count.any()
    assert state.counters.tolist() == [[0, 0, 0, -1, 0], [1, 0, 0, -1, 0]]
    assert DecodeState(2, 3).step_map is None
    assert "step_map=True" in repr(state)


@pytest.mark.parametrize(
    "rows, which",
    [
        (None, [0, 1, 2, 3]),
        (2, [2]),
        (-1, [3]),
        ([0, -2], [0, 2]),
        ((), []),
        (slice(1, 3), [1, 2]),
        ([True, False, True, False], [0, 2]),
        (torch.tensor([3, 1]), [1, 3]),
        (torch.tensor([False, True, False, True]), [1, 3]),
        (np.array([2]), [2]),
    ],
)
def test_reset_clears_the_block_and_keeps_the_row(rows, which):
    state = numbered(4, first=5, step_map=True)
    before = clone(state)
    assert state.reset(rows) is state
    fresh = DecodeState(4, 3, step_map=True)
    kept = [Counter.ROW_ID, Counter.STEP, Counter.ROW_SEED]
    assert torch.equal(state.counters[:, kept], before.counters[:, kept])
    for row in range(4):
        source = fresh if row in which else before
        for name in ("streak_count", "streak_id", "streak_sum", "streak_max", "step_map"):
            assert torch.equal(getattr(state, name)[row], getattr(source, name)[row]), name
        of_block = [Counter.BLOCK_STEP, Counter.BLOCK_MASKED]
        assert torch.equal(state.counters[row, of_block], source.counters[row, of_block])


def test_a_state_made_under_inference_mode_is_as_any_other():
    with torch.inference_mode():
        state = DecodeState(2, 3, step_map=True)
    state.reset(0).put([1], DecodeState(1, 3, step_map=True))
    assert not any(tensor.is_inference() for tensor in state_tensors(state))


@pytest.mark.parametrize("step_map", [False, True])
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies(duplicate, step_map):
    state = numbered(3, step_map=step_map)
    other = duplicate(state)
    assert_same(state_tensors(other), state_tensors(state))
    assert (other.step_map is not None) == step_map
    if duplicate is not copy.copy:
        other.reset()
        assert held(state) == [0, 1, 2]


def test_to_shares_what_is_there_already():
    state = numbered(2, step_map=True)
    same = state.to("cpu")
    assert same is not state and same.streak_id is state.streak_id
    assert state.to("meta").device.type == "meta" and state.to("meta").step_map.is_meta
    assert DecodeState(2, 3).to("cpu").step_map is None


def test_take_is_a_copy():
    state = numbered(4, step_map=True)
    for rows, want in (([3, 0], [3, 0]), (slice(1, 3), [1, 2]), (torch.tensor([2, 2]), [2, 2])):
        some = state.take(rows)
        assert held(some) == want
        some.reset()
    assert held(state) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "rows, want",
    [
        ([1, 3], [0, 10, 2, 11]),
        ([-1, 0], [11, 1, 2, 10]),
        (slice(2), [10, 11, 2, 3]),
        ([False, True, True, False], [0, 10, 11, 3]),
        (torch.tensor([2, 1]), [0, 11, 10, 3]),
    ],
)
def test_put(rows, want):
    state, other = numbered(4, step_map=True), numbered(2, 10, step_map=True)
    assert state.put(rows, other) is state and held(state) == want
    assert held(other) == [10, 11]


def test_stack():
    parts = [numbered(2, 4), numbered(0), numbered(1, 9)]
    whole = DecodeState.stack(parts)
    assert held(whole) == [4, 5, 9]
    whole.reset()
    assert held(parts[0]) == [4, 5]
    assert held(DecodeState.stack(iter([parts[2]]))) == [9]


UNLIKE = [
    (DecodeState(1, 4), ValueError, "a state of block_length '3', got '4'"),
    (DecodeState(1, 3, device="meta"), ValueError, "a state of device 'cpu', got 'meta'"),
    (DecodeState(1, 3, step_map=True), ValueError, "a state without a step map, got DecodeState"),
    (torch.zeros(1, 3), TypeError, "a DecodeState, got Tensor"),
    (None, TypeError, "a DecodeState, got NoneType"),
]


@pytest.mark.parametrize("other, error, message", UNLIKE)
def test_rows_that_do_not_fit(other, error, message):
    state = numbered(2)
    with pytest.raises(error, match=f"DecodeState.put: other takes {message}"):
        state.put([0], other)
    with pytest.raises(error, match=r"DecodeState.stack: states\[1\] takes " + message):
        DecodeState.stack([state, other])
    assert held(state) == [0, 1]


def test_put_and_stack_refuse():
    state = numbered(2)
    for rows in ([0, 1], [], slice(None), [True, True], torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="other takes a state of [02] rows, got DecodeState"):
            state.put(rows, numbered(1))
    with pytest.raises(ValueError, match=r"DecodeState.put: rows takes an integer in \[-2, 1\]"):
        state.put([2], numbered(1))
    with pytest.raises(ValueError, match="DecodeState.stack: states takes one or more"):
        DecodeState.stack([])
    with pytest.raises(TypeError, match="DecodeState: step_map takes a bool, got 1"):
        DecodeState(1, 2, step_map=1)


def test_the_step_map_says_when_each_cell_got_its_token(r2, device):
    """Edits too; `reset` forgets it, and a long block stops counting at the greatest int16."""
    config = DecodeConfig(MASK, quota=2, threshold=None, edit_threshold=0.0, **OFF)
    tokens = torch.full((2, 6), MASK, device=device)
    state = DecodeState(2, 6, device=device, step_map=True)
    want = torch.full((2, 6), -1, dtype=torch.int16, device=device)
    edited = False
    for number, z in enumerate(random_steps(9, (2, 6, 21), 3, MASK)):
        editable = tokens != MASK
        step = r2.decode_step(z.to(device), tokens, state, config, editable=editable)
        want[step.rule != Rule.NONE] = number
        edited |= bool((step.rule == Rule.EDIT).any())
        assert torch.equal(state.step_map, want)
    assert edited
    state.reset([0])
    assert (state.step_map[0] == -1).all() and torch.equal(state.step_map[1], want[1])
    for number, shown in ((32766, 32766), (32767, 32767), (32768, 32767), (2**40, 32767)):
        state.counters[:, Counter.BLOCK_STEP] = number
        tokens.fill_(MASK)
        step = r2.decode_step(z.to(device), tokens, state, config)
        assert (state.step_map[step.rule != Rule.NONE] == shown).all() and step.rule.any()


def test_select_writes_the_step_map_too(r2, device):
    tokens = torch.full((1, 4), MASK, device=device)
    state = DecodeState(1, 4, device=device, step_map=True)
    z = random_steps(10, (1, 4, 21), 1, MASK)[0].to(device)
    step = r2.select(z, tokens, state, DecodeConfig(MASK))
    assert torch.equal(state.step_map == 0, step.rule != Rule.NONE) and (tokens == MASK).all()


def test_rows_of_a_larger_state(r2, device):
    """`slots`: a state may have any number of rows; the others stay as they are."""
    state = DecodeState(7, 4, device=device)
    untouched = clone(state)
    slots = torch.tensor([5, 2], device=device)
    tokens = torch.full((2, 4), MASK, device=device)
    config = DecodeConfig(MASK, token_cluster="random")
    for z in random_steps(11, (2, 4, 21), 2, MASK):
        r2.decode_step(z.to(device), tokens, state, config, slots=slots)
    others = [0, 1, 3, 4, 6]
    assert_same(state_tensors(state.take(others)), state_tensors(untouched.take(others)))
    assert state.counters[[5, 2], Counter.STEP].tolist() == [2, 2]


@pytest.mark.parametrize(
    "kind",
    [
        range(0, 3, 2),
        np.array([0, -2]),
        np.array([True, False, True, False]),
        [np.True_, np.False_, np.True_, np.False_],
        [torch.tensor(i == 0 or i == 2) for i in range(4)],
        np.array([0, 2], dtype=object),
        [np.int64(0), torch.tensor(2)],
        slice(2, None, -2),
    ],
    ids=repr,
)
def test_a_sequence_of_rows_may_be_of_any_kind(kind):
    assert sorted(held(numbered(4).take(kind))) == [0, 2]
    fresh = numbered(4)
    fresh.streak_count.fill_(5)
    assert fresh.reset(kind).streak_count[:, 0].tolist() == [0, 5, 0, 5]


def test_no_rows_are_no_rows():
    for none in ((), [], range(0), np.array([]), np.zeros(0, dtype=int)):
        assert held(numbered(4).take(none)) == []


@pytest.mark.parametrize("rows", ["0", b"\0\1", {0, 1}, {0: 1}, [[0]], 1.0, slice("a"), None, ...])
def test_what_has_no_order_or_no_indices_is_no_sequence_of_rows(rows):
    for name in ("take", "put"):
        arguments = (rows,) if name == "take" else (rows, numbered(2))
        with pytest.raises(TypeError, match=f"DecodeState.{name}: rows takes"):
            getattr(numbered(4), name)(*arguments)


def test_a_row_is_put_once():
    """Of two that go to one row, one would be lost in silence."""
    for rows in ([1, 1], (-1, 3), np.array([0, 0])):
        with pytest.raises(ValueError, match="DecodeState.put: rows takes each row once"):
            numbered(4).put(rows, numbered(2, 10))


def test_rows_may_be_put_in_another_order():
    state = numbered(3, step_map=True)
    assert held(state.put([1, 2, 0], state)) == [2, 0, 1]


def test_a_device_that_there_is_not():
    for where, make in (
        ("DecodeState", lambda: DecodeState(1, 2, device="gpu")),
        ("DecodeState.to", lambda: DecodeState(1, 2).to("gpu")),
    ):
        with pytest.raises(ValueError, match=f"{where}: device takes .* got 'gpu'"):
            make()
