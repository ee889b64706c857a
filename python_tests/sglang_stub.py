# SPDX-License-Identifier: Apache-2.0
"""Import this before SGLang: stands for torchvision where that is not installed.

SGLang wants it for its multimodal processors alone, and no wheel of it goes with a CPU torch.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from unittest.mock import MagicMock

_NAMES = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2")


def _stub(name: str) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    module.__getattr__ = lambda attribute: MagicMock(name=attribute)
    sys.modules[name] = module


if importlib.util.find_spec("torchvision") is None:
    for _name in (*_NAMES, ".transforms.v2.functional"):
        _stub("torchvision" + _name)
