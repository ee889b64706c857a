# SPDX-License-Identifier: Apache-2.0
"""Shape of the transformer, read from and written to the published config.json layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# What the transformer computes; a checkpoint that asks for anything else is refused by name.
_LLADA_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "rope": (True,),
    "rope_full_precision": (True,),
    "scale_logits": (False,),
    "multi_query_attention": (False, None),
    "rope_scaling": (None, False),
    "clip_qkv": (None, False),
}
_DREAM_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None, False),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a transformer; `family` decides how its cache and its checkpoint are laid out.

    Fields are named alike for both families; every one is validated when built (`ValueError`
    naming field, value and what it takes).

    >>> ModelConfig("llada", vocab_size=64, width=32, layers=2, heads=4, mlp_width=64).head_dim
    8
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    kv_heads: int | None = None  # None: as many as heads
    embedding_size: int | None = None  # rows of embedding and head; None: vocab_size
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    tied_head: bool = False
    max_length: int = 4096
    mask_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in ("llada", "dream"):
            raise ValueError(f"ModelConfig: family is {self.family!r}, takes 'llada' or 'dream'")
        for name, fallback in (("kv_heads", self.heads), ("embedding_size", self.vocab_size)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, fallback)
        for name in ("vocab_size", "width", "layers", "heads", "mlp_width", "kv_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ModelConfig: {name} is {value!r}, takes an int >= 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"ModelConfig: width {self.width} is not an even multiple of heads {self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"ModelConfig: heads {self.heads} is not a multiple of kv_heads {self.kv_heads}"
            )
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"ModelConfig: embedding_size {self.embedding_size} is below "
                f"vocab_size {self.vocab_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def from_hf_config(cls, fields: dict[str, Any]) -> ModelConfig:
        """Reads a `config.json` in the LLaDA (`d_model`) or Dream (`hidden_size`) layout.

        Absent optional fields take the defaults of the published classes. A missing field, or a
        value that the transformer does not compute, raises `ValueError` naming it.
        """
        if "d_model" in fields:
            return cls._from_llada(fields)
        if "hidden_size" in fields:
            return cls._from_dream(fields)
        raise ValueError(
            "config.json: neither d_model (LLaDA layout) nor hidden_size (Dream layout) is present"
        )

    @classmethod
    def _from_llada(cls, fields: dict[str, Any]) -> ModelConfig:
        _refuse_unsupported(fields, _LLADA_FIXED)
        width = _required(fields, "d_model")
        mlp_width = fields.get("mlp_hidden_size")
        return cls(
            family="llada",
            vocab_size=_required(fields, "vocab_size"),
            embedding_size=fields.get("embedding_size"),
            width=width,
            layers=_required(fields, "n_layers"),
            heads=_required(fields, "n_heads"),
            kv_heads=fields.get("n_kv_heads"),
            mlp_width=fields.get("mlp_ratio", 4) * width if mlp_width is None else mlp_width,
            rope_theta=float(fields.get("rope_theta", 10000.0)),
            norm_eps=float(fields.get("rms_norm_eps", 1e-5)),
            qkv_bias=bool(fields.get("include_qkv_bias", False)),
            tied_head=bool(fields.get("weight_tying", False)),
            max_length=fields.get("max_sequence_length", 4096),
            mask_id=fields.get("mask_token_id"),
            eos_id=fields.get("eos_token_id"),
            pad_id=fields.get("pad_token_id"),
        )

    @classmethod
    def _from_dream(cls, fields: dict[str, Any]) -> ModelConfig:
        rope = fields.get("rope_parameters") or {}  # where newer writers nest the rope fields
        _refuse_unsupported(fields, _DREAM_FIXED)
        _refuse_unsupported(rope, {"rope_type": ("default",)})
        width, heads = _required(fields, "hidden_size"), _required(fields, "num_attention_heads")
        _refuse_unsupported(fields, {"head_dim": (width // heads, None)})
        return cls(
            family="dream",
            vocab_size=_required(fields, "vocab_size"),
            width=width,
            layers=_required(fields, "num_hidden_layers"),
            heads=heads,
            kv_heads=fields.get("num_key_value_heads"),
            mlp_width=_required(fields, "intermediate_size"),
            rope_theta=float(fields.get("rope_theta", rope.get("rope_theta", 10000.0))),
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            qkv_bias=True,
            tied_head=bool(fields.get("tie_word_embeddings", False)),
            max_length=fields.get("max_position_embeddings", 4096),
            mask_id=fields.get("mask_token_id"),
            eos_id=fields.get("eos_token_id"),
            pad_id=fields.get("pad_token_id"),
        )

    def to_hf_config(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The `config.json` of this shape in the layout of its family; inverse of the above."""
        common = {
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "mask_token_id": self.mask_id,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.pad_id,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        if self.family == "dream":
            return common | {
                "model_type": "Dream",
                "hidden_act": "silu",
                "hidden_size": self.width,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "intermediate_size": self.mlp_width,
                "max_position_embeddings": self.max_length,
                "tie_word_embeddings": self.tied_head,
                "rope_scaling": None,
            }
        return common | {
            "model_type": "llada",
            "activation_type": "silu",
            "alibi": False,
            "block_group_size": 1,
            "block_type": "llama",
            "d_model": self.width,
            "embedding_size": self.embedding_size,
            "include_bias": False,
            "include_qkv_bias": self.qkv_bias,
            "layer_norm_type": "rms",
            "max_sequence_length": self.max_length,
            "mlp_hidden_size": self.mlp_width,
            "n_heads": self.heads,
            "n_kv_heads": self.kv_heads,
            "n_layers": self.layers,
            "rope": True,
            "weight_tying": self.tied_head,
        }


def _required(fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise ValueError(f"config.json: field {name} is missing")
    return fields[name]


def _refuse_unsupported(fields: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> None:
    for name, allowed in fixed.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"config.json: {name} is {fields[name]!r}, supported: "
                + " or ".join(repr(value) for value in allowed if value is not None)
            )
