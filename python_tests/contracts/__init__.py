# SPDX-License-Identifier: Apache-2.0
"""Engines that are repositories, not packages: what an integration builds on, restated.

`contract(engine)` makes the restatement importable under the engine's name, `checkout(engine)` the
engine's own files, from a folder of checkouts that R2DLLM_ENGINE_SOURCES names.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def checkout(name: str) -> Path:
    """The folder of a checkout; skips where there is none."""
    root = os.environ.get("R2DLLM_ENGINE_SOURCES", "").strip()  # blank counts as unset
    if not root:
        pytest.skip("R2DLLM_ENGINE_SOURCES names no folder of checkouts")
    if not (Path(root) / name).is_dir():
        pytest.skip(f"R2DLLM_ENGINE_SOURCES has no {name}")
    return Path(root) / name


@contextmanager
def integration(engine: str, folders: Mapping[str, Path]) -> Iterator[ModuleType]:
    """`r2dllm_ext.integrations.<engine>` where these packages, without what their __init__ does,
    lie in these folders."""
    ours = f"r2dllm_ext.integrations.{engine}"
    before = dict(sys.modules)
    for name in [name for name in before if name == ours or name.partition(".")[0] in folders]:
        del sys.modules[name]
    for name, folder in folders.items():
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = module_from_spec(spec)
    try:
        yield importlib.import_module(ours)
    finally:
        for name in set(sys.modules) - set(before):
            if name == ours or name.partition(".")[0] in folders:
                del sys.modules[name]
        sys.modules.update(before)
