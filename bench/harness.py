# SPDX-License-Identifier: Apache-2.0
"""Timing, statistics, description of the machine, tables and JSON."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import r2dllm_ext

Z95 = 1.959963984540054

# ---- timing ----------------------------------------------------------------------------------


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


# ---- what may be missing ----------------------------------------------------------------------


def optional(module: str) -> str | None:
    """Why a library can't be compared, or None."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def on_cuda(device: str) -> str | None:
    return None if device == "cuda" else "runs on CUDA only"


# ---- reading every byte ----------------------------------------------------------------------


def as_words(logits: Tensor) -> Tensor:
    """The same bytes as a flat tensor of the widest integers that divide them."""
    flat = logits.reshape(-1)
    for dtype in (torch.int32, torch.int16):
        if flat.nbytes % dtype.itemsize == 0:
            return flat.view(dtype)
    return flat


def _read(turns: list[Tensor], reduction: str) -> Callable[[], Any]:
    return lambda: [getattr(x, reduction)() for x in turns]


def fastest_read(*turns: Tensor) -> tuple[str, Callable[[], Any]]:
    """What reads the buffers, all alike, fastest on this machine, and its name: a plain torch
    reduction, or on CUDA, where there is an nvcc, read_words.cu.

    A sum over bfloat16 would be bound by the conversion; the same bytes as wider words are not.
    """
    logits = turns[0]
    reads: dict[str, Callable[[], Any]] = {
        f"{str(as_words(logits).dtype).removeprefix('torch.')} amax": _read(
            [as_words(x) for x in turns], "amax"
        )
    }
    if logits.nbytes % 8 == 0:
        wide = [x.reshape(-1).view(torch.int64) for x in turns]
        reads["int64 sum"] = _read(wide, "sum")
    if logits.nbytes % 4 == 0:
        single = [x.reshape(-1).view(torch.float32) for x in turns]
        reads["float32 sum"] = _read(single, "sum")
    if logits.is_cuda and shutil.which("nvcc"):
        from gpu_kernels import read_bytes

        reads["read_words.cu"] = read_bytes(turns)
    if len(reads) == 1:
        return next(iter(reads.items()))
    variants = [Variant(name, read) for name, read in reads.items()]
    before, device = variants[0].call, logits.device.type
    samples = measure(variants, before=before, seconds=0.1, device=device)
    name = min(reads, key=lambda name: statistics.median(samples[name]))
    return name, reads[name]


# ---- statistics ------------------------------------------------------------------------------


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


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) without observations."""
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: successes takes 0 .. n = {n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre, scale = (p + z * z / (2 * n)), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


# ---- machine, versions, output ---------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """One that complains in one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def use_device(device: str) -> None:
    """Refuse a device that the extension or the machine does not have."""
    if device == "cuda":
        if not r2dllm_ext.build_info()["cuda"]:
            fail("--device cuda: the extension was built without CUDA")
        if not torch.cuda.is_available():
            fail("--device cuda: torch finds no CUDA device")


def environment(device: str) -> dict[str, Any]:
    """Machine, versions, commit and command of this run."""
    info = r2dllm_ext.build_info()
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info["cpu_in_use"],
    }
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        machine["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "machine": machine,
        "versions": {
            "r2dllm_ext": r2dllm_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "commit": _commit(),
        "command": _command(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the source tree, "+" if it has changes, None outside of git."""
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain"], **options).stdout.strip()
        return head + "+" * bool(dirty)
    except (OSError, subprocess.CalledProcessError):
        return None


def _command() -> str:
    """The command line; paths outside of the working folder by their last part alone."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv]
    return shlex.join(["python", *words])


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path.name}")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Aligned plain text; the first `left` columns to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def duration(us: float) -> str:
    """Three significant digits with a unit."""
    for limit, scale, unit in ((1e3, 1, "us"), (1e6, 1e3, "ms"), (math.inf, 1e6, "s")):
        if us < limit:
            return f"{us / scale:.3g} {unit}" if us / scale < 100 else f"{us / scale:.0f} {unit}"
    raise AssertionError


def mebibytes(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:.{2 if size < 100 * 2**20 else 0}f}"
