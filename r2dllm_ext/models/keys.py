# SPDX-License-Identifier: Apache-2.0
"""Keys of the published checkpoints, and what is said when those of a file are others."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Our module path -> published key; "{}" is the layer number.
_KEYS = {
    "llada": {
        "embed": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
        "blocks.{}.attn_norm": "model.transformer.blocks.{}.attn_norm",
        "blocks.{}.attn.q_proj": "model.transformer.blocks.{}.q_proj",
        "blocks.{}.attn.k_proj": "model.transformer.blocks.{}.k_proj",
        "blocks.{}.attn.v_proj": "model.transformer.blocks.{}.v_proj",
        "blocks.{}.attn.o_proj": "model.transformer.blocks.{}.attn_out",
        "blocks.{}.mlp_norm": "model.transformer.blocks.{}.ff_norm",
        "blocks.{}.gate_proj": "model.transformer.blocks.{}.ff_proj",
        "blocks.{}.up_proj": "model.transformer.blocks.{}.up_proj",
        "blocks.{}.down_proj": "model.transformer.blocks.{}.ff_out",
    },
    "dream": {
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
        "blocks.{}.attn.q_proj": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.attn.k_proj": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.attn.v_proj": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.attn.o_proj": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.gate_proj": "model.layers.{}.mlp.gate_proj",
        "blocks.{}.up_proj": "model.layers.{}.mlp.up_proj",
        "blocks.{}.down_proj": "model.layers.{}.mlp.down_proj",
    },
}
_ROTARY_BUFFERS = ("inv_freq", "cos_cached", "sin_cached")
# What wrappers put into the names of what they wrap: torch.compile, DDP and FSDP, checkpointing.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def published_key(family: str, name: str) -> str:
    """Checkpoint key of one of our parameters.

    >>> published_key("llada", "blocks.3.down_proj.weight")
    'model.transformer.blocks.3.ff_out.weight'
    """
    module, leaf = name.rsplit(".", 1)
    layer = re.match(r"blocks\.(\d+)\.", module)
    number = layer[1] if layer else ""
    pattern = module.replace(f"blocks.{number}.", "blocks.{}.", 1) if layer else module
    return f"{_KEYS[family][pattern].format(number)}.{leaf}"


def is_rotary_buffer(key: str) -> bool:
    """Tables that some writers store; they follow from the config.

    >>> is_rotary_buffer("model.layers.0.self_attn.rotary_emb.inv_freq")
    True
    """
    *modules, name = key.split(".")
    return "rotary_emb" in modules or name in _ROTARY_BUFFERS


def naming_hint(wanted: str, stored: Iterable[str]) -> str:
    """How the stored keys seem to differ from the published ones, from one that is missing.

    >>> naming_hint("lm_head.weight", ["module.lm_head.weight", "module.norm.weight"])
    ": the stored keys seem to have the prefix 'module.' too many"
    >>> naming_hint("model.norm.weight", ["norm.weight"])
    ": the stored keys seem to lack the prefix 'model.'"
    """
    for key in stored:
        if key.endswith(f".{wanted}"):
            extra = key.removesuffix(wanted)
            return f": the stored keys seem to have the prefix {extra!r} too many"
        for wrapper in _WRAPPERS:
            if wrapper in key and key.replace(wrapper, "") == wanted:
                return f": the stored keys seem to have {wrapper!r} too many"
        if wanted.endswith(f".{key}"):
            return f": the stored keys seem to lack the prefix {wanted.removesuffix(key)!r}"
    return ""
