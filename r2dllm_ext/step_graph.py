# SPDX-License-Identifier: Apache-2.0
"""Model forward and decode step as a CUDA graph: replayed by the host, or looping on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .block_edits import BlockEdits
from .config import DecodeConfig
from .decode_progress import BlockProgress, StuckRow, ending
from .model_driver import ModelDriver
from .ops import decode_step
from .row_params import RowParams
from .state import DecodeState, DecodeStep

HAS_LOOPS = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")  # torch 2.15


@contextlib.contextmanager
def _capture(forward: Callable[[], object], pool: Any) -> Iterator[Any]:
    """Captures what is done inside; gives the `torch.cuda.CUDAGraph` (what torch 2.15 has of it is
    unknown to the types of older ones).

    `forward` is run once before, so that what libraries set up when they first meet a shape is not
    captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # torch's own choice is one stream for all devices, on that of the first capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            yield graph
    except RuntimeError as error:
        raise RuntimeError(
            "generate: cuda_graph takes a model whose forward a CUDA graph can capture (static "
            f"shapes, nothing read on the host): {error}"
        ) from error


class StepGraph:
    """A captured step.

    Args:
        step: forward and `decode_step` on tensors that stay where they are; nothing in it may read
            the device from the host.
        forward: the same forward, run once before the capture.
        pool: `torch.cuda.graph_pool_handle()`, memory that consecutive graphs share.
    """

    def __init__(
        self, step: Callable[[], DecodeStep], forward: Callable[[], object], pool: Any
    ) -> None:
        with _capture(forward, pool) as self._graph:
            self._step = step()
        remaining = self._step.remaining
        self._reports = [
            (torch.empty_like(remaining, device="cpu", pin_memory=True), torch.cuda.Event())
            for _ in range(2)
        ]

    def replay(self) -> Callable[[], DecodeStep]:
        """Enqueues one step. The result waits for it and returns it, `remaining` on the CPU; it
        holds until the next but one replay."""
        self._graph.replay()
        self._reports.reverse()
        host, event = self._reports[0]
        host.copy_(self._step.remaining, non_blocking=True)
        event.record()

        def report() -> DecodeStep:
            event.synchronize()
            return self._step._replace(remaining=host)

        return report


class LoopCounters:
    """What a loop on the device keeps: the steps it took, and what each row has `left`."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self._left = torch.zeros(rows, dtype=torch.int32, device=device)

    def reset(self, left: list[int]) -> None:
        """For a new block."""
        self._left.copy_(torch.tensor(left, dtype=torch.int32, device="cpu"))

    def goes_on(self, remaining: Tensor) -> Tensor:
        """0-dim bool: after a step, is anything left, and has every row that has something left
        made progress? One that has not is for the host to look at."""
        stuck = (remaining > 0) & (remaining == self._left)
        self._left.copy_(remaining)
        self.steps.add_(1)
        return (remaining > 0).any() & ~stuck.any()


class LoopGraph:
    """A captured loop over steps, a conditional WHILE node: one launch takes steps as long as
    `LoopCounters.goes_on`, but at least one. Arguments as those of `StepGraph`.
    """

    def __init__(
        self,
        step: Callable[[], DecodeStep],
        forward: Callable[[], object],
        pool: Any,
        counters: LoopCounters,
    ) -> None:
        enters = torch.ones((), dtype=torch.bool, device=counters.steps.device)
        self._counters = counters
        with _capture(forward, pool) as self._graph:
            self._graph.begin_capture_to_while_node(enters)
            try:
                self._step = step()
                goes_on = counters.goes_on(self._step.remaining)
                self._graph.set_conditional_handle_for_current_node(goes_on)
            finally:
                self._graph.end_capture_to_conditional_node()

    def run(self) -> tuple[DecodeStep, int]:
        """The last step, `remaining` on the CPU, and how many were taken; waits for them."""
        self._counters.steps.zero_()
        self._graph.replay()
        steps = int(self._counters.steps)
        return self._step._replace(remaining=self._step.remaining.cpu()), steps


class _BlockStep:
    """Forward and decode step of the active block, in place.

    As a graph needs them: on tensors that stay where they are, `_columns` telling which block it
    is, and nothing read on the host.
    """

    def __init__(
        self,
        driver: ModelDriver,
        sequences: Tensor,
        prompt_length: int,
        state: DecodeState,
        config: DecodeConfig,
        rows: RowParams | None,
        edits: BlockEdits | None,
        stops: Sequence[int],
    ) -> None:
        self._driver, self._sequences, self._state = driver, sequences, state
        self._answers = sequences[:, prompt_length:]
        assert config.mask_id is not None  # checked by `generate`
        self._config, self._mask_id, self._rows = config, config.mask_id, rows
        self._edits, self._stops = edits, stops
        self._batch = list(range(len(sequences)))
        self._in_block = torch.arange(state.block_length, device=sequences.device)
        self._columns = self._in_block.clone()
        driver.columns = self._columns

    def begin_block(self, start: int) -> None:
        self._columns.copy_(self._in_block).add_(start)
        self._state.reset()
        if self._edits is not None:
            self._edits.begin(self._sequences.index_select(1, self._columns))

    def forward(self, start: int, new_block: bool = False) -> tuple[Tensor, int, bool]:
        end = start + len(self._columns)
        return self._driver.forward(self._sequences, start, end, self._batch, new_block=new_block)

    def step(self, start: int, new_block: bool = False) -> DecodeStep:
        """In a finished row nothing remains."""
        logits, shift, full_pass = self.forward(start, new_block)
        tokens = self._sequences.index_select(1, self._columns)
        config, rows = self._driver.step_options(self._config, self._rows, full_pass)
        edits = self._edits
        step = decode_step(
            logits,
            tokens,
            self._state,
            config,
            editable=None if edits is None else edits.editable(tokens),
            rows=rows,
            logits_shift=shift,
        )
        self._sequences.index_copy_(1, self._columns, tokens)
        if edits is not None:
            step = edits.update(step)
        if not self._stops:
            return step
        ends = ending(tokens, self._stops, self._mask_id)
        if edits is not None:
            ends = ends.masked_fill(edits.goes_on, -1)
            edits.settle(ends >= 0)
        undecided = (ends >= 0)[:, None] & (self._answers == self._mask_id)
        self._answers.copy_(torch.where(undecided, ends[:, None], self._answers))
        return step._replace(remaining=step.remaining.masked_fill(ends >= 0, 0))

    def all_done(self, start: int, stuck: Container[int]) -> bool:
        """Whether every row is finished or stuck: a host read, if rows can finish."""
        ends = [-1] * len(self._batch)
        if self._stops:
            tokens = self._sequences[:, start : start + len(self._columns)]
            ends = ending(tokens, self._stops, self._mask_id).tolist()
        return all(end >= 0 or row in stuck for row, end in zip(self._batch, ends, strict=True))


def generate_by_graph(
    driver: ModelDriver,
    sequences: Tensor,
    prompt_length: int,
    state: DecodeState,
    config: DecodeConfig,
    rows: RowParams | None,
    edits: BlockEdits | None,
    stops: Sequence[int],
    stuck: dict[int, StuckRow],
    *,
    loop: bool,
) -> int:
    """Decodes `sequences` [B, P + G] in place by a graph of forward and step.

    It is captured once, or, where it fits one block only, in each block. With `loop` the loop over
    the steps of a block is part of it. Rows that can't be finished go into `stuck`, and on through
    the forwards. Returns the number of forwards.
    """
    batch, length, nfe = list(range(len(sequences))), state.block_length, 0
    if not batch:
        return nfe
    block = _BlockStep(driver, sequences, prompt_length, state, config, rows, edits, stops)
    pool = torch.cuda.graph_pool_handle() if sequences.is_cuda else None
    counters = LoopCounters(len(batch), sequences.device)
    replayed: StepGraph | None = None
    looping: LoopGraph | None = None
    for start in range(prompt_length, sequences.shape[1], length):
        if block.all_done(start, stuck):
            break
        block.begin_block(start)
        max_edits = 0 if edits is None else edits.max_edits
        progress = BlockProgress(config, batch, length, stuck, max_edits)
        if driver.cache != "none":
            nfe += 1
            progress.update(block.step(start, new_block=True), nfe)
            if block.all_done(start, stuck):
                break
            if not (progress.remaining or driver.owes_block_step):
                continue
        captured = (partial(block.step, start), partial(block.forward, start), pool)
        if loop:
            if looping is None or driver.graph_fits_one_block:
                looping = LoopGraph(*captured, counters)
            counters.reset(progress.left)
            while True:
                step, steps = looping.run()
                nfe += steps
                progress.update(step, nfe)
                if not progress.remaining:
                    break
        else:
            if replayed is None or driver.graph_fits_one_block:
                replayed = StepGraph(*captured)
            # The host sees each step while the next one runs: the device never waits for it, and
            # when it is the last one, a replay too many is under way.
            report = replayed.replay()
            while True:
                nfe, following = nfe + 1, replayed.replay()
                progress.update(report(), nfe)
                if not progress.remaining:
                    break
                report = following
            nfe += 1
    return nfe


def check_graph(cuda_graph: bool | str, device: torch.device, **looks_at_steps: Any) -> None:
    """Raises a ValueError if `generate` can't do as it is asked; see there."""
    if device.type != "cuda":
        raise ValueError(f"generate: cuda_graph takes False on {device}, got {cuda_graph!r}")
    if cuda_graph == "loop" and not HAS_LOOPS:
        raise ValueError(
            "generate: cuda_graph takes 'loop' with torch 2.15 or newer, this is "
            f"{torch.__version__}"
        )
    for name, value in looks_at_steps.items():
        if value is not None and value is not False:
            raise ValueError(
                f"generate: {name} takes its default with cuda_graph={cuda_graph!r}, got {value!r}"
            )
