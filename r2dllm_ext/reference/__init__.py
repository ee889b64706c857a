# SPDX-License-Identifier: Apache-2.0
"""The oracle: every op of the package once more, written to be read rather than to be fast.

Plain PyTorch in float64 with the signatures of the ops; importable without the extension. What the
tests compare against, and the place to look up what a rule does.
"""

from ..config import DecodeConfig, Rule
from ..state import DecodeState, DecodeStep
from .base_rule import base_rule
from .decode_step import (
    Observation,
    decide,
    decode_step,
    observe,
    observe_statistics,
    select,
)
from .edits import edits
from .neighbour import neighbours
from .positional_ambiguity import positional_ambiguity
from .random import philox4x32, uniform
from .row_stats import row_stats
from .rows import each_row
from .sampling import draw_token, draw_tokens, token_weights
from .sft_loss import linear_sft_loss, sft_loss
from .stability import update_stability_
from .token_confidence import probability_of, token_confidence, token_entropy
from .vocab_statistics import merge_statistics, vocab_statistics
from .window_pool import window_pool

__all__ = [
    "DecodeConfig",
    "DecodeState",
    "DecodeStep",
    "Observation",
    "Rule",
    "base_rule",
    "decide",
    "decode_step",
    "draw_token",
    "draw_tokens",
    "each_row",
    "edits",
    "linear_sft_loss",
    "merge_statistics",
    "neighbours",
    "observe",
    "observe_statistics",
    "philox4x32",
    "positional_ambiguity",
    "probability_of",
    "row_stats",
    "select",
    "sft_loss",
    "token_confidence",
    "token_entropy",
    "token_weights",
    "uniform",
    "update_stability_",
    "vocab_statistics",
    "window_pool",
]
