# SPDX-License-Identifier: Apache-2.0
"""Build switches, the errors of a build that can't be, and of an import that doesn't fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import r2dllm_ext

ROOT = Path(__file__).parent.parent
in_source_tree = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source tree beside the tests"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def setup_py(prologue: str = "", **environment: str) -> subprocess.CompletedProcess:
    code = f"{prologue}\nimport sys, runpy; sys.argv = ['setup.py', 'build_ext']\n"
    return run(code + "runpy.run_path('setup.py', run_name='__main__')", **environment)


def one_error(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0
    return " ".join(result.stderr.split())


@in_source_tree
def test_no_torch_at_build_time():
    error = one_error(setup_py("import sys; sys.modules['torch'] = None"))
    assert error.startswith("r2dllm_ext: torch is not there") and "--no-build-isolation" in error


@in_source_tree
def test_no_compiler():
    error = one_error(setup_py(CXX="no-such-compiler"))
    assert "no C++ compiler: 'no-such-compiler'" in error and "g++" in error


@in_source_tree
def test_cuda_demanded_in_vain():
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    error = one_error(setup_py(R2DLLM_CUDA="1"))
    assert "R2DLLM_CUDA=1, but" in error and "R2DLLM_CUDA=0" in error


@in_source_tree
def test_cuda_switch_misspelt():
    assert "R2DLLM_CUDA takes auto, 0, 1 or emulate, got 'yes'" in one_error(
        setup_py(R2DLLM_CUDA="yes")
    )


@in_source_tree
@pytest.mark.parametrize("blank", ["", " ", "\t \n"])
def test_empty_variables_count_as_unset(blank):
    """The build gets as far as an option that setup.py does not have."""
    code = "import sys, runpy; sys.argv = ['setup.py', '--no-such-option']\n"
    error = one_error(
        run(
            code + "runpy.run_path('setup.py', run_name='__main__')",
            CXX=blank,
            R2DLLM_CUDA=blank,
            CUDA_HOME=blank,
            MAX_JOBS=blank,
        )
    )
    assert "R2DLLM_CUDA takes" not in error and "--no-such-option" in error
    names = ["CC", "CXX", "CXXFLAGS", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST"]
    code = "import os, sys, runpy; sys.argv = ['setup.py', '--version']\n"
    code += "runpy.run_path('setup.py', run_name='__main__')\n"
    code += f"print([name for name in {names} if os.environ.get(name) == {blank!r}])"
    done = run(code, R2DLLM_CUDA="0", **dict.fromkeys(names, blank))
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_another_torch_at_import_time():
    result = run("import torch; torch.__version__ = '2.99.0'; import r2dllm_ext")
    error = one_error(result)
    assert f"built against torch {torch.__version__}, but torch 2.99.0 is installed" in error
    assert "pip install --no-build-isolation" in error


def test_the_import_brings_no_compiler_along():
    """Which would double its time and memory, in every process of an engine."""
    result = run("import sys, r2dllm_ext; print('torch._dynamo' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_oracle_needs_no_extension():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name == "._built_with" else find(name, package))
sys.modules["r2dllm_ext._built_with"] = sys.modules["r2dllm_ext._C"] = None
from r2dllm_ext import reference
print(reference.decode_step.__name__)
import r2dllm_ext
r2dllm_ext.decode_step
"""
    result = run(code)
    assert result.stdout.strip() == "decode_step"
    assert "the extension is not built. Fix: pip install" in one_error(result)


def test_build_info():
    info = r2dllm_ext.build_info()
    assert info["version"] == r2dllm_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_in_use"] in info["cpu_compiled"]
    assert info["cuda"] == bool(info["cuda_architectures"])
