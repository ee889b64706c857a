# SPDX-License-Identifier: Apache-2.0
"""One read of every byte of some tensors, as fast as this machine can: the floor of a step."""

from __future__ import annotations

import ctypes
import functools
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import Variant, as_words, measure
from torch import Tensor


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
        reads["read_words.cu"] = read_bytes(turns)
    if len(reads) == 1:
        return next(iter(reads.items()))
    variants = [Variant(name, read) for name, read in reads.items()]
    before, device = variants[0].call, logits.device.type
    samples = measure(variants, before=before, seconds=0.1, device=device)
    name = min(reads, key=lambda name: statistics.median(samples[name]))
    return name, reads[name]


# ---- read_words.cu ---------------------------------------------------------------------------


def compile_read(architecture: str, folder: Path) -> Path:
    """read_words.cu as a shared library for one architecture, such as "90"."""
    library = folder / "read_words.so"
    source = Path(__file__).with_name("read_words.cu")
    command = ["nvcc", "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run(
        [*command, f"-arch=sm_{architecture}", "-o", str(library), str(source)],
        check=True,
        capture_output=True,
        text=True,
    )
    return library


@functools.cache
def _read_library() -> ctypes.CDLL:
    architecture = "".join(map(str, torch.cuda.get_device_capability()))
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.CDLL(str(compile_read(architecture, Path(folder))))
    pointer = ctypes.c_void_p
    library.read_bytes.argtypes = [pointer, ctypes.c_int64, pointer, pointer]
    return library


def read_bytes(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Reads every byte of contiguous CUDA tensors, on the current stream."""
    library, sink = _read_library(), torch.zeros(1, dtype=torch.int32, device=tensors[0].device)

    def call() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        for tensor in tensors:
            error = library.read_bytes(tensor.data_ptr(), tensor.nbytes, sink.data_ptr(), stream)
            if error:
                raise RuntimeError(f"read_bytes: CUDA error {error}")

    return call
