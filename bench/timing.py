# SPDX-License-Identifier: Apache-2.0
"""How long calls take: variants side by side, their medians and quartiles."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Variant(NamedTuple):
    """One column: `call` is timed, `renew` undoes it and is not."""

    name: str
    call: Callable[[], Any]
    renew: Callable[[], Any] = lambda: None
    graph: bool = True  # CUDA: may be captured (no host read)
    turns: int = 1  # times that one call does what is measured


def measure(
    variants: Sequence[Variant],
    *,
    before: Callable[[], Any],
    seconds: float,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """Microseconds of every call, by variant.

    All variants run in every round, in an order drawn anew, each call after an untimed `before()`
    that leaves the caches alike for all. Fast variants run several times a round; one that takes
    more than a quarter of `seconds` runs three times in all.
    """
    timer = _cuda_timer if device == "cuda" else _cpu_timer
    calls = {v.name: _captured(v) if device == "cuda" else v.call for v in variants}

    def once(variant: Variant) -> float:
        variant.renew()
        before()
        return timer(calls[variant.name]) / variant.turns

    cost = {}
    for variant in variants:
        cost[variant.name] = once(variant)
        if cost[variant.name] < seconds * 0.5e6:  # the first call also pays for lazy set-up
            cost[variant.name] = min(once(variant), once(variant))
    slow = {name for name, us in cost.items() if us > seconds * 0.25e6}
    repeats = {name: min(10, max(1, int(seconds * 5e3 / us))) for name, us in cost.items()}

    samples: dict[str, list[float]] = {v.name: [] for v in variants}
    shuffle = random.Random(0).shuffle
    order = list(variants)
    collecting = gc.isenabled()
    gc.disable()
    try:
        began, rounds = time.perf_counter(), 0
        while rounds < 7 or time.perf_counter() - began < seconds:
            shuffle(order)
            for variant in order:
                if variant.name in slow and len(samples[variant.name]) == 3:
                    continue
                for _ in range(repeats[variant.name]):
                    samples[variant.name].append(once(variant))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _cpu_timer(call: Callable[[], Any]) -> float:
    began = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - began) * 1e-3


def _cuda_timer(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _captured(variant: Variant) -> Callable[[], Any]:
    """A CUDA graph of the call, which leaves the host out of the time; else the call itself."""
    if not variant.graph:
        return variant.call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            variant.renew()
            variant.call()
    torch.cuda.current_stream().wait_stream(stream)
    variant.renew()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        variant.call()
    return graph.replay


def device_work(variant: Variant) -> dict[str, float]:
    """Kernels, copies and fills on the device, and waits of the host, for what is measured once."""
    activity = torch.profiler.ProfilerActivity
    variant.renew()
    variant.call()
    variant.renew()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        variant.call()
    events = profile.events()
    on_device = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    waits = sum(event.name == "cudaStreamSynchronize" for event in events)
    return {"launches": on_device / variant.turns, "host_syncs": waits / variant.turns}


def cache_state(kind: str, logits: Tensor) -> Callable[[], Any]:
    """What runs untimed before each call.

    "warm": one read of the logits, as if the head had just written them; they stay in the cache as
    far as they fit. "cold": a sweep over a buffer of 512 MiB, larger than the caches.
    """
    if kind == "cold":
        buffer = torch.zeros(1 << 27, dtype=torch.float32, device=logits.device)
        return lambda: buffer.add_(1)
    words = as_words(logits)
    return lambda: words.amax()


def as_words(logits: Tensor) -> Tensor:
    """The same bytes as a flat tensor of the widest integers that divide them."""
    flat = logits.reshape(-1)
    for dtype in (torch.int32, torch.int16):
        if flat.nbytes % dtype.itemsize == 0:
            return flat.view(dtype)
    return flat


def summary(samples: list[float]) -> dict[str, Any]:
    """Median, quartiles and range of microseconds."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median_us": round(median, 3),
        "q1_us": round(low, 3),
        "q3_us": round(high, 3),
        "min_us": round(min(samples), 3),
        "max_us": round(max(samples), 3),
        "n": len(samples),
    }
