"""Bidirectional masked-diffusion transformer for LLaDA and Dream checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROPE_LENGTH = 4096  # positions tabulated up front; longer sequences grow the table once

# What this class computes; a checkpoint that asks for anything else is refused by name.
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
    """Shape of a :class:`Transformer`; ``family`` decides the cache and checkpoint layout.

    Example::

        ModelConfig("llada", vocab_size=64, width=32, layers=2, heads=4, mlp_width=64)
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
        """Read a ``config.json`` in the LLaDA (``d_model``) or Dream (``hidden_size``) layout.

        Raises ``ValueError`` naming the field for a missing field or a value that this class does
        not compute. Absent optional fields take the defaults of the published classes.
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
        """The ``config.json`` of this shape in the layout of its family; inverse of the above."""
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


class ModelOutput(NamedTuple):
    """``logits`` [B, n, embedding_size]; ``past_key_values``: (k, v) per layer, or ``None``."""

    logits: Tensor
    past_key_values: list[tuple[Tensor, Tensor]] | None


class RMSNorm(nn.Module):
    """Root mean square norm in float32; the weight multiplies after the cast back."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Rotary(nn.Module):
    """float32 cosine and sine tables [length, head_dim / 2], immune to ``.to(dtype)``."""

    def __init__(self, head_dim: int, theta: float, length: int) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self._build(length, torch.get_default_device())

    @torch.compiler.disable
    def _build(self, length: int, device: torch.device) -> None:
        # Always computed on the CPU: every device then rotates by the very same numbers.
        with torch.device("cpu"):
            exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
            angle = torch.outer(torch.arange(length, dtype=torch.float32), 1 / self.theta**exponent)
            cos, sin = angle.cos(), angle.sin()
        self.cos, self.sin = cos.to(device), sin.to(device)

    def _apply(self, fn, recurse=True):
        # Plain attributes, not buffers, so that a cast leaves them alone; only the device follows.
        probe = torch.empty(0, device="cpu" if self.cos.is_meta else self.cos.device)
        device = fn(probe).device
        if device != self.cos.device:
            self._build(self.cos.shape[0], device)
        return super()._apply(fn, recurse)

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for at least ``length`` positions on ``device``."""
        have = self.cos.shape[0]
        if length > have or self.cos.device != device:
            self._build(have if length <= have else 1 << (length - 1).bit_length(), device)
        return self.cos, self.sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused CPU kernel's bfloat16 backward is 7 times slower than plain matrix products.
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class _Step(NamedTuple):
    """What all layers of one forward share."""

    query_rope: tuple[Tensor, Tensor]
    key_rope: tuple[Tensor, Tensor]
    mask: Tensor | None  # [B, 1, 1, T_keys] bool
    replace: tuple[int, int] | Tensor | None  # where cached pairs are overwritten


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, config.width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, step: _Step
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        config, (B, T, _) = self.config, x.shape
        q, k, v = self._heads(self.q_proj(x)), self.k_proj(x), self.v_proj(x)
        if config.family == "llada":
            k, v = self._heads(k), self._heads(v)
        if past is not None:
            k, v = (_extend(p, n, step.replace) for p, n in zip(past, (k, v), strict=True))
        pair = (k, v)
        if config.family == "dream":
            k, v = self._heads(k), self._heads(v)
        q, k = _rotate(q, *step.query_rope), _rotate(k, *step.key_rope)
        # Attention here never depends on the query's position, so the query heads that share a
        # key head are laid end to end as more queries: GQA without repeating keys, any backend.
        q = q.reshape(B, config.kv_heads, -1, config.head_dim)
        out = _attend(q, k, v, step.mask)
        out = out.reshape(B, config.heads, T, config.head_dim).transpose(1, 2)
        return self.o_proj(out.reshape(B, T, config.width)), pair


def _extend(past: Tensor, new: Tensor, replace: tuple[int, int] | Tensor | None) -> Tensor:
    """Append ``new`` to ``past`` along time, or overwrite ``past`` in place at ``replace``."""
    time = past.dim() - 2
    if replace is None:
        return torch.cat((past, new.to(past.dtype)), dim=time)
    if isinstance(replace, tuple):
        past.narrow(time, replace[0], new.shape[time]).copy_(new)
        return past
    shape = [1] * past.dim()
    shape[0], shape[time] = replace.shape
    return past.scatter_(time, replace.view(shape).expand_as(new), new.to(past.dtype))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None, step: _Step
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, pair = self.attn(self.attn_norm(x), past, step)
        x = x + h
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h)), pair


class Transformer(nn.Module):
    """Masked-diffusion transformer: RMSNorm, RoPE, SwiGLU, bidirectional attention.

    Logits have ``config.embedding_size`` columns, as the published LLaDA class returns them.
    Build it with :func:`r2dllm_ext.models.load_model`, or from a config for a fresh one::

        model = Transformer(ModelConfig("llada", 64, width=32, layers=2, heads=4, mlp_width=64))
        model(torch.zeros(1, 8, dtype=torch.int64)).logits  # [1, 8, 64]
    """

    supports_logits_positions = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.embedding_size, config.width)
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = (
            None if config.tied_head else nn.Linear(config.width, config.embedding_size, bias=False)
        )
        self.rotary = Rotary(
            config.head_dim, config.rope_theta, min(config.max_length, _ROPE_LENGTH)
        )

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def mask_id(self) -> int | None:
        return self.config.mask_id

    @property
    def eos_id(self) -> int | None:
        return self.config.eos_id

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def lm_head_weight(self) -> Tensor:
        """Head matrix [embedding_size, width]; the embedding itself when the head is tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = 0.02) -> Transformer:
        """Draw every matrix from N(0, std), residual outputs scaled by 1 / sqrt(2 layers)."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = (2 * self.config.layers) ** -0.5 if name.endswith(_RESIDUAL) else 1.0
                weight.copy_(torch.randn(weight.shape, generator=generator) * (std * scale))
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def hidden_states(
        self,
        input_ids: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        replace_position: Tensor | tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Normed hidden states [B, T, width] in front of the head, and the (k, v) pairs."""
        step = self._step(input_ids, past_key_values, replace_position, attention_mask)
        x, pairs = self.embed(input_ids), []
        for i, block in enumerate(self.blocks):
            x, pair = block(x, None if past_key_values is None else past_key_values[i], step)
            pairs.append(pair)
        return self.norm(x), pairs

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]] | None = None,
        use_cache: bool = False,
        replace_position: Tensor | tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
        logits_positions: slice | tuple[int, int] | Tensor | None = None,
        dual_cache: bool | None = None,
    ) -> ModelOutput:
        """Logits for ``input_ids`` [B, T] int64.

        past_key_values: (k, v) per layer, keys before the rotary embedding; LLaDA
            [B, kv_heads, P, head_dim], Dream [B, P, kv_heads * head_dim].
        use_cache: also return the pairs, extended or overwritten by ``input_ids``.
        replace_position: ``None`` appends the ids after the past, which is left as it is.
            A bool mask [B, P] with exactly T true positions a row, or their ``(start, end)``,
            writes the ids' pairs there, in place (dual cache). The number of true positions is
            checked on the CPU only: reading it on CUDA would synchronise.
        attention_mask: [B, T_keys] bool or 0/1 over past and new keys; 0 is never attended to.
            A row of zeros alone is treated as unmasked, so it stays finite.
        logits_positions: slice, ``(start, end)``, or int64 tensor [n] or [B, n] of positions in
            ``input_ids``; the head runs, and logits are returned, for these only.
        dual_cache: accepted for Dream's calling convention; ``replace_position`` says it all.

        Returns ``ModelOutput(logits [B, n, embedding_size], past_key_values or None)``. Raises
        ``ValueError`` / ``TypeError`` for shapes and dtypes that do not fit together.

        Example::

            full = model(ids, use_cache=True)
            block = model(ids[:, 32:64], past_key_values=full.past_key_values, use_cache=True,
                          replace_position=(32, 64))
        """
        hidden, pairs = self.hidden_states(
            input_ids, past_key_values, replace_position, attention_mask
        )
        hidden = _take(hidden, logits_positions)
        return ModelOutput(F.linear(hidden, self.lm_head_weight), pairs if use_cache else None)

    def _step(
        self,
        ids: Tensor,
        past: list[tuple[Tensor, Tensor]] | None,
        replace: Tensor | tuple[int, int] | None,
        attention_mask: Tensor | None,
    ) -> _Step:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"Transformer: input_ids is {ids.dtype} {list(ids.shape)}, takes int64 [B, T]"
            )
        B, T = ids.shape
        if past is not None and len(past) != self.config.layers:
            raise ValueError(
                f"Transformer: past_key_values has {len(past)} layers, takes {self.config.layers}"
            )
        if past is None and replace is not None:
            raise ValueError("Transformer: replace_position given, needs past_key_values")
        P = 0 if past is None else past[0][0].shape[-2]
        if replace is None:
            keys, query = P + T, slice(P, P + T)
        else:
            replace = _replaced(replace, B, T, P)
            keys, query = P, slice(*replace) if isinstance(replace, tuple) else replace
        cos, sin = self.rotary(keys, ids.device)
        query_rope = (cos[query], sin[query])
        if isinstance(query, Tensor):
            query_rope = tuple(table.unsqueeze(1) for table in query_rope)
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != (B, keys):
                raise ValueError(
                    f"Transformer: attention_mask is {list(attention_mask.shape)}, takes "
                    f"[B, T_keys] = [{B}, {keys}]"
                )
            mask = attention_mask.bool()
            mask = (mask | ~mask.any(-1, keepdim=True))[:, None, None]
        return _Step(query_rope, (cos[:keys], sin[:keys]), mask, replace)


_RESIDUAL = ("o_proj.weight", "down_proj.weight")


def _replaced(
    replace: Tensor | tuple[int, int], B: int, T: int, P: int
) -> tuple[int, int] | Tensor:
    """``(start, end)``, or the replaced positions [B, T] found without a host read."""
    if isinstance(replace, tuple):
        start, end = replace
        if not (0 <= start and end <= P and end - start == T):
            raise ValueError(
                f"Transformer: replace_position is ({start}, {end}), takes {T} positions (the ids) "
                f"within the {P} of past_key_values"
            )
        return replace
    if replace.dtype != torch.bool or replace.shape != (B, P):
        raise ValueError(
            f"Transformer: replace_position is {replace.dtype} {list(replace.shape)}, takes bool "
            f"[B, T_past] = [{B}, {P}] or (start, end)"
        )
    if replace.device.type == "cpu" and not bool((replace.sum(-1) == T).all()):
        raise ValueError(
            f"Transformer: replace_position is true on {replace.sum(-1).tolist()} positions a row, "
            f"takes exactly {T} (the ids)"
        )
    return replace.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :T]


def _take(hidden: Tensor, positions: slice | tuple[int, int] | Tensor | None) -> Tensor:
    if positions is None:
        return hidden
    if isinstance(positions, slice):
        return hidden[:, positions]
    if isinstance(positions, tuple):
        return hidden[:, positions[0] : positions[1]]
    if positions.dim() == 1:
        return hidden.index_select(1, positions)
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


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
