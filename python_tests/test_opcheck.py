# SPDX-License-Identifier: Apache-2.0
"""The registered ops keep torch's contract: schema, mutation, fake kernels, dynamic shapes."""

import pytest
import torch
from cases import STREAKS, laid_out, strided_tokens

from r2dllm_ext.config import DecodeConfig
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
        streaks = [getattr(state, name) for name in STREAKS]
        candidates = masked if number else None
        args = (logits, tokens, *streaks, state.counters, candidates, number, *config._op_args)
        opcheck(op, args)


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
    assert release._op_args == (7, True, True, 0.5)


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
