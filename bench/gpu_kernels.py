# SPDX-License-Identifier: Apache-2.0
"""Kernels that a step on a GPU is compared with: a pure read, Triton, FlashInfer."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import optional
from torch import Tensor

Confidence = Callable[[Tensor], tuple[Tensor, Tensor]]


def flashinfer_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    from flashinfer.sampling import softmax

    return softmax(logits.view(-1, logits.shape[-1])).view(logits.shape).max(-1)


def other_ways(device: str) -> tuple[dict[str, Confidence], dict[str, str]]:
    """Confidence and prediction by the GPU packages that are here; why the others are left out."""
    ways: dict[str, Confidence] = {}
    skipped: dict[str, str] = {}
    for name in ("triton", "flashinfer") if device == "cuda" else ():
        if reason := optional(name):
            skipped[name] = reason
        elif name == "triton":
            from triton_confidence import triton_confidence

            ways[name] = triton_confidence
        else:
            ways[name] = flashinfer_confidence
    return ways, skipped


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
