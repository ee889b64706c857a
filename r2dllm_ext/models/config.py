# SPDX-License-Identifier: Apache-2.0
"""Shape of the transformer, read from and written to the published config.json layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch

from .rope import LARGEST, RopeScaling, read_rope

_MOST = 2**24  # of any size: no model is larger, and products of two stay far from 64 bits
_SIZES = (
    "vocab_size",
    "width",
    "layers",
    "heads",
    "mlp_width",
    "kv_heads",
    "embedding_size",
    "max_length",
)
_TOKEN_IDS = {"mask_id": "mask_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id"}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a transformer; `family` decides how its cache and its checkpoint are laid out.

    Fields are named alike for both families; every one is validated when built (`ValueError`
    naming field, what it takes and what it got).

    >>> ModelConfig("llada", vocab_size=64, width=32, layers=2, heads=4, mlp_width=64).head_dim
    8
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    # The type of these, and of qkv_bias, is that of a built config: no None is left in one.
    kv_heads: int = cast(int, None)  # None: as many as heads
    embedding_size: int = cast(int, None)  # rows of embedding and head; None: vocab_size
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    qkv_bias: bool = cast(bool, None)  # None: as published, False for llada and True for dream
    tied_head: bool = False
    max_length: int = 4096  # as config.json counts positions; see `context_length`
    mask_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None  # several: each of them ends an answer
    pad_id: int | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or self.family not in _LAYOUTS:
            raise ValueError(f"ModelConfig: family takes 'llada' or 'dream', got {self.family!r}")
        layout = _LAYOUTS[self.family]
        if self.qkv_bias is None:
            object.__setattr__(self, "qkv_bias", layout.defaults["qkv_bias"])
        for name, value in _completed(vars(self)).items():
            object.__setattr__(self, name, value)
        _validate(vars(self), "ModelConfig", {})
        only = {"qkv_bias": layout.defaults["qkv_bias"], "embedding_size": self.vocab_size}
        for name, value in only.items():
            if name not in layout.names and getattr(self, name) != value:
                raise ValueError(
                    f"ModelConfig: {name} takes {value} with family {self.family!r}, whose "
                    f"config.json can't say otherwise, got {getattr(self, name)!r}"
                )
        if not isinstance(self.rope_scaling, (RopeScaling, type(None))):
            raise ValueError(
                f"ModelConfig: rope_scaling takes a RopeScaling or None, got {self.rope_scaling!r}"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def context_length(self) -> int:
        """Positions that the rotary embedding, stretched or not, is meant for."""
        scaling = self.rope_scaling
        if scaling is None or scaling.type == "llama3":  # whose max_length is the stretched one
            return self.max_length
        trained = scaling.original_length if scaling.type == "yarn" else self.max_length
        return max(self.max_length, int(trained * scaling.factor))

    @classmethod
    def from_hf_config(cls, fields: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Reads a `config.json` in the LLaDA (`d_model`) or Dream (`hidden_size`) layout.

        Absent and null fields take the defaults of the published classes. A missing field, or a
        value that the transformer does not compute, raises `ValueError`: `where`, the field as the
        file calls it, what it takes and what it got.

        >>> ModelConfig.from_hf_config({"model_type": "Dream", "hidden_size": 8})
        Traceback (most recent call last):
        ValueError: config.json: field vocab_size is missing
        """
        family = _family(fields, where)
        layout = _LAYOUTS[family]
        for name, allowed in (_FIXED | layout.fixed).items():
            if fields.get(name) is not None and fields[name] not in allowed:
                takes = " or ".join(map(repr, allowed))
                raise ValueError(f"{where}: {name} takes {takes}, got {fields[name]!r}")
        kinds = fields.get("layer_types")
        are_full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
        if kinds is not None and not are_full:
            raise ValueError(f"{where}: layer_types takes 'full_attention' alone, got {kinds!r}")

        names = layout.names | _TOKEN_IDS
        given = {ours: fields.get(name) for ours, name in names.items()}
        values = layout.defaults | {k: v for k, v in given.items() if v is not None}
        if family == "llada" and "mlp_width" not in values:
            _check_size(values.get("width"), "d_model", where)
            ratio = 4 if fields.get("mlp_ratio") is None else fields["mlp_ratio"]
            _check_size(ratio, "mlp_ratio", where)
            values["mlp_width"] = ratio * values["width"]
        for ours in ("vocab_size", "width", "layers", "heads", "mlp_width"):
            if ours not in values:
                raise ValueError(f"{where}: field {names[ours]} is missing")
        values = _completed(values)
        _validate(values, where, names)
        if fields.get("head_dim") not in (None, values["width"] // values["heads"]):
            takes = f"{names['width']} / {names['heads']} = {values['width'] // values['heads']}"
            raise ValueError(f"{where}: head_dim takes {takes}, got {fields['head_dim']!r}")
        values["rope_theta"], values["rope_scaling"] = read_rope(
            fields, default_theta=10000.0, max_length=values["max_length"], where=where
        )
        return cls(family, **values)

    def with_token_ids(self, fields: Mapping[str, Any], where: str) -> ModelConfig:
        """This config, and ids that it lacks from the fields of a `generation_config.json`."""
        lacking = {ours: n for ours, n in _TOKEN_IDS.items() if getattr(self, ours) is None}
        found = _completed({ours: fields.get(name) for ours, name in lacking.items()})
        _check_ids(found, self.vocab_size, where, lacking)
        return dataclasses.replace(self, **found)

    def to_hf_config(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The `config.json` of this shape in the layout of its family; inverse of the above."""
        layout = _LAYOUTS[self.family]
        fields = {name: getattr(self, ours) for ours, name in (layout.names | _TOKEN_IDS).items()}
        fields["rope_theta"] = self.rope_theta
        fields["rope_scaling"] = self.rope_scaling and self.rope_scaling.to_fields()
        fields["torch_dtype"] = str(dtype).removeprefix("torch.")
        return fields | layout.written


@dataclass(frozen=True)
class _Layout:
    """A published config.json: `names` of our fields in it and `defaults` where it has none."""

    names: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, tuple[Any, ...]]  # what the transformer computes; anything else is refused
    written: dict[str, Any]


# Quantised weights have keys of their own; read as floats they would be another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    # What relatives of these families compute.
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_causal": (False,),
    "partial_rotary_factor": (1,),
    "use_sliding_window": (False,),
}
_LAYOUTS = {
    "llada": _Layout(
        names={
            "vocab_size": "vocab_size",
            "embedding_size": "embedding_size",
            "width": "d_model",
            "layers": "n_layers",
            "heads": "n_heads",
            "kv_heads": "n_kv_heads",
            "mlp_width": "mlp_hidden_size",
            "norm_eps": "rms_norm_eps",
            "qkv_bias": "include_qkv_bias",
            "tied_head": "weight_tying",
            "max_length": "max_sequence_length",
        },
        defaults={"norm_eps": 1e-5, "qkv_bias": False, "tied_head": False, "max_length": 4096},
        fixed={
            "activation_type": ("silu",),
            "alibi": (False,),
            "attention_layer_norm": (False,),
            "block_group_size": (1,),
            "block_type": ("llama",),
            "include_bias": (False,),
            "input_emb_norm": (False,),
            "layer_norm_type": ("rms",),
            "layer_norm_with_affine": (True,),
            "bias_for_layer_norm": (False,),
            "rope": (True,),
            "rope_full_precision": (True,),
            "scale_logits": (False,),
            "multi_query_attention": (False,),
            "clip_qkv": (False,),
        },
        written={
            "model_type": "llada",
            "activation_type": "silu",
            "alibi": False,
            "block_group_size": 1,
            "block_type": "llama",
            "include_bias": False,
            "layer_norm_type": "rms",
            "rope": True,
        },
    ),
    "dream": _Layout(
        names={
            "vocab_size": "vocab_size",
            "width": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "mlp_width": "intermediate_size",
            "norm_eps": "rms_norm_eps",
            "tied_head": "tie_word_embeddings",
            "max_length": "max_position_embeddings",
        },
        defaults={"norm_eps": 1e-6, "qkv_bias": True, "tied_head": False, "max_length": 4096},
        fixed={
            "hidden_act": ("silu",),
            "use_mrope": (False,),
        },
        written={"model_type": "Dream", "hidden_act": "silu"},
    ),
}


def _family(fields: Mapping[str, Any], where: str) -> str:
    """By `model_type`, or the classes in `architectures`; with neither, by the layout."""
    kind, classes = fields.get("model_type"), fields.get("architectures")
    experts = [f"{name} {value!r}" for name, value in fields.items() if "expert" in name and value]
    if experts or "moe" in f"{kind} {classes}".lower():
        raise ValueError(
            f"{where}: model_type takes 'llada' or 'Dream', got {kind!r}, architectures "
            f"{classes!r}, {experts[0] if experts else 'no experts'}: mixtures of experts "
            "(LLaDA-MoE, LLaDA2) are not supported"
        )
    widths = {"llada": "d_model", "dream": "hidden_size"}
    laid_out = [family for family, width in widths.items() if fields.get(width) is not None]
    if kind is None and not laid_out:
        raise ValueError(
            f"{where}: neither d_model (LLaDA layout) nor hidden_size (Dream layout) is present"
        )
    family = laid_out[0] if kind is None else str(kind).lower()
    # OLMo and Qwen2 have the same layouts, and causal attention: their class tells.
    first = str(classes[0] if isinstance(classes, list) and classes else classes or family)
    if family not in widths or (kind is None and not first.lower().startswith(family)):
        raise ValueError(
            f"{where}: model_type takes 'llada' or 'Dream', got {kind!r}, architectures {classes!r}"
        )
    if family not in laid_out:
        raise ValueError(f"{where}: field {widths[family]} is missing, model_type is {kind!r}")
    return family


def _completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that stand for others, spelt out; end ids as one int or a tuple of several."""
    completed = dict(values)
    for name, source in (("kv_heads", "heads"), ("embedding_size", "vocab_size")):
        if source in completed and completed.get(name) is None:
            completed[name] = completed[source]
    ends = completed.get("eos_id")
    if isinstance(ends, (list, tuple)) and all(type(i) is int for i in ends):
        distinct = tuple(dict.fromkeys(ends))
        completed["eos_id"] = distinct if len(distinct) > 1 else distinct[0] if distinct else None
    return completed


def _validate(values: Mapping[str, Any], where: str, names: Mapping[str, str]) -> None:
    """Checks completed values; `names` are those of a file for our fields."""

    def name(field: str) -> str:
        return names.get(field, field)

    def refuse(field: str, takes: str) -> NoReturn:
        raise ValueError(f"{where}: {name(field)} takes {takes}, got {values[field]!r}")

    for field in _SIZES:
        _check_size(values[field], name(field), where)
    for field in ("rope_theta", "norm_eps"):
        value = values.get(field, 1.0)
        if not isinstance(value, (int, float)) or value is True or not 0 < value <= LARGEST:
            refuse(field, f"a number in (0, {LARGEST:g}]")
    for field in ("qkv_bias", "tied_head"):
        if not isinstance(values[field], bool):
            refuse(field, "true or false")
    width, heads, kv_heads = values["width"], values["heads"], values["kv_heads"]
    if width % (2 * heads):
        refuse("width", f"an even multiple of {name('heads')} ({heads})")
    if heads % kv_heads:
        refuse("heads", f"a multiple of {name('kv_heads')} ({kv_heads})")
    if values["embedding_size"] < values["vocab_size"]:
        refuse("embedding_size", f"at least {name('vocab_size')} ({values['vocab_size']})")
    _check_ids(values, values["vocab_size"], where, names)


def _check_size(value: Any, name: str, where: str) -> None:
    if type(value) is not int or not 1 <= value <= _MOST:
        raise ValueError(f"{where}: {name} takes an int in [1, {_MOST}], got {value!r}")


def _check_ids(
    values: Mapping[str, Any], vocab_size: int, where: str, names: Mapping[str, str]
) -> None:
    for field in _TOKEN_IDS:
        ids, takes = values.get(field), f"an id of the vocabulary [0, {vocab_size})"
        if field == "eos_id":
            takes += " or several of them"
        several = ids if field == "eos_id" and isinstance(ids, tuple) else (ids,)
        if ids is not None and not all(type(i) is int and 0 <= i < vocab_size for i in several):
            got = list(ids) if isinstance(ids, tuple) else ids
            raise ValueError(f"{where}: {names.get(field, field)} takes {takes}, got {got!r}")
