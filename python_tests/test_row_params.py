# SPDX-License-Identifier: Apache-2.0
"""RowParams: a row with its own options is that row alone; what it refuses, and what it ignores."""

import dataclasses

import pytest
import torch
from cases import OFF, assert_same, clone, random_steps, same_bits, state_tensors, sure_logits

from r2dllm_ext.config import DecodeConfig, Rule
from r2dllm_ext.row_params import RowParams
from r2dllm_ext.state import DecodeState

MASK, SHAPE = 20, (4, 12, 21)
# Field -> a config in which it matters, the values of four rows, the dtypes of the tensor.
NUMBERS, INTEGERS = (torch.float32, torch.float64), (torch.int32, torch.int64)
DRAWS = {"temperature": 1.0, **OFF}
FIELDS = {
    "threshold": (OFF, (0.25, 0.5, 0.75, 1.0), NUMBERS),
    "quota": (OFF, (0, 1, 3, 99), INTEGERS),
    "error_budget": ({"base": "budget", **OFF}, (0.0, 0.25, 1.0, 4.0), NUMBERS),
    "entropy_budget": ({"base": "entropy", **OFF}, (0.0, 0.5, 2.0, 40.0), NUMBERS),
    "spatial_threshold": ({"temporal_steps": 0}, (0.125, 0.375, 0.625, 1.0), NUMBERS),
    "temporal_threshold": ({**OFF, "temporal_steps": 1}, (0.125, 0.375, 0.625, 1.0), NUMBERS),
    "edit_threshold": ({"edit_threshold": 0.5, **OFF}, (0.125, 0.375, 0.625, 1.0), NUMBERS),
    "temperature": (DRAWS, (0.0, 0.5, 1.5, 1e30), NUMBERS),
    "top_k": (DRAWS, (0, 1, 3, 99), INTEGERS),
    "top_p": (DRAWS, (0.25, 0.5, 0.75, 1.0), NUMBERS),
    "min_p": (DRAWS, (0.0, 0.125, 0.5, 1.0), NUMBERS),
    "seed": (DRAWS, (0, 5, -(2**63), 2**63 - 1), (torch.int64,)),
}
OFF_VALUES = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # where a config says None
CASES = [(name, dtype) for name, (*_, dtypes) in FIELDS.items() for dtype in dtypes]


def inputs(device: str):
    """Tokens with decided cells that may be edited, and a state."""
    tokens = torch.full(SHAPE[:2], MASK, device=device)
    tokens[:, ::3] = 1
    return tokens, tokens == 1, DecodeState(*SHAPE[:2], device=device, step_map=True)


def test_all_fields_are_those_of_the_config():
    names = [field.name for field in dataclasses.fields(RowParams)]
    assert names == list(FIELDS)
    assert set(names) <= {field.name for field in dataclasses.fields(DecodeConfig)}


@pytest.mark.parametrize("name, dtype", CASES)
def test_a_row_is_that_row_alone(r2, device, name, dtype):
    """Decision, tokens and state of three steps, to the bit; the value makes a difference."""
    options, values, _ = FIELDS[name]
    config = DecodeConfig(MASK, report_entropy=True, **options)
    edits = config.edit_threshold is not None
    rows = RowParams(**{name: torch.tensor(values, dtype=dtype, device=device)})
    tokens, decided, state = inputs(device)
    twin, alone_tokens = clone(state), tokens.clone()
    changed = False
    for z in random_steps(3, SHAPE, 3, MASK):
        z = z.to(device)
        editable = decided if edits else None
        plain = r2.select(z, tokens, clone(state), config, editable=editable)
        got = r2.decode_step(z, tokens, state, config, editable=editable, rows=rows)
        changed |= not same_bits(got.rule, plain.rule)
        changed |= not same_bits(got.prediction, plain.prediction)
        for b, value in enumerate(values):
            row = slice(b, b + 1)
            own = config.replace(**{name: None if value == OFF_VALUES.get(name) else value})
            one = twin.take([b])
            cells = decided[row] if edits else None
            want = r2.decode_step(z[row], alone_tokens[row], one, own, editable=cells)
            twin.put([b], one)
            assert_same([part[row] for part in got], list(want), f"row {b}")
        assert_same(state_tensors(state), state_tensors(twin))
        assert torch.equal(tokens, alone_tokens)
    assert changed


@pytest.mark.parametrize("name", FIELDS)
def test_rows_of_configs(name):
    """What each config says, exactly; the first one is that of the step."""
    options, values, _ = FIELDS[name]
    first = DecodeConfig(MASK, **options)
    said = [None if value == OFF_VALUES.get(name) else value for value in values]
    rows = RowParams.of([first.replace(**{name: value}) for value in said])
    tensor = getattr(rows, name)
    assert tensor.tolist() == list(values)
    assert tensor.dtype in (torch.float64, torch.int64)
    others = [field for field in FIELDS if field != name]
    assert all(getattr(rows, field) is None for field in others)
    assert len(getattr(RowParams.of([first] * 3, names=[name]), name)) == 3


def test_what_rows_can_not_say():
    config = DecodeConfig.r2(MASK)
    assert not RowParams.of([config, config])._op_args
    for configs, message in (
        ([], "at least one, got .*"),
        ([config, config.replace(temporal_steps=1)], "one temporal_steps for all rows, got .3, 1."),
        ([config, config.replace(threshold=None)], "one threshold for all rows, got .0.9, None."),
    ):
        with pytest.raises(ValueError, match=f"RowParams.of: configs takes {message}"):
            RowParams.of(configs)
    with pytest.raises(ValueError, match="configs takes one edit_threshold for all rows"):
        RowParams.of([config], names=["edit_threshold"])
    with pytest.raises(ValueError, match="configs takes one gamma for all rows, got None"):
        RowParams.of([config], names=["gamma"])


# One value of each kind that is out of range, beside three that are not.
BAD = [
    *(
        (name, value)
        for name in ("threshold", "spatial_threshold", "temporal_threshold", "edit_threshold")
        for value in (-0.01, 1.01, torch.nan)
    ),
    *((name, value) for name in ("error_budget", "entropy_budget") for value in (-1e-9, torch.nan)),
    *(("temperature", value) for value in (-1.0, torch.nan, torch.inf)),
    *((name, value) for name in ("top_p", "min_p") for value in (-0.01, 1.01, torch.nan)),
    ("quota", -1),
    ("top_k", -1),
]


@pytest.mark.parametrize("name, bad", BAD)
def test_a_value_out_of_range_leaves_its_row_alone(r2, device, name, bad):
    options, values, dtypes = FIELDS[name]
    config = DecodeConfig(MASK, **options)
    edits = config.edit_threshold is not None
    given = torch.tensor(values, dtype=dtypes[0], device=device)
    given[2] = bad
    tokens, decided, state = inputs(device)
    before, fresh = tokens.clone(), clone(state)
    z = random_steps(4, SHAPE, 1, MASK)[0].to(device)
    rows = RowParams(**{name: given})
    editable = decided if edits else None
    step = r2.decode_step(z, tokens, state, config, editable=editable, rows=rows)
    assert not step.rule[2].any() and torch.equal(tokens[2], before[2])
    assert step.remaining[2] == (before[2] == MASK).sum()
    assert_same(state_tensors(state.take([2])), state_tensors(fresh.take([2])))
    top, p = r2.token_confidence(z, exclude_id=MASK)
    cells = (before[2] == MASK) | (decided[2] if edits else False)
    assert torch.equal(step.prediction[2], top[2].where(cells, -1))
    assert same_bits(step.confidence[2], p[2].where(cells, 0))
    assert step.rule[[0, 1, 3]].any()


@pytest.mark.parametrize("slot", [-1, 4, 2**40, -(2**63)])
def test_a_slot_that_is_not_there_leaves_its_row_alone(r2, device, slot):
    tokens, _, state = inputs(device)
    before, fresh = tokens.clone(), clone(state)
    slots = torch.tensor([3, slot, 0, 1], device=device)
    z = random_steps(4, SHAPE, 1, MASK)[0].to(device)
    step = r2.decode_step(z, tokens, state, DecodeConfig(MASK), slots=slots)
    assert not step.rule[1].any() and torch.equal(tokens[1], before[1])
    assert_same(state_tensors(state.take([2])), state_tensors(fresh.take([2])))
    assert state.counters[:, 1].tolist() == [1, 1, 0, 1] and step.rule[[0, 2, 3]].any()


def test_rows_that_draw_beside_rows_that_do_not(r2, device):
    logits = sure_logits([(3, 0.25)] * 64).to(device).expand(2, 64, 16).contiguous()
    tokens = torch.full((2, 64), 15, device=device)
    rows = RowParams(temperature=torch.tensor([0.0, 1.0], device=device))
    config, state = DecodeConfig(15, threshold=0.0, **OFF), DecodeState(2, 64, device=device)
    r2.decode_step(logits, tokens, state, config, rows=rows)
    assert (tokens[0] == 3).all() and set(tokens[1].tolist()) == {3, 4, 5, 6}


def test_take():
    rows = RowParams(
        threshold=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), quota=torch.tensor([1, 2, 3])
    )
    for index in ([2, 0], torch.tensor([2, 0]), [-1, -3]):
        kept = rows.take(index)
        assert kept.quota.tolist() == [3, 1] and kept.threshold.tolist() == [0.3, 0.1]
        assert kept.seed is None and kept.threshold.dtype == torch.float64
    assert rows.take(torch.tensor([False, True, False])).quota.tolist() == [2]
    some = rows.take(slice(1, None))
    some.quota.zero_()
    assert rows.quota.tolist() == [1, 2, 3]
    assert RowParams().take([0]).quota is None
    with pytest.raises(ValueError, match=r"RowParams.take: rows takes an integer in \[-3, 2\]"):
        rows.take([3])


def test_nothing_given_is_the_plain_call(r2, device):
    tokens, _, state = inputs(device)
    z = random_steps(5, SHAPE, 1, MASK)[0].to(device)
    want = r2.select(z, tokens, clone(state), DecodeConfig(MASK))
    assert_same(r2.select(z, tokens, state, DecodeConfig(MASK), rows=RowParams()), want)
    assert RowParams()._op_args == [] and len(RowParams(seed=torch.ones(1))._op_args) == 12


@pytest.mark.parametrize("name", FIELDS)
def test_what_is_no_tensor(name):
    for value in (0.5, [0.5], "0.5"):
        with pytest.raises(TypeError, match=f"RowParams: {name} takes a torch.Tensor or None, got"):
            RowParams(**{name: value})


def test_frozen():
    with pytest.raises(AttributeError):
        RowParams().threshold = torch.ones(1)


def test_other_values_do_not_compile_again(r2, device):
    """And a graph sees what the tensors hold when it runs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = DecodeConfig(MASK, **OFF)

    def step(logits, tokens, state, rows):
        return r2.decode_step(logits, tokens, state, config, rows=rows).rule

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    z, counts = random_steps(6, SHAPE, 1, MASK)[0].to(device), []
    for value in (0.25, 0.75, 1.0):
        rows = RowParams(threshold=torch.full((4,), value, device=device))
        tokens, _, state = inputs(device)
        twin = tokens.clone()
        got = compiled(z, tokens, state, rows)
        assert torch.equal(got, step(z, twin, DecodeState(*SHAPE[:2], device=device), rows))
        assert torch.equal(tokens, twin)
        counts.append(int((got == Rule.THRESHOLD).sum()))
    assert counts[0] > counts[1] > counts[2]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_captured_graph_reads_them_in_place(r2, cuda):
    config, shape = DecodeConfig(MASK, **OFF), SHAPE
    z = random_steps(6, shape, 1, MASK)[0].to(cuda)
    tokens, _, state = inputs(cuda)
    rows = RowParams(threshold=torch.full((4,), 1.0, device=cuda))
    slots = torch.arange(4, device=cuda)
    r2.select(z, tokens, clone(state), config, rows=rows, slots=slots)  # warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step = r2.select(z, tokens, state, config, rows=rows, slots=slots)
    counts = []
    for value in (1.0, 0.25):
        rows.threshold.fill_(value)
        graph.replay()
        want = r2.select(z, tokens, clone(state), config.replace(threshold=value))
        assert same_bits(step.rule, want.rule)
        counts.append(int(step.rule.count_nonzero()))
    assert counts[1] > counts[0]
