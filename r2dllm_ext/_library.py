# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled ops, or says in one sentence why it can't."""

from __future__ import annotations

from typing import Any

import torch


def _load() -> Any:
    try:
        from . import _built_with
    except ImportError as error:
        raise ImportError(
            "r2dllm_ext: the extension is not built. Fix: pip install --no-build-isolation . in "
            "the source tree (or -e . to work on it)"
        ) from error
    built, found = _built_with.TORCH, torch.__version__
    if built.split("+")[0].split(".")[:2] != found.split("+")[0].split(".")[:2]:
        raise ImportError(
            f"r2dllm_ext was built against torch {built}, but torch {found} is installed. Fix: "
            "rebuild it against this one: pip install --no-build-isolation --force-reinstall "
            "--no-deps ."
        )
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(
            f"r2dllm_ext: the extension, built against torch {built}, does not load with torch "
            f"{found}: {error}. Fix: rebuild it: pip install --no-build-isolation "
            "--force-reinstall --no-deps ."
        ) from error
    _C.build_info()  # ValueError where R2DLLM_CPU asks for what this machine does not have
    return _C


_C = _load()


def build_info() -> dict[str, Any]:
    """What was built and what runs.

    Returns a dict: `version` of the package, `torch` it was built against, `cuda` (bool),
    `cuda_architectures`, `cpu_compiled` (instruction sets with kernels, best first),
    `cpu_supported` (those of them that this processor runs) and `cpu_in_use` (the one that the
    environment variable R2DLLM_CPU names when the package is imported: "avx512", "avx2" or
    "portable"; unset or blank, the first supported). The import raises ValueError if that one is
    not supported.

    >>> build_info()["cpu_in_use"] in build_info()["cpu_supported"]
    True
    """
    return _C.build_info()
