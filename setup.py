# SPDX-License-Identifier: Apache-2.0
"""Builds the extension `r2dllm_ext._C`; everything else about the package is in pyproject.toml.

R2DLLM_CUDA=auto (default) builds the CUDA back end where a toolkit and a CUDA build of torch are
found and says what it chose and why; 0 never does; 1 fails where it can't.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGE = "r2dllm_ext"


def fail(problem: str, fix: str) -> None:
    sys.exit(f"\nr2dllm_ext: {problem}\n  {fix}\n")


try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    fail(
        "torch is not there at build time.",
        "Install it first, then: pip install --no-build-isolation .",
    )


def cuda_choice() -> tuple[bool, str]:
    """Whether to build the CUDA back end, and the reason in words."""
    switch = os.environ.get("R2DLLM_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        fail(f"R2DLLM_CUDA takes auto, 0 or 1, got {switch!r}.", "Unset it, or set one of these.")
    if switch == "0":
        return False, "R2DLLM_CUDA=0"
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        reason = "this release has no CUDA back end yet"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build"
    elif not (os.environ.get("CUDA_HOME") or shutil.which("nvcc")):
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
                "Install g++ 9 or newer (Debian: apt-get install g++), or set CXX.",
            )
        use_cuda, reason = cuda_choice()
        print(f"r2dllm_ext: {'CUDA and CPU' if use_cuda else 'CPU only'} ({reason})", flush=True)
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


def extension() -> CppExtension:
    version = re.search(r'"(.+)"', (ROOT / PACKAGE / "_version.py").read_text()).group(1)
    sources = [p for p in (ROOT / "csrc").rglob("*.cpp") if "tests" not in p.parts]
    return CppExtension(
        f"{PACKAGE}._C",
        sorted(str(p.relative_to(ROOT)) for p in sources),
        define_macros=[
            ("R2DLLM_VERSION", f'"{version}"'),
            ("R2DLLM_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
        # No contraction: CPU and CUDA have to agree bit for bit after the pass over V.
        extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"],
        extra_link_args=["-fopenmp"],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
