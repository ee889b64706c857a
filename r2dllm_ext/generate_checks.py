# SPDX-License-Identifier: Apache-2.0
"""What `generate` checks of its prompt, mask and model before the first forward.

A model does not notice these: it answers with other tokens, or with an assertion on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._checks import refuse


def check_inputs(
    model: Any,
    prompt: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    gen_length: int,
    mask_id: int,
    stops: Sequence[int] = (),
) -> None:
    """Raises ValueError naming the argument of `generate`; reads prompt and mask on the host."""
    if attention_mask is not None:
        _check_attention_mask(attention_mask)
    _check_length(model, prompt.shape[1], gen_length)
    if set(stops) == {mask_id}:  # a cell that holds it is not decided: nothing would ever end
        takes = f"an id that is not config.mask_id ({mask_id})"
        refuse(ValueError, "generate", "stop_id", takes, mask_id)
    rows = embedding_rows(model)
    if rows is None:
        return
    for name, i in (("config.mask_id", mask_id), *(("stop_id", i) for i in stops)):
        if not 0 <= i < rows:
            takes = f"an id in [0, {rows}), the rows of the model's embedding"
            refuse(ValueError, "generate", name, takes, i)
    outside = (prompt < 0) | (prompt >= rows)
    if outside.any():
        row, position = outside.nonzero()[0].tolist()
        raise ValueError(
            f"generate: prompt takes ids in [0, {rows}), the rows of the model's embedding, got "
            f"{int(prompt[row, position])} in row {row} at position {position}"
        )


def embedding_rows(model: Any) -> int | None:
    """Rows of the model's embedding, or None where it does not say.

    `get_input_embeddings` is the convention of transformers, whose base class raises
    NotImplementedError where a model has not defined it.

    >>> embedding_rows(load_model("ledger"))
    56
    """
    try:
        weight = model.get_input_embeddings().weight
        return weight.shape[0]
    except (AttributeError, NotImplementedError):
        return None


def context_length(model: Any) -> int | None:
    """Positions that the model is meant for, or None where it does not say.

    >>> context_length(load_model("ledger"))
    512
    """
    config = getattr(model, "config", None)
    # Ours; LLaDA's and Dream's own classes. (`max_length` of a transformers config is another.)
    for holder, name in (
        (model, "context_length"),
        (config, "max_sequence_length"),
        (config, "max_position_embeddings"),
    ):
        length = getattr(holder, name, None)
        if isinstance(length, int):
            return length
    return None


def _check_length(model: Any, prompt_length: int, gen_length: int) -> None:
    positions = context_length(model)
    if positions is not None and prompt_length + gen_length > positions:
        raise ValueError(
            f"generate: prompt and gen_length take together at most the {positions} positions of "
            f"the model, got {prompt_length} + {gen_length}"
        )


def _check_attention_mask(mask: torch.Tensor) -> None:
    real = mask == 1
    if not (real | (mask == 0)).all():
        raise ValueError(
            "generate: attention_mask takes 1 / True on tokens and 0 / False on padding, got "
            f"{mask.dtype} with other values (an additive mask?)"
        )
    after_token = real[:, :-1] & ~real[:, 1:]
    if after_token.any():
        row = int(after_token.any(1).nonzero()[0])
        raise ValueError(
            "generate: attention_mask takes rows padded on the left, zeros before ones (the answer "
            f"follows the prompt), got a zero after a one in row {row}"
        )
