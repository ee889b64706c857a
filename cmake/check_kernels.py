# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA kernel for each architecture and reads the machine code; needs no GPU.

    python cmake/check_kernels.py [--arch 80 --arch 90 ...] [--require]

Holds registers, spills and local memory against the limits below, and the loads of the pass over V:
16 bytes wide, all of a thread's issued before the first is looked at; and the gradient's stores.
csrc/cuda includes nothing of torch, so nvcc is all that is needed, and cuobjdump or nvdisasm for
the machine code (the toolkit's, or those in the triton package). What is missing is said; with
--require that is a failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("80", "90", "100", "120")
FLAGS = ("-std=c++20", "-O3", "--fmad=false", "-Xptxas", "-v")  # as setup.py


class Limits(NamedTuple):
    registers: int
    local: int  # bytes of local memory; on sm_90 nothing is spilled in any case
    wide_loads: int = 0  # this many loads of 16 bytes, issued together
    wide_stores: int = 0  # this many stores of 16 bytes


# By a word of the kernel's name. With 64 registers a block of 1024 threads starts at all, and 8
# blocks of 128 share a multiprocessor; with 96, 5 do.
LIMITS = {
    "slice_kernel": Limits(64, 0, 8),
    "row_kernel": Limits(64, 0),
    "cutoff_kernel": Limits(64, 8),  # a register saved over the call of a double division
    "draw_kernel": Limits(64, 8),
    "gradient_kernel": Limits(96, 0, 8, 8),
}
DEFAULT = Limits(255, 1024)


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    spills: int


def read_report(report: str) -> list[Kernel]:
    """The kernels that ptxas names."""
    kernels, name, frame = [], "", (0, 0)
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            frame = int(found[1]), int(found[2])
        elif name and (found := re.search(r"Used (\d+) registers", line)):
            kernels.append(Kernel(name, int(found[1]), *frame))
            name = ""
    return kernels


def inspect(source: Path, arch: str, disassembler: list[str] | None) -> tuple[list[str], int, int]:
    """Lines to print, kernels beyond their limits, kernels whose machine code was not read."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", *FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", str(cubin), str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            return [f"sm_{arch}  FAIL {source.name}\n{result.stderr}"], 1, 0
        code = machine_code(disassembler, cubin) if disassembler else {}
    lines, failed, unread = [], 0, 0
    for kernel in read_report(result.stderr):
        instructions = code.get(kernel.name)
        found = problems(kernel, arch, instructions)
        failed += bool(found)
        unread += instructions is None
        lines.append(
            f"sm_{arch}  {kernel.registers:3} registers  {kernel.stack:3} B stack  "
            f"{kernel.spills:3} B spilled  {demangle(kernel.name)}"
            + "".join(f"\n  FAIL {problem}" for problem in found)
        )
    return lines, failed, unread


def find_disassembler() -> list[str] | None:
    """A command that prints the machine code of a cubin."""
    triton = importlib.util.find_spec("triton")
    nvcc = Path(shutil.which("nvcc") or "")
    folders = [None, str(nvcc.resolve().parent)]
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    for folder in folders:
        for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-sass")):
            if found := shutil.which(tool, path=folder):
                return [found, option]
    return None


def machine_code(disassembler: list[str], cubin: Path) -> dict[str, list[str]]:
    """The instructions of each kernel; an empty dict if the tool does not know the architecture."""
    result = subprocess.run([*disassembler, str(cubin)], capture_output=True, text=True)
    code: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in result.stdout.splitlines():
        if found := re.search(r"(?:\.text\.|Function : )(\w+)", line):
            lines = code.setdefault(found[1], [])
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]+)", line):
            lines.append(found[1])
    return code


def longest_burst(instructions: list[str]) -> int:
    """The most loads of 16 bytes with at most one other instruction between two of them."""
    best = burst = gap = 0
    for instruction in instructions:
        if instruction.startswith("LDG") and ".128" in instruction:
            burst, gap = burst + 1, 0
        elif (gap := gap + 1) > 1:
            burst = 0
        best = max(best, burst)
    return best


def problems(kernel: Kernel, arch: str, code: list[str] | None) -> list[str]:
    limits = next((limit for word, limit in LIMITS.items() if word in kernel.name), DEFAULT)
    found = []
    if kernel.registers > limits.registers:
        found.append(f"{kernel.registers} registers, takes at most {limits.registers}")
    if kernel.spills and arch == "90":
        found.append(f"{kernel.spills} bytes of registers are spilled")
    if kernel.stack > limits.local:
        found.append(f"{kernel.stack} bytes of local memory")
    if code is not None and limits.wide_loads:
        if (burst := longest_burst(code)) < limits.wide_loads:
            found.append(f"{burst} loads of 16 bytes in a row, takes {limits.wide_loads}")
        if local := sum(word.startswith(("LDL", "STL")) for word in code):
            found.append(f"{local} accesses to local memory")
        stores = sum(word.startswith("STG") and ".128" in word for word in code)
        if stores < limits.wide_stores:
            found.append(f"{stores} stores of 16 bytes, takes {limits.wide_stores}")
    return found


def demangle(name: str) -> str:
    if not shutil.which("c++filt"):
        return name
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"r2dllm::|cuda::|\(anonymous namespace\)::|^void |\(.*\)$", "", plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help=f"default {' '.join(ARCHITECTURES)}")
    parser.add_argument("--require", action="store_true", help="fail where a tool is missing")
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/cuda/*.cu")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("check_kernels: SKIPPED, there is no nvcc on the PATH")
        sys.exit(args.require)
    disassembler, failed, unread = find_disassembler(), 0, 0
    sources = args.sources or sorted(CUDA.glob("*.cu"))
    work = [(source, arch) for arch in args.arch or ARCHITECTURES for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for lines, bad, skipped in pool.map(lambda pair: inspect(*pair, disassembler), work):
            print("\n".join(lines), flush=True)
            failed, unread = failed + bad, unread + skipped
    if unread:
        tool = Path(disassembler[0]).name if disassembler else "cuobjdump or nvdisasm"
        print(f"check_kernels: SKIPPED, machine code of {unread} kernels not read ({tool})")
    if failed or (unread and args.require):
        sys.exit(f"check_kernels: {failed} kernels beyond their limits")


if __name__ == "__main__":
    main()
