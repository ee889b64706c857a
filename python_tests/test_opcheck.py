# SPDX-License-Identifier: Apache-2.0
"""The registered ops keep torch's contract: schema, mutation, fake kernels, dynamic shapes."""

import dataclasses

import pytest
import torch
from cases import STREAKS, laid_out, strided_tokens

from r2dllm_ext.config import DecodeConfig, op_options
from r2dllm_ext.row_params import RowParams
from r2dllm_ext.state import DecodeState

OPS = (
    "decode_step",
    "decode_step.statistics",
    "merge_statistics",
    "positional_ambiguity",
    "select",
    "select.statistics",
    "token_confidence",
    "update_stability_",
    "vocab_statistics",
    "window_pool",
)
SHAPES = [(2, 6, 33), (1, 1, 2), (0, 4, 5), (3, 0, 5)]


def opcheck(name: str, args: tuple, **kwargs) -> None:
    torch.library.opcheck(getattr(torch.ops.r2dllm, name).default, args, kwargs)


def inputs(shape, device: str, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=g).to(dtype).to(device)  # opcheck takes NaN != NaN
    masked = torch.ones(shape[:2], dtype=torch.bool, device=device)
    return logits, masked, DecodeState(*shape[:2], device=device)


def test_every_op_is_registered(r2):
    """With kernels for the CPU, for fake tensors and, if built with CUDA, for it."""
    names = {
        name.removeprefix("r2dllm::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("r2dllm::")
    }
    assert set(OPS) <= names
    keys = ("CPU", "Meta", *(("CUDA",) if r2.build_info()["cuda"] else ()))
    for op in OPS:
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"r2dllm::{op}", key), (op, key)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_token_confidence(r2, device, shape, dtype):
    logits, masked, _ = inputs(shape, device, dtype)
    opcheck("token_confidence", (logits,))
    if logits.numel():  # opcheck cannot copy an empty tensor with gaps
        opcheck("token_confidence", (laid_out(logits, "padded"), masked, 0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["decode_step", "select"])
def test_step(r2, device, op, shape):
    configs = (
        DecodeConfig(0),
        DecodeConfig(0, base="factor", token_cluster="random", temperature=0.7, top_k=3, top_p=0.9),
    )
    for number, config in enumerate(configs):
        logits, masked, state = inputs(shape, device)
        tokens = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        tokens = strided_tokens(tokens) if number else tokens
        candidates = masked if number else None
        given = (candidates, None, None, None, [])
        opcheck(op, (logits, tokens, *held(state), *given, number, *config._op_args))


def held(state: DecodeState | None) -> list:
    """The op's arguments of a state."""
    return [getattr(state, name, None) for name in DecodeState.__slots__]


@pytest.mark.parametrize("op", ["decode_step", "select"])
def test_step_with_everything(r2, device, op):
    """int32 tokens, a state by slot with a step map, edits, proposals, rows; and no state."""
    rows, length = 2, 6
    logits, masked, _ = inputs((rows, length, 33), device)
    tokens = torch.arange(rows * length, device=device).view(rows, length) % 3
    state = DecodeState(5, length, device=device, step_map=True)
    own = RowParams(
        quota=torch.tensor([0, 2], device=device), threshold=torch.full((rows,), 0.1, device=device)
    )
    slots = torch.tensor([4, 1], device=device)
    edits = DecodeConfig(0, edit_threshold=0.1, report_entropy=True)
    given = (masked, tokens > 1, tokens, slots, own._op_args)
    opcheck(op, (logits, tokens.int(), *held(state), *given, 0, *edits._op_args))
    budget = DecodeConfig.entropy(None)
    given = (masked, None, None, None, [])
    opcheck(op, (logits, tokens.int(), *held(None), *given, 1, *budget._op_args))


@pytest.mark.parametrize("op", ["decode_step", "select"])
@pytest.mark.parametrize("overload", ["default", "statistics"])
def test_defaults_of_the_schema_are_those_of_the_config(r2, op, overload):
    """`DecodeConfig._op_args` leaves out what the op's schema says by itself."""
    schema = getattr(getattr(torch.ops.r2dllm, op), overload)._schema
    names = [argument.name for argument in schema.arguments]
    options = schema.arguments[names.index("mask_id") :]
    config = DecodeConfig(7)
    assert config._op_args == (7,)
    assert config._all_op_args()[1:] == tuple(option.default_value for option in options[1:])
    last = config.replace(seed=1)
    assert last._op_args == last._all_op_args() and len(last._op_args) == len(options)
    release = config.replace(mask_prediction="allow", confidence_dtype="logits", temperature=0.5)
    assert release._op_args == (7, 1, True, 0.5)
    names = ["confidence_dtype" if "logits_dtype" in o.name else o.name for o in options]
    assert list(op_options((7,))) == names


def test_fields_of_rows_are_in_the_order_of_the_op(r2, device):
    """The op names a tensor by its place."""
    logits, _, state = inputs((2, 3, 5), device)
    for field in dataclasses.fields(RowParams):
        rows = RowParams(**{field.name: torch.ones(3, dtype=torch.int64, device=device)})
        config = DecodeConfig(0, edit_threshold=0.5)
        tokens = torch.zeros(2, 3, dtype=torch.int64, device=device)
        with pytest.raises((TypeError, ValueError), match=f"decode_step: rows.{field.name} takes"):
            r2.decode_step(logits, tokens, state, config, rows=rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_rules(r2, device, shape):
    logits, masked, state = inputs(shape, device)
    ids, p = r2.token_confidence(logits)
    rows = torch.arange(shape[0], device=device)
    streaks = [getattr(state, name) for name in STREAKS]
    opcheck("window_pool", (p, masked, 3, 0.5, 1))
    opcheck("window_pool", (p.half(), masked, 3, 0.5))
    opcheck("positional_ambiguity", (ids, p, masked, 0.5))
    opcheck("positional_ambiguity", (ids, p.t().contiguous().t(), masked, 0.5, 2, 3, 7, rows, 4))
    for mode in range(3):
        opcheck("update_stability_", (*streaks, ids, p, masked, masked, 1, 0.5, mode))
