# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM (v1), its forks and R2-dLLM's own release: their loops, decided by `decode_step`.

    from r2dllm_ext.integrations import fast_dllm
    undo = fast_dllm.patch(generate)                    # their llada/generate.py, same tokens
    undo = fast_dllm.patch(generate, temporal_steps=3)  # and a rule that they do not have

Written for Fast-dLLM 24cc59e and R2-dLLM 6d06bb2, which are no packages; `patch` refuses functions
of a fork that take arguments it does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._checks import refuse
from ..config import Rule
from ..ops import select
from ..row_params import RowParams
from ..state import Counter, DecodeState
from . import _fast_dllm_loops as loops
from .rules import cached_engine_config


def get_transfer_index(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | None,
    threshold: float | None = None,
    return_confidence: bool = False,
) -> tuple[Tensor, ...]:
    """Their function of this name: which masked cells get a token now, and which one.

    Args:
        logits: [B, L, V] as `decode_step` takes them; only the rows of masked cells are read.
        temperature: 0 = argmax, > 0 draws; torch's random numbers (`manual_seed`) give the seed.
        remasking: "low_confidence"; "random" raises NotImplementedError.
        mask_index: [B, L] bool, the cells that may get one.
        x: [B, L] int64, the tokens.
        num_transfer_tokens: [B] or [B, 1], so many best cells of each row; without `threshold`.
        threshold: every cell of at least this confidence, and the best one; above 1 the best alone.
        return_confidence: of R2-dLLM's copy.

    Returns:
        x0 [B, L] int64 (`x` where there is no prediction) and transfer_index [B, L] bool; with
        `return_confidence` also the confidence [B, L] float64, -inf outside `mask_index`. They are
        theirs, in float32 and with ties by the lowest index (torch's topk promises none); a cell
        without a mask is never transferred (theirs may write its own token again).

    Errors are those of `decode_step`. No host synchronisation.

    >>> x, logits = torch.full((1, 2), 3), torch.eye(4)[None, :2] * 9
    >>> x0, chosen = get_transfer_index(logits, 0.0, "low_confidence", x == 3, x, None, 0.9)
    >>> x0, chosen
    (tensor([[0, 1]]), tensor([[True, True]]))
    """
    where, rows = "get_transfer_index", None
    if threshold is not None:
        rule, options = f"fast_dllm.{where}.threshold", {"threshold": loops.probability(threshold)}
    elif num_transfer_tokens is None:
        refuse(ValueError, where, "num_transfer_tokens", "a tensor [B] without threshold", None)
    else:
        rule, options = f"fast_dllm.{where}.quota", {}
        rows = RowParams(quota=num_transfer_tokens.reshape(-1).to(x.device).contiguous())
    # Without a mask id nothing is banned: predicting it counts as any other token, as in theirs.
    config = cached_engine_config(rule, None, temperature=temperature, **options)
    return _select(where, logits, config, remasking, mask_index, x, rows, return_confidence)


def get_transfer_index_dynamic(
    logits: Tensor,
    temperature: float,
    remasking: str,
    mask_index: Tensor,
    x: Tensor,
    num_transfer_tokens: Tensor | None = None,
    factor: float = 1,
    return_confidence: bool = False,
) -> tuple[Tensor, ...]:
    """Their function of this name: the longest run of best cells that `factor` (> 0) allows.

    Arguments, results and errors are those of `get_transfer_index`; `num_transfer_tokens` is not
    read, as in theirs.
    """
    where = "get_transfer_index_dynamic"
    config = cached_engine_config(
        f"fast_dllm.{where}", None, temperature=temperature, factor=factor
    )
    return _select(where, logits, config, remasking, mask_index, x, None, return_confidence)


def patch(module: ModuleType, **rules: Any) -> Callable[[], None]:
    """Put the functions above in place of the module's; returns a function that undoes it.

    `generate`, `generate_with_prefix_cache` and `generate_with_dual_cache` then decide through
    them: same tokens, same number of forwards. A loop that takes R2's rules as arguments (dual
    cache of R2-dLLM's release) becomes a call of `r2dllm_ext.generate`. So does every loop if
    `rules` are given: they are added to what a call says. Such a loop leaves masks in the prompt
    alone; one that was imported by name before (`from generate import ...`) is not replaced there.

    Args:
        module: with `get_transfer_index`, `get_transfer_index_dynamic` or both.
        rules: fields of `DecodeConfig` for which the loops have no argument.

    Raises:
        TypeError: neither function is there, one of them or a loop to be replaced takes an
            argument that is not known, or a rule is an argument of a loop.
    """
    functions = (get_transfer_index, get_transfer_index_dynamic)
    new: dict[str, Any] = {f.__name__: f for f in functions if hasattr(module, f.__name__)}
    if not new:
        refuse(TypeError, "patch", "module", "one with get_transfer_index", module.__name__)
    for name, function in new.items():
        loops.check_arguments(module, name, inspect.signature(function).parameters)
    for name in [name for name in loops.LOOPS if hasattr(module, name)]:
        loop = getattr(module, name)
        arguments = inspect.signature(loop).parameters
        if taken := [rule for rule in rules if loops.FIELDS.get(rule, rule) in arguments]:
            refuse(TypeError, "patch", "rules", f"what is no argument of {name}", taken[0])
        if rules or "temporal_steps" in arguments:
            loops.check_arguments(module, name, loops.ARGUMENTS)
            new[name] = loops.loop_of(loop, loops.LOOPS[name], rules)
    old = {name: getattr(module, name) for name in new}
    vars(module).update(new)
    return lambda: vars(module).update(old)


def _select(where, logits, config, remasking, mask_index, x, rows, return_confidence):
    loops.check_remasking(where, remasking)
    state = None
    if config.temperature > 0:
        state = DecodeState(*x.shape, device=x.device)
        state.counters[:, Counter.ROW_SEED] = loops.seed()
    step = select(logits, x, state, config, candidates=mask_index, rows=rows)
    x0, chosen = torch.where(step.prediction >= 0, step.prediction, x), step.rule != Rule.NONE
    if not return_confidence:
        return x0, chosen
    return x0, chosen, step.confidence.double().masked_fill(~mask_index, -torch.inf)
