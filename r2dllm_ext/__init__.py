# SPDX-License-Identifier: Apache-2.0
"""Native decode steps for masked-diffusion language models: the rules of R2-dLLM.

`decode_step` commits the tokens of a block from one forward's logits; `generate` drives a whole
model with it; `load_model` loads LLaDA and Dream checkpoints, or the bundled ledger model.
`r2dllm_ext.reference` is the readable oracle of every op and needs no extension.
"""

from importlib.util import find_spec

from . import _command as _command  # before anything that takes time
from . import models, reference, tasks
from ._version import __version__
from .config import DecodeConfig, Rule
from .corruption import Corruption, corrupt
from .models import load_model
from .row_params import RowParams
from .state import DecodeState
from .tasks import ledger

__all__ = [
    "Corruption",
    "DecodeConfig",
    "DecodeState",
    "DecodeStep",
    "Evidence",
    "Generation",
    "NoProgressError",
    "RedundancyScore",
    "RowParams",
    "RowStats",
    "Rule",
    "StepEvent",
    "Trace",
    "VocabStatistics",
    "__version__",
    "all_gather_statistics",
    "build_info",
    "corrupt",
    "decode_step",
    "evidence",
    "generate",
    "ledger",
    "linear_sft_loss",
    "load_model",
    "merge_statistics",
    "models",
    "positional_ambiguity",
    "redundancy_score",
    "reference",
    "row_stats",
    "select",
    "sft_loss",
    "tasks",
    "token_confidence",
    "update_stability_",
    "vocab_statistics",
    "window_pool",
]

# A build leaves `_built_with`. With it the extension is loaded, and checked against the installed
# torch, here and now; without it whoever asks for an op is told how to build.
if find_spec("._built_with", __name__) is not None:
    from ._library import build_info
    from .decode_progress import NoProgressError
    from .evidence import Evidence, evidence
    from .generation import Generation, StepEvent, generate
    from .ops import (
        DecodeStep,
        RowStats,
        VocabStatistics,
        all_gather_statistics,
        decode_step,
        linear_sft_loss,
        merge_statistics,
        positional_ambiguity,
        row_stats,
        select,
        sft_loss,
        token_confidence,
        update_stability_,
        vocab_statistics,
        window_pool,
    )
    from .redundancy import RedundancyScore, redundancy_score
    from .trace import Trace
else:

    def __getattr__(name: str):
        if name in __all__:
            from . import _library  # noqa: F401  (raises the error that names the fix)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
