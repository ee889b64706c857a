# SPDX-License-Identifier: Apache-2.0
"""R2DLLM_CPU: the instruction set can be chosen, and what is not there is an error."""

import pytest
import torch
from cases import EMULATED
from test_package import one_error, run

import r2dllm_ext

KNOWN = ["avx512", "avx2", "portable"]  # best first
INFO = r2dllm_ext.build_info()
IN_USE = "import r2dllm_ext; print(r2dllm_ext.build_info()['cpu_in_use'])"


def test_build_info_lists_what_is_compiled_and_what_runs():
    compiled, supported = INFO["cpu_compiled"], INFO["cpu_supported"]
    assert compiled == [name for name in KNOWN if name in compiled]
    assert supported == [name for name in compiled if name in supported]
    assert supported[-1] == "portable"
    # torch looks at the same bits of the processor.
    best = torch.backends.cpu.get_cpu_capability()
    if compiled == KNOWN and best in ("AVX2", "AVX512"):
        assert "avx2" in supported
        assert best == "AVX2" or "avx512" in supported


@pytest.mark.parametrize("name", INFO["cpu_supported"])
def test_a_set_that_is_here_is_used(name):
    result = run(IN_USE, R2DLLM_CPU=name)
    assert result.stdout.split() == [name], result.stderr


@pytest.mark.parametrize("blank", ["", " ", " \t\n"])
def test_empty_counts_as_unset(blank):
    assert run(IN_USE, R2DLLM_CPU=blank).stdout.split() == [INFO["cpu_supported"][0]]


@pytest.mark.parametrize("name", [*(set(KNOWN) - set(INFO["cpu_supported"])), "sse", " portable"])
def test_a_set_that_is_not_here_is_an_error_at_import(name):
    """Also at the second import and, for those who load the ops themselves, at their first call."""
    code = """
import sys, torch
messages = []
for _ in range(2):
    try:
        import r2dllm_ext.ops
    except ValueError as error:
        messages.append(str(error))
try:
    torch.ops.r2dllm.token_confidence(torch.zeros(1, 2, 3))
except Exception as error:
    messages.append(str(error))
sys.exit("\\n".join(messages))
"""
    here = ", ".join(INFO["cpu_supported"])
    takes = f"R2DLLM_CPU takes one of {here} on this machine, got '{name}': "
    error = one_error(run(code, R2DLLM_CPU=name))
    assert error.count(takes) == (2 if EMULATED else 3), error
    reason = (
        "this processor does not run it"
        if name in INFO["cpu_compiled"]
        else (
            "this build has no kernels for it"
            if name in KNOWN
            else "there is no such instruction set"
        )
    )
    assert reason in error
