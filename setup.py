# SPDX-License-Identifier: Apache-2.0
"""Builds the extension `r2dllm_ext._C`; everything else about the package is in pyproject.toml.

C++20 throughout. R2DLLM_CUDA=auto (default) builds the CUDA back end where a toolkit and a CUDA
build of torch are found and says what it chose and why; 0 never does; 1 fails where it can't.
R2DLLM_CUDA=emulate is for tests: CPU tensors go through the CUDA back end, compiled for the CPU
with a fibre per thread.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import setup

# Blank counts as unset, also for torch's build helpers, which read most of these themselves.
for name in (
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"),
    *("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "R2DLLM_CUDA", "TORCH_CUDA_ARCH_LIST"),
):
    if not os.environ.get(name, name).strip():
        del os.environ[name]

ROOT = Path(__file__).parent
PACKAGE = "r2dllm_ext"


def fail(problem: str, fix: str) -> NoReturn:
    sys.exit(f"\nr2dllm_ext: {problem}\n  {fix}\n")


def find_toolkit() -> str | None:
    """The folder of the CUDA toolkit, also where nvcc on the PATH is a wrapper script."""
    if os.environ.get("CUDA_HOME") or not shutil.which("nvcc"):
        return os.environ.get("CUDA_HOME")
    plan = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    found = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return str(Path(found.group(1)).resolve()) if found else None


TOOLKIT = find_toolkit()
if TOOLKIT:
    os.environ["CUDA_HOME"] = TOOLKIT  # torch reads it when its build helpers are imported

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import (
        BuildExtension,
        CppExtension,
        CUDAExtension,
        include_paths,
    )
except ImportError as error:
    fail(
        f"{error.name} is not there at build time.",
        "Install torch and pybind11 first, then: pip install --no-build-isolation .",
    )


def cuda_choice() -> tuple[bool, str]:
    """Whether to build the CUDA back end, and the reason in words."""
    switch = os.environ.get("R2DLLM_CUDA", "auto")
    if switch not in ("auto", "0", "1", "emulate"):
        fail(
            f"R2DLLM_CUDA takes auto, 0, 1 or emulate, got {switch!r}.",
            "Unset it, or set one of these.",
        )
    if switch in ("0", "emulate"):
        return False, f"R2DLLM_CUDA={switch}"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
    elif TOOLKIT is None:
        reason = "no CUDA toolkit: neither CUDA_HOME nor nvcc"
    else:
        return True, f"torch {torch.__version__} and a CUDA toolkit are there"
    if switch == "1":
        fail(f"R2DLLM_CUDA=1, but {reason}.", "Provide what is missing, or set R2DLLM_CUDA=0.")
    return False, reason


class Build(BuildExtension):
    def run(self) -> None:
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            fail(
                f"no C++ compiler: {compiler!r} is not on the PATH.",
                "Install g++ 10 or newer (Debian: apt-get install g++), or set CXX.",
            )
        print(f"r2dllm_ext: {'CUDA and CPU' if USE_CUDA else 'CPU only'} ({REASON})", flush=True)
        super().run()
        self.record_torch()

    def record_torch(self) -> None:
        """Lets the import name both versions if it ever meets another torch."""
        root = ROOT if self.inplace else Path(self.build_lib)
        (root / PACKAGE / "_built_with.py").write_text(
            f"TORCH = {torch.__version__!r}\nCUDA = {torch.version.cuda!r}\n"
        )

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / PACKAGE / "_built_with.py")]


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST; by default the cards that are here, else every common one."""
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        listed = ";".join(f"{major}.{minor}" for major, minor in sorted(here))
        os.environ["TORCH_CUDA_ARCH_LIST"] = listed or "8.0;8.9;9.0;10.0;12.0+PTX"
    return os.environ["TORCH_CUDA_ARCH_LIST"]


def extension():
    version = re.search(r'"(.+)"', (ROOT / PACKAGE / "_version.py").read_text()).group(1)
    csrc, emulation = ROOT / "csrc", ROOT / "csrc" / "tests" / "emulated_cuda"
    sources = [p for p in csrc.rglob("*.cpp") if p.relative_to(csrc).parts[0] != "tests"]
    macros = [
        ("R2DLLM_VERSION", f'"{version}"'),
        ("R2DLLM_TORCH_VERSION", f'"{torch.__version__}"'),
    ]
    # pybind11's header is that of the pip package, before the one that torch brings.
    system = [f"-isystem{path}" for path in (pybind11.get_include(), *include_paths())]
    common = ["-std=c++20", "-O3"]
    # No contraction: CPU and CUDA have to agree bit for bit after the pass over V.
    flags = {
        "cxx": [
            *common,
            *system,
            *("-Wall", "-Wextra", "-g0", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"),
        ]
    }
    if USE_CUDA:
        sources += (csrc / "cuda").glob("*.cu")
        macros += [
            ("R2DLLM_WITH_CUDA", None),
            ("R2DLLM_CUDA_ARCHITECTURES", f'"{cuda_architectures()}"'),
        ]
        flags["nvcc"] = [*common, "--fmad=false", "-Xcompiler=-fvisibility=hidden"]
    elif EMULATES_CUDA:
        sources.append(emulation / "backend.cpp")
        macros += [
            ("R2DLLM_WITH_CUDA", None),
            ("R2DLLM_EMULATED_CUDA", None),
            ("R2DLLM_CUDA_ARCHITECTURES", '"emulated"'),
        ]
    return (CUDAExtension if USE_CUDA else CppExtension)(
        f"{PACKAGE}._C",
        sorted(str(p.relative_to(ROOT)) for p in sources),
        define_macros=macros,
        include_dirs=[str(emulation)] if EMULATES_CUDA else [],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
    )


USE_CUDA, REASON = cuda_choice()
EMULATES_CUDA = os.environ.get("R2DLLM_CUDA") == "emulate"
setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
