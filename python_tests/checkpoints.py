# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of both published layouts, and a plain reimplementation of their math."""

import json
import math

import torch
from safetensors.torch import save_file

LLADA = {
    "model_type": "llada",
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": 50,
    "embedding_size": 56,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "mask_token_id": 49,
    "eos_token_id": 48,
    "weight_tying": False,
    "layer_norm_type": "rms",
    "block_group_size": 1,
    "alibi": False,
    "max_sequence_length": 64,
}
DREAM = {
    "model_type": "Dream",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "mask_token_id": 49,
    "eos_token_id": 48,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LINEAR = {"type": "linear", "factor": 2}
VARIANTS = {
    "llada": LLADA,
    "llada-gqa": LLADA | {"n_kv_heads": 2},
    "llada-tied": LLADA | {"weight_tying": True},
    "llada-bias": LLADA | {"include_qkv_bias": True},
    "llada-yarn": LLADA | {"rope_theta": None, "rope_parameters": YARN},
    "llada-linear": LLADA | {"rope_scaling": LINEAR},
    "dream": DREAM,
    "dream-tied": DREAM | {"tie_word_embeddings": True},
    "dream-yarn": DREAM | {"rope_theta": None, "rope_parameters": YARN},
    "dream-llama3": DREAM | {"rope_theta": 100.0, "rope_scaling": LLAMA3},
}


def random_weights(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Published keys and shapes, written down from the specification."""
    draw = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=draw) * 0.3).to(dtype)

    def vector(size, base):
        return (base + torch.randn(size, generator=draw) * 0.3).to(dtype)

    if "d_model" in config:
        d, mlp = config["d_model"], config["mlp_hidden_size"]
        kv = d // config["n_heads"] * config["n_kv_heads"]
        rows = config["embedding_size"]
        weights = {"model.transformer.wte.weight": matrix(rows, d)}
        weights["model.transformer.ln_f.weight"] = vector(d, 1)
        if not config["weight_tying"]:
            weights["model.transformer.ff_out.weight"] = matrix(rows, d)
        for n in range(config["n_layers"]):
            block = {"attn_norm": vector(d, 1), "ff_norm": vector(d, 1)}
            block |= {"q_proj": matrix(d, d), "k_proj": matrix(kv, d), "v_proj": matrix(kv, d)}
            block |= {"attn_out": matrix(d, d), "ff_out": matrix(d, mlp)}
            block |= {"ff_proj": matrix(mlp, d), "up_proj": matrix(mlp, d)}
            weights |= {f"model.transformer.blocks.{n}.{k}.weight": w for k, w in block.items()}
            if config.get("include_qkv_bias"):
                for name, size in (("q", d), ("k", kv), ("v", kv)):
                    weights[f"model.transformer.blocks.{n}.{name}_proj.bias"] = vector(size, 0)
        return weights
    d, mlp, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = {"model.embed_tokens.weight": matrix(rows, d), "model.norm.weight": vector(d, 1)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(rows, d)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        for name, size in (("q", d), ("k", kv), ("v", kv)):
            weights[f"{at}self_attn.{name}_proj.weight"] = matrix(size, d)
            weights[f"{at}self_attn.{name}_proj.bias"] = vector(size, 0)
        weights[f"{at}self_attn.o_proj.weight"] = matrix(d, d)
        weights[f"{at}mlp.gate_proj.weight"] = matrix(mlp, d)
        weights[f"{at}mlp.up_proj.weight"] = matrix(mlp, d)
        weights[f"{at}mlp.down_proj.weight"] = matrix(d, mlp)
        weights[f"{at}input_layernorm.weight"] = vector(d, 1)
        weights[f"{at}post_attention_layernorm.weight"] = vector(d, 1)
    return weights


def plain_rotation(config: dict, head_dim: int) -> tuple[float, list[float]]:
    """Factor of cosine and sine, and radians a position of each pair, in the papers' terms. The
    context of the training is 64 positions."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config["rope_theta"] or rope["rope_theta"]
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind is None:
        return 1.0, plain
    if kind == "linear":
        return 1.0, [f / factor for f in plain]
    if kind == "llama3":
        frequency = []
        for f in plain:
            length = 2 * math.pi / f
            smooth = (64 / length - 1) / (4 - 1)
            mixed = (1 - smooth) * f / factor + smooth * f
            frequency.append(f if length < 64 / 4 else f / factor if length > 64 / 1 else mixed)
        return 1.0, frequency
    first, last = (
        head_dim * math.log(64 / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)
    )
    first, last = max(math.floor(first), 0), math.ceil(last)
    ramp = [min(max((i - first) / (last - first), 0), 1) for i in range(head_dim // 2)]
    mixed = [r * f / factor + (1 - r) * f for r, f in zip(ramp, plain, strict=True)]
    return 0.1 * math.log(factor) + 1, mixed


def plain_logits(config: dict, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, rows] of one sequence [T] in float64: loops over heads, rotation by complex
    numbers, softmax spelled out, no cache."""
    w = {key: value.double() for key, value in weights.items()}
    if "d_model" in config:
        width, heads, kv_heads = config["d_model"], config["n_heads"], config["n_kv_heads"]
        layers, stem = config["n_layers"], "model.transformer.blocks.{}."
        outer = ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out")
        inner = "attn_norm q_proj k_proj v_proj attn_out ff_norm ff_proj up_proj ff_out".split()
    else:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
        stem, outer = "model.layers.{}.", ("model.embed_tokens", "model.norm", "lm_head")
        inner = (
            "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
            "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
        ).split()
    D, T = width // heads, len(ids)

    def norm(x, key):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * w[key]

    def linear(x, key):
        return x @ w[key + ".weight"].T + w.get(key + ".bias", 0)

    scale, frequency = plain_rotation(config, D)
    angle = torch.arange(T)[:, None] * torch.tensor(frequency).double()
    turn = torch.polar(torch.full_like(angle, scale), angle)

    def rotate(x):
        z = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * turn
        return torch.cat((z.real, z.imag), dim=1)

    x = w[outer[0] + ".weight"][ids]
    for n in range(layers):
        norm1, q_key, k_key, v_key, o_key, norm2, gate, up, down = (
            stem.format(n) + name for name in inner
        )
        h = norm(x, norm1 + ".weight")
        q, k, v = linear(h, q_key), linear(h, k_key), linear(h, v_key)
        mixed = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            mine, shared = slice(head * D, head * D + D), slice(group * D, group * D + D)
            scores = rotate(q[:, mine]) @ rotate(k[:, shared]).T / D**0.5
            share = scores.exp() / scores.exp().sum(-1, keepdim=True)
            mixed.append(share @ v[:, shared])
        x = x + linear(torch.cat(mixed, dim=1), o_key)
        h = norm(x, norm2 + ".weight")
        g = linear(h, gate)
        x = x + linear(g / (1 + (-g).exp()) * linear(h, up), down)
    x = norm(x, outer[1] + ".weight")
    return x @ w.get(outer[2] + ".weight", w[outer[0] + ".weight"]).T


def write(folder, config, weights, shards: int = 1):
    """A checkpoint folder as published: one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    where = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
