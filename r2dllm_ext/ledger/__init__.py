# SPDX-License-Identifier: Apache-2.0
"""The ledger task: generator, tokenizer, verifier, training script and a small trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .task import (
    ANSWER_LENGTH,
    Problem,
    Sample,
    Verdict,
    encode_sample,
    make_sample,
    parse_prompt,
    verify,
    verify_record,
)
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from ..models import Transformer

__all__ = [
    "ANSWER_LENGTH",
    "MODEL_PATH",
    "Problem",
    "Sample",
    "Tokenizer",
    "Verdict",
    "encode_sample",
    "load",
    "make_sample",
    "parse_prompt",
    "verify",
    "verify_record",
]

MODEL_PATH = Path(__file__).parent / "model"


def load(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """The bundled ledger model; `dtype=None` keeps its float32.

    >>> model, tokenizer = load(), Tokenizer()
    >>> model.vocab_size == len(tokenizer)
    True
    """
    from ..models import load_model

    return load_model("ledger", device=device, dtype=dtype)
