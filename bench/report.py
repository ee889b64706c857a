# SPDX-License-Identifier: Apache-2.0
"""What a benchmark says: errors in one line, machine and versions, intervals, tables, JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import r2dllm_ext

Z95 = 1.959963984540054


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """One that complains in one line."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def optional(module: str) -> str | None:
    """Why a library can't be compared, or None."""
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


def on_cuda(device: str) -> str | None:
    return None if device == "cuda" else "runs on CUDA only"


def use_device(device: str) -> None:
    """Refuse a device that the extension or the machine does not have."""
    if device == "cuda":
        if not r2dllm_ext.build_info()["cuda"]:
            fail("--device cuda: the extension was built without CUDA")
        if not torch.cuda.is_available():
            fail("--device cuda: torch finds no CUDA device")


def use_threads(threads: int | None) -> None:
    """torch's own choice for None."""
    if threads is not None:
        if threads < 1:
            fail(f"--threads takes an integer >= 1, got {threads}")
        torch.set_num_threads(threads)


def check_seconds(seconds: float) -> None:
    if not 0 < seconds < 3600:
        fail(f"--seconds takes a number in (0, 3600), got {seconds:g}")


def environment(device: str) -> dict[str, Any]:
    """Machine, versions, commit and command of this run."""
    info = r2dllm_ext.build_info()
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info["cpu_in_use"],
        "instruction_set_of_torch": torch.backends.cpu.get_cpu_capability().lower(),
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


# Variables that choose kernels: of ours, of torch, and of the libraries that torch multiplies with.
_CHOICES = ("R2DLLM_CPU", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def _command() -> str:
    """The command line after the variables that choose kernels; paths outside of the working folder
    by their last part alone."""
    choices = [f"{name}={os.environ[name]}" for name in _CHOICES if os.environ.get(name)]
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv]
    return " ".join([*choices, shlex.join(["python", *words])])


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


def share(right: int, parts: int) -> dict[str, Any]:
    """Of what was judged: counts, their quotient and its 95 % interval."""
    return {
        "right": right,
        "parts": parts,
        "accuracy": round(right / parts, 4),
        "wilson95": [round(bound, 4) for bound in wilson(right, parts)],
    }


SHARE_HEADER = ("n", "right", "95 % interval")


def share_cells(found: dict[str, Any]) -> tuple[str, ...]:
    """Of a `share`, under SHARE_HEADER."""
    interval = "{:.1%} .. {:.1%}".format(*found["wilson95"])
    return str(found["parts"]), f"{found['accuracy']:.1%}", interval


def calibration_line(name: str, found: dict[str, Any]) -> str:
    exact = found.get("exact_calibration_error")
    truth = "" if exact is None else f" ({exact:.4f} against the true distribution)"
    return f"{name}: calibration error {found['calibration_error']:.4f}{truth}"


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
