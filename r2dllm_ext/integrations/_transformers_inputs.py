# SPDX-License-Identifier: Apache-2.0
"""What `r2_generate` is given by transformers: sampling, arguments, positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import refuse
from ..config import DecodeConfig

# Options that `r2_generate` or transformers, before it is called, acts upon; those that say
# something about a beam or an assistant, of which there is none; and what a file says of itself.
_KNOWN = frozenset(
    "max_length max_new_tokens max_time stop_strings do_sample temperature top_k top_p min_p "
    "pad_token_id bos_token_id eos_token_id mask_token_id num_return_sequences token_healing "
    "return_dict_in_generate disable_compile use_cache transformers_version".split()
)
# What `GenerationConfig` turns into a processor of logits, and here into fields of DecodeConfig.
_SAMPLERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper")
# What transformers prepares for a loop of its own.
_PREPARED = ("use_cache", "logits_to_keep", "cache", "past_key_values", "cache_position")


def sampling_of(config: DecodeConfig, options: Any, processors: Any) -> DecodeConfig:
    """`config` with the sampling of a GenerationConfig; ValueError for what has no place here."""
    where = "r2_generate"
    for processor in processors:
        name = type(processor).__name__
        if not (options.do_sample and name in _SAMPLERS):
            refuse(ValueError, where, "logits_processor", "none (cells are decided together)", name)
    neutral = options._get_default_generation_params()
    # Of those that became no processor: what is set, and not to its default.
    for name, value in options.to_dict().items():
        off = value is None or value is False or value == neutral.get(name)
        if not (off or name in _KNOWN or name.startswith("_")):
            refuse(ValueError, where, name, f"{neutral.get(name)} (its default)", value)
    if not options.do_sample:
        return config
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if getattr(config, name):
            got = f"{getattr(config, name)} beside do_sample"
            refuse(ValueError, where, f"r2_config.{name}", "its default with do_sample", got)
    return config.replace(
        temperature=options.temperature,
        top_k=options.top_k or None,
        top_p=options.top_p,
        min_p=options.min_p or None,
        seed=int(torch.randint(2**62, (), dtype=torch.int64, device="cpu")),
    )


class _WithPositions:
    """A model whose forward takes `position_ids`, and is told those of rows that are padded."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, ids: Tensor, *, attention_mask: Tensor, **options: Any) -> Any:
        positions = positions_of(attention_mask)
        if (place := options.get("replace_position")) is not None:
            first = place.int().argmax(1, keepdim=True)
            columns = first + torch.arange(ids.shape[1], device=ids.device)
            positions = positions.gather(1, columns)
        else:
            positions = positions[:, -ids.shape[1] :]
        return self._model(ids, attention_mask=attention_mask, position_ids=positions, **options)


def positions_of(attention_mask: Tensor) -> Tensor:
    """[B, T]: the first token of each row is at 0."""
    return (attention_mask.long().cumsum(1) - 1).clamp_(min=0)


def with_positions(model: Any, ids: Tensor, attention_mask: Tensor | None, kwargs: dict) -> Any:
    """The model, told its positions where it takes them; ValueError for any other argument."""
    positions = kwargs.pop("position_ids", None)
    for name, value in kwargs.items():
        prepared = name in _PREPARED and not getattr(value, "_is_user_defined", False)
        if value is not None and not prepared:
            refuse(ValueError, "r2_generate", name, "None", "a value")
    if positions is None:
        return model
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    if not torch.equal(positions.expand_as(ids)[mask == 1], positions_of(mask)[mask == 1]):
        refuse(
            ValueError, "r2_generate", "position_ids", "None, or 0, 1, 2, ... of each row", "others"
        )
    return model if attention_mask is None else _WithPositions(model)
