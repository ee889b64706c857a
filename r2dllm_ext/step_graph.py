# SPDX-License-Identifier: Apache-2.0
"""Model forward and decode step as a CUDA graph: replayed by the host, or looping on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .state import DecodeStep

HAS_LOOPS = hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node")  # torch 2.15


@contextlib.contextmanager
def _capture(forward: Callable[[], object], pool) -> Iterator[torch.cuda.CUDAGraph]:
    """Captures what is done inside.

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
        with torch.cuda.graph(graph, pool=pool):
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

    def __init__(self, step: Callable[[], DecodeStep], forward: Callable[[], object], pool) -> None:
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


def replay_until(graph: StepGraph, done: Callable[[DecodeStep, int], bool]) -> tuple[int, int]:
    """Replays until `done(step, replays so far)`, which sees each step while the next one runs: the
    device never waits for the host, and the last replay is in vain.

    Returns the number of replays, and how many of these were in vain.
    """
    replays, report = 1, graph.replay()
    while True:
        following = graph.replay()
        if done(report(), replays):
            return replays + 1, 1
        replays, report = replays + 1, following


class LoopCounters:
    """What a loop on the device keeps: the steps it took, and what each row has `left`."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self._left = torch.zeros(rows, dtype=torch.int32, device=device)

    def reset(self, left: list[int]) -> None:
        """For a new block."""
        self._left.copy_(torch.tensor(left))

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
        pool,
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
