# SPDX-License-Identifier: Apache-2.0
"""Native decode steps for masked-diffusion language models: the rules of R2-dLLM.

`decode_step` commits the tokens of a block from one forward's logits; `generate` drives a whole
model with it; `load_model` loads LLaDA and Dream checkpoints, or the bundled ledger model.
`r2dllm_ext.reference` is the readable oracle of every op and needs no extension.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from ._version import __version__

# Where each public name lives. Resolved on first use, so that `r2dllm_ext.reference` and
# `r2dllm_ext.config` import without the compiled extension.
_HOME = {
    "DecodeConfig": ".config",
    "DecodeState": ".state",
    "DecodeStep": ".ops",
    "Generation": ".generation",
    "NoProgressError": ".generation",
    "Rule": ".config",
    "Trace": ".trace",
    "build_info": "._library",
    "decode_step": ".ops",
    "generate": ".generation",
    "load_model": ".models",
    "positional_ambiguity": ".ops",
    "select": ".ops",
    "token_confidence": ".ops",
    "update_stability_": ".ops",
    "window_pool": ".ops",
}

_MODULES = ("ledger", "models", "reference")

if TYPE_CHECKING:
    from ._library import build_info
    from .config import DecodeConfig, Rule
    from .generation import Generation, NoProgressError, generate
    from .models import load_model
    from .ops import (
        DecodeStep,
        decode_step,
        positional_ambiguity,
        select,
        token_confidence,
        update_stability_,
        window_pool,
    )
    from .state import DecodeState
    from .trace import Trace

__all__ = ["__version__", *_HOME, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# A built extension is checked against the installed torch here and now, not at its first use.
if importlib.util.find_spec("._built_with", __name__) is not None:
    from . import _library as _library
