# SPDX-License-Identifier: Apache-2.0
"""What every process of SGLang loads through the entry point `sglang.srt.plugins`, dLLM or not.

SGLang's algorithms, and with them most of SGLang, are imported by those processes that decode
with them. Ours join its registry at that moment, and nothing is imported before.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

from ._versions import require

_REGISTRY = "sglang.srt.dllm.algorithm"


def register() -> None:
    """Make `R2DLLM` and `R2JointThreshold` names of `--dllm-algorithm`. May be called again.

    Raises:
        ImportError: SGLang is of a version that is not known.
    """
    require("sglang")
    if _REGISTRY in sys.modules:
        _add(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _add(registry) -> None:
    from .sglang import R2DLLM, R2JointThreshold

    registry.algo_name_to_cls.update(R2DLLM=R2DLLM, R2JointThreshold=R2JointThreshold)


class _WhenImported(MetaPathFinder):
    """Lets the others find the registry, once, and adds to it when its module has been run."""

    def find_spec(self, name, path=None, target=None):
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def run_and_add(module) -> None:
                loader.exec_module = run  # a loader may serve other modules too
                run(module)
                _add(module)

            loader.exec_module = run_and_add
        return spec
