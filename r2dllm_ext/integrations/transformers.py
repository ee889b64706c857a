# SPDX-License-Identifier: Apache-2.0
"""transformers: `model.generate(..., custom_generate=r2_generate)` for masked-diffusion models.

    from r2dllm_ext.integrations.transformers import CUSTOM_GENERATE, r2_generate
    model.generate(**inputs, custom_generate=r2_generate, r2_config=DecodeConfig.r2(mask_id))
    model.generate(**inputs, custom_generate=CUSTOM_GENERATE, trust_remote_code=True, r2_config=...)

Options of `GenerationConfig` are mapped or refused. What transformers itself does before (inputs,
padding, stopping criteria) stays its own. A model without `GenerationMixin` (LLaDA's remote class)
has no `generate` there: `r2dllm_ext.generate` takes it as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .._checks import instance, integer, refuse
from ..config import DecodeConfig
from ..generation import generate
from ._transformers_answers import Answers, Finished
from ._transformers_inputs import sampling_of, with_positions
from ._versions import require

CUSTOM_GENERATE = str(Path(__file__).parent / "custom_generate_repo")
"""A folder as `custom_generate` takes one, with `r2_generate` in it; it can be copied to a hub."""


def r2_generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    r2_config: DecodeConfig | None = None,
    r2_cache: str = "none",
    r2_streamer: Any = None,
    block_length: int = 32,
    logits_shift: int = 0,
    **model_kwargs: Any,
) -> Any:
    """Decode as `r2dllm_ext.generate` does; called by transformers, never by hand.

    What one gives to `model.generate` beside `custom_generate`:

    Args:
        r2_config: what a step may commit. Default: `DecodeConfig.r2` with the `mask_token_id` of
            the generation config or of the model's config.
        r2_cache: "none", "prefix" or "dual", where the model has the cache of the published loops.
        r2_streamer: gets the prompt, then the tokens of a block, [B, n], when it is finished.
            (transformers gives no callable its `streamer` and `tokenizer`: the folder takes these.)
        block_length: of a block (32). The last one is decoded whole and cut.
        logits_shift: 1 for models whose row i - 1 predicts token i (Dream).
        max_new_tokens, max_length, eos_token_id, pad_token_id, num_return_sequences: as ever.
        do_sample, temperature, top_k, top_p, min_p: the fields of DecodeConfig of these names
            (top_k is 50 unless it is given), by a seed from torch's random numbers. Without
            do_sample `r2_config` decides.
        attention_mask: batches that are padded on the left.
        stopping_criteria, stop_strings, max_time: looked at when a block is finished, at each of
            its tokens in turn: an answer ends with the first that fulfils one (max_time: with the
            block). A row that has ended waits for the others.
        return_dict_in_generate: gives `GenerateDecoderOnlyOutput(sequences=...)`.

    Returns:
        [B, P + n] int64, what follows the end of an answer is `pad_token_id`.

    Raises:
        ImportError: transformers is not of the series that this was tested with.
        ValueError: an option or a logits processor that a parallel decode has no place for, by its
            name; and what `generate` raises.
    """
    require("transformers")
    where = "r2_generate"
    config = r2_config
    if config is None:
        config = DecodeConfig.r2(_mask_id(model, generation_config))
    instance(where, "r2_config", config, DecodeConfig)
    config = sampling_of(config, generation_config, logits_processor)
    integer(where, "block_length", block_length, 1)
    attention_mask = model_kwargs.pop("attention_mask", None)
    if generation_config.use_cache is False and r2_cache != "none":
        refuse(ValueError, where, "r2_cache", "'none' with use_cache=False", r2_cache)
    model = with_positions(model, input_ids, attention_mask, model_kwargs)
    answers = Answers(input_ids, generation_config, stopping_criteria, r2_streamer, block_length)
    if r2_streamer is not None:
        r2_streamer.put(input_ids.cpu())
    blocks = -(-(generation_config.max_length - input_ids.shape[1]) // block_length)
    try:
        sequences = generate(
            model,
            input_ids,
            gen_length=blocks * block_length,
            block_length=block_length,
            config=config,
            cache=r2_cache,
            logits_shift=logits_shift,
            attention_mask=attention_mask,
            stop_id=answers.eos or None,
            on_step=answers.on_step,
        ).sequences
    except Finished as finished:
        sequences = finished.sequences
    sequences = answers.end(sequences)
    if r2_streamer is not None:
        r2_streamer.end()
    if not generation_config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)


def generate_from_folder(model: Any, **arguments: Any) -> Any:
    """What the folder's `generate` does: `r2_generate` with `streamer` and `stop_strings`."""
    for name in ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask"):
        if arguments.pop(name, None) is not None:
            refuse(ValueError, "r2_generate", name, "None", "a value")
    streamer, tokenizer = arguments.pop("streamer", None), arguments.pop("tokenizer", None)
    if (stop_strings := arguments.pop("stop_strings", None)) is not None:
        from transformers import StoppingCriteriaList, StopStringCriteria

        criterion = StopStringCriteria(tokenizer, stop_strings)
        given = arguments.get("stopping_criteria") or ()
        arguments["stopping_criteria"] = StoppingCriteriaList([*given, criterion])
    if streamer is not None:
        arguments["r2_streamer"] = streamer
    return model.generate(custom_generate=r2_generate, **arguments)


def _mask_id(model: Any, generation_config: Any) -> int:
    for holder in (generation_config, model.config):
        mask_id = getattr(holder, "mask_token_id", None)
        if mask_id is not None:
            return mask_id
    takes = "a DecodeConfig where neither generation config nor model config has a mask_token_id"
    return refuse(ValueError, "r2_generate", "r2_config", takes, None)
