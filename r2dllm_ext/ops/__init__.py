# SPDX-License-Identifier: Apache-2.0
"""The ops, one file each: a thin wrapper over `torch.ops.r2dllm` and its fake (meta) kernel."""

from .. import _library as _library  # registers the ops
from ..state import DecodeStep as DecodeStep
from .decode_step import decode_step, select
from .linear_sft_loss import linear_sft_loss
from .positional_ambiguity import positional_ambiguity
from .row_stats import RowStats, row_stats
from .sft_loss import sft_loss
from .token_confidence import token_confidence
from .update_stability import update_stability_
from .vocab_statistics import (
    VocabStatistics,
    all_gather_statistics,
    merge_statistics,
    vocab_statistics,
)
from .window_pool import window_pool

__all__ = [
    "DecodeStep",
    "RowStats",
    "VocabStatistics",
    "all_gather_statistics",
    "decode_step",
    "linear_sft_loss",
    "merge_statistics",
    "positional_ambiguity",
    "row_stats",
    "select",
    "sft_loss",
    "token_confidence",
    "update_stability_",
    "vocab_statistics",
    "window_pool",
]
