# SPDX-License-Identifier: Apache-2.0
"""Model forward and decode step as one CUDA graph, replayed until a block is decoded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .ops import DecodeStep


class StepGraph:
    """A captured step.

    Args:
        step: forward and `decode_step` on tensors that stay where they are; nothing in it may read
            the device from the host.
        forward: the same forward, run once before the capture so that what libraries set up when
            they first meet a shape is not captured; None if that is done.
        pool: `torch.cuda.graph_pool_handle()`, memory that consecutive graphs share.
    """

    def __init__(
        self, step: Callable[[], DecodeStep], forward: Callable[[], object] | None, pool
    ) -> None:
        if forward is not None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                forward()
            torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=pool):
                self._step = step()
        except RuntimeError as error:
            raise RuntimeError(
                "generate: cuda_graph=True takes a model whose forward a CUDA graph can capture "
                f"(static shapes, nothing read on the host): {error}"
            ) from error
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
