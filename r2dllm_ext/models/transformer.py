# SPDX-License-Identifier: Apache-2.0
"""Bidirectional masked-diffusion transformer for LLaDA and Dream checkpoints."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .rope import RopeScaling, plain_frequencies

_RESIDUAL = ("o_proj.weight", "down_proj.weight")  # what a layer adds to the stream
_ROPE_LENGTH = 4096  # positions tabulated up front; longer sequences grow the table once


class ModelOutput(NamedTuple):
    """`logits` [B, n, embedding_size]; `past_key_values`: (k, v) per layer, or `None`."""

    logits: Tensor
    past_key_values: list[tuple[Tensor, Tensor]] | None


class RMSNorm(nn.Module):
    """Root mean square norm in float32 (float64 of float64); the weight multiplies after the cast
    back."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class Rotary(nn.Module):
    """float32 cosine and sine tables [length, head_dim / 2], immune to `.to(dtype)`.

    They outlive the call that builds them, so the modes of that call (inference mode, fake tensors,
    a default device, a transform of torch.func) must leave no trace in them.
    """

    def __init__(
        self, head_dim: int, theta: float, length: int, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        fake = _makes_no_plain_tensors()  # then its device need not exist, nor will this be read
        self._build(length, torch.device("cpu") if fake else torch.get_default_device())

    def _tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        # Always computed on the CPU: every device then rotates by the very same numbers.
        if self.scaling is None:
            scale, frequencies = 1.0, plain_frequencies(self.theta, self.head_dim)
        else:
            scale = self.scaling.attention_factor
            frequencies = self.scaling.frequencies(self.theta, self.head_dim)
        positions = torch.arange(length, dtype=torch.float32, device="cpu")
        angle = torch.outer(positions, frequencies)
        return (angle.cos() * scale).to(device), (angle.sin() * scale).to(device)

    @torch._disable_dynamo  # imports dynamo with the first model, torch.compiler.disable with us
    def _build(self, length: int, device: torch.device) -> None:
        # A thread of its own has none of the caller's modes: all of torch's are local to a thread.
        # So is the current stream, in whose order the caller will read, and free, the tables.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def build() -> tuple[Tensor, Tensor]:
            with torch.cuda.stream(stream):
                return self._tables(length, device)

        with ThreadPoolExecutor(max_workers=1) as thread:
            self.cos, self.sin = thread.submit(build).result()

    def _apply(self, fn, recurse=True):
        # Plain attributes, not buffers, so that a cast leaves them alone; only the device follows.
        probe = fn(torch.empty(0, device="cpu" if self.cos.is_meta else self.cos.device))
        if probe.device != self.cos.device and type(probe) is Tensor:
            self._build(self.cos.shape[0], probe.device)
        return super()._apply(fn, recurse)

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for at least `length` positions on `device`."""
        if not torch.compiler.is_compiling() and _makes_no_plain_tensors():
            return self._tables(length, device)  # of the caller's kind, and not kept
        have = self.cos.shape[0]
        if length > have or self.cos.device != device:
            self._build(have if length <= have else 1 << (length - 1).bit_length(), device)
        return self.cos, self.sin


def _makes_no_plain_tensors() -> bool:
    """Under a mode (of fake tensors, say) whose tensors can't be mixed with those made outside."""
    return type(torch.empty(0, device="cpu")) is not Tensor


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In the precision of the tables, or in that of `x` where it is higher."""
    a, b = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
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
    """Appends `new` to `past` along time, or overwrites `past` in place at `replace`."""
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

    Logits have `config.embedding_size` columns, as the published LLaDA class returns them.
    `load_model` builds it from a checkpoint; a fresh one takes a config and `init_weights`.

    >>> config = ModelConfig("llada", 64, width=32, layers=2, heads=4, mlp_width=64)
    >>> model = Transformer(config).init_weights(seed=0)
    >>> model(torch.zeros(1, 8, dtype=torch.int64)).logits.shape
    torch.Size([1, 8, 64])
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
            config.head_dim,
            config.rope_theta,
            min(config.max_length, _ROPE_LENGTH),
            config.rope_scaling,
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
    def eos_id(self) -> int | tuple[int, ...] | None:
        """The id that ends an answer; a tuple where the checkpoint names several."""
        return self.config.eos_id

    @property
    def context_length(self) -> int:
        """Positions that the model is meant for: prompt and answer together."""
        return self.config.context_length

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, under the name that transformers gives it."""
        return self.embed

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def lm_head_weight(self) -> Tensor:
        """Head matrix [embedding_size, width]; the embedding itself when the head is tied."""
        return self.embed.weight if self.head is None else self.head.weight

    @torch.no_grad()
    def init_weights(self, seed: int = 0, std: float = 0.02) -> Transformer:
        """Draws every matrix from N(0, std), residual outputs scaled by 1 / sqrt(2 layers)."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                scale = (2 * self.config.layers) ** -0.5 if name.endswith(_RESIDUAL) else 1.0
                drawn = torch.randn(
                    weight.shape, generator=generator, dtype=torch.float32, device="cpu"
                )
                weight.copy_(drawn * (std * scale))
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
        """Logits for `input_ids` [B, T] int64.

        Args:
            past_key_values: (k, v) per layer, keys before the rotary embedding; LLaDA
                [B, kv_heads, P, head_dim], Dream [B, P, kv_heads * head_dim].
            use_cache: also return the pairs, extended or overwritten by `input_ids`.
            replace_position: None appends the ids after the past, which is left as it is. A bool
                mask [B, P] with exactly T true positions a row, or their (start, end), writes the
                ids' pairs there, in place (dual cache). The number of true positions is checked
                on the CPU only: reading it on CUDA would synchronise.
            attention_mask: [B, T_keys] bool or 0/1 over past and new keys; 0 is never attended
                to. A row of zeros alone is treated as unmasked, so that it stays finite.
            logits_positions: slice, (start, end), or int64 tensor [n] or [B, n] of positions in
                `input_ids`; the head runs, and logits are returned, for these only.
            dual_cache: part of Dream's calling convention; `replace_position` says it all.

        Returns `ModelOutput`: logits [B, n, embedding_size] in the dtype of the weights, and the
        pairs or None. Shapes and dtypes that do not fit together raise `ValueError`.

        >>> config = ModelConfig("dream", 64, width=32, layers=2, heads=4, mlp_width=64)
        >>> model, ids = Transformer(config), torch.zeros(1, 96, dtype=torch.int64)
        >>> past = model(ids, use_cache=True).past_key_values
        >>> block = model(ids[:, 32:64], past_key_values=past, replace_position=(32, 64))
        >>> block.logits.shape
        torch.Size([1, 32, 64])
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
                f"Transformer: input_ids takes int64 [B, T], got {ids.dtype} {list(ids.shape)}"
            )
        B, T = ids.shape
        if past is not None and len(past) != self.config.layers:
            raise ValueError(
                f"Transformer: past_key_values takes {self.config.layers} layers, got {len(past)}"
            )
        if past is None and replace is not None:
            raise ValueError(
                "Transformer: replace_position takes past_key_values beside it, got none"
            )
        P = 0 if past is None else past[0][0].shape[-2]
        if replace is None:
            keys = P + T
            query: tuple[int, int] | Tensor = (P, keys)
        else:
            keys, query = P, _replaced(replace, B, T, P)
            replace = query
        cos, sin = (table[:keys] for table in self.rotary(keys, ids.device))
        if self.config.family == "dream":  # the published class rotates in its own precision
            cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        if isinstance(query, tuple):
            query_rope = cos[slice(*query)], sin[slice(*query)]
        else:
            query_rope = cos[query].unsqueeze(1), sin[query].unsqueeze(1)
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != (B, keys):
                raise ValueError(
                    f"Transformer: attention_mask takes [B, T_keys] = [{B}, {keys}], got "
                    f"{list(attention_mask.shape)}"
                )
            mask = attention_mask.bool()
            mask = (mask | ~mask.any(-1, keepdim=True))[:, None, None]
        return _Step(query_rope, (cos, sin), mask, replace)


def _replaced(
    replace: Tensor | tuple[int, int], B: int, T: int, P: int
) -> tuple[int, int] | Tensor:
    """`(start, end)`, or the replaced positions [B, T] found without a host read."""
    if isinstance(replace, tuple):
        start, end = replace
        if not (0 <= start and end <= P and end - start == T):
            raise ValueError(
                f"Transformer: replace_position takes {T} positions (the ids) within the {P} of "
                f"past_key_values, got ({start}, {end})"
            )
        return replace
    if replace.dtype != torch.bool or replace.shape != (B, P):
        raise ValueError(
            f"Transformer: replace_position takes bool [B, T_past] = [{B}, {P}] or (start, end), "
            f"got {replace.dtype} {list(replace.shape)}"
        )
    readable = replace.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not bool((replace.sum(-1) == T).all()):
        raise ValueError(
            f"Transformer: replace_position takes exactly {T} true positions a row (the ids), got "
            f"{replace.sum(-1).tolist()}"
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
