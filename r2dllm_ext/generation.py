# SPDX-License-Identifier: Apache-2.0
"""`generate`: block-wise decoding of any masked-diffusion model with `decode_step`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ._checks import choice, flag, instance, integer, is_tensor, refuse, sized, tensor
from .block_edits import BlockEdits
from .config import DecodeConfig
from .decode_progress import BlockProgress, NoProgressError, StuckRow, ending
from .generate_checks import check_inputs
from .model_driver import CACHES, ModelDriver
from .ops import decode_step
from .row_params import RowParams
from .state import Counter, DecodeState, DecodeStep
from .step_graph import check_graph, generate_by_graph
from .stop_ids import StopId, stop_ids
from .trace import Trace, TraceRecorder


class Generation(NamedTuple):
    """Result of `generate`."""

    sequences: torch.Tensor  # [B, P + gen_length] int64
    nfe: int  # forwards
    trace: Trace | None


class StepEvent(NamedTuple):
    """What `on_step` is called with, after each step."""

    nfe: int  # forwards so far
    block: int  # index of the active block
    start: int  # its first position in the sequence
    rows: list[int]  # rows of the batch that are still being decoded
    step: DecodeStep  # of these rows
    sequences: torch.Tensor  # [B, P + gen_length], the live buffer: read it, don't write


@torch.no_grad()
def generate(
    model: Any,
    prompt: torch.Tensor,
    *,
    gen_length: int,
    block_length: int = 32,
    config: DecodeConfig,
    rows: RowParams | None = None,
    edit: bool = False,
    max_edits: int = 4,
    cache: str = "none",
    logits_shift: int = 0,
    attention_mask: torch.Tensor | None = None,
    stop_id: StopId = None,
    on_step: Callable[[StepEvent], None] | None = None,
    progress: bool = False,
    trace: bool = False,
    cuda_graph: bool | str = False,
) -> Generation:
    """Append `gen_length` tokens to each prompt, block by block, left to right.

    Args:
        model: any callable of the convention that the published loops use: `model(ids).logits`
            [B, T, V]; with a cache also `use_cache`, `past_key_values`, and `replace_position` for
            "dual". A model with `supports_logits_positions = True` is asked for the logits of the
            active block alone, `logits_positions=(start, end)`.
        prompt: [B, P] int64. Prompts of different lengths: pad on the left, pass `attention_mask`.
        gen_length: G >= 0, a multiple of `block_length`.
        block_length: L >= 1 (release: 32).
        config: what a step may commit.
        rows: options of each row of the batch in place of the config's, [B] tensors on the model's
            device, which are read once to check them. With a `seed` of its own a row draws the same
            tokens in any batch; without, its place in the batch counts too.
        edit: True lets a step change what it has decided in the active block, where
            `config.edit_threshold` allows it. A row then stays in its block until no cell is masked
            and the last step edited nothing; a `stop_id` counts from such a step on, too.
        max_edits: of a cell in its block, >= 1, so that it ends.
        cache: "none" (each forward reads everything), "prefix" (keys and values before the block
            are kept) or "dual" (those after it too). A block begins with a full pass.
        logits_shift: 0 where row i predicts position i (LLaDA); 1 where row i - 1 does (Dream).
            With 1 and a cache the loop is Dream's: a block's full pass commits its first cell by
            the base rule, and at least one block step follows.
        attention_mask: [B, P], 1 / True on tokens, 0 / False on padding; given to the model,
            lengthened by ones, if anything is padding. Default: no padding. (The released LLaDA
            class takes it and ignores it: pad nothing there.)
        stop_id: a token id, or several: a row is finished once one of them is decided and
            everything before it is; its undecided cells become that token, and it is not forwarded
            any more. The mask token alone is none, and refused. Default: none.
        on_step: called after each step. Whatever it raises ends the decode.
        progress: True shows a bar of decided tokens (needs tqdm).
        trace: True records every step (copies to the host each step).
        cuda_graph: True captures forward and decode step as one CUDA graph and replays it, the same
            for all blocks (with the prefix cache one a block); with a cache, a block's full pass
            comes before. The host reads what remains one step late, so that the device never waits
            for it; in exchange the last forward of each block is in vain (it counts in `nfe`; the
            tokens are the same). With `stop_id` a finished row stays in the batch until all are
            finished. Takes a model on CUDA whose forward can be captured (`logits_positions` is
            then an int64 tensor [L] where there is no cache), and no `on_step`, `progress` or
            `trace`, which look at every step. "loop" puts the loop over the steps of a block into
            the graph as well (a conditional node; torch 2.15 and CUDA 12.4 or newer): one launch
            and one wait a block, no forward in vain.

    Returns:
        Generation: `sequences` [B, P + G] int64 on the model's device, `nfe` = forwards made,
        `trace` (None unless asked for).

    Raises:
        TypeError, ValueError: a bad argument, or logits of an unexpected shape from the model.
        NoProgressError: rows whose masked cells all have non-finite logits, or which commit nothing
            but mask ids for very long. They are given up, the others are finished; it carries the
            result.

    One host synchronisation a step: the loop reads how many cells remain (see `cuda_graph`).

    >>> model = load_model("ledger")
    >>> prompt = torch.tensor([[1, 2, 3]])
    >>> out = generate(model, prompt, gen_length=32, config=DecodeConfig(model.mask_id))
    >>> out.sequences.shape, out.nfe <= 32
    (torch.Size([1, 35]), True)
    """
    _check(prompt, config, rows, edit, max_edits, cache, attention_mask, on_step, progress, trace)
    gen_length, block_length = _lengths(gen_length, block_length)
    logits_shift = integer("generate", "logits_shift", logits_shift, 0, 1)
    assert config.mask_id is not None  # checked
    stops = stop_ids(stop_id, where="generate")
    check_inputs(
        model, prompt, attention_mask, gen_length=gen_length, mask_id=config.mask_id, stops=stops
    )
    device = torch.device(getattr(model, "device", prompt.device))
    if not isinstance(cuda_graph, bool) and cuda_graph != "loop":
        error = ValueError if isinstance(cuda_graph, str) else TypeError
        refuse(error, "generate", "cuda_graph", "False, True or 'loop'", cuda_graph)
    if cuda_graph:
        check_graph(cuda_graph, device, on_step=on_step, progress=progress, trace=trace)
    batch, prompt_length = prompt.shape
    sequences = torch.full(
        (batch, prompt_length + gen_length), config.mask_id, dtype=torch.int64, device=device
    )
    sequences[:, :prompt_length] = prompt
    key_mask = _key_mask(attention_mask, gen_length, device)
    driver = ModelDriver(model, cache, logits_shift, key_mask, prompt_length)
    state = DecodeState(batch, block_length, device=device)
    if rows is not None:
        rows.check_values("generate")
        if rows.seed is not None:
            state.counters[:, Counter.ROW_ID] = 0
    stuck: dict[int, StuckRow] = {}
    edits = None
    if edit:
        edits = BlockEdits(batch, block_length, max_edits, config.mask_id, device)
    if cuda_graph:
        decoding = (driver, sequences, prompt_length, state, config, rows, edits, stops, stuck)
        with torch.cuda.device_of(sequences):  # streams, pool and events are the current device's
            nfe = generate_by_graph(*decoding, loop=cuda_graph == "loop")
        return _result(Generation(sequences, nfe, None), stuck)

    recorder = TraceRecorder(batch, prompt_length, gen_length, block_length) if trace else None
    active, nfe = list(range(batch)), 0  # rows that are not finished
    with _progress_bar(batch * gen_length) if progress else contextlib.nullcontext() as bar:
        for block in range(gen_length // block_length):
            if not active:
                break
            start = prompt_length + block * block_length
            end = start + block_length
            state.reset()
            if edits is not None:
                edits.begin(sequences[active, start:end])
            most = max_edits if edit else 0
            block_progress = BlockProgress(config, active, block_length, stuck, most)
            first = True
            while active and (first or block_progress.remaining or driver.owes_block_step):
                ids = sequences if len(active) == batch else sequences[active]
                logits, shift, full_pass = driver.forward(ids, start, end, active, new_block=first)
                first = False
                nfe += 1
                step_config, step_rows = driver.step_options(config, rows, full_pass)
                tokens = ids[:, start:end]
                masked = tokens == config.mask_id
                step = decode_step(
                    logits,
                    tokens,
                    state,
                    step_config,
                    editable=None if edits is None else edits.editable(tokens),
                    rows=step_rows,
                    logits_shift=shift,
                )
                if ids is not sequences:
                    sequences[active, start:end] = tokens
                owed = step if edits is None else edits.update(step)
                committed = block_progress.update(owed, nfe, masked)

                if recorder is not None:
                    recorder.record(block, full_pass, active, masked, step)
                if bar is not None:
                    bar.update(committed)
                    bar.set_postfix(nfe=nfe, refresh=False)
                if on_step is not None:
                    on_step(StepEvent(nfe, block, start, list(active), step, sequences))
                ends = [-1] * len(active)
                if stops:
                    stop_of = ending(tokens, stops, config.mask_id)
                    if edits is not None:
                        stop_of.masked_fill_(edits.goes_on, -1)
                    ends = stop_of.tolist()
                kept = [i for i, row in enumerate(active) if ends[i] < 0 and row not in stuck]
                if len(kept) == len(active):
                    continue
                for row, stop in zip(active, ends, strict=True):
                    if stop >= 0:
                        answer = sequences[row, prompt_length:]
                        answer.masked_fill_(answer == config.mask_id, stop)
                active = [active[i] for i in kept]
                index = torch.tensor(kept, dtype=torch.int64, device=device)
                state = state.take(index)
                rows = None if rows is None else rows.take(index)
                if edits is not None:
                    edits.keep_rows(index)
                driver.keep_rows(kept)
                block_progress.keep_rows(kept)
    generation = Generation(sequences, nfe, recorder.finish(sequences) if recorder else None)
    return _result(generation, stuck)


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [n, longest] int64, padded on the left, and bool of the same shape: False on padding."""
    longest = max(map(len, rows), default=0)
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    real = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    shape = (len(rows), longest)
    return (
        torch.tensor(ids, dtype=torch.int64, device="cpu").reshape(shape),
        torch.tensor(real, dtype=torch.bool, device="cpu").reshape(shape),
    )


def _result(generation: Generation, stuck: dict[int, StuckRow]) -> Generation:
    if stuck:
        raise NoProgressError(stuck, generation)
    return generation


def _key_mask(attention_mask, gen_length: int, device) -> torch.Tensor | None:
    """[B, P + G], or None if nothing is padding."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.to(device)
    return torch.cat([mask, mask.new_ones(mask.shape[0], gen_length)], dim=1)


def _progress_bar(total: int):
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "generate: progress=True needs tqdm. Fix: pip install 'r2dllm_ext[cli]'"
        ) from error
    return tqdm(total=total, unit="tok", desc="generate")


def _check(
    prompt, config, rows, edit, max_edits, cache, attention_mask, on_step, progress, trace
) -> None:
    """What is not a number that the loop goes on with."""
    where = "generate"
    tensor(where, "prompt", prompt, "[B, P]", torch.int64)
    instance(where, "config", config, DecodeConfig)
    if config.mask_id is None:
        refuse(ValueError, where, "config.mask_id", "the model's mask token", None)
    instance(where, "rows", rows, RowParams, optional=True)
    for option in dataclasses.fields(RowParams) if rows is not None else ():
        if getattr(rows, option.name) is not None:
            sized(where, f"rows.{option.name}", getattr(rows, option.name), "[B]", prompt.shape[:1])
    for name, value in (("edit", edit), ("progress", progress), ("trace", trace)):
        flag(where, name, value)
    if edit and config.edit_threshold is None:
        refuse(ValueError, where, "edit", "False where config.edit_threshold is None", edit)
    integer(where, "max_edits", max_edits, 1, 2**31 - 1)
    choice(where, "cache", cache, CACHES)
    if on_step is not None and not callable(on_step):
        refuse(TypeError, where, "on_step", "a callable or None", on_step)
    if attention_mask is not None:
        is_tensor(where, attention_mask=attention_mask)
        if attention_mask.shape != prompt.shape:
            takes = f"the shape of prompt {list(prompt.shape)}"
            refuse(ValueError, where, "attention_mask", takes, list(attention_mask.shape))


def _lengths(gen_length, block_length) -> tuple[int, int]:
    gen_length = integer("generate", "gen_length", gen_length, 0)
    block_length = integer("generate", "block_length", block_length, 1)
    if gen_length % block_length:
        takes = f"a multiple of block_length ({block_length})"
        refuse(ValueError, "generate", "gen_length", takes, gen_length)
    return gen_length, block_length
