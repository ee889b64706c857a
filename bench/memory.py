# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory of a step or loss, measured in a process of its own.

CPU: torch's counters do not see the scratch of C++ code, and the kernel's high-water mark (VmHWM)
counts in batches of pages. So glibc's malloc is told to keep whatever it once got: after
`malloc_trim` has given back all free memory, what one call adds to the resident set is its peak.
The set is counted page by page (smaps_rollup). A tensor of 1 MiB must come out as 1 MiB, and by how
much it does not is the error. Not seen: stacks of the threads, beyond the first call.
CUDA: `torch.cuda.max_memory_allocated`, exact.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shapes import DTYPES, Shape, spiked_block

_REPEATS = 3
_SLOW = 2.0  # seconds, from which one repeat has to do
_KEEP_ALL = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
_KNOWN = 2**20


def peak_memory(
    shape: Shape, dtype: str, device: str, threads: int, op: str | None = None, share: int = 100
) -> dict[str, int] | str:
    """Bytes by variant of a step, or of a loss or an engine's step that `op` names, and "error"; or
    why they can't be measured."""
    if device == "cpu" and not Path("/proc/self/smaps_rollup").exists():
        return "no /proc/self/smaps_rollup on this system"
    command = [sys.executable, __file__, json.dumps([shape, dtype, device, threads, op, share])]
    done = subprocess.run(command, env=os.environ | _KEEP_ALL, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return f"the probe failed: {lines[-1] if lines else done.returncode}"
    peaks = json.loads(done.stdout)
    if abs(peaks["error"]) > _KNOWN // 4:
        return f"a tensor of 1 MiB is off by {peaks['error']} bytes: another malloc than glibc's?"
    return peaks


def _resident() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Rss:\s+(\d+) kB", rollup, re.MULTILINE)[1]) * 1024


def _grown_on_cpu(call: Callable[[], Any]) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident()
    call()
    return _resident() - before


def _grown_on_cuda(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _probe(
    shape: Shape, dtype: str, device: str, threads: int, op: str | None, share: int
) -> dict[str, int]:
    from comparisons import step_variants
    from engine_cases import STEPS, engine_case
    from loss import memory_variants

    no_huge_pages = 41  # PR_SET_THP_DISABLE
    ctypes.CDLL(None).prctl(no_huge_pages, 1, 0, 0, 0)
    torch.set_num_threads(threads)
    grown = _grown_on_cuda if device == "cuda" else _grown_on_cpu
    known = [grown(lambda: torch.ones(_KNOWN // 4, device=device)) for _ in range(1 + _REPEATS)]
    peaks = {"error": max((size - _KNOWN for size in known[1:]), key=abs)}
    if op is None:
        variants = step_variants(spiked_block(shape, DTYPES[dtype], device))
    elif op in STEPS:
        variants = engine_case(op, shape, DTYPES[dtype], device).variants
    else:
        variants = memory_variants(op, shape, DTYPES[dtype], share, device)
    for variant in variants:
        sizes = []
        for _ in range(1 + _REPEATS):  # the first call also loads code
            variant.renew()
            began = time.perf_counter()
            sizes.append(grown(variant.call))
            if len(sizes) == 2 and time.perf_counter() - began > _SLOW:
                break
        peaks[variant.name] = max(sizes[1:])
    return peaks


if __name__ == "__main__":
    _shape, *_rest = json.loads(sys.argv[1])
    print(json.dumps(_probe(Shape(*_shape), *_rest)))
